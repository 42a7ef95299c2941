// Subspace projection of layer gradients, G viewed [rows, d], with an orthonormal basis U [d, k]:
//   out:  G <- G - (G U) U^T        onto:  G <- (G U) U^T
// On a GPU the library's products do this; on a CPU the kernel below also keeps results independent of the number of
// threads, which a threaded BLAS does not.
#pragma once

#include "core/dtype.h"

namespace unlearn_ext {

// A layer: `groups` gradients [rows, d], one after the other, each with its own basis.
struct Projection {
  void* grad;         // [groups][rows][d], dense
  const void* basis;  // [groups][d][k], strided
  int64_t groups, rows, d, k;
  int64_t basis_strides[3];  // elements between groups, rows, columns
};

// Gradients of `dtype`; bases of `basis_dtype`: `dtype`, or float for half-precision gradients.
template <Backend B>
int project(DType dtype, DType basis_dtype, const Projection* layers, int64_t count, bool onto, const Exec& exec);

}  // namespace unlearn_ext
