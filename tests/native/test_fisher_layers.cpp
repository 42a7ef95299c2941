// Per-sample Fisher diagonals of layers against loops over samples, positions and channels.
#include <algorithm>
#include <numeric>

#include "harness.h"
#include "kernels/fisher_layers.h"

namespace unlearn_ext::test {
namespace {

using Real = long double;

// How an operand lies in memory.
enum class Layout {
  channels_first,
  channels_last,
  gaps,
  ragged_rows,     // channels last, three elements after every position
  ragged_samples,  // channels last, one element after every sample
  expanded         // the same at every position
};
const std::vector<Layout> kLayouts = {Layout::channels_first, Layout::channels_last,  Layout::gaps,
                                      Layout::ragged_rows,    Layout::ragged_samples, Layout::expanded};

struct Layer {
  const char* name;
  int64_t samples, groups, channels, outputs;  // the last two of one group
  int64_t in[3] = {1, 1, 1}, kernel[3] = {1, 1, 1}, stride[3] = {1, 1, 1}, before[3] = {}, after[3] = {},
          dilation[3] = {1, 1, 1};

  int64_t out(int axis) const {
    return (in[axis] + before[axis] + after[axis] - dilation[axis] * (kernel[axis] - 1) - 1) / stride[axis] + 1;
  }
};

Layer linear(int64_t samples, int64_t positions, int64_t channels, int64_t outputs) {
  return {"linear", samples, 1, channels, outputs, {1, 1, positions}};
}

// Fills in strides and returns how many elements the tensor spans.
template <class P>
int64_t lay_out(P& p, int64_t samples, int64_t channels, const int64_t (&extent)[3], Layout layout) {
  int64_t next = 1;
  const bool channels_inside = layout != Layout::channels_first && layout != Layout::gaps;
  if (channels_inside) p.channel_stride = 1, next = layout == Layout::ragged_rows ? channels + 3 : channels;
  if (layout == Layout::gaps) next = 2;
  for (int axis = 2; axis >= 0; --axis) {
    p.space_stride[axis] = layout == Layout::expanded ? 0 : next;
    next *= layout == Layout::expanded ? 1 : extent[axis] + (layout == Layout::gaps);
  }
  if (!channels_inside) p.channel_stride = next, next *= channels;
  p.sample_stride = next + (layout == Layout::ragged_samples);
  return p.sample_stride * samples;
}

template <class T>
Buf<T> random(int64_t n, int64_t offset) {
  Buf<T> data(n, offset);
  for (int64_t i = 0; i < n; ++i) data[i] = nearest<T>(uniform(-1, 1));
  return data;
}

template <class T>
struct Operand {
  Buf<T> now, before;
  Operand(int64_t n, int64_t offset) : now(random<T>(n, offset)), before(n) {
    for (int64_t i = 0; i < n; ++i) before[i] = now[i];
  }
  void check_unchanged(const char* name) {
    CHECK(now.fetch(), std::string("a write outside ") + name);
    bool same = true;
    for (int64_t i = 0; i < now.size(); ++i) same = same && same_bits(now[i], before[i]);
    CHECK(same, std::string(name) + " changed");
  }
};

// A sum of |s|^power over samples, with what rounding may do to it.
struct Expected {
  Real sum = 0, error = 0;
  void add(Real s, Real terms, Real relative, int power) {
    const Real error_of_s = terms * relative, magnitude = std::fabs(s);
    sum += power == 2 ? s * s : magnitude;
    error += power == 2 ? 2 * magnitude * error_of_s + error_of_s * error_of_s : error_of_s;
  }
  // Of F after weight * sum was added to `before`, the sum in a compute type of this spacing.
  Real tolerance(Real before, Real weight, Real samples, Real epsilon) const {
    return weight * (error + (samples + 20) * epsilon * sum) + 2 * epsilon * std::fabs(before) + 1e-35L;
  }
};

template <class A>
void check_fisher(Buf<A>& fisher, const std::vector<A>& before, const std::vector<Expected>& expected, double weight,
                  int64_t samples) {
  CHECK(fisher.fetch(), "a write outside F");
  for (int64_t i = 0; i < fisher.size(); ++i) {
    const auto& e = expected[static_cast<size_t>(i)];
    const Real start = before[static_cast<size_t>(i)], want = start + static_cast<Real>(weight) * e.sum;
    const Real tolerance =
        e.tolerance(start, static_cast<Real>(weight), static_cast<Real>(samples), static_cast<Real>(spacing<A>(1.0)));
    CHECK(std::fabs(static_cast<Real>(fisher[i]) - want) <= tolerance,
          std::to_string(i) + ": got " + std::to_string(fisher[i]) + ", want " +
              std::to_string(static_cast<double>(want)) + " +- " + std::to_string(static_cast<double>(tolerance)));
  }
}

template <class A>
std::pair<Buf<A>, std::vector<A>> preloaded(int64_t n, int64_t offset = 1) {
  Buf<A> fisher(n, offset);
  std::vector<A> before(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) fisher[i] = before[static_cast<size_t>(i)] = static_cast<A>(uniform(0, 2));
  return {std::move(fisher), std::move(before)};
}

// ---- fisher_weight

struct Options {
  Layout inputs = Layout::channels_last, grads = Layout::channels_last;
  int power = 2;
  bool tf32 = false;
  int64_t offset = 0;    // of the operands from an aligned address
  bool in_runs = false;  // on a GPU: whether the samples have to be split
  int64_t fisher_offset = 1;
  bool turned = false;  // on a GPU: whether one run has to be turned into the order of F
};

template <class T>
std::vector<Expected> weights_of(const Layer& layer, const LayerProduct& product, const Buf<T>& inputs,
                                 const Buf<T>& grads, const Options& options) {
  const Patches& p = product.inputs;
  const Positions& g = product.grads;
  const int64_t positions = p.positions(), columns = p.columns(), outputs = layer.groups * layer.outputs;
  std::vector<Expected> expected(static_cast<size_t>(outputs * columns));
  // Rounded sums of `positions` products; tf32 also rounds either factor to 11 bits.
  const Real relative = static_cast<Real>(positions + 8) * static_cast<Real>(spacing<acc_t<T>>(1.0)) +
                        (options.tf32 && std::is_same_v<T, float> ? 0x1.1p-10L : 0.0L);
  std::vector<double> a(static_cast<size_t>(positions * columns)), b(static_cast<size_t>(positions));
  for (int64_t n = 0; n < p.samples; ++n)
    for (int64_t group = 0; group < layer.groups; ++group) {
      for (int64_t t = 0; t < positions; ++t)
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t at[] = {t / (p.out[1] * p.out[2]), t / p.out[2] % p.out[1], t % p.out[2]};
          const int64_t tap[] = {j / (p.kernel[1] * p.kernel[2]) % p.kernel[0], j / p.kernel[2] % p.kernel[1],
                                 j % p.kernel[2]};
          const int64_t channel = j / (p.kernel[0] * p.kernel[1] * p.kernel[2]);
          int64_t where = n * p.sample_stride + group * product.group_stride + channel * p.channel_stride;
          bool inside = true;
          for (int axis = 0; axis < 3; ++axis) {
            const int64_t source =
                at[axis] * layer.stride[axis] - layer.before[axis] + tap[axis] * layer.dilation[axis];
            inside = inside && source >= 0 && source < layer.in[axis];
            where += source * p.space_stride[axis];
          }
          a[static_cast<size_t>(j * positions + t)] = inside ? value(inputs[where]) : 0.0;
        }
      for (int64_t o = 0; o < layer.outputs; ++o) {
        for (int64_t t = 0; t < positions; ++t)
          b[static_cast<size_t>(t)] =
              value(grads[n * g.sample_stride + (group * layer.outputs + o) * g.channel_stride +
                          t / (p.out[1] * p.out[2]) * g.space_stride[0] + t / p.out[2] % p.out[1] * g.space_stride[1] +
                          t % p.out[2] * g.space_stride[2]]);
        for (int64_t j = 0; j < columns; ++j) {
          Real sum = 0, terms = 0;
          for (int64_t t = 0; t < positions; ++t) {
            const Real product_at = Real{b[static_cast<size_t>(t)]} * a[static_cast<size_t>(j * positions + t)];
            sum += product_at, terms += std::fabs(product_at);
          }
          expected[static_cast<size_t>((group * layer.outputs + o) * columns + j)].add(sum, terms, relative,
                                                                                       options.power);
        }
      }
    }
  return expected;
}

template <Backend B, class T>
void weight(const Layer& layer, const Options& options, const Exec& exec) {
  using A = acc_t<T>;
  const Scope scope(layer.name + std::string(" n ") + std::to_string(layer.samples) + " g " +
                    std::to_string(layer.groups) + " i " + std::to_string(layer.channels) + " o " +
                    std::to_string(layer.outputs) + " in " + std::to_string(layer.in[2]) + " layouts " +
                    std::to_string(static_cast<int>(options.inputs)) + std::to_string(static_cast<int>(options.grads)) +
                    " power " + std::to_string(options.power) + (options.tf32 ? " tf32" : "") + " offset " +
                    std::to_string(options.offset));
  LayerProduct product{};
  Patches& p = product.inputs;
  Positions& g = product.grads;
  p.dtype = g.dtype = Format<T>::dtype;
  p.samples = g.samples = layer.samples, p.channels = layer.channels;
  g.channels = layer.groups * layer.outputs;
  for (int axis = 0; axis < 3; ++axis) {
    p.in[axis] = layer.in[axis], p.kernel[axis] = layer.kernel[axis], p.stride[axis] = layer.stride[axis];
    p.padding[axis] = layer.before[axis], p.dilation[axis] = layer.dilation[axis];
    p.out[axis] = g.extent[axis] = layer.out(axis);
  }
  Operand<T> inputs(lay_out(p, layer.samples, layer.groups * layer.channels, p.in, options.inputs), options.offset);
  Operand<T> grads(lay_out(g, layer.samples, g.channels, g.extent, options.grads), options.offset);
  p.data = inputs.now.device(), g.data = grads.now.device();
  product.groups = layer.groups, product.group_stride = layer.channels * p.channel_stride;
  product.weight = 0.37, product.power = options.power, product.tf32 = options.tf32;

  auto [fisher, before] = preloaded<A>(g.channels * p.columns(), options.fisher_offset);
  const int64_t splits = fisher_weight_partials<B>(product);
  CHECK(splits >= (kOnCuda && options.in_runs ? 2 : 0), "fisher_weight_partials");
  if (kOnCuda && options.turned) CHECK(splits == 1, "not one run in the order of the tiles: " + std::to_string(splits));
  Buf<A> partial(splits * fisher.size());
  for (int64_t i = 0; i < partial.size(); ++i) partial[i] = static_cast<A>(NAN);  // all of it must be written
  CHECK(fisher_weight<B>(product, fisher.device(), splits > 0 ? partial.device() : nullptr, exec) == 0, "error code");
  CHECK(partial.fetch(), "a write outside the partial sums");
  check_fisher(fisher, before, weights_of(layer, product, inputs.before, grads.before, options), product.weight,
               layer.samples);
  inputs.check_unchanged("inputs"), grads.check_unchanged("gradients");
}

// Every dtype and power, floats also as tf32.
template <class F>
void on_all(const F& f) {
  on_dtypes([&]<class T>(Tag<T>) {
    on_backends([&]<Backend B>(const Exec& exec) {
      Options options;
      f.template operator()<B, T>(options, exec);
      options.power = 1;
      f.template operator()<B, T>(options, exec);
      if constexpr (kOnCuda && std::is_same_v<T, float>) {
        options.tf32 = true, options.power = 2;
        f.template operator()<B, T>(options, exec);
      }
    });
  });
}

const Case positions_case("fisher_weight: positions", [] {
  for (const int64_t positions : thinned<int64_t>({0, 1, 2, 3, 4, 7, 8, 9, 16, 17, 33, 100}, 6))
    on_all([&]<Backend B, class T>(const Options& options, const Exec& exec) {
      weight<B, T>(linear(1, positions, 16, 8), options, exec);
      weight<B, T>(linear(5, positions, 72, 24), options, exec);
    });
});

const Case widths_case("fisher_weight: widths", [] {
  const std::vector<std::pair<int64_t, int64_t>> widths = {{1, 1},    {3, 5},    {8, 1},   {1, 17},  {7, 9},
                                                           {15, 16},  {31, 33},  {63, 64}, {64, 65}, {65, 64},
                                                           {65, 130}, {128, 72}, {130, 65}};
  for (const auto& [channels, outputs] : thinned(widths, 6))
    on_all([&]<Backend B, class T>(Options options, const Exec& exec) {
      weight<B, T>(linear(2, 5, channels, outputs), options, exec);
      weight<B, T>(linear(3, 1, channels, outputs), options, exec);
      options.offset = 1;
      weight<B, T>(linear(2, 19, channels, outputs), options, exec);
    });
});

// Samples enough for several runs of them, and positions for several rounds of every buffer.
const Case samples_case("fisher_weight: samples", [] {
  on_all([&]<Backend B, class T>(const Options& options, const Exec& exec) {
    for (const int64_t samples : thinned<int64_t>({0, 1, 2, 40}, 2))
      weight<B, T>(linear(samples, 3, 24, 10), options, exec);
    weight<B, T>(linear(reduced() ? 200 : 2000, 1, 12, 9), options, exec);
    weight<B, T>(linear(1, 200, 61, 11), options, exec);
    weight<B, T>({"groups and runs", 60, 2, 8, 16, {1, 4, 3}, {1, 3, 3}}, options, exec);
    if (reduced()) return;
    weight<B, T>(linear(13, 90, 40, 8), options, exec);
  });
  // As large as tensor cores need before they gain by splitting the samples.
  on_backends([&]<Backend B>(const Exec& exec) {
    weight<B, BFloat16>(linear(70, 40, 72, 72), {}, exec);
    if (reduced()) return;
    weight<B, BFloat16>(linear(7, 700, 24, 16), {}, exec);
    // Several tiles and rounds of everything.
    weight<B, Half>(linear(3, 300, 264, 136), {}, exec);
    Options tf32;
    tf32.tf32 = true;
    weight<B, float>(linear(3, 150, 264, 136), tf32, exec);
  });
});

// Samples that end within the steps of the tensor cores: at every place of a step, in both sizes of tiles, and over
// more slabs than are described at once.
const Case halves_case("fisher_weight: halves of steps", [] {
  std::vector<Layer> layers;
  for (const int64_t positions : thinned<int64_t>({2, 3, 4, 5, 8, 9, 11, 12, 13, 17, 20, 24, 25}, 4))
    for (const int64_t outputs : {72, 16}) layers.push_back(linear(positions == 8 ? 37 : 5, positions, 72, outputs));
  layers.push_back({"2x2 of 3x3", 7, 1, 8, 72, {1, 2, 2}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}});
  on_backends([&]<Backend B>(const Exec& exec) {
    for (const Layer& layer : layers)
      for (const int power : {2, 1}) {
        if (power == 1 && reduced()) continue;
        Options options;
        options.power = power;
        weight<B, BFloat16>(layer, options, exec);
        weight<B, Half>(layer, options, exec);
        options.tf32 = kOnCuda;
        weight<B, float>(layer, options, exec);
        options.offset = 1;  // element by element: whole steps
        weight<B, Half>(layer, options, exec);
      }
  });
});

