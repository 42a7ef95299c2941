// Rows of a matrix that is never stored: im2col patches of a batch, or plain rows of a strided tensor.
#pragma once

#include <optional>

#include "core/dtype.h"

namespace unlearn_ext {

inline constexpr int kMaxSpatial = 3;

// Row (n, p) of group g holds, in the column order of weight.view(out_channels, -1), the inputs that output position
// p of sample n sees. Unused leading spatial axes have extent 1. A tensor of plain rows is a batch of 1x1x1 images.
struct Patches {
  DType dtype;
  int64_t samples, channels;  // channels of one group
  int64_t in[kMaxSpatial], out[kMaxSpatial], kernel[kMaxSpatial];
  int64_t stride[kMaxSpatial], padding[kMaxSpatial], dilation[kMaxSpatial];  // padding before
  int64_t sample_stride, channel_stride, space_stride[kMaxSpatial];          // of the tensor, in elements
  const void* data;                                                          // of the first group

  UNLEARN_HD int64_t positions() const { return out[0] * out[1] * out[2]; }
  UNLEARN_HD int64_t rows() const { return samples * positions(); }
  UNLEARN_HD int64_t window() const { return kernel[0] * kernel[1] * kernel[2]; }
  UNLEARN_HD int64_t columns() const { return channels * window(); }

  // A column is (channel, tap along every axis), a row (sample, output position along every axis), the last fastest.
  UNLEARN_HD int64_t channel_of(int64_t column) const { return column / window(); }
  UNLEARN_HD int64_t sample_of(int64_t row) const { return row / positions(); }
  UNLEARN_HD int64_t tap(int axis, int64_t column) const { return digit(kernel, axis, column); }
  UNLEARN_HD int64_t position(int axis, int64_t row) const { return digit(out, axis, row); }

  // How far apart neighbouring rows are where that is the same for all and a row is the channels of one position: so
  // are plain rows, and images of 1x1 convolutions whose positions lie one after the other, sample after sample.
  std::optional<int64_t> row_stride() const {
    std::optional<int64_t> apart;
    int64_t faster = 1;
    const auto fits = [&](int64_t extent, int64_t between) {
      if (extent == 1) return true;
      const bool even = !apart || between == *apart * faster;
      if (!apart) apart = between;
      faster *= extent;
      return even;
    };
    for (int axis = kMaxSpatial - 1; axis >= 0; --axis)
      if (kernel[axis] != 1 || stride[axis] != 1 || out[axis] != in[axis] || !fits(in[axis], space_stride[axis]))
        return std::nullopt;
    if (!fits(samples, sample_stride)) return std::nullopt;
    return apart.value_or(0);
  }

  // Where along an axis output position `at` looks through tap `tap`; outside [0, in) is padding.
  UNLEARN_HD int64_t source(int axis, int64_t at, int64_t tap) const {
    return at * stride[axis] - padding[axis] + tap * dilation[axis];
  }

 private:
  UNLEARN_HD static int64_t digit(const int64_t (&extent)[kMaxSpatial], int axis, int64_t index) {
    for (int faster = kMaxSpatial - 1; faster > axis; --faster) index /= extent[faster];
    return index % extent[axis];
  }
};

// A strided tensor of one value per (sample, position, channel). Unused leading position axes have extent 1.
struct Positions {
  DType dtype;
  int64_t samples, channels, extent[kMaxSpatial];
  int64_t sample_stride, channel_stride, space_stride[kMaxSpatial];  // in elements
  const void* data;

  UNLEARN_HD int64_t positions() const { return extent[0] * extent[1] * extent[2]; }
};

}  // namespace unlearn_ext
