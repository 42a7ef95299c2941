// Indices past 2^31. Tensors live in sparse memory, and only the first and last parts of the work are run: those touch
// the ends of every tensor, which is where a truncated index shows.
#if !defined(UNLEARN_TEST_GPU)

#include <stdexcept>

#include <sys/mman.h>

#include "core/shuffled.h"
#include "harness.h"
#include "kernels/fisher.h"
#include "kernels/fisher_layers.h"
#include "kernels/gram.h"
#include "kernels/masked.h"
#include "kernels/pack.h"
#include "kernels/project.h"
#include "kernels/select.h"

namespace unlearn_ext::test {
namespace {

constexpr int64_t kHuge = (int64_t{1} << 31) + 4096 + 77;

// n zeros, of which only the touched pages exist.
template <class T>
class Sparse {
 public:
  explicit Sparse(int64_t n) : n_(n) {
    p_ = static_cast<T*>(
        mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (p_ == MAP_FAILED) throw std::runtime_error("cannot map " + std::to_string(bytes()) + " bytes");
  }
  ~Sparse() { munmap(p_, bytes()); }
  Sparse(const Sparse&) = delete;
  Sparse& operator=(const Sparse&) = delete;

  T* data() { return p_; }
  T& operator[](int64_t i) { return p_[i]; }
  T& last(int64_t i) { return p_[n_ - 1 - i]; }

 private:
  size_t bytes() const { return static_cast<size_t>(n_) * sizeof(T); }
  int64_t n_;
  T* p_;
};

#if defined(UNLEARN_EMULATE)
template <class F>
void on_ends(const F& f) {
  simt::config().ends_only = true;
  f.template operator()<Backend::cuda>(Exec{});
  simt::config().ends_only = false;
}
#else
void ends(int64_t n, int64_t, Body body, const void* context) {
  body(context, 0, std::min<int64_t>(n, 2));
  if (n > 2) body(context, std::max<int64_t>(n - 2, 2), n);
}
template <class F>
void on_ends(const F& f) {
  on_backends([&]<Backend B>(const Exec& exec) {
    if (exec.parallel_for == &whole) f.template operator()<B>(Exec{nullptr, &ends});
  });
}
#endif

const Case lists_case("huge lists", [] {
  on_ends([]<Backend B>(const Exec& exec) {
    Sparse<float> fisher(kHuge);
    Sparse<BFloat16> grads(kHuge);
    const Slice<2> slice{{fisher.data(), grads.data()}, kHuge};
    for (int64_t i = 0; i < 40; ++i) grads[i] = grads.last(i) = nearest<BFloat16>(static_cast<double>(i));
    CHECK(fisher_accumulate<B>(DType::bf16, &slice, 1, 1.0, 1.0, 2, exec) == 0, "error code");
    for (int64_t i = 0; i < 40; ++i)
      CHECK(fisher[i] == static_cast<float>(i * i) && fisher.last(i) == fisher[i], "scalar " + std::to_string(i));
  });
});

const Case masked_case("huge masked lists", [] {
  on_ends([]<Backend B>(const Exec& exec) {
    Sparse<float> params(kHuge), buffers(kHuge), grads(kHuge);
    Sparse<uint8_t> mask((kHuge + 7) / 8);
    const auto set = [&](int64_t i) { mask[i / 8] = static_cast<uint8_t>(mask[i / 8] | 1 << i % 8); };
    for (int64_t i = 0; i < 40; ++i) grads[i] = grads.last(i) = 1.f;
    for (int64_t i = 0; i < 40; i += 3) set(i), set(kHuge - 1 - i);
    const Slice<4> step{{params.data(), buffers.data(), grads.data(), mask.data()}, kHuge};
    CHECK(masked_sgd<B>(DType::f32, &step, 1, SgdConstants{0.5, 0.9, 0, 0, false, false}, exec) == 0, "error code");
    const Slice<2> clear{{grads.data(), mask.data()}, kHuge};
    CHECK(apply_mask<B>(DType::f32, &clear, 1, exec) == 0, "error code");
    for (int64_t i = 0; i < 40; ++i) {
      const float kept = i % 3 == 0 ? 1.f : 0.f;
      CHECK(params[i] == -0.5f * kept && params.last(i) == params[i], "param " + std::to_string(i));
      CHECK(buffers[i] == kept && buffers.last(i) == kept, "buffer " + std::to_string(i));
      CHECK(grads[i] == kept && grads.last(i) == kept, "grad " + std::to_string(i));
    }
  });
});

const Case pack_case("huge masks", [] {
  on_ends([]<Backend B>(const Exec& exec) {
    Sparse<uint8_t> mask(kHuge), packed((kHuge + 7) / 8), unpacked(kHuge);
    for (int64_t i = 0; i < 12; i += 3) mask[i] = mask.last(i) = 1;
    const Slice<2> pack{{mask.data(), packed.data()}, kHuge}, unpack{{unpacked.data(), packed.data()}, kHuge};
    CHECK(pack_masks<B>(&pack, 1, exec) == 0, "error code");
    CHECK(unpack_masks<B>(&unpack, 1, exec) == 0, "error code");
    for (int64_t i = 0; i < 12; ++i) {
      const int64_t far = kHuge - 1 - i;
      CHECK((packed[far / 8] >> far % 8 & 1) == (i % 3 == 0), "bit " + std::to_string(i));
      CHECK(unpacked[i] == (i % 3 == 0) && unpacked.last(i) == unpacked[i], "flag " + std::to_string(i));
    }
  });
});

const Case counts_case("huge selections", [] {
  on_ends([]<Backend B>(const Exec& exec) {
    Sparse<float> full(kHuge), forget(kHuge);
    for (int64_t i = 0; i < 40; ++i) {
      full[i] = full.last(i) = 1.f;
      forget[i] = static_cast<float>(1 + i), forget.last(i) = static_cast<float>(101 + i);
    }
    const Slice<2> slice{{full.data(), forget.data()}, kHuge};
    const double alpha = 11.5;
    Buf<int64_t> counts(1), n_finite(1);
    counts[0] = 0;
    CHECK(selected_counts<B>(DType::f32, &slice, 1, &alpha, 1, counts.device(), exec) == 0, "error code");
    counts.fetch();
    CHECK(counts[0] == 29 + 40, std::to_string(counts[0]) + " selected");

    Buf<float> result(1);
    Sparse<char> scratch(select_scratch_bytes(kHuge, 1));
    CHECK(ratio_quantile<B>(DType::f32, &slice, 1, 1.0, result.device(), n_finite.device(), scratch.data(), exec) == 0,
          "error code");
    result.fetch(), n_finite.fetch();
    CHECK(n_finite[0] == 80 && result[0] == 140.f, "quantile " + std::to_string(result[0]));
  });
});

// Two samples that far apart; the first is zero, the second has gradients of 1 and inputs of 1 to 8 at every position.
constexpr int64_t kFar = kHuge / 8 * 8, kChannels = 8;

template <class T>
struct FarSamples {
  int64_t positions, outputs;
  Sparse<T> inputs{kFar + positions * kChannels}, grads{kFar + positions * outputs};

