// The matrix unit of x86 CPUs (AMX): eight tile registers of 16 rows of 64 bytes, and products of tiles of bfloat16
// with sums in float32. Source: Intel, Architecture Instruction Set Extensions Programming Reference, chapter 3.
//
// Included by CPU files only, each built once per instruction set: the unnamed namespace keeps every build's copy to
// itself. The compiler knows nothing of these registers; it never uses them by itself, so that code built with this
// header runs on CPUs without the unit as long as nobody calls it.
//
// UNLEARN_EMULATED_MATRIX_UNIT makes ordinary loops of the instructions, also of those of kernels/fisher_dots_cpu.h,
// for tests on any CPU with AVX-512: sanitizers see what is read and written, and registers hold NaN until something is
// loaded.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/compiler.h"

// The baseline has no vector registers to feed it from.
#if defined(__AVX512F__) && defined(__x86_64__) && defined(__linux__) && !defined(UNLEARN_NO_MATRIX_UNIT)
#define UNLEARN_MATRIX_UNIT
#endif

#if defined(UNLEARN_MATRIX_UNIT)
namespace unlearn_ext {
namespace {

constexpr int kTileSide = 16;                             // rows, and columns of sums
constexpr int kTileDepth = 32;                            // products added up by one instruction
constexpr int64_t kTileScalars = kTileSide * kTileDepth;  // bfloat16 of a tile of factors
constexpr int64_t kTileBytes = kTileScalars * 2;          // of any full tile

#if defined(UNLEARN_EMULATED_MATRIX_UNIT)

struct TileRegister {
  alignas(64) uint32_t row[kTileSide][kTileSide];
};
inline thread_local TileRegister tile_registers[8];

class MatrixUnit {
 public:
  MatrixUnit() { memset(tile_registers, 0xff, sizeof(tile_registers)); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
};

template <int kTile>
void load_tile(const void* from, int64_t bytes_between_rows) {
  for (int r = 0; r < kTileSide; ++r)
    memcpy(tile_registers[kTile].row[r], static_cast<const char*>(from) + r * bytes_between_rows, 64);
}
template <int kTile>
void store_tile(void* to, int64_t bytes_between_rows) {
  for (int r = 0; r < kTileSide; ++r)
    memcpy(static_cast<char*>(to) + r * bytes_between_rows, tile_registers[kTile].row[r], 64);
}
template <int kTile>
void clear_tile() {
  memset(&tile_registers[kTile], 0, sizeof(TileRegister));
}
inline float without_subnormal(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return std::fpclassify(value) == FP_SUBNORMAL ? 0.f : value;
}
template <int kSums, int kA, int kB>
void multiply_tiles() {
  const auto &a = tile_registers[kA].row, &b = tile_registers[kB].row;
  for (int m = 0; m < kTileSide; ++m)
    for (int n = 0; n < kTileSide; ++n) {
      float even = 0, odd = 0;
      for (int k = 0; k < kTileSide; ++k) {
        even = std::fma(without_subnormal(a[m][k] << 16), without_subnormal(b[k][n] << 16), even);
        odd = std::fma(without_subnormal(a[m][k] & 0xffff0000u), without_subnormal(b[k][n] & 0xffff0000u), odd);
      }
      uint32_t& bits = tile_registers[kSums].row[m][n];
      const float sum = without_subnormal(bits) + (even + odd);
      memcpy(&bits, &sum, sizeof(sum));
    }
}

#else

// Full tiles in all registers for the lifetime of this, and afterwards what was configured before: libraries keep a
// configuration from one call to the next.
class MatrixUnit {
 public:
  MatrixUnit() {
    asm volatile("sttilecfg %0" : "=m"(before_)::"memory");
    Configuration full{};
    full.palette = 1;
    for (int tile = 0; tile < 8; ++tile) full.rows[tile] = kTileSide, full.bytes_per_row[tile] = 64;
    asm volatile("ldtilecfg %0" ::"m"(full) : "memory");
  }
  ~MatrixUnit() {
    if (before_.palette == 0)
      asm volatile("tilerelease" ::: "memory");
    else
      asm volatile("ldtilecfg %0" ::"m"(before_) : "memory");
  }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;

 private:
  struct alignas(64) Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Configuration) == 64);

  Configuration before_;
};

// The clobbers keep the compiler from moving stores to the memory read behind the load.
template <int kTile>
UNLEARN_ALWAYS_INLINE inline void load_tile(const void* from, int64_t bytes_between_rows) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes_between_rows), "i"(kTile) : "memory");
}
template <int kTile>
UNLEARN_ALWAYS_INLINE inline void store_tile(void* to, int64_t bytes_between_rows) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes_between_rows), "i"(kTile) : "memory");
}
template <int kTile>
UNLEARN_ALWAYS_INLINE inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
// sums[m][n] += sum over k of a[m][2k] b[k][2n] + a[m][2k + 1] b[k][2n + 1]. Subnormal factors and sums count as 0.
template <int kSums, int kA, int kB>
UNLEARN_ALWAYS_INLINE inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kA), "i"(kB));
}

#endif

}  // namespace
}  // namespace unlearn_ext
#endif
