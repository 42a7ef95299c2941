// Panels (see gemm_cpu.h) of what a layer saw and of the gradients of what it gave, for a stretch of positions of some
// samples. Included by kernel files only: see gemm_cpu.h on the unnamed namespace.
#pragma once

#include <algorithm>
#include <vector>

#include "core/gemm_cpu.h"
#include "core/patches.h"

namespace unlearn_ext {
namespace {

// The depth of a panel: output positions [x, x + width) of `lines` lines of `samples` samples, in this order. A line is
// a run along the last axis; lines are numbered through the other two.
struct Stretch {
  int64_t sample, samples, line, lines, x, width;

  int64_t depth() const { return samples * lines * width; }

  // f(sample within the stretch, line) in the order of the depth.
  template <class F>
  void for_each_line(const F& f) const {
    for (int64_t s = 0; s < samples; ++s)
      for (int64_t l = line; l < line + lines; ++l) f(s, l);
  }
};

// to[i * to_step + j] = from[i * step + j * channel_step] for `rows` rows of `columns` values, in the compute type.
template <int kColumns, class T>
void copy_rows(const T* from, int64_t step, int64_t rows, acc_t<T>* to, int64_t to_step) {
  for (int64_t i = 0; i < rows; ++i, from += step, to += to_step)
    for (int j = 0; j < kColumns; ++j) to[j] = acc_t<T>(from[j]);
}
template <class T>
void copy_rows(const T* from, int64_t step, int64_t channel_step, int64_t rows, int64_t columns, acc_t<T>* to,
               int64_t to_step) {
  if (channel_step == 1) {
    if (columns == kTileCols<acc_t<T>>) return copy_rows<kTileCols<acc_t<T>>>(from, step, rows, to, to_step);
    if (columns == kTileRows) return copy_rows<kTileRows>(from, step, rows, to, to_step);
    if (columns == kLanes<acc_t<T>>) return copy_rows<kLanes<acc_t<T>>>(from, step, rows, to, to_step);
  }
  for (int64_t i = 0; i < rows; ++i, from += step, to += to_step)
    for (int64_t j = 0; j < columns; ++j) to[j] = acc_t<T>(from[j * channel_step]);
}

template <class A>
struct Square {
  VectorRegister<A> row[kLanes<A>];
};

// Square of kLanes x kLanes values, transposed in registers: log2(kLanes) rounds that exchange blocks of halving size.
template <class A, int kBlock = kLanes<A> / 2>
UNLEARN_ALWAYS_INLINE inline void transpose(Square<A>& square) {
  if constexpr (kBlock > 0) {
    constexpr auto kLow = [](int lane) { return lane & kBlock ? kLanes<A> + lane - kBlock : lane; };
    constexpr auto kHigh = [](int lane) { return lane & kBlock ? kLanes<A> + lane : lane + kBlock; };
    UNLEARN_UNROLL
    for (int i = 0; i < kLanes<A>; ++i) {
      if (i & kBlock) continue;
      const VectorRegister<A> a = square.row[i], b = square.row[i | kBlock];
      square.row[i] = shuffle<A, kVectorBytes>(a, b, kLow);
      square.row[i | kBlock] = shuffle<A, kVectorBytes>(a, b, kHigh);
    }
    transpose<A, kBlock / 2>(square);
  }
}

// The same as copy_rows for values that lie next to each other along the rows (step 1), not along the columns.
template <class T>
void transpose_rows(const T* from, int64_t channel_step, int64_t rows, int64_t columns, acc_t<T>* to, int64_t to_step) {
  using A = acc_t<T>;
  constexpr int kSide = kLanes<A>;
  for (int64_t j = 0; j < columns; j += kSide) {
    const int64_t wide = std::min<int64_t>(kSide, columns - j);
    int64_t i = 0;
    for (; i + kSide <= rows; i += kSide) {
      Square<A> square;
      for (int64_t c = 0; c < kSide; ++c) {
        const T* source = from + (j + std::min(c, wide - 1)) * channel_step + i;
        A line[kSide];
        for (int k = 0; k < kSide; ++k) line[k] = A(source[k]);
        memcpy(&square.row[c], line, sizeof line);
      }
      transpose(square);
      A* out = to + i * to_step + j;
      if (wide == kSide)
        for (int k = 0; k < kSide; ++k) memcpy(out + k * to_step, &square.row[k], sizeof square.row[k]);
      else
        for (int k = 0; k < kSide; ++k)
          memcpy(out + k * to_step, &square.row[k], static_cast<size_t>(wide) * sizeof(A));
    }
    copy_rows(from + j * channel_step + i, 1, channel_step, rows - i, wide, to + i * to_step + j, to_step);
  }
}

// Channels [first, first + columns) of a tensor as one panel: to[k][0 .. width), zero past the last column.
template <class T>
void pack_positions(const Positions& p, int64_t first, int64_t columns, const Stretch& at, int width, acc_t<T>* to) {
  const T* data = static_cast<const T*>(p.data) + first * p.channel_stride;
  const int64_t step = p.space_stride[2];
  at.for_each_line([&](int64_t s, int64_t line) {
    const T* from = data + (at.sample + s) * p.sample_stride + line / p.extent[1] * p.space_stride[0] +
                    line % p.extent[1] * p.space_stride[1] + at.x * step;
    if (step == 1 && p.channel_stride != 1)
      transpose_rows(from, p.channel_stride, at.width, columns, to, width);
    else
      copy_rows(from, step, p.channel_stride, at.width, columns, to, width);
    for (int64_t k = 0; columns < width && k < at.width; ++k)
      for (int64_t j = columns; j < width; ++j) to[k * width + j] = 0;
    to += at.width * width;
  });
}

// The im2col columns of channels [first, first + channels) as panels of kTileCols.
//
// Columns are taken in an order that lets a position's values be copied in runs: (tap, channel) where channels lie next
// to each other, (channel, tap) where there are few channels and positions do. Otherwise the lines that a stretch looks
// at are first transposed into memory of the caller's.
template <class T>
class ImagePanels {
 public:
  using A = acc_t<T>;

