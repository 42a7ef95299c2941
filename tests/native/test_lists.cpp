// Elementwise list ops against scalar formulas in double precision.
#include <sstream>

#include "harness.h"
#include "kernels/dampen.h"
#include "kernels/fisher.h"
#include "kernels/masked.h"

namespace unlearn_ext::test {
namespace {

// Around vectors, words, warps, blocks and chunks, with empties first, in the middle and last.
const std::vector<int64_t> kEdges = {0, 1, 31, 63, 64, 65, 255, 256, 0, 257, 4095, 4096, 4097, 3 * 4096 + 5, 0};

// More tensors than any address table holds.
std::vector<int64_t> many() {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < 500; ++i) sizes.push_back(i % 7 == 3 ? 0 : i * 17 % 131 + 1);
  return sizes;
}

struct Shape {
  const char* name;
  std::vector<int64_t> sizes;
  int64_t offset, apart = 0;  // from an aligned address: of the lists, and of the last of them from the others
};
const std::vector<Shape>& shapes() {
  static const std::vector<Shape> all = {{"no tensor", {}, 0},
                                         {"many", many(), 0},
                                         {"many, misaligned", many(), 3},
                                         {"edges", kEdges, 0},
                                         {"edges, apart", kEdges, 2, 1},
                                         {"one empty", {0}, 0},
                                         {"one scalar", {1}, 0},
                                         {"edges, misaligned", kEdges, 1}};
  return all;
}
template <class F>
void on_shapes(const F& f) {
  for (const Shape& shape : thinned(shapes(), 3)) {
    const Scope scope(shape.name);
    f(shape);
  }
}

// Oracles are evaluated in more than the precision of any op.
using Real = long double;

template <class T>
auto values(double low, double high) {
  return [=] { return nearest<T>(uniform(low, high)); };
}

struct At {
  const char* list;
  size_t tensor;
  int64_t scalar;
};
std::string text(const At& at) {
  return std::string(at.list) + "[" + std::to_string(at.tensor) + "], scalar " + std::to_string(at.scalar);
}

// got must be `want` rounded once from a formula whose terms are as large as `scale`, each rounded a few times in A.
template <class T>
void check_near(T got, Real exact, Real scale, const At& at,
                std::source_location where = std::source_location::current()) {
  const double x = value(got), want = static_cast<double>(exact);
  const double tolerance =
      4 * spacing<acc_t<T>>(static_cast<double>(scale)) + (std::is_same_v<T, acc_t<T>> ? 0 : 0.5 * spacing<T>(want));
  const bool ok = std::isnan(want) ? std::isnan(x) : std::isinf(want) ? x == want : std::fabs(x - want) <= tolerance;
  if (ok) return passed();
  std::ostringstream message;
  message << text(at) << ": got " << x << ", want " << want << " within " << tolerance;
  failed(message.str(), where);
}

// ---- fisher_accumulate

template <Backend B, class T>
void fisher(const Shape& shape, const Exec& exec, double weight, double decay, int power) {
  using A = acc_t<T>;
  List<A> fisher(shape.sizes, shape.offset, values<A>(0, 2));
  List<T> grads(shape.sizes, shape.offset + shape.apart, values<T>(-3, 3));
  const auto slices = slices_of(fisher, grads);
  CHECK(fisher_accumulate<B>(Format<T>::dtype, slices.data(), static_cast<int64_t>(slices.size()), weight, decay, power,
                             exec) == 0,
        "error code");
  fisher.fetch(), grads.fetch();
  grads.check_unchanged("grads");
  for (size_t t = 0; t < fisher.now.size(); ++t)
    for (int64_t i = 0; i < fisher.now[t].size(); ++i) {
      const Real g = value(grads.before[t][i]), kept = static_cast<Real>(static_cast<A>(decay)) * fisher.before[t][i];
      const Real added = static_cast<Real>(static_cast<A>(weight)) * (power == 2 ? g * g : std::fabs(g));
      check_near<A>(fisher.now[t][i], kept + added, kept + added, At{"fisher", t, i});
    }
}

const Case fisher_accumulate_case("fisher_accumulate", [] {
  on_shapes([](const Shape& shape) {
    on_dtypes([&]<class T>(Tag<T>) {
      on_backends([&]<Backend B>(const Exec& exec) {
        fisher<B, T>(shape, exec, 1.0, 1.0, 2);
        fisher<B, T>(shape, exec, 0.3, 0.9, 1);
      });
    });
  });
});

// Every half-precision bit pattern through the kernel's conversion.
template <Backend B, class T>
void conversion_to_float(const Exec& exec) {
  int bits = 0;
  List<float> fisher({65536}, 0, [] { return 0.f; });
  List<T> grads({65536}, 0, [&] { return T{static_cast<uint16_t>(bits++)}; });
  const auto slices = slices_of(fisher, grads);
  CHECK(fisher_accumulate<B>(Format<T>::dtype, slices.data(), 1, 1.0, 1.0, 1, exec) == 0, "error code");
  fisher.fetch();
  for (int64_t i = 0; i < 65536; ++i) {
    const double want = std::fabs(value(grads.before[0][i])), got = fisher.now[0][i];
    CHECK(std::isnan(want) ? std::isnan(got) : got == want, text({"fisher", 0, i}));
  }
}

// Values of all magnitudes, halfway points between neighbours among them, stored by a step of plain descent: p = -g.
template <Backend B, class T>
void conversion_from_float(const Exec& exec) {
  const int64_t n = 1 << 17;
  List<T> params({n}, 0, [] { return nearest<T>(0.0); });
  int64_t i = 0;
  List<T> grads({n}, 0, [&] { return T{static_cast<uint16_t>(i++ / 2)}; });
  List<uint8_t> mask({n / 8}, 0, [] { return uint8_t{0xff}; });
  // 1 + 2^-(bits + 1) lands halfway between neighbours for odd significands, 1.37 nowhere in particular, and the
  // powers of two reach the subnormals and infinity.
  const double halfway = 1 + std::ldexp(1.0, -Format<T>::fraction - 1);
  for (const double lr : thinned<double>({halfway, 1.37, 0x1p-9, 0x1p-20, 0x1p9, 0x1.8p-1}, 6)) {
    const auto slices = slices_of(params, grads, mask);
    CHECK(masked_sgd<B>(Format<T>::dtype, slices.data(), 1, SgdConstants{lr, 0, 0, 0, false, false}, exec) == 0,
          "error code");
    params.fetch();
    for (int64_t j = 0; j < n; ++j) {
      const float step =
          static_cast<float>(-static_cast<float>(lr) * value(grads.before[0][j]));  // rounded as in the kernel
      const T want = nearest<T>(step + 0.0);
      const T got = params.now[0][j];
      CHECK(std::isnan(step) ? std::isnan(value(got)) : value(got) == value(want), text({"params", 0, j}));
      params.now[0][j] = params.before[0][j];
    }
  }
}

const Case conversions_case("half-precision conversions", [] {
  on_backends([]<Backend B>(const Exec& exec) {
    conversion_to_float<B, Half>(exec), conversion_from_float<B, Half>(exec);
    conversion_to_float<B, BFloat16>(exec), conversion_from_float<B, BFloat16>(exec);
  });
});

// ---- selective_dampen

// forget > alpha * full in real numbers: 113 bits hold the product of two doubles.
template <class A>
bool exactly_selected(double alpha, A full, A forget) {
  if (!std::isfinite(full) || !std::isfinite(forget)) return false;
  return static_cast<Quad>(forget) > static_cast<Quad>(static_cast<A>(alpha)) * static_cast<Quad>(full);
}

template <class A>
auto importances() {  // mostly ordinary; zeros, subnormals, infinities and NaN among them
  return [] {
    switch (below(12)) {
      case 0:
        return A(0);
      case 1:
        return static_cast<A>(below(4)) * std::numeric_limits<A>::denorm_min();
      case 2:
        return below(2) ? std::numeric_limits<A>::infinity() : std::numeric_limits<A>::quiet_NaN();
      default:
        return static_cast<A>(uniform(0, 1) * std::ldexp(1.0, static_cast<int>(below(6))));
    }
  };
}

template <Backend B, class T>
void dampen(const Shape& shape, const Exec& exec, const Dampening<double>& c) {
  using A = acc_t<T>;
  List<T> params(shape.sizes, shape.offset, any_bits<T>);
  List<A> full(shape.sizes, shape.offset, importances<A>()),
      forget(shape.sizes, shape.offset + shape.apart, importances<A>());
  for (size_t t = 0; t < full.now.size(); ++t)  // on the boundary and next to it
    for (int64_t i = 0; i + 2 < full.now[t].size(); i += 5) {
      const A edge = static_cast<A>(static_cast<A>(c.alpha) * full.now[t][i]);
      const A near = i % 3 == 0 ? edge : std::nextafter(edge, i % 3 == 1 ? A(INFINITY) : A(0));
      forget.now[t][i] = forget.before[t][i] = near;
    }
  const auto slices = slices_of(params, full, forget);
  CHECK(selective_dampen<B>(Format<T>::dtype, slices.data(), static_cast<int64_t>(slices.size()), c, exec) == 0,
        "error code");
  params.fetch(), full.fetch(), forget.fetch();
  full.check_unchanged("importance_full"), forget.check_unchanged("importance_forget");
  for (size_t t = 0; t < params.now.size(); ++t)
    for (int64_t i = 0; i < params.now[t].size(); ++i) {
      const T old = params.before[t][i], got = params.now[t][i];
      const A d = full.before[t][i], f = forget.before[t][i];
      if (!exactly_selected(c.alpha, d, f)) {
        CHECK(same_bits(got, old), text({"params", t, i}) + " is not selected, but changed");
        continue;
      }
      const Real product = static_cast<Real>(static_cast<A>(c.lambda)) * d, ratio = product / f;
      Real beta = std::pow(ratio, static_cast<Real>(static_cast<A>(c.exponent)));
      beta = std::min<Real>(std::max<Real>(beta, static_cast<A>(c.beta_min)), static_cast<A>(c.beta_max));
      if (std::isinf(value(old)) && beta > 0 && beta < 16 * std::numeric_limits<A>::denorm_min())
        continue;  // inf * 0 is NaN
      // Relative error of the factor: small, except where lambda * full or the ratio is subnormal and has few bits.
      const Real tiny = std::numeric_limits<A>::denorm_min(), epsilon = std::numeric_limits<A>::epsilon();
      const Real relative = ratio > 0 ? std::min<Real>(1, tiny / product + tiny / ratio) : 0;
      const Real want = value(old) * beta, scale = 2 * std::fabs(want) * (1 + relative / epsilon);
      check_near<T>(got, want, std::isfinite(scale) ? scale : 0, At{"params", t, i});
    }
}

const Case selective_dampen_case("selective_dampen", [] {
  on_shapes([](const Shape& shape) {
    on_dtypes([&]<class T>(Tag<T>) {
      on_backends([&]<Backend B>(const Exec& exec) {
        dampen<B, T>(shape, exec, {1.5, 0.7, 1.0, 0.0, 1.0});
        dampen<B, T>(shape, exec, {1.0 / 3, 1.3, 0.5, 0.1, 0.9});
        dampen<B, T>(shape, exec, {0.0, 0.0, 1.0, 0.0, 1.0});
      });
    });
  });
});

// ---- masked optimizers

// Dense, sparse and empty stretches of a mask, and any bits behind its end.
List<uint8_t> masks(const std::vector<int64_t>& sizes, int64_t offset) {
  std::vector<int64_t> bytes;
  for (const int64_t n : sizes) bytes.push_back((n + 7) / 8);
  int64_t left = 0;
  uint64_t kind = 0;
  return {bytes, offset, [&] {
            if (left-- == 0) kind = below(4), left = static_cast<int64_t>(below(40));
            return static_cast<uint8_t>(kind == 0 ? 0 : kind == 1 ? 0xff : kind == 2 ? 1u << below(8) : rng()());
          }};
}
bool is_set(const Buf<uint8_t>& mask, int64_t i) { return mask[i / 8] >> (i % 8) & 1; }

// Ordinary values where the mask is set, any bits where it is clear: those must survive.
template <class T>
void scramble(List<T>& list, const List<uint8_t>& mask) {
  for (size_t t = 0; t < list.now.size(); ++t)
    for (int64_t i = 0; i < list.now[t].size(); ++i)
      if (!is_set(mask.before[t], i)) list.now[t][i] = list.before[t][i] = any_bits<T>();
}

template <class T>
void check_kept(const List<T>& list, const List<uint8_t>& mask, const char* name,
                std::source_location where = std::source_location::current()) {
  for (size_t t = 0; t < list.now.size(); ++t)
    for (int64_t i = 0; i < list.now[t].size(); ++i)
      if (!is_set(mask.before[t], i) && !same_bits(list.now[t][i], list.before[t][i]))
        return failed(text({name, t, i}) + " is masked out, but changed", where);
  passed();
}

template <Backend B, class T>
void sgd(const Shape& shape, const Exec& exec, const SgdConstants& c) {
  using A = acc_t<T>;
  const bool momentum = c.momentum != 0;
  List<T> params(shape.sizes, shape.offset, values<T>(-2, 2)),
      grads(shape.sizes, shape.offset + shape.apart, values<T>(-1, 1));
  List<A> buffers(shape.sizes, shape.offset, values<A>(-1, 1));
  List<uint8_t> mask = masks(shape.sizes, shape.offset);
  scramble(params, mask), scramble(grads, mask), scramble(buffers, mask);
  const int64_t count = static_cast<int64_t>(shape.sizes.size());
  if (momentum)
    CHECK(masked_sgd<B>(Format<T>::dtype, slices_of(params, buffers, grads, mask).data(), count, c, exec) == 0,
          "error code");
  else
    CHECK(masked_sgd<B>(Format<T>::dtype, slices_of(params, grads, mask).data(), count, c, exec) == 0, "error code");
  params.fetch(), buffers.fetch(), grads.fetch(), mask.fetch();
  grads.check_unchanged("grads"), mask.check_unchanged("masks");
  check_kept(params, mask, "params"), check_kept(buffers, mask, "momentum_buffers");
  for (size_t t = 0; t < params.now.size(); ++t)
    for (int64_t i = 0; i < params.now[t].size(); ++i) {
      if (!is_set(mask.before[t], i)) continue;
      const Real p = value(params.before[t][i]), b = value(buffers.before[t][i]);
      Real g = (c.maximize ? -1 : 1) * value(grads.before[t][i]) + c.weight_decay * p, step = g;
      if (momentum) {
        const Real next = c.momentum * b + (1 - c.dampening) * g;
        check_near<A>(buffers.now[t][i], next, 2.0, At{"momentum_buffers", t, i});
        step = c.nesterov ? g + c.momentum * next : next;
      }
      check_near<T>(params.now[t][i], p - c.lr * step, 2.0, At{"params", t, i});
    }
}

const Case masked_sgd_case("masked_sgd", [] {
  on_shapes([](const Shape& shape) {
    on_dtypes([&]<class T>(Tag<T>) {
      on_backends([&]<Backend B>(const Exec& exec) {
        sgd<B, T>(shape, exec, {0.1, 0, 0, 0, false, false});
        sgd<B, T>(shape, exec, {0.1, 0, 0, 0.05, false, true});
        sgd<B, T>(shape, exec, {0.1, 0.9, 0.25, 0.01, false, false});
        sgd<B, T>(shape, exec, {0.1, 0.9, 0, 0.01, true, true});
      });
    });
  });
});

// step_type: 0 a number, 4 or 8 the bytes of a float or double in device memory.
template <Backend B, class T>
void adamw(const Shape& shape, const Exec& exec, const AdamwConstants& c, int step, int step_type) {
  using A = acc_t<T>;
  List<T> params(shape.sizes, shape.offset, values<T>(-2, 2)),
      grads(shape.sizes, shape.offset + shape.apart, values<T>(-1, 1));
  List<A> averages(shape.sizes, shape.offset, values<A>(-1, 1)), squares(shape.sizes, shape.offset, values<A>(0.01, 1));
  List<uint8_t> mask = masks(shape.sizes, shape.offset);
  scramble(params, mask), scramble(grads, mask), scramble(averages, mask), scramble(squares, mask);
  Buf<float> step4(1);
  Buf<double> step8(1);
  Buf<AdamwCorrections> scratch(1);
  step4[0] = static_cast<float>(step), step8[0] = step;
  const void* device_step = step_type == 4   ? static_cast<const void*>(step4.device())
                            : step_type == 8 ? static_cast<const void*>(step8.device())
                                             : nullptr;
  CHECK(masked_adamw<B>(Format<T>::dtype, slices_of(params, averages, squares, grads, mask).data(),
                        static_cast<int64_t>(shape.sizes.size()), c, step_type ? 12345.0 : step, device_step,
                        step_type == 8 ? DType::f64 : DType::f32, scratch.device(), exec) == 0,
        "error code");
  params.fetch(), averages.fetch(), squares.fetch(), grads.fetch(), mask.fetch();
  grads.check_unchanged("grads"), mask.check_unchanged("masks");
  check_kept(params, mask, "params"), check_kept(averages, mask, "exp_avgs"), check_kept(squares, mask, "exp_avg_sqs");
  for (size_t t = 0; t < params.now.size(); ++t)
    for (int64_t i = 0; i < params.now[t].size(); ++i) {
      if (!is_set(mask.before[t], i)) continue;
      const Real g = (c.maximize ? -1 : 1) * value(grads.before[t][i]);
      const Real m = c.beta1 * value(averages.before[t][i]) + (1 - c.beta1) * g;
      const Real v = c.beta2 * value(squares.before[t][i]) + (1 - c.beta2) * g * g;
      const Real update = c.lr / (1 - std::pow<Real>(c.beta1, step)) * m /
                          (std::sqrt(v) / std::sqrt(1 - std::pow<Real>(c.beta2, step)) + c.eps);
      const Real p = value(params.before[t][i]) * (1 - c.lr * c.weight_decay);
      check_near<A>(averages.now[t][i], m, 2.0, At{"exp_avgs", t, i});
      check_near<A>(squares.now[t][i], v, 1.0, At{"exp_avg_sqs", t, i});
      check_near<T>(params.now[t][i], p - update, 2.0 + std::fabs(update), At{"params", t, i});
    }
}

const Case masked_adamw_case("masked_adamw", [] {
  on_shapes([](const Shape& shape) {
    on_dtypes([&]<class T>(Tag<T>) {
      on_backends([&]<Backend B>(const Exec& exec) {
        adamw<B, T>(shape, exec, {0.01, 0.9, 0.999, 1e-8, 0.01, false}, 1, 0);
        adamw<B, T>(shape, exec, {0.01, 0.8, 0.95, 1e-3, 0.1, true}, 1000, 0);
        adamw<B, T>(shape, exec, {0.01, 0.9, 0.999, 1e-8, 0.0, false}, 7, 4);
        adamw<B, T>(shape, exec, {0.01, 0.9, 0.999, 1e-8, 0.0, false}, 7, 8);
      });
    });
  });
});

const Case apply_mask_case("apply_mask", [] {
  on_shapes([](const Shape& shape) {
    on_dtypes([&]<class T>(Tag<T>) {
      on_backends([&]<Backend B>(const Exec& exec) {
        List<T> grads(shape.sizes, shape.offset, any_bits<T>);
        List<uint8_t> mask = masks(shape.sizes, shape.offset);
        CHECK(apply_mask<B>(Format<T>::dtype, slices_of(grads, mask).data(), static_cast<int64_t>(shape.sizes.size()),
                            exec) == 0,
              "error code");
        grads.fetch(), mask.fetch();
        mask.check_unchanged("masks");
        for (size_t t = 0; t < grads.now.size(); ++t)
          for (int64_t i = 0; i < grads.now[t].size(); ++i)
            CHECK(same_bits(grads.now[t][i], is_set(mask.before[t], i) ? grads.before[t][i] : nearest<T>(0.0)),
                  text({"grads", t, i}));
      });
    });
  });
});

}  // namespace
}  // namespace unlearn_ext::test
