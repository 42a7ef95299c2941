// Runs the CUDA kernels at sizes that show their traffic, and prints what the CUDA checker counted: one line of JSON
// per case, the case's name first. traffic.py holds the figures to traffic.json.
//
// Values do not matter here, except where a kernel's path depends on them: test_*.cpp checks them.
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <functional>
#include <numeric>
#include <random>

#include "core/simt.h"
#include "kernels/dampen.h"
#include "kernels/fisher.h"
#include "kernels/fisher_layers.h"
#include "kernels/gram.h"
#include "kernels/masked.h"
#include "kernels/pack.h"
#include "kernels/select.h"
#include "traffic.h"

namespace unlearn_ext {
namespace {

constexpr Backend kCuda = Backend::cuda;
const Exec kExec{};

std::mt19937_64 engine;
double uniform(double low, double high) { return low + (high - low) * static_cast<double>(engine() >> 11) * 0x1p-53; }

template <class T>
constexpr DType kType = std::is_same_v<T, double>     ? DType::f64
                        : std::is_same_v<T, Half>     ? DType::f16
                        : std::is_same_v<T, BFloat16> ? DType::bf16
                                                      : DType::f32;

void must(int error) {
  if (error != 0) std::printf("error %d\n", error), std::exit(1);
}

// The least bytes a case can move; arrays raise it as they are made.
struct Floor {
  uint64_t bytes = 0;
  std::map<std::string, uint64_t> read;  // by array, of those that are read
} least;

enum class Role { in, out, inout, scratch };

template <class T>
T* array(const std::string& name, Role role, int64_t n, int64_t offset = 0) {
  T* data = static_cast<T*>(
      simt::traffic::array(name, static_cast<uint64_t>(n) * sizeof(T), static_cast<uint64_t>(offset) * sizeof(T)));
  const uint64_t bytes = static_cast<uint64_t>(n) * sizeof(T);
  if (role == Role::in || role == Role::inout) least.bytes += bytes, least.read[name] += bytes;
  if (role == Role::out || role == Role::inout) least.bytes += bytes;
  return data;
}

template <class T>
T* filled(const std::string& name, Role role, int64_t n, double low, double high, int64_t offset = 0) {
  T* data = array<T>(name, role, n, offset);
  for (int64_t i = 0; i < n; ++i) data[i] = store_as<T>(static_cast<acc_t<T>>(uniform(low, high)));
  return data;
}

// ---- Cases

std::string round3(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3f", x);
  return text;
}

void report(const char* name, const simt::Stats& before) {
  uint64_t instructions = 0, asked = 0, useful = 0, sectors = 0, distinct = 0, loaded = 0, inputs = 0;
  std::string detail;
  for (const auto& [array, counts] : simt::traffic::arrays()) {
    simt::traffic::Count both = counts.loads;
    both += counts.stores;
    instructions += both.instructions, asked += both.asked, useful += both.useful, sectors += both.sectors,
        distinct += both.distinct;
    if (const auto read = least.read.find(array); read != least.read.end())
      loaded += counts.loads.useful, inputs += read->second;
    for (const auto& [what, c] : {std::pair{"loads", counts.loads}, std::pair{"stores", counts.stores}}) {
      char text[256];
      std::snprintf(text, sizeof text,
                    "%s\"%s %s\": {\"instructions\": %" PRIu64 ", \"asked\": %" PRIu64 ", \"useful\": %" PRIu64
                    ", \"sectors\": %" PRIu64 ", \"distinct\": %" PRIu64 "}",
                    detail.empty() ? "" : ", ", array.c_str(), what, c.instructions, c.asked, c.useful, c.sectors,
                    c.distinct);
      if (c.instructions) detail += text;
    }
  }
  const auto& shared = simt::traffic::shared();
  const simt::Stats& now = simt::stats();
  const double floor = static_cast<double>(least.bytes);
  std::printf(
      "{\"case\": \"%s\", \"floor\": %" PRIu64
      ", \"memory\": %s, \"moved\": %s, \"efficiency\": %s, \"width\": %s, "
      "\"passes\": %s, "
      "\"wavefronts\": %" PRIu64 ", \"conflicts\": %s, \"barriers\": %" PRIu64
      ", \"mmas\": %.10g"
      ", \"blocks\": %" PRIu64 ", \"launches\": %" PRIu64 ", \"arrays\": {%s}}\n",
      name, least.bytes, round3(static_cast<double>(distinct) * simt::traffic::kSector / floor).c_str(),
      round3(static_cast<double>(sectors) * simt::traffic::kSector / floor).c_str(),
      round3(static_cast<double>(useful) / (static_cast<double>(sectors) * simt::traffic::kSector)).c_str(),
      round3(static_cast<double>(asked) / (32 * static_cast<double>(instructions))).c_str(),
      round3(static_cast<double>(loaded) / static_cast<double>(inputs)).c_str(), shared.wavefronts,
      round3(shared.least ? static_cast<double>(shared.wavefronts) / static_cast<double>(shared.least) - 1 : 0.0)
          .c_str(),
      now.barriers - before.barriers, static_cast<double>(now.half_mmas - before.half_mmas) / 2,
      now.blocks - before.blocks, now.launches - before.launches, detail.c_str());
  std::fflush(stdout);
}

struct Case {
  const char* name;
  std::function<void()> run;
};

// ---- Lists

// A small network: layers of some size, biases and norms.
const std::vector<int64_t> kSizes = {262144, 147456, 36864, 64, 64, 40960, 1000, 128, 8192};

template <class... T>
struct Lists {
  std::vector<Slice<sizeof...(T)>> slices;

