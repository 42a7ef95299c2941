#include "kernels/pack.h"

#include "core/apply_cpu.h"

namespace unlearn_ext {

template <>
int pack_mask<kBackend>(const uint8_t* mask, uint8_t* packed, int64_t numel, const Exec& exec) {
  parallel_for(exec, (numel + 7) / 8, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      uint64_t flags = 0;
      memcpy(&flags, mask + 8 * i, static_cast<size_t>(std::min<int64_t>(8, numel - 8 * i)));
      // Any non-zero byte counts as set: fold it onto its lowest bit.
      flags |= flags >> 4 & 0x0f0f0f0f0f0f0f0fu;
      flags |= flags >> 2 & 0x0303030303030303u;
      flags |= flags >> 1 & 0x0101010101010101u;
      packed[i] = static_cast<uint8_t>(gather_flags(flags & 0x0101010101010101u));
    }
  });
  return 0;
}

template <>
int unpack_mask<kBackend>(const uint8_t* packed, uint8_t* mask, int64_t numel, const Exec& exec) {
  parallel_for(exec, (numel + 7) / 8, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t flags = scatter_flags(packed[i]);
      memcpy(mask + 8 * i, &flags, static_cast<size_t>(std::min<int64_t>(8, numel - 8 * i)));
    }
  });
  return 0;
}

}  // namespace unlearn_ext
