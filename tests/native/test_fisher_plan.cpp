// What is launched for the Fisher diagonal of a layer on a GPU, and division by a number known in advance: ordinary
// C++, the same in every build.
#include "harness.h"
#include "kernels/fisher_plan.h"

namespace unlearn_ext::test {
namespace {

constexpr int64_t kLargestCount = INT32_MAX;

const Case divisor_case("fisher_plan: divisor", [] {
  std::vector<int64_t> divisors;
  for (int64_t by = 1; by <= 2000; ++by) divisors.push_back(by);
  for (int bit = 11; bit < 31; ++bit)
    for (const int64_t off : {-1, 0, 1}) divisors.push_back((int64_t{1} << bit) + off);
  divisors.insert(divisors.end(), {46340, 46341, kLargestCount - 1, kLargestCount});
  const auto drawn = [](int64_t below) { return static_cast<int64_t>(uniform(0, 1) * static_cast<double>(below)); };
  for (int i = 0; i < 500; ++i) divisors.push_back(1 + drawn(kLargestCount - 1));
  for (const int64_t by : divisors) {
    const Divisor divisor(by);
    // Around multiples, where a rounded multiplier goes wrong first, and most at the largest.
    const int64_t most = kLargestCount / by;
    std::vector<int64_t> numbers = {0, 1, kLargestCount, drawn(kLargestCount)};
    for (const int64_t times : {int64_t{1}, most / 2, most - 1, most, drawn(most + 1)})
      for (const int64_t off : {-1, 0, 1}) numbers.push_back(times * by + off);
    for (const int64_t n : numbers) {
      if (n < 0 || n > kLargestCount) continue;
      const auto got = static_cast<int64_t>(divisor.quotient(static_cast<uint32_t>(n)));
      CHECK(got == n / by, std::to_string(n) + " / " + std::to_string(by) + ": got " + std::to_string(got));
    }
  }
});

// The longest block after the other on every multiprocessor, each with a tile of F to read and write or of partial sums
// to write; then, unless a single run was added to F, the launch that reads the partial sums of all runs and brings F
// up to date.
double clocks_of(int64_t splits, int64_t tiles, int64_t samples, double sample_clocks, double tile_bytes,
                 double fisher_bytes, bool direct) {
  const auto rounds = static_cast<double>((tiles * splits + 131) / 132);
  const auto run = static_cast<double>((samples + splits - 1) / splits);
  if (splits == 1 && direct) return rounds * (run * sample_clocks + 2 * tile_bytes / 20);
  return rounds * (run * sample_clocks + tile_bytes / 20) + 5000 +
         (static_cast<double>(splits) + 2) * fisher_bytes / (132 * 20);
}

const Case splits_case("fisher_plan: splits", [] {
  for (const int64_t tiles : {1, 3, 18, 131, 132, 133, 400, 5000})
    for (const int64_t samples : {1, 2, 3, 7, 40, 63, 64, 65, 1000})
      for (const double sample_clocks : {1.0, 50.0, 700.0, 20000.0})
        for (const auto& [fisher_bytes, direct] :
             {std::pair{1e3, true}, {1e5, false}, {2e6, true}, {2e6, false}, {3e7, true}, {7e7, true}, {7e7, false}}) {
          const auto clocks = [&, bytes = fisher_bytes, adds = direct](int64_t splits) {
            return clocks_of(splits, tiles, samples, sample_clocks, 16384, bytes, adds);
          };
          const Scope scope("tiles " + std::to_string(tiles) + " samples " + std::to_string(samples) + " clocks " +
                            std::to_string(sample_clocks) + " bytes " + std::to_string(fisher_bytes));
          const int64_t splits = best_splits(tiles, samples, sample_clocks, 16384, fisher_bytes, direct);
          const auto told = "got " + std::to_string(splits);
          CHECK(splits >= 1 && splits <= std::min<int64_t>(64, samples), told);
          const auto fits = [&, bytes = fisher_bytes](int64_t s) {
            return s == 1 || static_cast<double>(s) * bytes <= 64 << 20;
          };
          CHECK(fits(splits), told + ": more partial sums than are worth their memory");
          const int64_t run = (samples + splits - 1) / splits;
          CHECK((splits - 1) * run < samples, told + ": a run without samples");
          double least = clocks(1);
          for (int64_t other = 1; other <= std::min<int64_t>(64, samples) && fits(other); ++other)
            least = std::min(least, clocks(other));
          CHECK(clocks(splits) <= 1.1 * least * (1 + 1e-12), told + ": slow");
          for (int64_t fewer = 1; fewer < splits; ++fewer)
            CHECK(clocks(fewer) > 1.1 * least * (1 - 1e-12), told + ", fewer " + std::to_string(fewer));
        }
});

struct Shape {
  int64_t samples, groups, channels, outputs;  // channels and outputs of one group
  int64_t in[3], kernel[3];
};

LayerProduct layer_of(const Shape& s, DType dtype, bool tf32) {
  LayerProduct layer{};
  Patches& p = layer.inputs;
  p.dtype = layer.grads.dtype = dtype, p.samples = layer.grads.samples = s.samples, p.channels = s.channels;
  for (int axis = 0; axis < kMaxSpatial; ++axis) {
    p.in[axis] = s.in[axis], p.kernel[axis] = s.kernel[axis], p.stride[axis] = p.dilation[axis] = 1;
    p.out[axis] = layer.grads.extent[axis] = s.in[axis] - s.kernel[axis] + 1;
  }
  layer.grads.channels = s.groups * s.outputs;
  layer.groups = s.groups, layer.weight = 1, layer.power = 2, layer.tf32 = tf32;
  return layer;
}

Shape linear(int64_t samples, int64_t positions, int64_t channels, int64_t outputs) {
  return {samples, 1, channels, outputs, {1, 1, positions}, {1, 1, 1}};
}

void check_plan(const char* name, const LayerProduct& layer, const Plan& want) {
  const Scope scope(name);
  const Plan got = plan_of(layer);
  CHECK(got.way == want.way, "way " + std::to_string(static_cast<int>(got.way)));
  CHECK(got.m == want.m && got.n == want.n, "tile " + std::to_string(got.m) + " x " + std::to_string(got.n));
  CHECK(got.step == want.step, "step " + std::to_string(got.step));
  CHECK(got.halves == want.halves, "halves " + std::to_string(got.halves));
  CHECK(got.splits == want.splits, "splits " + std::to_string(got.splits));
}

struct Want {
  const char* name;
  Shape shape;
  DType dtype;
  bool tf32;
  Plan plan;
};

const Case plans_case("fisher_plan: plans", [] {
  const Shape wide = linear(4, 64, 256, 256), few = linear(4, 64, 256, 64),
              image = {32, 1, 64, 64, {1, 9, 9}, {1, 3, 3}};
  const Shape grouped = {7, 9, 2, 4, {1, 8, 7}, {1, 3, 3}}, depthwise = {4, 64, 1, 1, {1, 16, 16}, {1, 3, 3}};
  for (const Want& want : std::vector<Want>{
           {"halves", wide, DType::bf16, false, {Way::large_mma, 128, 128, 16, 2}},
           {"halves of the other kind", wide, DType::f16, true, {Way::large_mma, 128, 128, 16, 2}},
           {"floats on tensor cores", wide, DType::f32, true, {Way::large_mma, 128, 128, 8, 4}},
           {"floats", wide, DType::f32, false, {Way::fma, 64, 128, 4, 4}},
           {"doubles", wide, DType::f64, true, {Way::fma, 64, 64, 4, 4}},
           {"at most 64 outputs", few, DType::bf16, false, {Way::small_mma, 64, 64, 16, 1}},
           {"one position", linear(256, 1, 256, 256), DType::bf16, false, {Way::powers, 64, 64, 1, 6}},
           {"half a step", linear(4, 8, 256, 256), DType::bf16, false, {Way::large_mma, 128, 128, 16, 1, true}},
           {"more than half a step", linear(4, 9, 256, 256), DType::bf16, false, {Way::large_mma, 128, 128, 16, 1}},
           {"a step and a half", linear(4, 24, 256, 256), DType::f16, false, {Way::large_mma, 128, 128, 16, 1, true}},
           {"a step and a bit", linear(4, 17, 256, 64), DType::f16, false, {Way::small_mma, 64, 64, 16, 1, true}},
           {"two steps", linear(4, 25, 256, 256), DType::f16, false, {Way::large_mma, 128, 128, 16, 1}},
           {"two and a half", linear(4, 40, 256, 256), DType::bf16, false, {Way::large_mma, 128, 128, 16, 1}},
           {"floats, half a step", linear(4, 4, 256, 256), DType::f32, true, {Way::large_mma, 128, 128, 8, 1, true}},
           {"floats, a step and a half",
            linear(4, 12, 256, 64),
            DType::f32,
            true,
            {Way::small_mma, 64, 64, 8, 1, true}},
           {"floats, two steps", linear(4, 13, 256, 256), DType::f32, true, {Way::large_mma, 128, 128, 8, 1}},
           {"exact floats", linear(4, 4, 256, 256), DType::f32, false, {Way::fma, 64, 128, 4, 1}},
           {"convolution in runs", image, DType::bf16, false, {Way::small_mma, 64, 64, 16, 7}},
           {"tiles enough", linear(4, 64, 4096, 4096), DType::bf16, false, {Way::large_mma, 128, 128, 16, 1}},
           {"one sample", linear(1, 4096, 64, 64), DType::f32, false, {Way::fma, 64, 128, 4, 1}},
           {"few outputs of many groups", grouped, DType::f32, false, {Way::narrow, 4, 9, 1, 7}},
           {"one output per group", depthwise, DType::f32, false, {Way::narrow, 1, 9, 1, 4}},
           {"no samples", linear(0, 3, 8, 8), DType::f32, false, {Way::fma, 1, 1, 1, 1}},
           {"no positions", linear(3, 0, 8, 8), DType::bf16, false, {Way::fma, 1, 1, 1, 1}},
           {"no channels", linear(3, 3, 0, 8), DType::f64, false, {Way::fma, 1, 1, 1, 1}},
           {"no outputs", linear(3, 3, 8, 0), DType::f16, false, {Way::fma, 1, 1, 1, 1}}}) {
    LayerProduct layer = layer_of(want.shape, want.dtype, want.tf32);
    check_plan(want.name, layer, want.plan);
    // By shapes and types alone.
    static const double somewhere[2] = {};
    layer.inputs.data = &somewhere[0], layer.grads.data = &somewhere[1];
    layer.inputs.channel_stride = layer.grads.channel_stride = 7, layer.group_stride = 3;
    layer.weight = 0.25, layer.power = 1;
    check_plan(want.name, layer, want.plan);
  }
});

// One run needs an array where its columns would lie apart in F.
const Case partials_case("fisher_plan: partials", [] {
  struct Wanted {
    const char* name;
    Shape shape;
    int64_t channel_stride, partials;
  };
  const Shape image = {1, 1, 256, 256, {1, 4, 4}, {1, 3, 3}};
  for (const Wanted& want : std::vector<Wanted>{{"channels last", image, 1, 1},
                                                {"channels first", image, 16, 0},
                                                {"no window", linear(4, 64, 4096, 4096), 1, 0},
                                                {"one channel", {1, 1, 1, 256, {1, 9, 9}, {1, 3, 3}}, 1, 0},
                                                {"runs", {32, 1, 64, 64, {1, 9, 9}, {1, 3, 3}}, 81, 7},
                                                {"runs, channels last", {32, 1, 64, 64, {1, 9, 9}, {1, 3, 3}}, 1, 7},
                                                {"narrow", {1, 40, 2, 1, {1, 16, 16}, {1, 3, 3}}, 1, 0},
                                                {"narrow, runs", {4, 64, 2, 1, {1, 16, 16}, {1, 3, 3}}, 1, 4}}) {
    const Scope scope(want.name);
    LayerProduct layer = layer_of(want.shape, DType::bf16, false);
    layer.inputs.channel_stride = want.channel_stride;
    const int64_t got = partials_of(layer, plan_of(layer));
    CHECK(got == want.partials, "got " + std::to_string(got));
  }
});

}  // namespace
}  // namespace unlearn_ext::test