const Case layouts_case("fisher_weight: layouts", [] {
  const Layer rows = {"rows of three axes", 2, 1, 24, 72, {2, 3, 4}};
  const Layer image = {"image", 2, 1, 8, 16, {1, 5, 7}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}};
  const Layer wide = {"wide image", 1, 1, 16, 80, {1, 6, 6}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}};
  for (const Layer& layer : thinned<Layer>({rows, image, wide}, 3))
    on_all([&]<Backend B, class T>(Options options, const Exec& exec) {
      for (const Layout inputs : thinned(kLayouts, 1))
        for (const Layout grads : kLayouts) {
          if (inputs != grads && (options.power == 1 || reduced())) continue;
          options.inputs = inputs, options.grads = grads;
          options.offset = 0;
          weight<B, T>(layer, options, exec);
          options.offset = 3;
          if (inputs == grads) weight<B, T>(layer, options, exec);
        }
    });
});

const Case convolutions_case("fisher_weight: convolutions", [] {
  const std::vector<Layer> layers = {
      {"conv1d", 3, 1, 4, 6, {1, 1, 37}, {1, 1, 5}, {1, 1, 2}, {0, 0, 3}, {0, 0, 1}, {1, 1, 2}},
      {"patches", 2, 1, 3, 9, {1, 8, 12}, {1, 4, 4}, {1, 4, 4}},
      {"one position", 5, 1, 6, 7, {1, 4, 4}, {1, 4, 4}},
      {"strided", 2, 1, 5, 8, {1, 12, 10}, {1, 3, 2}, {1, 2, 3}, {0, 2, 0}, {0, 0, 1}, {1, 1, 2}},
      {"padding wider than the image", 2, 1, 8, 4, {1, 2, 1}, {1, 2, 3}, {1, 1, 2}, {0, 3, 4}, {0, 2, 5}},
      {"conv3d", 2, 1, 2, 3, {4, 5, 6}, {2, 3, 2}, {1, 2, 1}, {1, 0, 1}, {0, 1, 1}, {1, 1, 2}},
      {"grouped, large", 2, 2, 8, 16, {1, 5, 5}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}},
      {"grouped", 2, 3, 6, 5, {1, 5, 5}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}},
      {"grouped, few", 7, 5, 2, 4, {1, 6, 5}, {1, 3, 3}, {1, 2, 1}, {0, 1, 1}, {0, 0, 1}},
      {"two per group", 2, 9, 1, 2, {1, 1, 40}, {1, 1, 4}, {1, 1, 1}, {0, 0, 3}},
      {"depthwise, 5x5", 2, 3, 1, 1, {1, 9, 8}, {1, 5, 5}, {1, 2, 2}, {0, 2, 2}, {0, 1, 2}},
      {"depthwise, one position", 4, 33, 1, 1, {1, 1, 2}, {1, 1, 2}},
      {"depthwise", 3, 40, 1, 1, {1, 7, 7}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}},
  };
  for (const Layer& layer : thinned(layers, 6))
    on_all([&]<Backend B, class T>(Options options, const Exec& exec) {
      for (const Layout layout : thinned(kLayouts, 3)) {
        options.inputs = options.grads = layout;
        weight<B, T>(layer, options, exec);
      }
    });
});

