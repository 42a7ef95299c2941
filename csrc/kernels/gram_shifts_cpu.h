// Gram matrices of the inputs of convolutions of stride 1 on the CPU, from products of the image with itself.
//
// With x the image and q = p - padding + i * dilation the place that output position p sees through tap i,
//
//   gram[(c, i), (d, j)] = sum over p of x[c, q] x[d, q + (j - i) * dilation],   0 outside of the image,
//
// which depends on i and j by their difference, the shift, but for the range of q: the window of tap i. So an axis is
// cut into parts where a window begins or ends, and a part lies in a window wholly or not at all: three of them for
// three taps with padding 1. Every shift's products are added up once for every part, and each element of the matrix is
// the sum of those in the window of its tap. Nothing is subtracted, so nothing cancels. Of 3x3 taps there are 13
// shifts (the other half mirrors them) for 45 pairs of taps, and products with padding are left out.
//
// Zero times what is not finite is NaN, which an element would not get where that product is with padding: then the
// caller has to multiply patches. Included by gram.cpp alone: see gemm_cpu.h on the unnamed namespace.
#pragma once

#include <algorithm>
#include <cstring>

#include "core/apply_cpu.h"
#include "core/layer_panels_cpu.h"
#include "core/shuffled.h"
#include "kernels/gram.h"

namespace unlearn_ext {
namespace {

// An axis cut where the window of a tap begins or ends.
class AxisParts {
 public:
  AxisParts(const Patches& p, int axis) : p_(p), axis_(axis) {
    add(0), add(p.in[axis]);
    for (int64_t tap = 0; tap < p.kernel[axis]; ++tap) add(begin_of(tap)), add(begin_of(tap) + p.out[axis]);
  }

  int64_t count() const { return cuts_ - 1; }

  bool is_seen(int64_t part, int64_t tap) const {
    return begin_of(tap) <= cut_[part] && cut_[part + 1] <= begin_of(tap) + p_.out[axis_];
  }

  // What of a part is in the image also after a shift by so many taps.
  void range(int64_t part, int64_t shift, int64_t& begin, int64_t& end) const {
    const int64_t by = shift * p_.dilation[axis_];
    begin = std::max(cut_[part], -by);
    end = std::max(begin, std::min(cut_[part + 1], p_.in[axis_] - by));
  }

 private:
  int64_t begin_of(int64_t tap) const { return p_.source(axis_, 0, tap); }

  // Kept in order, each once.
  void add(int64_t place) {
    place = std::clamp<int64_t>(place, 0, p_.in[axis_]);
    int at = cuts_;
    while (at > 0 && cut_[at - 1] > place) --at;
    if (at > 0 && cut_[at - 1] == place) return;
    for (int i = cuts_; i > at; --i) cut_[i] = cut_[i - 1];
    cut_[at] = place;
    ++cuts_;
  }

  const Patches& p_;
  int axis_, cuts_ = 0;
  int64_t cut_[2 * kGramShiftTaps + 2] = {};
};

// Differences between taps along all axes as one number: 0 for none, -s for the mirror image of s.
struct Shifts {
  const Patches& p;

  // Of the largest.
  int64_t most() const { return gram_shifts(p) / 2; }

  void at(int64_t number, int64_t (&shift)[kMaxSpatial]) const {
    number += most();
    for (int axis = kMaxSpatial - 1; axis >= 0; --axis) {
      const int64_t extent = 2 * p.kernel[axis] - 1;
      shift[axis] = number % extent - (p.kernel[axis] - 1);
      number /= extent;
    }
  }

  // From tap i to tap j.
  int64_t between(int64_t i, int64_t j) const {
    int64_t number = 0;
    for (int axis = 0; axis < kMaxSpatial; ++axis)
      number = number * (2 * p.kernel[axis] - 1) + p.tap(axis, j) - p.tap(axis, i) + p.kernel[axis] - 1;
    return number - most();
  }
};

// Positions q of one image line and of q shifted, by their numbers in packed panels.
struct Piece {
  int64_t q, shifted, width;
};

// total[r][n] += sum over the pieces of a[q][r] * b[shifted][n], of kRows rows and `columns` columns.
template <int kRows, class A, class G>
void add_pieces(const A* a, const A* b, const Piece* pieces, int count, int64_t rows, int64_t columns, G* total) {
  VectorRegister<A> sum[kRows][2] = {};
  for (int i = 0; i < count; ++i)
    add_products(a + pieces[i].q * kTileRows, b + pieces[i].shifted * kTileCols<A>, pieces[i].width, sum);
  A product[kRows][kTileCols<A>];
  UNLEARN_UNROLL
  for (int r = 0; r < kRows; ++r) memcpy(product[r], sum[r], sizeof product[r]);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t n = 0; n < columns; ++n) total[r * kGramShiftBlock + n] += static_cast<G>(product[r][n]);
}

// The products of two blocks of channels, the first not after the second, over some chunks of the images. Of a block
// beside itself half of the shifts suffice.
template <class T, class G>
class ShiftedBlocks {
 public:
  using A = acc_t<T>;