  ImagePanels(const Patches& patches, const T* data, int64_t first, int64_t channels)
      : p_(patches), data_(data + first * patches.channel_stride), channels_(channels) {
    const bool positions_adjacent = p_.space_stride[2] * p_.dilation[2] == 1 || p_.kernel[2] == 1;
    order_ = channels == 1 || p_.channel_stride == 1          ? Order::channels_fastest
             : channels < kLanes<A> / 2 && positions_adjacent ? Order::taps_fastest
                                                              : Order::gathered;
    if (channels == 1 && p_.kernel[2] > 1 && positions_adjacent) order_ = Order::taps_fastest;
  }

  int64_t columns() const { return channels_ * p_.window(); }

  // Where column q of this order is among the columns (channel, tap) of these channels.
  int64_t natural(int64_t q) const {
    return order_ == Order::taps_fastest ? q : q % channels_ * p_.window() + q / channels_;
  }

  // Whether natural() changes nothing.
  bool is_natural() const { return order_ == Order::taps_fastest || p_.window() == 1 || channels_ == 1; }

  // Whether a column is a channel, seen where it is.
  bool is_plain() const {
    for (int axis = 0; axis < kMaxSpatial; ++axis)
      if (p_.kernel[axis] != 1 || p_.stride[axis] != 1 || p_.padding[axis] != 0 || p_.in[axis] != p_.out[axis])
        return false;
    return true;
  }
  // These channels of a plain image.
  Positions plain() const {
    return {p_.dtype,
            p_.samples,
            channels_,
            {p_.out[0], p_.out[1], p_.out[2]},
            p_.sample_stride,
            p_.channel_stride,
            {p_.space_stride[0], p_.space_stride[1], p_.space_stride[2]},
            data_};
  }

  // Elements that load() needs for one sample of a stretch.
  static int64_t scratch(const Patches& p, int64_t channels, int64_t lines, int64_t width) {
    const int64_t looked_at = std::min(p.in[0], p.out[0] * p.kernel[0]) * std::min(p.in[1], p.out[1] * p.kernel[1]);
    return std::min(looked_at, lines * p.kernel[0] * p.kernel[1]) * length(p, width) * channels;
  }

