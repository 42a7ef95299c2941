// Two passes: the sums of every sample and channel, then their powers over the samples. Bound by memory: a gradient
// (and a normalised input) is read once, in the order in which it lies.
#include <vector>

#include "core/apply_cpu.h"
#include "kernels/fisher_layers.h"

namespace unlearn_ext {
namespace {

// Terms added up at a time: sums of such runs are added in turn, which keeps rounding small over many positions.
constexpr int64_t kRun = 64;

template <class T>
struct Values {
  const T* data;
  int64_t step;

  acc_t<T> operator[](int64_t i) const { return acc_t<T>(data[i * step]); }
};

template <class T>
Values<T> values_of(const Positions& p, int64_t sample, int64_t line) {
  return {static_cast<const T*>(p.data) + sample * p.sample_stride + line / p.extent[1] * p.space_stride[0] +
              line % p.extent[1] * p.space_stride[1],
          p.space_stride[2]};
}

// f(line of g, line of x) for the lines of a sample; x is g's where there is none.
template <class T, class F>
void for_each_line(const Positions& g, const Positions* x, int64_t sample, const F& f) {
  for (int64_t line = 0; line < g.extent[0] * g.extent[1]; ++line)
    f(values_of<T>(g, sample, line), values_of<T>(x == nullptr ? g : *x, sample, line));
}

// sums[c] for channels that lie next to each other.
template <bool kScaled, class T>
void sum_rows(const Positions& g, const Positions* x, int64_t sample, acc_t<T>* part, acc_t<T>* sums) {
  const int64_t channels = g.channels;
  for_each_line<T>(g, x, sample, [&](Values<T> gradients, Values<T> scales) {
    for (int64_t begin = 0; begin < g.extent[2]; begin += kRun) {
      const int64_t end = std::min(g.extent[2], begin + kRun);
      for (int64_t c = 0; c < channels; ++c) part[c] = 0;
      for (int64_t t = begin; t < end; ++t) {
        const T *row = gradients.data + t * gradients.step, *other = scales.data + t * scales.step;
        UNLEARN_INDEPENDENT
        for (int64_t c = 0; c < channels; ++c) {
          if constexpr (kScaled)
            part[c] += acc_t<T>(row[c]) * acc_t<T>(other[c]);
          else
            part[c] += acc_t<T>(row[c]);
        }
      }
      for (int64_t c = 0; c < channels; ++c) sums[c] += part[c];
    }
  });
}

// The sum of one channel, whose positions lie `step` apart.
template <bool kScaled, class T>
acc_t<T> sum_channel(const Positions& g, const Positions* x, int64_t sample, int64_t channel) {
  using A = acc_t<T>;
  constexpr int kLanes = 32;
  A total = 0;
  for_each_line<T>(g, x, sample, [&](Values<T> gradients, Values<T> scales) {
    gradients.data += channel * g.channel_stride;
    if constexpr (kScaled) scales.data += channel * x->channel_stride;
    const auto term = [&](int64_t t) { return kScaled ? gradients[t] * scales[t] : gradients[t]; };
    int64_t t = 0;
    if (gradients.step == 1 && scales.step == 1)
      for (; t + kLanes <= g.extent[2];) {
        A lanes[kLanes] = {};
        for (int64_t run = 0; run < kRun && t + kLanes <= g.extent[2]; ++run, t += kLanes)
          for (int lane = 0; lane < kLanes; ++lane) {
            if constexpr (kScaled)
              lanes[lane] += A(gradients.data[t + lane]) * A(scales.data[t + lane]);
            else
              lanes[lane] += A(gradients.data[t + lane]);
          }
        for (int width = kLanes / 2; width > 0; width /= 2)
          for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
        total += lanes[0];
      }
    while (t < g.extent[2]) {
      A part = 0;
      for (const int64_t end = std::min(g.extent[2], t + kRun); t < end; ++t) part += term(t);
      total += part;
    }
  });
  return total;
}

// Samples of one position, whose channels lie next to each other: nothing to add up before the power.
template <bool kScaled, class T>
void accumulate_single(const Positions& g, const Positions* x, double weight, int power, void* fisher,
                       const Exec& exec) {
  using A = acc_t<T>;
  A* to = static_cast<A*>(fisher);
  parallel_for(exec, g.channels, std::max<int64_t>(1, kGrain / g.samples), [&](int64_t begin, int64_t end) {
    std::vector<A> total(static_cast<size_t>(end - begin), A(0));
    for (int64_t n = 0; n < g.samples; ++n) {
      const T* row = static_cast<const T*>(g.data) + n * g.sample_stride + begin;
      const T* other = static_cast<const T*>((kScaled ? x : &g)->data) + n * (kScaled ? x : &g)->sample_stride + begin;
      UNLEARN_INDEPENDENT
      for (int64_t c = 0; c < end - begin; ++c) {
        const A sum = kScaled ? A(row[c]) * A(other[c]) : A(row[c]);
        total[static_cast<size_t>(c)] += raised(sum, power);
      }
    }
    for (int64_t c = begin; c < end; ++c) to[c] += static_cast<A>(weight) * total[static_cast<size_t>(c - begin)];
  });
}

template <bool kScaled, class T>
void accumulate(const Positions& g, const Positions* x, double weight, int power, void* fisher, const Exec& exec) {
  using A = acc_t<T>;
  const int64_t samples = g.samples, channels = g.channels;
  const bool side_by_side = g.channel_stride == 1 && (!kScaled || x->channel_stride == 1);
  if (side_by_side && samples > 0 && g.positions() == 1)
    return accumulate_single<kScaled, T>(g, x, weight, power, fisher, exec);
  std::vector<A> sums(static_cast<size_t>(samples * channels), A(0));
  if (side_by_side) {
    parallel_for(exec, samples, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, g.positions() * channels)),
                 [&](int64_t begin, int64_t end) {
                   std::vector<A> part(static_cast<size_t>(channels));
                   for (int64_t n = begin; n < end; ++n)
                     sum_rows<kScaled, T>(g, x, n, part.data(), sums.data() + n * channels);
                 });
  } else {
    parallel_for(exec, samples * channels, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, g.positions())),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i)
                     sums[static_cast<size_t>(i)] = sum_channel<kScaled, T>(g, x, i / channels, i % channels);
                 });
  }
  // Every channel's samples are added first to last, whoever does it.
  A* to = static_cast<A*>(fisher);
  std::vector<A> total(static_cast<size_t>(channels), A(0));
  parallel_for(exec, channels, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, samples)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t n = 0; n < samples; ++n)
                   for (int64_t c = begin; c < end; ++c) {
                     const A sum = sums[static_cast<size_t>(n * channels + c)];
                     total[static_cast<size_t>(c)] += raised(sum, power);
                   }
                 for (int64_t c = begin; c < end; ++c) to[c] += static_cast<A>(weight) * total[static_cast<size_t>(c)];
               });
}

}  // namespace

template <>
int64_t fisher_channels_partials<kBackend>(const Positions&, const Positions*) {
  return 1;
}

template <>
int fisher_channels<kBackend>(const Positions& grads, const Positions* normalized, double weight, int power,
                              void* fisher, void*, const Exec& exec) {
  visit(grads.dtype, [&]<class T>(Tag<T>) {
    if (normalized == nullptr)
      accumulate<false, T>(grads, nullptr, weight, power, fisher, exec);
    else
      accumulate<true, T>(grads, normalized, weight, power, fisher, exec);
  });
  return 0;
}

}  // namespace unlearn_ext