  int64_t count() const { return static_cast<int64_t>(slices.size()); }
};

// Lists of the types given, of these roles, all values in (0, 1]; element k of `offsets` is how far list k starts from
// an aligned address, in scalars.
template <class... T, size_t N = sizeof...(T)>
Lists<T...> lists(const std::array<const char*, N>& names, const std::array<Role, N>& roles,
                  const std::array<int64_t, N>& offsets = {}) {
  Lists<T...> all;
  for (const int64_t n : kSizes) {
    size_t k = 0;
    Slice<N> slice{};
    slice.numel = n;
    ((slice.data[k] = filled<T>(names[k], roles[k], n, 0.01, 1, offsets[k]), ++k), ...);
    all.slices.push_back(slice);
  }
  return all;
}

// The same with packed masks behind them: runs of 2048 scalars in turn wholly set, wholly clear, and at random.
// What need not be moved is taken off the floor by whole sectors: `acts` says which bits the op acts on, `reads`
// whether it needs the values there.
template <int N>
std::vector<Slice<N + 1>> masked(const std::vector<Slice<N>>& slices, const std::array<uint64_t, N>& bytes,
                                 const std::array<bool, N>& written, bool on_cleared) {
  std::vector<Slice<N + 1>> all;
  for (const Slice<N>& slice : slices) {
    Slice<N + 1> with{};
    with.numel = slice.numel;
    std::copy_n(slice.data, N, with.data);
    const int64_t n = (slice.numel + 7) / 8;
    auto* bits = array<uint8_t>("mask", Role::in, n);
    for (int64_t i = 0; i < n; ++i)
      bits[i] = i / 256 % 3 == 0 ? 0xff : i / 256 % 3 == 1 ? 0 : static_cast<uint8_t>(engine());
    with.data[N] = bits;
    const auto acts = [&](int64_t i) { return ((bits[i / 8] >> i % 8 & 1) != 0) != on_cleared; };
    for (size_t k = 0; k < N; ++k) {
      const auto per = static_cast<int64_t>(simt::traffic::kSector / bytes[k]);
      for (int64_t first = 0; first < slice.numel; first += per) {
        const int64_t here = std::min(per, slice.numel - first);
        int64_t acting = 0;
        for (int64_t i = 0; i < here; ++i) acting += acts(first + i);
        const auto size = static_cast<uint64_t>(here) * bytes[k];
        // ClearMasked needs no value where it writes the whole sector.
        if (acting == 0 || (on_cleared && acting == here)) least.bytes -= size;
        if (acting == 0 && written[k]) least.bytes -= size;
      }
    }
    all.push_back(with);
  }
  return all;
}

template <class T>
void accumulate(std::array<int64_t, 2> offsets = {}) {
  const auto l = lists<acc_t<T>, T>({"fisher", "grads"}, {Role::inout, Role::in}, offsets);
  must(fisher_accumulate<kCuda>(kType<T>, l.slices.data(), l.count(), 1.0, 0.9, 2, kExec));
}

template <class T>
void dampen() {
  using A = acc_t<T>;
  const auto l = lists<T, A, A>({"params", "full", "forget"}, {Role::inout, Role::in, Role::in});
  must(selective_dampen<kCuda>(kType<T>, l.slices.data(), l.count(), {1, 1, 1, 0, 1}, kExec));
}

template <class T>
void sgd() {
  using A = acc_t<T>;
  const auto l = lists<T, A, T>({"params", "momentum", "grads"}, {Role::inout, Role::inout, Role::in});
  const auto m = masked<3>(l.slices, {sizeof(T), sizeof(A), sizeof(T)}, {true, true, false}, false);
  must(masked_sgd<kCuda>(kType<T>, m.data(), l.count(), {0.1, 0.9, 0, 0, false, false}, kExec));
}

template <class T>
void adamw() {
  using A = acc_t<T>;
  const auto l = lists<T, A, A, T>({"params", "exp_avgs", "exp_avg_sqs", "grads"},
                                   {Role::inout, Role::inout, Role::inout, Role::in});
  const auto m = masked<4>(l.slices, {sizeof(T), sizeof(A), sizeof(A), sizeof(T)}, {true, true, true, false}, false);
  must(masked_adamw<kCuda>(kType<T>, m.data(), l.count(), {0.01, 0.9, 0.999, 1e-8, 0.01, false}, 3, nullptr, DType::f32,
                           nullptr, kExec));
}

template <class T>
void clear() {
  const auto l = lists<T>({"grads"}, {Role::inout});
  const auto m = masked<1>(l.slices, {sizeof(T)}, {true}, true);
  must(apply_mask<kCuda>(kType<T>, m.data(), l.count(), kExec));
}

// ---- Selections

void counts() {
  const auto l = lists<float, float>({"full", "forget"}, {Role::in, Role::in});
  std::vector<double> alphas;
  for (int i = 0; i < 32; ++i) alphas.push_back(0.1 * i);
  auto* counts = array<int64_t>("counts", Role::inout, 32 * l.count());
  must(selected_counts<kCuda>(DType::f32, l.slices.data(), l.count(), alphas.data(), 32, counts, kExec));
}

int64_t total() { return std::accumulate(kSizes.begin(), kSizes.end(), int64_t{0}); }

void quantile() {
  const auto l = lists<float, float>({"full", "forget"}, {Role::in, Role::in});
  auto* scratch = array<char>("scratch", Role::scratch, select_scratch_bytes(total(), l.count()));
  auto* result = array<float>("result", Role::out, 1);
  auto* n_finite = array<int64_t>("n_finite", Role::out, 1);
  must(ratio_quantile<kCuda>(DType::f32, l.slices.data(), l.count(), 0.9, result, n_finite, scratch, kExec));
}

template <class T>
void topk(bool tied) {
  std::vector<Slice<2>> slices;
  for (const int64_t n : kSizes) {
    auto* scores = filled<T>("scores", Role::in, n, 0, 1);
    if (tied)
      for (int64_t i = 0; i < n; ++i) scores[i] = store_as<T>(static_cast<acc_t<T>>(engine() % 16));
    slices.push_back({{scores, array<uint8_t>("mask", Role::out, (n + 7) / 8)}, n});
  }
  const auto count = static_cast<int64_t>(slices.size());
  auto* scratch = array<char>("scratch", Role::scratch, select_scratch_bytes(total(), count));
  int64_t n_nan = 0;
  must(topk_mask<kCuda>(kType<T>, slices.data(), count, total() / 10, true, &n_nan, scratch, kExec));
}

void pack() {
  std::vector<Slice<2>> slices;
  for (const int64_t n : kSizes)
    slices.push_back({{array<uint8_t>("mask", Role::in, n), array<uint8_t>("packed", Role::out, (n + 7) / 8)}, n});
  must(pack_masks<kCuda>(slices.data(), static_cast<int64_t>(slices.size()), kExec));
}

void unpack() {
  std::vector<Slice<2>> slices;
  for (const int64_t n : kSizes)
    slices.push_back({{array<uint8_t>("mask", Role::out, n), array<uint8_t>("packed", Role::in, (n + 7) / 8)}, n});
  must(unpack_masks<kCuda>(slices.data(), static_cast<int64_t>(slices.size()), kExec));
}

// ---- Layers

// Fills in dense strides, channels first or last.
template <class P>
void lay_out(P& p, int64_t channels, const int64_t (&extent)[3], bool channels_last) {
  int64_t next = 1;
  if (channels_last) p.channel_stride = 1, next = channels;
  for (int axis = 2; axis >= 0; --axis) p.space_stride[axis] = next, next *= extent[axis];
  if (!channels_last) p.channel_stride = next, next *= channels;
  p.sample_stride = next;
}

template <class T>
Positions positions(const char* name, int64_t samples, int64_t channels, const int64_t (&extent)[3],
                    bool channels_last) {
  Positions p{};
  p.dtype = kType<T>, p.samples = samples, p.channels = channels;
  std::copy_n(extent, 3, p.extent);
  lay_out(p, channels, extent, channels_last);
  p.data = filled<T>(name, Role::in, samples * p.sample_stride, -1, 1);
  return p;
}

struct Shape {
  int64_t samples, groups, channels, outputs;  // channels and outputs of one group
  int64_t in[3], kernel[3];
};

template <class T>
Patches patches(const Shape& s, bool channels_last) {
  Patches p{};
  p.dtype = kType<T>, p.samples = s.samples, p.channels = s.channels;
  for (int axis = 0; axis < 3; ++axis) {
    p.in[axis] = p.out[axis] = s.in[axis], p.kernel[axis] = s.kernel[axis];
    p.stride[axis] = p.dilation[axis] = 1, p.padding[axis] = s.kernel[axis] / 2;
  }
  lay_out(p, s.groups * s.channels, p.in, channels_last);
  p.data = filled<T>("inputs", Role::in, s.samples * p.sample_stride, -1, 1);
  return p;
}

template <class T>
void weight(const Shape& s, bool channels_last, bool tf32 = false) {
  LayerProduct layer{};
  layer.inputs = patches<T>(s, channels_last);
  layer.grads = positions<T>("grads", s.samples, s.groups * s.outputs, layer.inputs.out, channels_last);
  layer.groups = s.groups, layer.group_stride = s.channels * layer.inputs.channel_stride;
  layer.weight = 1, layer.power = 2, layer.tf32 = tf32;
  const int64_t elements = s.groups * s.outputs * layer.inputs.columns();
  auto* fisher = array<acc_t<T>>("fisher", Role::inout, elements);
  const int64_t runs = fisher_weight_partials<kCuda>(layer);
  auto* partial = runs > 0 ? array<acc_t<T>>("partial", Role::scratch, runs * elements) : nullptr;
  must(fisher_weight<kCuda>(layer, fisher, partial, kExec));
}

template <class T>
void channels(int64_t samples, int64_t n, const int64_t (&extent)[3], bool channels_last, bool normalized) {
  const Positions grads = positions<T>("grads", samples, n, extent, channels_last);
  const Positions inputs = normalized ? positions<T>("normalized", samples, n, extent, channels_last) : grads;
  auto* fisher = array<acc_t<T>>("fisher", Role::inout, n);
  const Positions* scales = normalized ? &inputs : nullptr;
  const int64_t runs = fisher_channels_partials<kCuda>(grads, scales);
  auto* partial = runs > 1 ? array<acc_t<T>>("partial", Role::scratch, runs * n) : nullptr;
  must(fisher_channels<kCuda>(grads, scales, 1, 2, fisher, partial, kExec));
}

void embedding() {
  constexpr int64_t kSamples = 16, kPositions = 64, kRows = 1000;
  const Positions grads = positions<float>("grads", kSamples, 256, {1, 1, kPositions}, true);
  std::vector<int64_t> index(kSamples * kPositions), order(index.size());
  for (int64_t& i : index) i = engine() % 4 ? static_cast<int64_t>(engine() % kRows) : 7;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return index[static_cast<size_t>(a)] < index[static_cast<size_t>(b)]; });
  const auto n = static_cast<int64_t>(order.size());
  auto *sorted = array<int64_t>("indices", Role::in, n), *from = array<int64_t>("order", Role::in, n);
  int64_t touched = 0;
  for (int64_t i = 0; i < n; ++i) {
    from[i] = order[static_cast<size_t>(i)], sorted[i] = index[static_cast<size_t>(from[i])];
    touched += i == 0 || sorted[i] != sorted[i - 1];
  }
  auto* fisher = array<float>("fisher", Role::scratch, kRows * 256);
  least.bytes += 2 * static_cast<uint64_t>(touched) * 256 * sizeof(float);
  must(fisher_embedding<kCuda>(grads, sorted, from, kRows, -1, 1, 2, fisher, kExec));
}