// Whole and cut steps, tiles and blocks of a CPU's matrix unit, and samples in parts. The CUDA kernels have no such
// steps.
const Case matrix_unit_case("fisher_weight: many positions", [] {
  if (kOnCuda) return;
  const std::vector<Layer> layers = {
      linear(3, 20, 16, 16),
      linear(7, 31, 33, 17),
      linear(9, 32, 64, 48),
      linear(2, 65, 70, 33),
      linear(2, 257, 40, 20),
      linear(1, 700, 33, 50),
      linear(1, 36, 30, 800),
      linear(1, 33, 1200, 40),
      {"padded", 3, 1, 20, 18, {1, 9, 13}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}},
      {"large", 2, 1, 18, 16, {1, 24, 20}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}},
      {"volumes", 2, 1, 16, 32, {3, 7, 5}},
      {"planes", 2, 2, 16, 16, {5, 12, 9}},
  };
  for (const Layer& layer : thinned(layers, 3))
    on_dtypes([&]<class T>(Tag<T>) {
      on_backends([&]<Backend B>(const Exec& exec) {
        Options options;
        Layer enough = layer;
        if (Format<T>::dtype == DType::f32) enough.outputs += 64;
        for (const Layout layout : kLayouts) {
          options.inputs = options.grads = layout;
          options.offset = layout == Layout::channels_last;
          weight<B, T>(enough, options, exec);
        }
        options.grads = Layout::channels_last;
        weight<B, T>(enough, options, exec);
      });
    });
});

