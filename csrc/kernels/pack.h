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

}  // namespace unlearn_ext
