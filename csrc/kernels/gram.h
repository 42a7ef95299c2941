// Gram matrices of layer inputs: gram += X^T X for the rows X of a strided tensor or of im2col patches. Products in
// the inputs' compute type (float, double for double inputs) over short runs of rows, totals in gram's own type.
#pragma once

#include "core/patches.h"

namespace unlearn_ext {

// CPU: the whole accumulation for `groups` groups, group_stride elements apart in the inputs.
// gram: [groups][d][d] of `gram_dtype` (f32 or f64), symmetric; its lower half is rewritten from the upper.
// partial: gram_partials(...) copies of gram's type and size, or null for none.
template <Backend B>
int gram_accumulate(const Patches& patches, int64_t groups, int64_t group_stride, DType gram_dtype, void* gram,
                    void* partial, const Exec& exec);

// Output tiles of the CPU kernel, and the runs of rows it shares among threads where tiles are few. Depends on the
// shape alone, so that results do not depend on the number of threads.
inline constexpr int64_t kGramTile = 288;
inline constexpr int64_t kGramDepth = 256;  // rows multiplied before the totals are added to

constexpr int64_t gram_partials(int64_t rows, int64_t columns, int64_t groups) {
  const int64_t across = (columns + kGramTile - 1) / kGramTile;
  const int64_t tiles = groups * across * (across + 1) / 2;
  const int64_t wanted = tiles == 0 ? 1 : (8 + tiles - 1) / tiles, runs = (rows + kGramDepth - 1) / kGramDepth;
  return wanted < runs ? wanted : runs > 0 ? runs : 1;
}

// CUDA, around the library's product: rows [first, first + n) as a dense [n][d] matrix of the compute type ...
template <Backend B>
int unfold_rows(const Patches& patches, int64_t first, int64_t n, void* rows, const Exec& exec);

// ... and gram[i][j] += block[i][j - column] for i < column + width, column <= j < column + width, with the mirrored
// element set alike. block: [column + width][width] of `dtype`.
template <Backend B>
int add_symmetric(DType dtype, const void* block, int64_t column, int64_t width, DType gram_dtype, void* gram,
                  int64_t d, const Exec& exec);

}  // namespace unlearn_ext