  FarSamples(int64_t positions_, int64_t outputs_) : positions(positions_), outputs(outputs_) {
    for (int64_t i = 0; i < positions * kChannels; ++i)
      inputs[kFar + i] = nearest<T>(static_cast<double>(i % kChannels + 1));
    for (int64_t i = 0; i < positions * outputs; ++i) grads[kFar + i] = nearest<T>(1.0);
  }
  Positions along(T* data, int64_t channels) const {
    return {Format<T>::dtype, 2, channels, {1, 1, positions}, kFar, 1, {0, 0, channels}, data};
  }
};

template <Backend B, class T>
void far_weight(int64_t positions, int64_t outputs, bool tf32, const Exec& exec) {
  const Scope scope(std::string(Format<T>::name) + ", positions " + std::to_string(positions));
  using A = acc_t<T>;
  FarSamples<T> far(positions, outputs);
  LayerProduct layer{};
  layer.inputs = {Format<T>::dtype, 2,    kChannels, {1, 1, positions}, {1, 1, positions}, {1, 1, 1}, {1, 1, 1}, {},
                  {1, 1, 1},        kFar, 1,         {0, 0, kChannels}, far.inputs.data()};
  layer.grads = far.along(far.grads.data(), outputs);
  layer.groups = 1, layer.weight = 1, layer.power = 2, layer.tf32 = tf32;
  const int64_t n = outputs * kChannels, splits = fisher_weight_partials<B>(layer);
  Buf<A> fisher(n), partial(splits * n);
  for (int64_t i = 0; i < n; ++i) fisher[i] = 0;
  for (int64_t i = 0; i < partial.size(); ++i) partial[i] = static_cast<A>(NAN);
  CHECK(fisher_weight<B>(layer, fisher.device(), splits > 0 ? partial.device() : nullptr, exec) == 0, "error code");
  fisher.fetch();
  for (int64_t i = 0; i < n; ++i) {
    const double sum = static_cast<double>(positions * (i % kChannels + 1));
    CHECK(static_cast<double>(fisher[i]) == sum * sum, std::to_string(i));
  }
}

template <Backend B, class T>
void far_positions(const Exec& exec) {
  const Scope scope(Format<T>::name);
  using A = acc_t<T>;
  constexpr int64_t kPositions = 5;
  FarSamples<T> far(kPositions, kChannels);
  const Positions g = far.along(far.grads.data(), kChannels), x = far.along(far.inputs.data(), kChannels);
  Buf<A> fisher(kChannels), table(kChannels);
  Buf<int64_t> indices(2 * kPositions), order(2 * kPositions);
  for (int64_t c = 0; c < kChannels; ++c) fisher[c] = table[c] = 0;
  for (int64_t i = 0; i < 2 * kPositions; ++i) indices[i] = 0, order[i] = i;
  CHECK(fisher_channels_partials<B>(g, &x) == 1, "runs of so little");
  CHECK(fisher_channels<B>(g, &x, 1.0, 2, fisher.device(), nullptr, exec) == 0, "error code");
  CHECK(fisher_embedding<B>(x, indices.device(), order.device(), 1, -1, 1.0, 2, table.device(), exec) == 0,
        "error code");
  fisher.fetch(), table.fetch();
  for (int64_t c = 0; c < kChannels; ++c) {
    const double sum = static_cast<double>(kPositions * (c + 1));
    CHECK(static_cast<double>(fisher[c]) == sum * sum, "channel " + std::to_string(c));
    CHECK(static_cast<double>(table[c]) == sum * sum, "embedding " + std::to_string(c));
  }
}

const Case far_case("huge strides of samples", [] {
  on_backends([]<Backend B>(const Exec& exec) {
    far_weight<B, float>(1, 16, false, exec);
    far_weight<B, float>(5, 16, false, exec);
    far_weight<B, float>(5, 16, true, exec);
    far_weight<B, float>(40, 1, false, exec);
    far_weight<B, double>(5, 16, false, exec);
    far_weight<B, BFloat16>(5, 16, false, exec);
    far_weight<B, BFloat16>(5, 15, false, exec);
    far_positions<B, float>(exec), far_positions<B, Half>(exec);
  });
});

#if defined(UNLEARN_EMULATE)  // the CPU kernel tells NaN by what it has not counted, and so has to see every score
const Case topk_case("huge top-k", [] {
  on_ends([]<Backend B>(const Exec& exec) {
    Sparse<float> scores(kHuge);
    Sparse<uint8_t> mask((kHuge + 7) / 8);
    Sparse<char> scratch(select_scratch_bytes(kHuge, 1));
    // Ten scores of 2 at the end, and ties of 1 at both ends for the other places: the near ones win.
    for (int64_t i = 0; i < 30; ++i) scores[i] = 1.f, scores.last(i) = i < 10 ? 2.f : 1.f;
    const Slice<2> slice{{scores.data(), mask.data()}, kHuge};
    int64_t n_nan = 0;
    CHECK(topk_mask<B>(DType::f32, &slice, 1, 45, true, &n_nan, scratch.data(), exec) == 0, "error code");
    for (int64_t i = 0; i < 30; ++i) {
      const int64_t far = kHuge - 1 - i;
      CHECK(mask[i / 8] >> i % 8 & 1, "near " + std::to_string(i));
      // Five ties remain for the far end: the lowest indices among its last 30 that are not 2.
      CHECK((mask[far / 8] >> far % 8 & 1) == (i < 10 || i >= 25), "far " + std::to_string(i));
    }
  });
});

const Case table_case("huge unfold", [] {
  constexpr int64_t kStride = kHuge / 2;
  Sparse<float> data(2 * kStride + 8);
  Patches p{DType::f32, 3,         8,       {1, 1, 1}, {1, 1, 1}, {1, 1, 1},  {1, 1, 1},
            {},         {1, 1, 1}, kStride, 1,         {8, 8, 8}, data.data()};
  for (int64_t j = 0; j < 8; ++j) data[2 * kStride + j] = static_cast<float>(j);
  Buf<float> rows(24);
  CHECK(unfold_rows<Backend::cuda>(p, 0, 3, rows.device(), Exec{}) == 0, "error code");
  rows.fetch();
  for (int64_t j = 0; j < 8; ++j) CHECK(rows[16 + j] == static_cast<float>(j), std::to_string(j));
});

const Case unfold_case("huge unfolded rows", [] {
  constexpr int64_t kRows = kHuge / 8;
  on_ends([]<Backend B>(const Exec& exec) {
    Buf<float> data(8);
    for (int64_t j = 0; j < 8; ++j) data[j] = static_cast<float>(j);
    // Every row is the same eight values.
    const Patches p{DType::f32, kRows,     8, {1, 1, 1}, {1, 1, 1}, {1, 1, 1},    {1, 1, 1},
                    {},         {1, 1, 1}, 0, 1,         {8, 8, 8}, data.device()};
    Sparse<float> rows(8 * kRows);
    CHECK(unfold_rows<B>(p, 0, kRows, rows.data(), exec) == 0, "error code");
    for (int64_t j = 0; j < 8; ++j)
      CHECK(rows[j] == static_cast<float>(j) && rows.last(j) == static_cast<float>(7 - j), std::to_string(j));
  });
});

#else

const Case gram_case("huge strides", [] {
  constexpr int64_t kStride = kHuge / 2;
  Sparse<float> data(2 * kStride + 8);
  const Patches p{DType::f32, 3,         8,       {1, 1, 1}, {1, 1, 1}, {1, 1, 1},  {1, 1, 1},
                  {},         {1, 1, 1}, kStride, 1,         {8, 8, 8}, data.data()};
  for (int64_t j = 0; j < 8; ++j) data[2 * kStride + j] = static_cast<float>(j);
  on_backends([&]<Backend B>(const Exec& exec) {
    Buf<double> gram(64);
    for (int64_t i = 0; i < 64; ++i) gram[i] = 0;
    CHECK(gram_accumulate<B>(p, 1, 0, DType::f64, gram.device(), nullptr, exec) == 0, "error code");
    gram.fetch();
    for (int64_t i = 0; i < 64; ++i) CHECK(gram[i] == static_cast<double>((i / 8) * (i % 8)), std::to_string(i));
  });
});

// The first and the last block, wherever the kernel's order of tasks puts them.
void shuffled_ends(int64_t n, int64_t, Body body, const void* context) {
  const Shuffled order(n);
  for (int64_t i = 0; i < n; ++i)
    if (order[i] == 0 || order[i] == n - 1) body(context, i, i + 1);
}

const Case project_case("huge gradient", [] {
  constexpr int64_t kD = 1024, kRows = kHuge / kD;
  Sparse<float> grad(kRows * kD);
  Buf<float> basis(kD);
  for (int64_t j = 0; j < kD; ++j) basis[j] = j == 0 ? 1.f : 0.f;
  on_backends([&]<Backend B>(const Exec& given) {
    if (given.parallel_for != &whole) return;
    const Exec exec{nullptr, &shuffled_ends};
    for (int64_t j = 0; j < kD; ++j) grad[j] = grad.last(j) = 1.f;
    const Projection layer{grad.data(), basis.device(), 1, kRows, kD, 1, {kD, 1, 1}};
    CHECK(project<B>(DType::f32, DType::f32, &layer, 1, false, exec) == 0, "error code");
    for (int64_t j = 0; j < kD; ++j) {
      CHECK(grad[j] == (j == 0 ? 0.f : 1.f), "first row " + std::to_string(j));
      CHECK(grad.last(j) == (j == kD - 1 ? 0.f : 1.f), "last row " + std::to_string(j));
    }
  });
});

#endif

}  // namespace
}  // namespace unlearn_ext::test

#endif
