// The matrix unit of x86 CPUs (AMX): eight tile registers of 16 rows of 64 bytes, and products of tiles of bfloat16
// with sums in float32. Source: Intel, Architecture Instruction Set Extensions Programming Reference, chapter 3.
//
// Included by CPU files only, each built once per instruction set: the unnamed namespace keeps every build's copy to
// itself. The compiler knows nothing of these registers; it never uses them by itself, so that code built with this
// header runs on CPUs without the unit as long as nobody calls it.
#pragma once

#include <cstdint>

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

}  // namespace
}  // namespace unlearn_ext
#endif
