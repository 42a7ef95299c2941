// Bool masks and their packed form: one bit per scalar, little bit order, as numpy.packbits(bitorder="little").
#pragma once

#include "core/lists.h"

namespace unlearn_ext {

// slices: a mask, [numel] bytes, non-zero is set; its packed form, [ceil(numel / 8)] bytes, whose bits past the end are
// cleared.
template <Backend B>
int pack_masks(const Slice<2>* slices, int64_t count, const Exec& exec);

// The same slices the other way round: bytes of a mask become 0 or 1.
template <Backend B>
int unpack_masks(const Slice<2>* slices, int64_t count, const Exec& exec);

}  // namespace unlearn_ext
