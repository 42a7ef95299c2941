// Counts what the executed kernels do to memory: bytes, 32-byte sectors, passes, shared-memory wavefronts.
//
// Kernels are compiled with the compiler's instrumentation for ThreadSanitizer and linked with callbacks of our own
// (traffic_counts.cpp) instead of its library, so that every load and store of a kernel is seen, with its size, as the
// source says it. The k-th access of a warp's lanes at one place of the code, since the warp last synchronised, is one
// warp instruction. Arrays come from memory of our own; other addresses (stacks, kernel parameters) are not counted.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace simt::traffic {

constexpr unsigned kSector = 32, kBanks = 32;

struct Count {
  uint64_t instructions = 0;  // of warps, each of at most 16 bytes per lane
  uint64_t asked = 0;         // bytes, of all lanes
  uint64_t useful = 0;        // different bytes per warp instruction
  uint64_t sectors = 0;       // per warp instruction
  uint64_t distinct = 0;      // sectors per launch

  void operator+=(const Count& other);
};

struct OfArray {
  Count loads, stores;  // an atomic is both
};

struct Shared {
  uint64_t wavefronts = 0;  // a cycle of all banks
  uint64_t least = 0;       // without bank conflicts
};

// Memory for an array of a case, `offset` bytes behind an aligned address. All are taken back by forget().
void* array(const std::string& name, uint64_t bytes, uint64_t offset);
void forget();

// Counts since the last call of forget().
const std::map<std::string, OfArray>& arrays();
const Shared& shared();

// What the engine and the emulated instructions report.
enum class Access { load, store, atomic };
void touch(const void* address, uint64_t bytes, Access access);  // by the current thread
void shared_array(const void* p, uint64_t bytes);
void warp_synchronised(unsigned warp);
void end_of_block();
void end_of_launch();

// While one lives, the instrumentation counts nothing.
struct Uncounted {
  Uncounted();
  ~Uncounted();
};

}  // namespace simt::traffic