// Where one sample's operands are as large or small as the factors say, those of others as always.
template <Backend B, class T>
void magnitudes(int64_t positions, float of_inputs, float of_grads, const Exec& exec) {
  const Layer layer = linear(3, positions, 40, 68);
  LayerProduct product{};
  Patches& p = product.inputs;
  Positions& g = product.grads;
  p.dtype = g.dtype = Format<T>::dtype, p.samples = g.samples = layer.samples;
  p.channels = layer.channels, g.channels = layer.outputs;
  for (int axis = 0; axis < 3; ++axis)
    p.in[axis] = p.out[axis] = g.extent[axis] = layer.in[axis], p.kernel[axis] = p.stride[axis] = p.dilation[axis] = 1;
  Operand<T> inputs(lay_out(p, layer.samples, layer.channels, p.in, Layout::channels_last), 0);
  Operand<T> grads(lay_out(g, layer.samples, layer.outputs, g.extent, Layout::channels_last), 0);
  for (auto [operand, factor] : {std::pair{&inputs, of_inputs}, std::pair{&grads, of_grads}})
    for (int64_t i = 0; i < operand->now.size() / layer.samples; ++i)
      operand->now[i] = operand->before[i] = store_as<T>(static_cast<float>(operand->now[i]) * factor);
  p.data = inputs.now.device(), g.data = grads.now.device();
  product.groups = 1, product.weight = 0.37, product.power = 2;
  auto [fisher, before] = preloaded<float>(layer.outputs * layer.channels);
  const int64_t splits = fisher_weight_partials<B>(product);
  Buf<float> partial(splits * fisher.size());
  for (int64_t i = 0; i < partial.size(); ++i) partial[i] = static_cast<float>(NAN);
  const Scope scope(std::string(Format<T>::name) + " 2^" + std::to_string(std::ilogb(of_inputs)) + ", 2^" +
                    std::to_string(std::ilogb(of_grads)));
  CHECK(fisher_weight<B>(product, fisher.device(), splits > 0 ? partial.device() : nullptr, exec) == 0, "error code");
  check_fisher(fisher, before, weights_of(layer, product, inputs.before, grads.before, Options{}), product.weight,
               layer.samples);
}