  // To be called before pack() whenever the stretch changes.
  void load(const Stretch& at, A* scratch) {
    if (order_ != Order::gathered) return;
    scratch_ = scratch;
    low_ = std::max<int64_t>(0, p_.source(2, at.x, 0));
    length_ = std::max<int64_t>(0, std::min(p_.in[2], low_ + length(p_, at.width)) - low_);
    const auto lines = static_cast<size_t>(at.samples * p_.in[0] * p_.in[1]);
    // Not by assign(): Clang makes a weak function of it, one name for every instruction set.
    if (slots_.size() != lines) slots_ = std::vector<int64_t>(lines);
    std::fill(slots_.begin(), slots_.end(), int64_t{-1});
    int64_t used = 0;
    at.for_each_line([&](int64_t s, int64_t line) {
      for (int64_t kz = 0; kz < p_.kernel[0]; ++kz)
        for (int64_t ky = 0; ky < p_.kernel[1]; ++ky) {
          const int64_t z = p_.source(0, line / p_.out[1], kz), y = p_.source(1, line % p_.out[1], ky);
          if (z < 0 || z >= p_.in[0] || y < 0 || y >= p_.in[1]) continue;
          int64_t& slot = slots_[static_cast<size_t>((s * p_.in[0] + z) * p_.in[1] + y)];
          if (slot >= 0) continue;
          slot = used++ * length_ * channels_;
          const T* from = data_ + (at.sample + s) * p_.sample_stride + z * p_.space_stride[0] + y * p_.space_stride[1] +
                          low_ * p_.space_stride[2];
          if (p_.space_stride[2] == 1)
            transpose_rows(from, p_.channel_stride, length_, channels_, scratch + slot, channels_);
          else
            copy_rows(from, p_.space_stride[2], p_.channel_stride, length_, channels_, scratch + slot, channels_);
        }
    });
  }

  void pack(const Stretch& at, int64_t panel, A* to) const {
    constexpr int64_t kWidth = kTileCols<A>;
    const int64_t begin = panel * kWidth, end = std::min(columns(), begin + kWidth);
    const int64_t longest = order_ == Order::taps_fastest ? p_.kernel[2] : channels_;
    for (int64_t q = begin; q < end;) {
      const int64_t run = std::min(longest - q % longest, end - q);
      if (order_ == Order::taps_fastest)
        pack_taps(at, q, run, to + (q - begin));
      else
        pack_channels(at, q, run, to + (q - begin));
      q += run;
    }
    for (int64_t k = 0; end - begin < kWidth && k < at.depth(); ++k)
      for (int64_t j = end - begin; j < kWidth; ++j) to[k * kWidth + j] = 0;
  }

 private:
  enum class Order { channels_fastest, taps_fastest, gathered };

  // Inputs that `width` output positions of a line look at, at most.
  static int64_t length(const Patches& p, int64_t width) {
    return std::min(p.in[2], (width - 1) * p.stride[2] + (p.kernel[2] - 1) * p.dilation[2] + 1);
  }

  // f(samples's number, first position of the input line or null where it is padding, rest of the depth) per line.
  template <class F>
  void for_each_source(const Stretch& at, int64_t kz, int64_t ky, const F& f) const {
    at.for_each_line([&](int64_t s, int64_t line) {
      const int64_t z = p_.source(0, line / p_.out[1], kz), y = p_.source(1, line % p_.out[1], ky);
      const bool inside = z >= 0 && z < p_.in[0] && y >= 0 && y < p_.in[1];
      f(s, inside ? z : -1, y);
    });
  }

  // Of the positions of a line, [low, high) look at the image through `taps` taps from kx on, at all of them at once.
  void inside(const Stretch& at, int64_t kx, int64_t taps, int64_t& low, int64_t& high) const {
    const int64_t first = p_.source(2, at.x, kx), last = p_.source(2, at.x, kx + taps - 1), stride = p_.stride[2];
    low = first >= 0 ? 0 : std::min(at.width, (-first + stride - 1) / stride);
    high = last >= p_.in[2] ? 0 : std::min(at.width, (p_.in[2] - 1 - last) / stride + 1);
    high = std::max(low, high);
  }