  ShiftedBlocks(const Patches& p, int64_t first_a, int64_t first_b)
      : p_(p),
        chunks_(p),
        shifts_{p},
        parts_{{p, 0}, {p, 1}, {p, 2}},
        n_parts_(parts_[0].count() * parts_[1].count() * parts_[2].count()),
        first_a_(first_a),
        first_b_(first_b),
        channels_a_(std::min(kGramShiftBlock, p.channels - first_a)),
        channels_b_(std::min(kGramShiftBlock, p.channels - first_b)),
        first_shift_(first_a == first_b ? 0 : -shifts_.most()),
        sums_(n_sums() * static_cast<int64_t>(sizeof(G))),
        panels_((kWideA * chunks_.positions() + kWideB * chunks_.shifted_positions()) *
                static_cast<int64_t>(sizeof(A))) {
    memset(sums_.template at<G>(0), 0, static_cast<size_t>(n_sums()) * sizeof(G));
  }

  // Products of positions of chunks [begin, end), of a group's images.
  void add(const T* data, int64_t begin, int64_t end) {
    const Positions images{p_.dtype,
                           p_.samples,
                           p_.channels,
                           {p_.in[0], p_.in[1], p_.in[2]},
                           p_.sample_stride,
                           p_.channel_stride,
                           {p_.space_stride[0], p_.space_stride[1], p_.space_stride[2]},
                           data};
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      here_ = stretch(chunk, 0), there_ = stretch(chunk, chunks_.reach);
      pack(images, first_a_, channels_a_, here_, kTileRows, panels_.template at<A>(0));
      pack(images, first_b_, channels_b_, there_, kTileCols<A>, panels_.template at<A>(kWideA * chunks_.positions()));
      for (int64_t shift = first_shift_; shift <= shifts_.most(); ++shift)
        for (int64_t part = 0; part < n_parts_; ++part) add_part(shift, part);
    }
  }

  // The matrix's share of these blocks, of which the upper triangle is kept: total[d][d].
  void write(G* total) const {
    const int64_t window = p_.window(), d = p_.columns();
    int64_t shift_to[kGramShiftTaps * kGramShiftTaps * kGramShiftTaps], seen[kGramShiftSums];
    G line[kGramShiftBlock];
    for (int64_t i = 0; i < window; ++i) {
      for (int64_t j = 0; j < window; ++j) shift_to[j] = shifts_.between(i, j);
      int64_t n_seen = 0;
      for (int64_t part = 0; part < n_parts_; ++part)
        if (is_seen(part, i)) seen[n_seen++] = part;
      for (int64_t a = 0; a < channels_a_; ++a)
        for (int64_t j = 0; j < window; ++j) {
          const int64_t shift = shift_to[j];
          if (shift < first_shift_) continue;
          std::fill(line, line + channels_b_, G(0));
          for (int64_t k = 0; k < n_seen; ++k) {
            const G* from = sums(shift, seen[k]) + a * kGramShiftBlock;
            for (int64_t b = 0; b < channels_b_; ++b) line[b] += from[b];
          }
          const int64_t row = (first_a_ + a) * window + i;
          for (int64_t b = first_a_ == first_b_ && shift == 0 ? a : 0; b < channels_b_; ++b) {
            const int64_t column = (first_b_ + b) * window + j;
            total[std::min(row, column) * d + std::max(row, column)] += line[b];
          }
        }
    }
  }

 private:
  static constexpr int64_t kBlock = kGramShiftBlock * kGramShiftBlock;
  static constexpr int64_t kWideA = (kGramShiftBlock + kTileRows - 1) / kTileRows * kTileRows;
  static constexpr int64_t kWideB = (kGramShiftBlock + kTileCols<A> - 1) / kTileCols<A> * kTileCols<A>;

  int64_t n_sums() const { return (shifts_.most() - first_shift_ + 1) * n_parts_ * kBlock; }
  G* sums(int64_t shift, int64_t part) const {
    return sums_.template at<G>(((shift - first_shift_) * n_parts_ + part) * kBlock);
  }