// Factors that pairs of bfloat16 do not reach: in one sample and one line, so that others are as always.
const Case magnitudes_case("fisher_weight: magnitudes", [] {
  if (kOnCuda) return;
  on_backends([&]<Backend B>(const Exec& exec) {
    for (const int64_t positions : {40, 600})
      for (const auto& [of_inputs, of_grads] : {std::pair{0x1p23f, 1.f},
                                                {1.f, 0x1p23f},
                                                {0x1p25f, 1.f},
                                                {1.f, 0x1p25f},
                                                {0x1p50f, 1.f},
                                                {0x1p100f, 0x1p-100f},
                                                {0x1p-120f, 0x1p110f},
                                                {0x1p-135f, 0x1p120f},
                                                {0x1p-120f, 1.f},
                                                {0x1p25f, 0x1p-135f},
                                                {0x1p-40f, 0x1p-30f}}) {
        magnitudes<B, float>(positions, of_inputs, of_grads, exec);
        magnitudes<B, BFloat16>(positions, of_inputs, of_grads, exec);
      }
  });
});

// Partial sums lie in the order of the tiles, taps before channels where channels lie side by side: for every kind of
// tile, windows and channels beyond what a block turns around, and rows that no chunk divides.
const Case runs_case("fisher_weight: runs of convolutions", [] {
  const std::vector<Layer> layers = {
      {"3x3", 60, 1, 8, 16, {1, 4, 3}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}},
      {"few outputs per group", 7, 9, 2, 4, {1, 6, 5}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}},
      {"large tiles", 40, 1, 20, 72, {1, 4, 4}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}},
      {"two blocks of channels", 60, 1, 35, 6, {1, 4, 5}, {1, 2, 2}},
      {"one position", 200, 1, 6, 7, {1, 4, 4}, {1, 4, 4}},
      {"odd columns", 60, 2, 7, 5, {1, 5, 5}, {1, 3, 3}},
      {"two blocks of taps", 16, 1, 3, 4, {1, 9, 9}, {1, 9, 9}, {1, 1, 1}, {0, 4, 4}, {0, 4, 4}},
      {"three axes", 60, 1, 5, 6, {2, 4, 3}, {2, 3, 2}},
  };
  for (const Layer& layer : thinned(layers, 2))
    on_all([&]<Backend B, class T>(Options options, const Exec& exec) {
      options.in_runs = true;
      weight<B, T>(layer, options, exec);
      if (reduced() || options.power == 1) return;
      options.inputs = options.grads = Layout::channels_first;
      weight<B, T>(layer, options, exec);
    });
});

