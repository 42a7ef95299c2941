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

// Products of shifted images (gram_shifts_cpu.h): of blocks of channels, for kernels of so many taps along an axis at
// most, with so many sums of a pair of channels (32 MiB of a block, in float64, for each thread); positions of the
// images that are packed at once, or a line.
inline constexpr int64_t kGramShiftBlock = 32, kGramShiftTaps = 8, kGramShiftSums = 4096, kGramChunk = 2048;

// Some samples, or some lines of one sample's image, at a time. A line is a run along the last axis.
struct GramChunks {
  int64_t samples, lines, width;  // of all images; of one
  int64_t samples_at_once, lines_at_once;
  int64_t reach = 0;  // how many lines a shift leads away

  UNLEARN_HD explicit GramChunks(const Patches& p) : samples(p.samples), lines(p.in[0] * p.in[1]), width(p.in[2]) {
    const int64_t image = lines * width;
    samples_at_once = image == 0 || image > kGramChunk ? 1 : kGramChunk / image;
    lines_at_once = image <= kGramChunk ? lines : width > kGramChunk ? 1 : kGramChunk / width;
    if (lines_at_once < lines) reach = reach_along(p, 0) * p.in[1] + reach_along(p, 1);
  }

  UNLEARN_HD int64_t per_image() const { return lines == 0 ? 0 : (lines + lines_at_once - 1) / lines_at_once; }
  UNLEARN_HD int64_t count() const { return (samples + samples_at_once - 1) / samples_at_once * per_image(); }
  UNLEARN_HD int64_t positions() const { return samples_at_once * lines_at_once * width; }
  UNLEARN_HD int64_t shifted_positions() const {
    const int64_t all = lines_at_once + 2 * reach;
    return samples_at_once * (all < lines ? all : lines) * width;
  }

 private:
  // Farther lies nothing, and the product might not fit.
  UNLEARN_HD static int64_t reach_along(const Patches& p, int axis) {
    const int64_t reach = (p.kernel[axis] - 1) * p.dilation[axis];
    return reach < p.in[axis] ? reach : p.in[axis];
  }
};

// Differences between taps, mirror images and none among them.
UNLEARN_HD int64_t gram_shifts(const Patches& p) {
  return (2 * p.kernel[0] - 1) * (2 * p.kernel[1] - 1) * (2 * p.kernel[2] - 1);
}

// Whether images shifted are multiplied, not patches: where that takes clearly fewer products, by the shape alone, and
// bounded memory.
UNLEARN_HD bool gram_by_shifts(const Patches& p) {
  int64_t parts = 1;  // no fewer than AxisParts makes, which counts a place once
  double places = 1, overlaps = 1;
  for (int axis = 0; axis < kMaxSpatial; ++axis) {
    if (p.stride[axis] != 1 || p.kernel[axis] > kGramShiftTaps) return false;
    int64_t valid = 0, cuts = 0;
    for (int64_t tap = 0; tap < p.kernel[axis]; ++tap) {
      const int64_t left = p.in[axis] - tap * p.dilation[axis], begin = p.source(axis, 0, tap);
      if (left > 0) valid += tap == 0 ? left : 2 * left;
      cuts += (0 < begin && begin < p.in[axis]) + (begin + p.out[axis] < p.in[axis]);
    }
    parts *= cuts + 1;
    places *= static_cast<double>(p.in[axis]), overlaps *= static_cast<double>(valid);
  }
  if (p.window() == 1) return false;
  const auto c = static_cast<double>(p.channels), d = static_cast<double>(p.columns());
  const auto wide = static_cast<double>((p.channels + kGramShiftBlock - 1) / kGramShiftBlock * kGramShiftBlock);
  const double n = static_cast<double>(p.samples), w = static_cast<double>(p.window());
  const double by_shifts = n * (overlaps + places) / 2 * c * wide + 64 * w * w * c * wide;
  const double by_patches = n * static_cast<double>(p.positions()) * d * d / 2;
  const GramChunks chunks(p);
  return by_shifts < 0.75 * by_patches && gram_shifts(p) * parts <= kGramShiftSums &&
         chunks.positions() + chunks.shifted_positions() <= 1 << 15;
}

// Blocks beside one another or themselves.
UNLEARN_HD int64_t pairs_of(int64_t extent, int64_t block) {
  const int64_t across = (extent + block - 1) / block;
  return across * (across + 1) / 2;
}

UNLEARN_HD int64_t gram_partials(const Patches& p, int64_t groups) {
  const bool shifted = gram_by_shifts(p);
  const int64_t tasks = groups * (shifted ? pairs_of(p.channels, kGramShiftBlock) : pairs_of(p.columns(), kGramTile));
  const int64_t runs = shifted ? GramChunks(p).count() : (p.rows() + kGramDepth - 1) / kGramDepth;
  const int64_t wanted = tasks == 0 ? 1 : (8 + tasks - 1) / tasks;
  return wanted < runs ? wanted : runs > 0 ? runs : 1;
}

// CUDA, around the library's product: rows [first, first + n) as a dense [n][d] matrix of the inputs' type ...
template <Backend B>
int unfold_rows(const Patches& patches, int64_t first, int64_t n, void* rows, const Exec& exec);

// ... and gram[i][j] += block[i][j - column] for i < column + width, column <= j < column + width, with the mirrored
// element set alike. block: [column + width][width] of `dtype`.
template <Backend B>
int add_symmetric(DType dtype, const void* block, int64_t column, int64_t width, DType gram_dtype, void* gram,
                  int64_t d, const Exec& exec);

}  // namespace unlearn_ext
