// Bool masks and their packed form: one bit per scalar, little bit order, as numpy.packbits(bitorder="little").
#pragma once

#include <cstdint>

#include "core/backend.h"

namespace unlearn_ext {

// mask: [numel] bytes, non-zero is set; packed: [ceil(numel / 8)], bits past the end are cleared.
template <Backend B>
int pack_mask(const uint8_t* mask, uint8_t* packed, int64_t numel, const Exec& exec);

// mask: [numel] bytes, each 0 or 1.
template <Backend B>
int unpack_mask(const uint8_t* packed, uint8_t* mask, int64_t numel, const Exec& exec);

// Byte j of `flags` (each 0 or 1, byte 0 lowest) becomes bit j.
UNLEARN_HD uint32_t gather_flags(uint64_t flags) { return static_cast<uint32_t>(flags * 0x0102040810204080u >> 56); }

// Bit j of `bits` becomes byte j.
UNLEARN_HD uint64_t scatter_flags(uint32_t bits) {
  // A copy of the byte in every byte, of which byte j keeps bit j; adding 0x7f carries a kept bit into the top bit.
  const uint64_t kept = bits * 0x0101010101010101u & 0x8040201008040201u;
  return (kept + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
}

}  // namespace unlearn_ext