// One run whose columns lie in the order of the tiles, and one that is added to F: in chunks, where rows consist of
// them, and element by element, with F off an aligned address. Every row and column of several tiles must get there.
const Case one_run_case("fisher_weight: one run of convolutions", [] {
  const std::vector<Layer> layers = {
      {"one sample", 1, 1, 72, 68, {1, 3, 3}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}},
      {"one sample, odd", 1, 1, 33, 70, {1, 4, 2}, {1, 2, 1}},
      {"one sample, groups", 1, 3, 12, 5, {1, 2, 3}, {1, 1, 3}, {1, 1, 1}, {0, 0, 1}, {0, 0, 1}},
      {"one sample, several tiles", 1, 1, 136, 140, {1, 2, 2}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}},
  };
  for (const Layer& layer : thinned<Layer>(layers, 3))
    on_all([&]<Backend B, class T>(Options options, const Exec& exec) {
      options.turned = true;
      weight<B, T>(layer, options, exec);
      options.turned = false, options.inputs = options.grads = Layout::channels_first;
      for (options.fisher_offset = 0; options.fisher_offset < 4; options.fisher_offset += 3)
        weight<B, T>(layer, options, exec);
    });
});

// What fills a tile up must not meet an infinite gradient or input: 0 times infinity is not a number.
const Case infinite_case("fisher_weight: infinite", [] {
  on_dtypes([&]<class T>(Tag<T>) {
    on_backends([&]<Backend B>(const Exec& exec) {
      for (const auto& [positions, tf32] : {std::pair{3, false}, {3, true}, {40, false}, {600, false}})
        for (const bool in_grads : {false, true}) {
          if (kOnCuda && positions > 3) continue;
          constexpr int64_t kSamples = 3, kInputs = 80, kOutputs = 72;
          Operand<T> inputs(kSamples * positions * kInputs, 0), grads(kSamples * positions * kOutputs, 0);
          for (int64_t i = 0; i < inputs.now.size(); ++i) inputs.now[i] = nearest<T>(uniform(0.5, 1));
          for (int64_t i = 0; i < grads.now.size(); ++i) grads.now[i] = nearest<T>(uniform(0.5, 1));
          (in_grads ? grads : inputs).now[0] = nearest<T>(INFINITY);
          LayerProduct product{};
          product.inputs.channels = kInputs, product.grads.channels = kOutputs;
          Patches& p = product.inputs;
          p.dtype = product.grads.dtype = Format<T>::dtype, p.samples = product.grads.samples = kSamples;
          for (int axis = 0; axis < 3; ++axis)
            p.in[axis] = p.out[axis] = product.grads.extent[axis] = axis == 2 ? positions : 1,
            p.kernel[axis] = p.stride[axis] = p.dilation[axis] = 1;
          lay_out(p, kSamples, kInputs, p.in, Layout::channels_last);
          lay_out(product.grads, kSamples, kOutputs, p.out, Layout::channels_last);
          p.data = inputs.now.device(), product.grads.data = grads.now.device();
          product.groups = 1, product.weight = 1, product.power = 2, product.tf32 = tf32;
          auto [fisher, before] = preloaded<acc_t<T>>(kInputs * kOutputs);
          const int64_t splits = fisher_weight_partials<B>(product);
          Buf<acc_t<T>> partial(splits * fisher.size());
          for (int64_t i = 0; i < partial.size(); ++i) partial[i] = static_cast<acc_t<T>>(NAN);
          CHECK(fisher_weight<B>(product, fisher.device(), splits > 0 ? partial.device() : nullptr, exec) == 0,
                "error code");
          CHECK(fisher.fetch(), "a write outside F");
          for (int64_t o = 0; o < kOutputs; ++o)
            for (int64_t i = 0; i < kInputs; ++i) {
              const bool infinite = (in_grads ? o : i) == 0;
              const double got = fisher[o * kInputs + i];
              CHECK(infinite ? got == INFINITY : std::isfinite(got), std::to_string(o) + ", " + std::to_string(i));
            }
        }
    });
  });
});

// ---- fisher_channels

