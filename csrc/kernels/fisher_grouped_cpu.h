// Convolutions whose groups are too small for a register tile, depthwise ones above all: a dot product per sample,
// output and column, vectorised along whatever lies next to each other, positions or groups. Included by kernel files
// only: see gemm_cpu.h on the unnamed namespace.
#pragma once

#include <vector>

#include "core/apply_cpu.h"
#include "core/gemm_cpu.h"
#include "kernels/fisher_layers.h"

namespace unlearn_ext {
namespace {

inline bool has_tiny_groups(const LayerProduct& layer) {
  return layer.groups >= 8 && layer.outputs() * layer.inputs.columns() <= 64;
}

// Calls f(first output position, first input position, count) with the memory offsets of the stretches of a sample
// along which tap (kz, ky, kx) looks at the image.
template <class F>
void for_each_stretch(const LayerProduct& layer, const int64_t (&tap)[kMaxSpatial], const F& f) {
  const Patches& p = layer.inputs;
  const Positions& g = layer.grads;
  const int64_t first = p.source(2, 0, tap[2]), stride = p.stride[2];
  const int64_t low = first >= 0 ? 0 : std::min(p.out[2], (-first + stride - 1) / stride);
  const int64_t high = first >= p.in[2] ? 0 : std::min(p.out[2], (p.in[2] - 1 - first) / stride + 1);
  if (low >= high) return;
  for (int64_t z = 0; z < p.out[0]; ++z)
    for (int64_t y = 0; y < p.out[1]; ++y) {
      const int64_t from[] = {p.source(0, z, tap[0]), p.source(1, y, tap[1]), p.source(2, low, tap[2])};
      if (from[0] < 0 || from[0] >= p.in[0] || from[1] < 0 || from[1] >= p.in[1]) continue;
      f(z * g.space_stride[0] + y * g.space_stride[1] + low * g.space_stride[2],
        from[0] * p.space_stride[0] + from[1] * p.space_stride[1] + from[2] * p.space_stride[2], high - low);
    }
}

template <class F>
void for_each_tap(const Patches& p, const F& f) {
  for (int64_t column = 0; column < p.window(); ++column) {
    const int64_t tap[] = {p.tap(0, column), p.tap(1, column), p.tap(2, column)};
    f(column, tap);
  }
}

// Vectorised along the positions of a line, where they lie next to each other.
template <class T>
void accumulate_group(const LayerProduct& layer, int64_t group, acc_t<T>* fisher) {
  using A = acc_t<T>;
  constexpr int kWidth = kLanes<A>;
  const Patches& p = layer.inputs;
  const Positions& g = layer.grads;
  const int64_t step = p.stride[2] * p.space_stride[2], columns = p.columns();
  const bool adjacent = step == 1 && g.space_stride[2] == 1;
  for (int64_t o = 0; o < layer.outputs(); ++o)
    for (int64_t c = 0; c < p.channels; ++c)
      for_each_tap(p, [&](int64_t column, const int64_t(&tap)[kMaxSpatial]) {
        A total = 0;
        for (int64_t n = 0; n < p.samples; ++n) {
          const T* gradients =
              static_cast<const T*>(g.data) + n * g.sample_stride + (group * layer.outputs() + o) * g.channel_stride;
          const T* inputs =
              static_cast<const T*>(p.data) + n * p.sample_stride + group * layer.group_stride + c * p.channel_stride;
          A lanes[kWidth] = {};
          for_each_stretch(layer, tap, [&](int64_t to, int64_t from, int64_t count) {
            const T *a = inputs + from, *b = gradients + to;
            int64_t i = 0;
            if (adjacent)
              for (; i + kWidth <= count; i += kWidth)
                for (int lane = 0; lane < kWidth; ++lane) lanes[lane] += A(b[i + lane]) * A(a[i + lane]);
            for (; i < count; ++i) lanes[i % kWidth] += A(b[i * g.space_stride[2]]) * A(a[i * step]);
          });
          A product = 0;
          for (const A lane : lanes) product += lane;
          total += raised(product, layer.power);
        }
        fisher[(group * layer.outputs() + o) * columns + c * p.window() + column] +=
            static_cast<A>(layer.weight) * total;
      });
}

// Vectorised along kWidth groups of one channel and one output each, which lie next to each other.
template <int kWidth, class T>
void accumulate_depthwise(const LayerProduct& layer, int64_t group, acc_t<T>* fisher) {
  using A = acc_t<T>;
  const Patches& p = layer.inputs;
  const Positions& g = layer.grads;
  const int64_t step = p.stride[2] * p.space_stride[2];
  for_each_tap(p, [&](int64_t column, const int64_t(&tap)[kMaxSpatial]) {
    A totals[kWidth] = {};
    for (int64_t n = 0; n < p.samples; ++n) {
      const T* gradients = static_cast<const T*>(g.data) + n * g.sample_stride + group;
      const T* inputs = static_cast<const T*>(p.data) + n * p.sample_stride + group;
      A products[kWidth] = {};
      for_each_stretch(layer, tap, [&](int64_t to, int64_t from, int64_t count) {
        const T *a = inputs + from, *b = gradients + to;
        for (int64_t i = 0; i < count; ++i, a += step, b += g.space_stride[2])
          for (int lane = 0; lane < kWidth; ++lane) products[lane] += A(b[lane]) * A(a[lane]);
      });
      for (int lane = 0; lane < kWidth; ++lane) totals[lane] += raised(products[lane], layer.power);
    }
    for (int lane = 0; lane < kWidth; ++lane)
      fisher[(group + lane) * p.window() + column] += static_cast<A>(layer.weight) * totals[lane];
  });
}

template <class T>
void accumulate_groups(const LayerProduct& layer, void* fisher, const Exec& exec) {
  using A = acc_t<T>;
  constexpr int kWidth = 2 * kLanes<A>;
  const bool across =
      layer.inputs.channels == 1 && layer.outputs() == 1 && layer.group_stride == 1 && layer.grads.channel_stride == 1;
  const int64_t work = layer.inputs.rows() * layer.inputs.columns() * layer.outputs();
  const int64_t blocks = (layer.groups + kWidth - 1) / kWidth;
  parallel_for(exec, blocks, std::max<int64_t>(1, kGrain / kWidth / std::max<int64_t>(1, work)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t group = begin * kWidth; group < std::min(layer.groups, end * kWidth);)
                   if (across && group + kWidth <= layer.groups) {
                     accumulate_depthwise<kWidth, T>(layer, group, static_cast<A*>(fisher));
                     group += kWidth;
                   } else {
                     accumulate_group<T>(layer, group++, static_cast<A*>(fisher));
                   }
               });
}

}  // namespace
}  // namespace unlearn_ext