  // A run of channels seen through one tap.
  void pack_channels(const Stretch& at, int64_t q, int64_t run, A* to) const {
    constexpr int64_t kWidth = kTileCols<A>;
    const int64_t tap = q / channels_, channel = q % channels_;
    const int64_t kx = tap % p_.kernel[2], ky = tap / p_.kernel[2] % p_.kernel[1],
                  kz = tap / p_.kernel[2] / p_.kernel[1];
    int64_t low, high;
    inside(at, kx, 1, low, high);
    for_each_source(at, kz, ky, [&](int64_t s, int64_t z, int64_t y) {
      const int64_t from = z < 0 ? at.width : low, until = z < 0 ? at.width : high;
      clear(to, 0, from, run);
      if (from < until) {
        const int64_t x = p_.source(2, at.x + from, kx);
        if (order_ == Order::gathered)
          copy_rows(scratch_ + slots_[static_cast<size_t>((s * p_.in[0] + z) * p_.in[1] + y)] + (x - low_) * channels_ +
                        channel,
                    p_.stride[2] * channels_, 1, until - from, run, to + from * kWidth, kWidth);
        else
          copy_rows(line(at.sample + s, z, y) + x * p_.space_stride[2] + channel * p_.channel_stride,
                    p_.stride[2] * p_.space_stride[2], p_.channel_stride, until - from, run, to + from * kWidth,
                    kWidth);
      }
      clear(to, until, at.width, run);
      to += at.width * kWidth;
    });
  }

  // A run of taps along the last axis, of one channel.
  void pack_taps(const Stretch& at, int64_t q, int64_t run, A* to) const {
    constexpr int64_t kWidth = kTileCols<A>;
    const int64_t tap = q % p_.window(), channel = q / p_.window();
    const int64_t kx = tap % p_.kernel[2], ky = tap / p_.kernel[2] % p_.kernel[1],
                  kz = tap / p_.kernel[2] / p_.kernel[1];
    int64_t low, high;
    inside(at, kx, run, low, high);
    for_each_source(at, kz, ky, [&](int64_t s, int64_t z, int64_t y) {
      if (z < 0) {
        clear(to, 0, at.width, run);
      } else {
        const T* from = line(at.sample + s, z, y) + channel * p_.channel_stride;
        const auto edge = [&](int64_t begin, int64_t end) {
          for (int64_t k = begin; k < end; ++k)
            for (int64_t j = 0; j < run; ++j) {
              const int64_t x = p_.source(2, at.x + k, kx + j);
              to[k * kWidth + j] = x >= 0 && x < p_.in[2] ? A(from[x * p_.space_stride[2]]) : A(0);
            }
        };
        edge(0, low);
        if (low < high)
          copy_rows(from + p_.source(2, at.x + low, kx) * p_.space_stride[2], p_.stride[2] * p_.space_stride[2],
                    p_.dilation[2] * p_.space_stride[2], high - low, run, to + low * kWidth, kWidth);
        edge(high, at.width);
      }
      to += at.width * kWidth;
    });
  }

  const T* line(int64_t sample, int64_t z, int64_t y) const {
    return data_ + sample * p_.sample_stride + z * p_.space_stride[0] + y * p_.space_stride[1];
  }

  static void clear(A* to, int64_t begin, int64_t end, int64_t run) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t j = 0; j < run; ++j) to[k * kTileCols<A> + j] = 0;
  }

  const Patches& p_;
  const T* data_;
  int64_t channels_;
  Order order_;
  A* scratch_ = nullptr;
  int64_t low_ = 0, length_ = 0;  // the part of a line that was loaded
  std::vector<int64_t> slots_;    // where the lines of the stretch were loaded to, -1 if nowhere
};

}  // namespace
}  // namespace unlearn_ext