template <Backend B, class T>
void channels(int64_t samples, int64_t channel_count, const int64_t (&extent)[3], Layout layout, Layout of_normalized,
              bool normalized, int power, int64_t offset, const Exec& exec) {
  using A = acc_t<T>;
  const Scope scope("n " + std::to_string(samples) + " c " + std::to_string(channel_count) + " positions " +
                    std::to_string(extent[0]) + "x" + std::to_string(extent[1]) + "x" + std::to_string(extent[2]) +
                    " layouts " + std::to_string(static_cast<int>(layout)) +
                    std::to_string(static_cast<int>(of_normalized)) + (normalized ? " normalized" : "") + " power " +
                    std::to_string(power));
  Positions g{}, x{};
  for (Positions* tensor : {&g, &x}) {
    tensor->dtype = Format<T>::dtype, tensor->samples = samples, tensor->channels = channel_count;
    std::copy_n(extent, 3, tensor->extent);
  }
  Operand<T> grads(lay_out(g, samples, channel_count, extent, layout), offset);
  Operand<T> inputs(normalized ? lay_out(x, samples, channel_count, extent, of_normalized) : 0, offset);
  g.data = grads.now.device(), x.data = inputs.now.device();
  std::vector<Expected> expected(static_cast<size_t>(channel_count));
  for (int64_t n = 0; n < samples; ++n)
    for (int64_t c = 0; c < channel_count; ++c) {
      Real sum = 0, terms = 0;
      for (int64_t i = 0; i < extent[0]; ++i)
        for (int64_t j = 0; j < extent[1]; ++j)
          for (int64_t k = 0; k < extent[2]; ++k) {
            const auto at = [&](const Positions& t) {
              return n * t.sample_stride + c * t.channel_stride + i * t.space_stride[0] + j * t.space_stride[1] +
                     k * t.space_stride[2];
            };
            Real term = value(grads.before[at(g)]);
            if (normalized) term *= value(inputs.before[at(x)]);
            sum += term, terms += std::fabs(term);
          }
      expected[static_cast<size_t>(c)].add(
          sum, terms, static_cast<Real>(g.positions() + 8) * static_cast<Real>(spacing<A>(1.0)), power);
    }
  auto [fisher, before] = preloaded<A>(channel_count);
  const Positions* scales = normalized ? &x : nullptr;
  const int64_t runs = fisher_channels_partials<B>(g, scales);
  Buf<A> partial(runs > 1 ? runs * channel_count : 0);
  for (int64_t i = 0; i < partial.size(); ++i) partial[i] = static_cast<A>(NAN);  // all of it must be written
  CHECK(fisher_channels<B>(g, scales, 0.37, power, fisher.device(), runs > 1 ? partial.device() : nullptr, exec) == 0,
        "error code");
  CHECK(partial.fetch(), "a write outside the partial sums");
  check_fisher(fisher, before, expected, 0.37, samples);
  grads.check_unchanged("gradients"), inputs.check_unchanged("normalized inputs");
}

const Case channels_case("fisher_channels", [] {
  struct Shape {
    int64_t samples, channels, extent[3];
  };
  const std::vector<Shape> shapes = {{0, 3, {1, 1, 4}},    {3, 5, {1, 0, 4}},   {1, 1, {1, 1, 1}},
                                     {5, 7, {1, 1, 1}},    {300, 9, {1, 1, 1}}, {2, 16, {1, 1, 8}},
                                     {3, 20, {1, 4, 6}},   {1, 3, {2, 3, 5}},   {40, 2, {1, 7, 7}},
                                     {2, 33, {1, 1, 100}}, {1, 8, {1, 40, 33}}, {3, 1, {1, 1, 5000}}};
  // Enough for a GPU to split the samples, in runs of which the last is shorter.
  const Shape many = {701, 5, {1, 1, 9}}, along = {97, 2, {1, 2, 300}};
  on_dtypes([&]<class T>(Tag<T>) {
    on_backends([&]<Backend B>(const Exec& exec) {
      for (const Shape& s : thinned(shapes, 4))
        for (const Layout layout : thinned(kLayouts, 3))
          for (const bool normalized : {false, true}) {
            channels<B, T>(s.samples, s.channels, s.extent, layout, layout, normalized, 2, 0, exec);
            channels<B, T>(s.samples, s.channels, s.extent, layout,
                           layout == Layout::gaps       ? Layout::channels_last
                           : layout == Layout::expanded ? Layout::gaps
                                                        : Layout::channels_first,
                           normalized, 1, layout == Layout::channels_last, exec);
          }
      const Layout last = Layout::channels_last, first = Layout::channels_first;
      channels<B, T>(many.samples, many.channels, many.extent, last, last, false, 2, 0, exec);
      channels<B, T>(many.samples, many.channels, many.extent, last, last, true, 1, 1, exec);
      channels<B, T>(along.samples, along.channels, along.extent, first, first, true, 2, 0, exec);
    });
  });
});

// ---- fisher_embedding

struct Lookups {
  const char* name;
  int64_t samples, extent[3], channels, rows, padding;
  std::function<int64_t(int64_t sample, int64_t position)> index;
};