  // A chunk's lines and, of an image that has more, those up to `reach` lines away.
  Stretch stretch(int64_t chunk, int64_t reach) const {
    const int64_t sample = chunk / chunks_.per_image() * chunks_.samples_at_once,
                  line = chunk % chunks_.per_image() * chunks_.lines_at_once,
                  until = std::min(chunks_.lines, line + chunks_.lines_at_once);
    const int64_t first = std::max<int64_t>(0, line - reach), last = std::min(chunks_.lines, until + reach);
    return {sample, std::min(chunks_.samples_at_once, chunks_.samples - sample), first, last - first, 0, chunks_.width};
  }

  static void pack(const Positions& images, int64_t first, int64_t channels, const Stretch& at, int width, A* to) {
    for (int64_t c = 0; c < channels; c += width, to += width * at.depth())
      pack_positions<T>(images, first + c, std::min<int64_t>(width, channels - c), at, width, to);
  }

  void place(int64_t part, int64_t (&at)[kMaxSpatial]) const {
    for (int axis = kMaxSpatial - 1; axis >= 0; --axis)
      at[axis] = part % parts_[axis].count(), part /= parts_[axis].count();
  }

  bool is_seen(int64_t part, int64_t tap) const {
    int64_t at[kMaxSpatial];
    place(part, at);
    return parts_[0].is_seen(at[0], p_.tap(0, tap)) && parts_[1].is_seen(at[1], p_.tap(1, tap)) &&
           parts_[2].is_seen(at[2], p_.tap(2, tap));
  }

  // Lines are collected until their positions are as many as are added up in the compute type.
  void add_part(int64_t shift, int64_t part) {
    int64_t by[kMaxSpatial], at[kMaxSpatial], begin[kMaxSpatial], end[kMaxSpatial];
    shifts_.at(shift, by);
    place(part, at);
    for (int axis = 0; axis < kMaxSpatial; ++axis) parts_[axis].range(at[axis], by[axis], begin[axis], end[axis]);
    if (begin[2] == end[2]) return;
    const int64_t lines = by[0] * p_.dilation[0] * p_.in[1] + by[1] * p_.dilation[1];
    G* total = sums(shift, part);
    Piece pieces[kGramDepth];
    int count = 0;
    int64_t depth = 0;
    const auto flush = [&] {
      if (count > 0) add_products_of(pieces, count, total);
      count = 0, depth = 0;
    };
    for (int64_t s = 0; s < here_.samples; ++s)
      for (int64_t z = begin[0]; z < end[0]; ++z)
        for (int64_t y = begin[1]; y < end[1]; ++y) {
          const int64_t line = z * p_.in[1] + y - here_.line;
          if (line < 0 || line >= here_.lines) continue;
          const int64_t q = (s * here_.lines + line) * p_.in[2];
          const int64_t shifted =
              (s * there_.lines + line + here_.line + lines - there_.line) * p_.in[2] + by[2] * p_.dilation[2];
          for (int64_t x = begin[2]; x < end[2];) {
            const int64_t width = std::min(kGramDepth, end[2] - x);
            if (depth + width > kGramDepth) flush();
            pieces[count++] = {q + x, shifted + x, width};
            depth += width, x += width;
          }
        }
    flush();
  }

  void add_products_of(const Piece* pieces, int count, G* total) const {
    for (int64_t b = 0; b < channels_b_; b += kTileCols<A>)
      for (int64_t a = 0; a < channels_a_; a += kTileRows) {
        const A* left = panels_.template at<A>(a * here_.depth());
        const A* right = panels_.template at<A>(kWideA * chunks_.positions() + b * there_.depth());
        const int64_t rows = std::min<int64_t>(kTileRows, channels_a_ - a),
                      columns = std::min<int64_t>(kTileCols<A>, channels_b_ - b);
        G* out = total + a * kGramShiftBlock + b;
        if (rows <= kTileRows / 3)
          add_pieces<kTileRows / 3>(left, right, pieces, count, rows, columns, out);
        else if (rows <= 2 * kTileRows / 3)
          add_pieces<2 * kTileRows / 3>(left, right, pieces, count, rows, columns, out);
        else
          add_pieces<kTileRows>(left, right, pieces, count, rows, columns, out);
      }
  }

  const Patches& p_;
  GramChunks chunks_;
  Shifts shifts_;
  AxisParts parts_[kMaxSpatial];
  int64_t n_parts_, first_a_, first_b_, channels_a_, channels_b_, first_shift_;
  PanelMemory sums_, panels_;
  Stretch here_{}, there_{};
};

}  // namespace
}  // namespace unlearn_ext
