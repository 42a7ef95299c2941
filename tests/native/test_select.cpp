// Masks, counts and order statistics against plain loops and sorts.
#include <algorithm>
#include <numeric>

#include "harness.h"
#include "kernels/pack.h"
#include "kernels/select.h"

namespace unlearn_ext::test {
namespace {

bool bit(const Buf<uint8_t>& packed, int64_t i) { return packed[i / 8] >> (i % 8) & 1; }

// ---- pack_masks, unpack_masks

using Sizes = std::vector<int64_t>;

// Packs and unpacks masks of these sizes in one call each; every one begins `offset` bytes behind an aligned address.
void pack_and_unpack(const Sizes& sizes, int64_t offset) {
  on_backends([&]<Backend B>(const Exec& exec) {
    std::vector<Buf<uint8_t>> masks, packed;
    for (const int64_t n : sizes) {
      auto& mask = masks.emplace_back(n, offset);
      packed.emplace_back((n + 7) / 8, offset);
      for (int64_t i = 0; i < n; ++i) mask[i] = below(3) ? static_cast<uint8_t>(rng()()) : 0;  // any byte but 0 is set
    }
    const auto count = static_cast<int64_t>(sizes.size());
    const auto slices = [&] {
      std::vector<Slice<2>> all;
      for (size_t t = 0; t < sizes.size(); ++t) all.push_back({{masks[t].device(), packed[t].device()}, sizes[t]});
      return all;
    };
    CHECK(pack_masks<B>(slices().data(), count, exec) == 0, "error code");
    for (size_t t = 0; t < sizes.size(); ++t) {
      const Scope scope("mask " + std::to_string(t) + " of " + std::to_string(sizes[t]) + " flags");
      CHECK(packed[t].fetch(), "a write outside the packed mask");
      for (int64_t i = 0; i < 8 * packed[t].size(); ++i)
        CHECK(bit(packed[t], i) == (i < sizes[t] && masks[t][i] != 0), "bit " + std::to_string(i));
      for (int64_t i = 0; i < packed[t].size(); ++i) packed[t][i] = static_cast<uint8_t>(rng()());
    }
    CHECK(unpack_masks<B>(slices().data(), count, exec) == 0, "error code");
    for (size_t t = 0; t < sizes.size(); ++t) {
      const Scope scope("mask " + std::to_string(t) + " of " + std::to_string(sizes[t]) + " flags");
      CHECK(masks[t].fetch(), "a write outside the mask");
      for (int64_t i = 0; i < sizes[t]; ++i) CHECK(masks[t][i] == bit(packed[t], i), "flag " + std::to_string(i));
    }
  });
}

const Case pack_case("pack_masks, one", [] {
  for (const int64_t n : thinned<int64_t>({0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 16383, 16384, 300001, 16385}, 3))
    for (const int64_t offset : {0, 1}) {
      const Scope scope("offset " + std::to_string(offset));
      pack_and_unpack({n}, offset);
    }
});

// More masks than a table holds, empty ones among them; a chunk ends inside some, and at the end of one.
const Case pack_list_case("pack_masks, lists", [] {
  Sizes sizes{0, 8192, 8193, 1, 0, 3 * 8192 + 5, 8191};
  for (int64_t i = 0; i < 240; ++i) sizes.push_back(i % 7 == 0 ? 0 : i * 13 % 97 + 1);
  for (const int64_t offset : {0, 1}) {
    const Scope scope("offset " + std::to_string(offset));
    pack_and_unpack(sizes, offset);
  }
});

// ---- selected_counts

std::vector<std::pair<const char*, Sizes>> lists() {
  Sizes many;
  for (int64_t i = 0; i < 400; ++i) many.push_back(i % 5 == 0 ? 0 : i * 13 % 97 + 1);
  using Lists = std::vector<std::pair<const char*, Sizes>>;
  return thinned(Lists{{"one scalar", {1}},
                       {"edges", {0, 1, 31, 63, 64, 65, 0, 255, 256, 257, 4095, 4096, 4097, 3 * 4096 + 5, 0}},
                       {"many", many},
                       {"long", reduced() ? Sizes{2 * 16384 + 5} : Sizes{16384, 3 * 16384 + 5, 70001}}},
                 2);
}

template <class A>
A importance() {
  switch (below(10)) {
    case 0:
      return A(0);
    case 1:
      return below(2) ? std::numeric_limits<A>::infinity() : std::numeric_limits<A>::quiet_NaN();
    default:
      return static_cast<A>(uniform(0, 1));
  }
}

template <class F>
void on_accumulators(const F& f) {
  f(Tag<float>{}), f(Tag<double>{});
}

const Case counts_case("selected_counts", [] {
  for (const auto& [name, sizes] : lists())
    on_accumulators([&]<class A>(Tag<A>) {
      on_backends([&]<Backend B>(const Exec& exec) {
        for (const int64_t n_alphas : {0, 1, 8, 33}) {
          if (n_alphas == 33 && sizes.size() < 10) continue;
          const Scope scope(std::string(name) + ", " + Format<A>::name + ", alphas " + std::to_string(n_alphas));
          const int64_t offset = n_alphas % 2;
          List<A> full(sizes, offset, importance<A>), forget(sizes, offset, importance<A>);
          std::vector<double> alphas;
          for (int64_t a = 0; a < n_alphas; ++a) alphas.push_back(a == 3 ? 0.0 : uniform(0, 3));
          const int64_t count = static_cast<int64_t>(sizes.size());
          Buf<int64_t> counts(n_alphas * count);
          for (int64_t i = 0; i < counts.size(); ++i) counts[i] = 1000;
          CHECK(selected_counts<B>(Format<A>::dtype, slices_of(full, forget).data(), count, alphas.data(), n_alphas,
                                   counts.device(), exec) == 0,
                "error code");
          CHECK(counts.fetch(), "a write outside the counts");
          full.fetch(), forget.fetch();
          full.check_unchanged("importance_full"), forget.check_unchanged("importance_forget");
          for (int64_t a = 0; a < n_alphas; ++a)
            for (int64_t t = 0; t < count; ++t) {
              int64_t want = 1000;
              for (int64_t i = 0; i < sizes[static_cast<size_t>(t)]; ++i) {
                const A d = full.before[static_cast<size_t>(t)][i], f = forget.before[static_cast<size_t>(t)][i];
                want += std::isfinite(d) && std::isfinite(f) &&
                        static_cast<Quad>(f) > static_cast<Quad>(static_cast<A>(alphas[static_cast<size_t>(a)])) * d;
              }
              CHECK(counts[a * count + t] == want, "alpha " + std::to_string(a) + ", tensor " + std::to_string(t));
            }
        }
      });
    });
});

// Pairs on the boundary forget = alpha * full and next to it, down to where the product is subnormal.
template <Backend B, class A>
void boundary(const Exec& exec) {
  constexpr int64_t kPairs = 4096;
  for (const double alpha : {1.0 / 3, 0.75, 1.5, 13.7}) {
    List<A> full({kPairs}, 0, [] {
      const int exponent = below(2) ? static_cast<int>(below(20)) : Format<A>::least - 26 + static_cast<int>(below(60));
      return static_cast<A>(std::ldexp(uniform(1, 2), exponent));
    });
    List<A> forget({kPairs}, 0, [] { return A(0); });
    int64_t want = 0;
    for (int64_t i = 0; i < kPairs; ++i) {
      const A edge = static_cast<A>(alpha) * full.now[0][i];
      const A up = std::nextafter(edge, std::numeric_limits<A>::infinity()), down = std::nextafter(edge, A(0));
      forget.now[0][i] = i % 3 == 0 ? edge : i % 3 == 1 ? up : down;
      want += static_cast<Quad>(forget.now[0][i]) > static_cast<Quad>(static_cast<A>(alpha)) * full.now[0][i];
    }
    Buf<int64_t> counts(1);
    counts[0] = 0;
    CHECK(
        selected_counts<B>(Format<A>::dtype, slices_of(full, forget).data(), 1, &alpha, 1, counts.device(), exec) == 0,
        "error code");
    counts.fetch();
    CHECK(counts[0] == want, "alpha " + std::to_string(alpha) + ": " + std::to_string(counts[0]) + " of " +
                                 std::to_string(want) + " selected");
  }
}

const Case boundary_case("selection boundary", [] {
  on_backends([]<Backend B>(const Exec& exec) { boundary<B, float>(exec), boundary<B, double>(exec); });
});

// ---- ratio_quantile

int64_t total_of(const Sizes& sizes) { return std::accumulate(sizes.begin(), sizes.end(), int64_t{0}); }

// Exactly as large as asked for: AddressSanitizer would see a byte more.
Buf<int64_t> scratch_for(const Sizes& sizes) {
  return Buf<int64_t>(select_scratch_bytes(total_of(sizes), static_cast<int64_t>(sizes.size())) / 8);
}

template <Backend B, class A, class Fill>
void quantile(const Sizes& sizes, const Exec& exec, double q, const Fill& fill) {
  List<A> full(sizes, 0, fill), forget(sizes, 0, fill);
  Buf<A> result(1);
  Buf<int64_t> n_finite(1), scratch = scratch_for(sizes);
  CHECK(ratio_quantile<B>(Format<A>::dtype, slices_of(full, forget).data(), static_cast<int64_t>(sizes.size()), q,
                          result.device(), n_finite.device(), scratch.device(), exec) == 0,
        "error code");
  CHECK(result.fetch() && n_finite.fetch() && scratch.fetch(), "a write outside the results");
  full.fetch(), forget.fetch();
  full.check_unchanged("importance_full"), forget.check_unchanged("importance_forget");
  std::vector<A> ratios;
  for (size_t t = 0; t < sizes.size(); ++t)
    for (int64_t i = 0; i < sizes[t]; ++i)
      if (const A ratio = forget.before[t][i] / full.before[t][i]; std::isfinite(ratio)) ratios.push_back(ratio);
  CHECK(n_finite[0] == static_cast<int64_t>(ratios.size()), "finite ratios: " + std::to_string(n_finite[0]));
  if (ratios.empty()) {
    CHECK(std::isnan(result[0]), "the quantile of nothing must be NaN");
    return;
  }
  std::sort(ratios.begin(), ratios.end());
  const double position = q * static_cast<double>(ratios.size() - 1);
  const size_t low = static_cast<size_t>(position), high = std::min(low + 1, ratios.size() - 1);
  const long double want = ratios[low] + (static_cast<long double>(ratios[high]) - ratios[low]) *
                                             (static_cast<long double>(position) - static_cast<long double>(low));
  CHECK(std::fabs(static_cast<double>(result[0] - want)) <= spacing<A>(static_cast<double>(want)),
        "got " + std::to_string(result[0]) + ", want " + std::to_string(want));
}

const Case quantile_case("ratio_quantile", [] {
  for (const auto& [name, sizes] : lists())
    on_accumulators([&]<class A>(Tag<A>) {
      on_backends([&]<Backend B>(const Exec& exec) {
        for (const double q : thinned<double>({0.0, 0.25, 0.9, 0.99999, 1.0}, 3)) {
          const Scope scope(std::string(name) + ", " + Format<A>::name + ", q " + std::to_string(q));
          quantile<B, A>(sizes, exec, q, importance<A>);
          if (q == 0.25) {
            quantile<B, A>(sizes, exec, q, [] { return static_cast<A>(1 + below(3)); });  // many equal ratios
            quantile<B, A>(sizes, exec, q, [] { return A(0); });                          // none is finite
          }
        }
      });
    });
});

// ---- topk_mask

// Flat indices in the order of selection: better score first, NaN last, ties by index.
template <class T>
std::vector<int64_t> ranking(const List<T>& scores, bool largest) {
  std::vector<double> flat;
  for (const Buf<T>& tensor : scores.before)
    for (int64_t i = 0; i < tensor.size(); ++i) flat.push_back(value(tensor[i]));
  std::vector<int64_t> order(flat.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const double x = flat[static_cast<size_t>(a)], y = flat[static_cast<size_t>(b)];
    if (std::isnan(x) || std::isnan(y)) return !std::isnan(x) && std::isnan(y);
    return largest ? x > y : x < y;
  });
  return order;
}

template <Backend B, class T, class Fill>
void topk(const Sizes& sizes, const Exec& exec, const std::vector<int64_t>& ks, bool largest, const Fill& fill) {
  static int64_t calls = 0;  // every second one on aligned scores
  List<T> scores(sizes, calls++ % 2, fill);
  int64_t n_nan = 0;
  for (const Buf<T>& tensor : scores.before)
    for (int64_t i = 0; i < tensor.size(); ++i) n_nan += std::isnan(value(tensor[i]));
  const std::vector<int64_t> order = ranking(scores, largest);
  for (const int64_t k : ks) {
    const Scope scope("k " + std::to_string(k));
    Sizes bytes;
    for (const int64_t n : sizes) bytes.push_back((n + 7) / 8);
    List<uint8_t> masks(bytes, 1, [] { return uint8_t{0xa5}; });
    Buf<int64_t> counted(1), scratch = scratch_for(sizes);
    counted[0] = 0;
    CHECK(topk_mask<B>(Format<T>::dtype, slices_of(scores, masks).data(), static_cast<int64_t>(sizes.size()), k,
                       largest, counted.device(), scratch.device(), exec) == 0,
          "error code");
    masks.fetch(), scores.fetch();
    CHECK(counted.fetch() && scratch.fetch(), "a write outside the results");
    scores.check_unchanged("scores");
    if (!kOnCuda) {
      CHECK(counted[0] == n_nan, "NaN scores: " + std::to_string(counted[0]));
      if (n_nan > 0) {
        masks.check_unchanged("masks");
        continue;
      }
    }
    std::vector<bool> want(order.size());
    for (int64_t r = 0; r < k; ++r) want[static_cast<size_t>(order[static_cast<size_t>(r)])] = true;
    size_t flat = 0;
    for (size_t t = 0; t < sizes.size(); ++t)
      for (int64_t i = 0; i < 8 * bytes[t]; ++i)
        CHECK(bit(masks.now[t], i) == (i < sizes[t] && want[flat++]),
              "tensor " + std::to_string(t) + ", bit " + std::to_string(i));
  }
}

template <class T>
T ordinary() {
  return nearest<T>(uniform(-2, 2));
}
template <class T>
T tied() {  // few values, both zeros and the infinities among them
  constexpr double kValues[] = {-1, -0.0, 0.0, 0.0, 1, 1, 2, INFINITY, -INFINITY};
  return nearest<T>(kValues[below(9)]);
}
template <class T>
T any_number() {
  const T x = any_bits<T>();
  return std::isnan(value(x)) ? nearest<T>(0.5) : x;
}

const Case topk_case("topk_mask", [] {
  for (const auto& [name, sizes] : lists()) {
    const int64_t n = total_of(sizes);
    std::vector<int64_t> ks = {(n + 1) / 2};
    if (n > 1 && n < 100000) ks = {1, n / 3, n - 1, n};
    on_dtypes([&]<class T>(Tag<T>) {
      on_backends([&]<Backend B>(const Exec& exec) {
        const Scope scope(name);
        topk<B, T>(sizes, exec, {ks[ks.size() / 2]}, true, tied<T>);
        topk<B, T>(sizes, exec, {(n + 1) / 2}, false, [] { return nearest<T>(-1.5); });
        if (reduced()) return;
        topk<B, T>(sizes, exec, ks, true, ordinary<T>);
        topk<B, T>(sizes, exec, {ks[ks.size() / 2]}, false, any_number<T>);
        topk<B, T>(sizes, exec, {ks[ks.size() / 2], n}, true,
                   [] { return nearest<T>(below(50) ? uniform(-1, 1) : NAN); });
      });
    });
  }
});

}  // namespace
}  // namespace unlearn_ext::test