template <Backend B, class T>
void embedding(const Lookups& l, Layout layout, int power, int64_t offset, const Exec& exec) {
  using A = acc_t<T>;
  const Scope scope(l.name + std::string(" layout ") + std::to_string(static_cast<int>(layout)) + " power " +
                    std::to_string(power));
  Positions g{};
  g.dtype = Format<T>::dtype, g.samples = l.samples, g.channels = l.channels;
  std::copy_n(l.extent, 3, g.extent);
  Operand<T> grads(lay_out(g, l.samples, l.channels, l.extent, layout), offset);
  g.data = grads.now.device();
  const int64_t positions = g.positions(), lookups = l.samples * positions;
  Buf<int64_t> indices(lookups), order(lookups);
  std::vector<int64_t> index(static_cast<size_t>(lookups)), sorted(static_cast<size_t>(lookups));
  for (int64_t i = 0; i < lookups; ++i) index[static_cast<size_t>(i)] = l.index(i / positions, i % positions);
  std::iota(sorted.begin(), sorted.end(), int64_t{0});
  std::stable_sort(sorted.begin(), sorted.end(),
                   [&](int64_t a, int64_t b) { return index[static_cast<size_t>(a)] < index[static_cast<size_t>(b)]; });
  for (int64_t i = 0; i < lookups; ++i)
    order[i] = sorted[static_cast<size_t>(i)], indices[i] = index[static_cast<size_t>(order[i])];

  std::vector<Expected> expected(static_cast<size_t>(l.rows * l.channels));
  std::vector<Real> sum(expected.size()), terms(expected.size());
  for (int64_t n = 0; n < l.samples; ++n) {
    std::fill(sum.begin(), sum.end(), Real{0}), std::fill(terms.begin(), terms.end(), Real{0});
    for (int64_t t = 0; t < positions; ++t) {
      const int64_t row = index[static_cast<size_t>(n * positions + t)];
      if (row < 0 || row >= l.rows || row == l.padding) continue;
      for (int64_t c = 0; c < l.channels; ++c) {
        const Real term = value(
            grads.before[n * g.sample_stride + c * g.channel_stride +
                         t / (l.extent[1] * l.extent[2]) * g.space_stride[0] +
                         t / l.extent[2] % l.extent[1] * g.space_stride[1] + t % l.extent[2] * g.space_stride[2]]);
        sum[static_cast<size_t>(row * l.channels + c)] += term;
        terms[static_cast<size_t>(row * l.channels + c)] += std::fabs(term);
      }
    }
    for (size_t i = 0; i < sum.size(); ++i)
      expected[i].add(sum[i], terms[i], static_cast<Real>(positions + 8) * static_cast<Real>(spacing<A>(1.0)), power);
  }
  auto [fisher, before] = preloaded<A>(l.rows * l.channels);
  CHECK(fisher_embedding<B>(g, indices.device(), order.device(), l.rows, l.padding, 0.37, power, fisher.device(),
                            exec) == 0,
        "error code");
  check_fisher(fisher, before, expected, 0.37, l.samples);
  grads.check_unchanged("gradients");
  // Rows that nobody looked up must not even be rewritten.
  for (int64_t row = 0; row < l.rows; ++row) {
    const bool used = row != l.padding && std::find(index.begin(), index.end(), row) != index.end();
    for (int64_t c = 0; c < l.channels && !used; ++c)
      CHECK(same_bits(fisher[row * l.channels + c], before[static_cast<size_t>(row * l.channels + c)]),
            "row " + std::to_string(row) + " changed");
  }
}

const Case embedding_case("fisher_embedding", [] {
  const auto mixed = [](int64_t rows) { return [rows](int64_t n, int64_t t) { return (n * 7 + t * t * 3) % rows; }; };
  const std::vector<Lookups> all = {
      {"no lookups", 0, {1, 1, 4}, 5, 3, -1, mixed(3)},
      {"all different", 1, {1, 1, 37}, 6, 37, -1, [](int64_t, int64_t t) { return t; }},
      {"one", 1, {1, 1, 1}, 1, 1, -1, mixed(1)},
      {"padding", 2, {1, 1, 17}, 16, 5, 2, mixed(5)},
      {"few rows", 3, {1, 1, 20}, 7, 4, -1, mixed(4)},
      {"outside the table", 2, {1, 1, 12}, 8, 6, -1, [](int64_t n, int64_t t) { return t - 3 + n; }},
      {"three axes", 2, {2, 3, 4}, 24, 9, 0, mixed(9)},
      {"all alike", 2, {1, 1, 3}, 260, 2, -1, [](int64_t, int64_t) { return 1; }},
      {"many of one sample", 1, {1, 1, 300}, 12, 3, -1, [](int64_t, int64_t t) { return t % 50 == 0 ? 2 : 1; }},
      {"many of several samples",
       5,
       {1, 1, 70},
       40,
       8,
       -1,
       [](int64_t n, int64_t t) { return t % 3 == 0 ? (n + t) % 8 : 4; }},
      {"many of many samples", 200, {1, 1, 2}, 9, 3, -1, [](int64_t n, int64_t t) { return n % 4 == 0 ? t : 2; }},
      {"exactly at the borders",
       1,
       {1, 1, 64 + 65 + 63},
       3,
       3,
       -1,
       [](int64_t, int64_t t) { return t < 64    ? 0
                                       : t < 129 ? 1
                                                 : 2; }},
  };
  for (const Lookups& l : thinned(all, 2))
    on_dtypes([&]<class T>(Tag<T>) {
      on_backends([&]<Backend B>(const Exec& exec) {
        for (const Layout layout : thinned(kLayouts, 3)) {
          embedding<B, T>(l, layout, 2, 0, exec);
          embedding<B, T>(l, layout, 1, 1, exec);
        }
      });
    });
});

}  // namespace
}  // namespace unlearn_ext::test