template <class T>
void unfold() {
  const Patches p = patches<T>({4, 1, 32, 1, {1, 16, 16}, {1, 3, 3}}, false);
  auto* rows = array<T>("rows", Role::out, p.rows() * p.columns());
  must(unfold_rows<kCuda>(p, 0, p.rows(), rows, kExec));
}

void symmetric() {
  constexpr int64_t kD = 512;
  auto* block = filled<float>("block", Role::in, kD * kD, -1, 1);
  auto* gram = filled<float>("gram", Role::inout, kD * kD, -1, 1);
  least.bytes = (kD * (kD + 1) / 2 * 2 + kD * kD) * sizeof(float);  // a triangle of each is read, gram is written
  must(add_symmetric<kCuda>(DType::f32, block, 0, kD, DType::f32, gram, kD, kExec));
}

const std::vector<Case> kCases = {
    {"fisher_accumulate f32", [] { accumulate<float>(); }},
    {"fisher_accumulate bf16", [] { accumulate<BFloat16>(); }},
    {"fisher_accumulate f32, all one scalar off", [] { accumulate<float>({1, 1}); }},
    {"fisher_accumulate bf16, all two scalars off", [] { accumulate<BFloat16>({2, 2}); }},
    {"fisher_accumulate f32, off by different scalars", [] { accumulate<float>({1, 2}); }},
    {"selective_dampen f32", [] { dampen<float>(); }},
    {"selective_dampen bf16", [] { dampen<BFloat16>(); }},
    {"masked_sgd f32", [] { sgd<float>(); }},
    {"masked_sgd bf16", [] { sgd<BFloat16>(); }},
    {"masked_adamw f32", [] { adamw<float>(); }},
    {"masked_adamw bf16", [] { adamw<BFloat16>(); }},
    {"apply_mask f32", [] { clear<float>(); }},
    {"apply_mask bf16", [] { clear<BFloat16>(); }},
    {"selected_counts f32", counts},
    {"ratio_quantile f32", quantile},
    {"topk_mask f32", [] { topk<float>(false); }},
    {"topk_mask f64", [] { topk<double>(false); }},
    {"topk_mask bf16", [] { topk<BFloat16>(false); }},
    {"topk_mask f32, ties", [] { topk<float>(true); }},
    {"pack_mask", pack},
    {"unpack_mask", unpack},
    {"unfold_rows bf16", unfold<BFloat16>},
    {"add_symmetric f32", symmetric},
    {"fisher_channels f32, channels last", [] { channels<float>(16, 64, {1, 16, 16}, true, false); }},
    {"fisher_channels bf16, channels last", [] { channels<BFloat16>(16, 64, {1, 16, 16}, true, false); }},
    {"fisher_channels f32, channels first", [] { channels<float>(16, 64, {1, 16, 16}, false, true); }},
    {"fisher_channels f32, one position", [] { channels<float>(1024, 512, {1, 1, 1}, true, false); }},
    {"fisher_embedding f32", embedding},
    {"fisher_weight bf16, linear", [] { weight<BFloat16>({4, 1, 256, 256, {1, 1, 64}, {1, 1, 1}}, true); }},
    {"fisher_weight tf32, linear", [] { weight<float>({4, 1, 256, 256, {1, 1, 64}, {1, 1, 1}}, true, true); }},
    {"fisher_weight f32, linear", [] { weight<float>({4, 1, 256, 256, {1, 1, 64}, {1, 1, 1}}, true); }},
    {"fisher_weight bf16, linear, 8 positions",
     [] { weight<BFloat16>({32, 1, 256, 256, {1, 1, 8}, {1, 1, 1}}, true); }},
    {"fisher_weight bf16, linear, 20 positions",
     [] { weight<BFloat16>({12, 1, 256, 256, {1, 1, 20}, {1, 1, 1}}, true); }},
    {"fisher_weight tf32, linear, 4 positions",
     [] { weight<float>({32, 1, 256, 256, {1, 1, 4}, {1, 1, 1}}, true, true); }},
    {"fisher_weight f32, one position", [] { weight<float>({256, 1, 256, 256, {1, 1, 1}, {1, 1, 1}}, true); }},
    {"fisher_weight bf16, conv 3x3, channels last",
     [] { weight<BFloat16>({8, 1, 128, 64, {1, 7, 7}, {1, 3, 3}}, true); }},
    {"fisher_weight bf16, conv 3x3, channels first",
     [] { weight<BFloat16>({8, 1, 128, 64, {1, 7, 7}, {1, 3, 3}}, false); }},
    {"fisher_weight bf16, conv 3x3, channels last, one run",
     [] { weight<BFloat16>({1, 1, 128, 128, {1, 7, 7}, {1, 3, 3}}, true); }},
    {"fisher_weight bf16, conv 3x3, channels last, one sample",
     [] { weight<BFloat16>({1, 1, 256, 256, {1, 4, 4}, {1, 3, 3}}, true); }},
    {"fisher_weight bf16, conv 3x3, channels first, one sample",
     [] { weight<BFloat16>({1, 1, 64, 128, {1, 4, 4}, {1, 3, 3}}, false); }},
    {"fisher_weight f32, conv 3x3, channels last, one sample",
     [] { weight<float>({1, 1, 64, 64, {1, 4, 4}, {1, 3, 3}}, true); }},
    {"fisher_weight bf16, conv 3x3, channels last, runs added",
     [] { weight<BFloat16>({32, 1, 64, 64, {1, 7, 7}, {1, 3, 3}}, true); }},
    {"fisher_weight f32, conv 3x3, channels last, runs added",
     [] { weight<float>({16, 1, 64, 64, {1, 7, 7}, {1, 3, 3}}, true); }},
    {"fisher_weight f32, depthwise 3x3", [] { weight<float>({4, 64, 1, 1, {1, 14, 14}, {1, 3, 3}}, true); }},
};

}  // namespace
}  // namespace unlearn_ext

bool counters_are_right();  // traffic_known.cpp

// traffic_cases [text]: all cases, or those whose name contains the text.
int main(int argc, char** argv) {
  using namespace unlearn_ext;
  if (!counters_are_right()) return 1;
  for (const Case& c : kCases) {
    if (argc > 1 && std::string(c.name).find(argv[1]) == std::string::npos) continue;
    simt::traffic::forget();
    least = {};
    engine.seed(20240);
    const simt::Stats before = simt::stats();
    c.run();
    report(c.name, before);
  }
  return 0;
}
