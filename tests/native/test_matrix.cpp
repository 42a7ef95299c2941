// Gram matrices and projections against triple loops.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string_view>

#include "harness.h"
#include "kernels/gram.h"
#include "kernels/project.h"

namespace unlearn_ext::test {
namespace {

using Real = long double;

// ---- gram

struct Conv {
  const char* name;
  int64_t samples, channels, groups;  // channels of one group
  int64_t in[3], kernel[3], stride[3], before[3], after[3], dilation[3];
  int64_t gap;  // unused elements between neighbours in memory: a strided view
};

Patches patches_of(const Conv& c, DType dtype, const void* data) {
  Patches p{};
  p.dtype = dtype, p.samples = c.samples, p.channels = c.channels, p.data = data;
  int64_t stride = 1 + c.gap;
  for (int axis = 2; axis >= 0; --axis) {
    p.in[axis] = c.in[axis], p.kernel[axis] = c.kernel[axis], p.stride[axis] = c.stride[axis];
    p.padding[axis] = c.before[axis], p.dilation[axis] = c.dilation[axis];
    p.out[axis] =
        (c.in[axis] + c.before[axis] + c.after[axis] - c.dilation[axis] * (c.kernel[axis] - 1) - 1) / c.stride[axis] +
        1;
    p.space_stride[axis] = stride, stride *= c.in[axis];
  }
  p.channel_stride = stride;
  p.sample_stride = stride * c.channels * c.groups;
  return p;
}

Conv rows_of(const char* name, int64_t rows, int64_t d, int64_t gap = 0) {
  return {name, rows, d, 1, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {}, {}, {1, 1, 1}, gap};
}

std::vector<Conv> convs() {
  std::vector<Conv> all = {rows_of("no rows", 0, 5),        rows_of("one row", 1, 1),  rows_of("tile edge", 257, 65),
                           rows_of("past a tile", 70, 195), rows_of("long", 1500, 13), rows_of("strided", 300, 33, 2)};
  all.push_back({"conv1d", 3, 4, 1, {1, 1, 37}, {1, 1, 5}, {1, 1, 2}, {0, 0, 3}, {0, 0, 1}, {1, 1, 2}, 0});
  all.push_back({"conv2d", 2, 3, 1, {1, 9, 11}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1}, 0});
  all.push_back({"conv2d, strided", 2, 5, 1, {1, 12, 10}, {1, 3, 2}, {1, 2, 3}, {0, 2, 0}, {0, 0, 1}, {1, 1, 2}, 1});
  all.push_back({"conv3d", 2, 2, 1, {4, 5, 6}, {2, 3, 2}, {1, 2, 1}, {1, 0, 1}, {0, 1, 1}, {1, 1, 2}, 0});
  all.push_back({"grouped", 4, 6, 3, {1, 5, 5}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1}, 0});
  return all;
}

template <class T>
Buf<T> images(const Conv& c) {
  const Patches p = patches_of(c, Format<T>::dtype, nullptr);
  Buf<T> data(c.samples * p.sample_stride);
  for (int64_t i = 0; i < data.size(); ++i) data[i] = nearest<T>(uniform(-1, 1));
  return data;
}

// Patch element straight from the definition of a convolution.
template <class T>
double element(const Conv& c, const Patches& p, const Buf<T>& data, int64_t group, int64_t row, int64_t column) {
  const int64_t x = row % p.out[2], y = row / p.out[2] % p.out[1], z = row / p.out[2] / p.out[1] % p.out[0];
  const int64_t sample = row / p.out[2] / p.out[1] / p.out[0], at[3] = {z, y, x};
  int64_t rest = column, tap[3];
  for (int axis = 2; axis >= 0; --axis) tap[axis] = rest % c.kernel[axis], rest /= c.kernel[axis];
  int64_t where = sample * p.sample_stride + (group * c.channels + rest) * p.channel_stride;
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t source = at[axis] * c.stride[axis] - c.before[axis] + tap[axis] * c.dilation[axis];
    if (source < 0 || source >= c.in[axis]) return 0;
    where += source * p.space_stride[axis];
  }
  return value(data[where]);
}

template <class G>
Buf<G> symmetric(int64_t groups, int64_t d) {
  Buf<G> gram(groups * d * d);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = i; j < d; ++j)
        gram[(g * d + i) * d + j] = gram[(g * d + j) * d + i] = static_cast<G>(uniform(-1, 1));
  return gram;
}

// Rows are said to lie evenly apart only where they do.
const Case row_stride_case("row stride", [] {
  struct Layout {
    const char* name;
    int64_t in[3], space_stride[3], sample_stride, samples;
    std::optional<int64_t> expected;
  };
  const Layout layouts[] = {
      {"rows", {1, 1, 1}, {7, 7, 7}, 7, 5, 7},
      {"every other row", {1, 1, 1}, {7, 7, 7}, 14, 5, 14},
      {"channels last", {1, 4, 6}, {0, 42, 7}, 168, 3, 7},
      {"channels last, cut", {1, 4, 5}, {0, 42, 7}, 168, 3, std::nullopt},
      {"channels last, samples apart", {1, 4, 6}, {0, 42, 7}, 336, 3, std::nullopt},
      {"one sample of channels first", {1, 4, 6}, {0, 6, 1}, 168, 1, 1},
      {"channels first", {1, 4, 6}, {0, 6, 1}, 168, 3, std::nullopt},
      {"channels last, 3d", {2, 4, 6}, {168, 42, 7}, 336, 3, 7},
      {"turned", {1, 4, 6}, {0, 7, 28}, 168, 3, std::nullopt},
      {"one value for all", {1, 4, 6}, {0, 0, 0}, 0, 3, 0},
      {"one value for all positions", {1, 4, 6}, {0, 0, 0}, 9, 3, std::nullopt},
      {"one row", {1, 1, 1}, {7, 7, 7}, 7, 1, 0},
  };
  for (const Layout& layout : layouts) {
    const Scope scope(layout.name);
    Patches p = patches_of(rows_of(layout.name, layout.samples, 7), DType::f32, nullptr);
    for (int axis = 0; axis < 3; ++axis)
      p.in[axis] = p.out[axis] = layout.in[axis], p.space_stride[axis] = layout.space_stride[axis];
    p.sample_stride = layout.sample_stride;
    CHECK(p.row_stride() == layout.expected, "row stride");
    const auto offset = [&](int64_t row) {
      int64_t at = p.sample_of(row) * p.sample_stride;
      for (int axis = 0; axis < 3; ++axis) at += p.position(axis, row) * p.space_stride[axis];
      return at;
    };
    if (const auto apart = p.row_stride())
      for (int64_t row = 0; row < p.rows(); ++row) CHECK(offset(row) == row * *apart, std::to_string(row));
    Patches wide = p, strided = p, padded = p;
    wide.kernel[2] = 2, strided.stride[2] = 2, padded.padding[2] = 1, padded.out[2] += 1;
    CHECK(!wide.row_stride() && !strided.row_stride() && !padded.row_stride(), "more than one position to a row");
  }
});

#if defined(UNLEARN_TEST_GPU) || defined(UNLEARN_EMULATE)

const Case unfold_case("unfold_rows", [] {
  for (const Conv& c : convs())
    on_dtypes([&]<class T>(Tag<T>) {
      const Scope scope(c.name);
      Buf<T> data = images<T>(c);
      const Patches p = patches_of(c, Format<T>::dtype, data.device());
      const int64_t d = p.columns(), first = p.rows() / 3, n = p.rows() - first;
      Buf<T> rows(n * d);
      CHECK(unfold_rows<Backend::cuda>(p, first, n, rows.device(), Exec{}) == 0, "error code");
      CHECK(rows.fetch(), "a write outside the rows");
      for (int64_t r = 0; r < n; ++r)
        for (int64_t j = 0; j < d; ++j)
          CHECK(value(rows[r * d + j]) == element(c, p, data, 0, first + r, j), "row " + std::to_string(r));
    });
});

template <class A, class G>
void add(int64_t d, int64_t column, int64_t width) {
  Buf<A> block((column + width) * width);
  for (int64_t i = 0; i < block.size(); ++i) block[i] = static_cast<A>(uniform(-1, 1));
  Buf<G> gram = symmetric<G>(1, d), before = symmetric<G>(1, d);
  for (int64_t i = 0; i < d * d; ++i) before[i] = gram[i];
  CHECK(add_symmetric<Backend::cuda>(Format<A>::dtype, block.device(), column, width, Format<G>::dtype, gram.device(),
                                     d, Exec{}) == 0,
        "error code");
  CHECK(gram.fetch(), "a write outside the matrix");
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = i; j < d; ++j) {
      const bool touched = j >= column && j < column + width;
      const G added = touched ? static_cast<G>(block[i * width + j - column]) : G(0);
      CHECK(gram[i * d + j] == before[i * d + j] + added && gram[j * d + i] == gram[i * d + j],
            std::to_string(i) + ", " + std::to_string(j));
    }
}

const Case add_symmetric_case("add_symmetric", [] {
  for (const auto& [d, column, width] : std::vector<std::tuple<int64_t, int64_t, int64_t>>{
           {1, 0, 1}, {32, 0, 32}, {33, 0, 33}, {70, 0, 40}, {70, 40, 30}, {70, 17, 5}, {70, 3, 0}, {95, 31, 64}}) {
    const Scope scope(std::to_string(d) + ", columns " + std::to_string(column) + " + " + std::to_string(width));
    add<float, float>(d, column, width), add<float, double>(d, column, width);
    add<double, float>(d, column, width), add<double, double>(d, column, width);
  }
});

#else

// Multiplied as shifted images by a CPU.
std::vector<Conv> shifted() {
  std::vector<Conv> all;
  all.push_back({"shifted", 20, 35, 1, {1, 8, 7}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 1, 1}, 0});
  all.push_back({"shifted, unpadded", 30, 32, 2, {1, 9, 6}, {1, 2, 3}, {1, 1, 1}, {}, {}, {1, 1, 1}, 0});
  all.push_back({"shifted, uneven", 40, 14, 1, {1, 5, 4}, {1, 3, 5}, {1, 1, 1}, {0, 4, 1}, {0, 0, 6}, {1, 2, 1}, 1});
  all.push_back({"shifted by all", 99, 20, 1, {1, 2, 3}, {1, 3, 3}, {1, 1, 1}, {0, 3, 2}, {0, 2, 3}, {1, 2, 3}, 0});
  all.push_back({"shifted, 1d", 2, 31, 1, {1, 1, 700}, {1, 1, 6}, {1, 1, 1}, {0, 0, 2}, {0, 0, 3}, {1, 1, 1}, 0});
  all.push_back({"shifted, 3d", 30, 16, 1, {3, 4, 4}, {2, 3, 2}, {1, 1, 1}, {1, 1, 0}, {0, 1, 1}, {1, 1, 1}, 0});
  all.push_back({"shifted lines", 2, 16, 1, {1, 50, 47}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}, {0, 1, 1}, {1, 2, 1}, 0});
  all.push_back({"shifted planes", 1, 30, 1, {5, 3, 200}, {2, 3, 1}, {1, 1, 1}, {1, 1, 0}, {0, 1, 0}, {1, 1, 1}, 0});
  return all;
}

void check_close(double got, Real want, Real tolerance, int64_t i, int64_t j,
                 std::source_location where = std::source_location::current()) {
  if (std::fabs(got - want) <= tolerance) return passed();
  failed(
      std::to_string(i) + ", " + std::to_string(j) + ": got " + std::to_string(got) + ", want " + std::to_string(want),
      where);
}

// What the products of a convolution's patches add up to, and their magnitudes: [group][d][d], i <= j. In more digits
// than the kernel has.
template <class T>
struct Sums {
  using Wide = std::conditional_t<std::is_same_v<T, double>, Real, double>;
  std::vector<Wide> sum, scale;

  Sums(const Conv& c, const Patches& p, const Buf<T>& data) {
    const int64_t d = p.columns(), rows = p.rows();
    sum.resize(static_cast<size_t>(c.groups * d * d)), scale.resize(sum.size());
    for (int64_t g = 0; g < c.groups; ++g) {
      std::vector<double> x(static_cast<size_t>(rows * d));
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < d; ++j) x[static_cast<size_t>(r * d + j)] = element(c, p, data, g, r, j);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < d; ++i)
          for (int64_t j = i; j < d; ++j) {
            const Wide product =
                static_cast<Wide>(x[static_cast<size_t>(r * d + i)]) * x[static_cast<size_t>(r * d + j)];
            const auto at = static_cast<size_t>((g * d + i) * d + j);
            sum[at] += product, scale[at] += std::fabs(product);
          }
    }
  }
};

template <Backend B, class T, class G>
void gram(const Conv& c, Buf<T>& data, const Sums<T>& sums, const Exec& exec) {
  using A = acc_t<T>;
  const Patches p = patches_of(c, Format<T>::dtype, data.device());
  const int64_t d = p.columns(), rows = p.rows(), splits = gram_partials(p, c.groups);
  CHECK(gram_by_shifts(p) == std::string_view(c.name).starts_with("shifted"), "the other way");
  Buf<G> gram = symmetric<G>(c.groups, d), before(gram.size());
  for (int64_t i = 0; i < gram.size(); ++i) before[i] = gram[i];
  Buf<G> partial(splits > 1 ? splits * gram.size() : 0);
  CHECK(gram_accumulate<B>(p, c.groups, c.channels * p.channel_stride, Format<G>::dtype, gram.device(),
                           splits > 1 ? partial.device() : nullptr, exec) == 0,
        "error code");
  CHECK(gram.fetch() && partial.fetch(), "a write outside the matrix");
  // Runs of kGramDepth products in A, totals in G: the error of a run is at most its length times epsilon, and behaves
  // like the root of that.
  const double relative = 16 * spacing<A>(1.0) + static_cast<double>(rows) / kGramDepth * spacing<G>(1.0);
  for (int64_t g = 0; g < c.groups; ++g)
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = i; j < d; ++j) {
        const int64_t at = (g * d + i) * d + j;
        const auto n = static_cast<size_t>(at);
        check_close(gram[at], before[at] + sums.sum[n], (1 + sums.scale[n]) * relative, i, j);
        CHECK(gram[(g * d + j) * d + i] == gram[at], "not symmetric");
      }
}

const Case gram_case("gram_accumulate", [] {
  std::vector<Conv> all = convs();
  for (const Conv& c : shifted()) all.push_back(c);
  for (const Conv& c : thinned(all, 2))
    on_dtypes([&]<class T>(Tag<T>) {
      Buf<T> data = images<T>(c);
      const Sums<T> sums(c, patches_of(c, Format<T>::dtype, nullptr), data);
      on_backends([&]<Backend B>(const Exec& exec) {
        const Scope scope(c.name);
        gram<B, T, double>(c, data, sums, exec);
        if constexpr (!std::is_same_v<T, double>) gram<B, T, float>(c, data, sums, exec);
      });
    });
});

// A value that is not finite is multiplied with padding too, and gives NaN there as patches do.
const Case infinite_case("gram_accumulate of what is not finite", [] {
  for (const Conv& c : thinned(shifted(), 2))
    for (const double odd : {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()})
      on_backends([&]<Backend B>(const Exec& exec) {
        const Scope scope(c.name);
        Buf<float> data = images<float>(c);
        data[data.size() - 1 - c.gap] = static_cast<float>(odd);
        const Patches p = patches_of(c, DType::f32, data.device());
        const int64_t d = p.columns(), splits = gram_partials(p, c.groups);
        Buf<double> gram(c.groups * d * d), partial(splits > 1 ? splits * gram.size() : 0);
        for (int64_t i = 0; i < gram.size(); ++i) gram[i] = 0;
        CHECK(gram_accumulate<B>(p, c.groups, c.channels * p.channel_stride, DType::f64, gram.device(),
                                 splits > 1 ? partial.device() : nullptr, exec) == 0,
              "error code");
        CHECK(gram.fetch() && partial.fetch(), "a write outside the matrix");
        const int64_t last = c.groups - 1;
        std::vector<char> met(static_cast<size_t>(d));
        for (int64_t i = 0; i < d; ++i)
          for (int64_t r = 0; r < p.rows(); ++r)
            met[static_cast<size_t>(i)] |= !std::isfinite(element(c, p, data, last, r, i));
        CHECK(std::count(met.begin(), met.end(), 1) > 0, "no patch sees it");
        for (int64_t i = 0; i < d; ++i)
          for (int64_t j = 0; j < d; ++j)
            CHECK(std::isfinite(gram[(last * d + i) * d + j]) ==
                      !(met[static_cast<size_t>(i)] || met[static_cast<size_t>(j)]),
                  std::to_string(i) + ", " + std::to_string(j));
      });
});

struct Layer {
  int64_t groups, rows, d, k;
  bool transposed;  // the basis is stored [k, d]
};

template <Backend B, class T, class U>
void projections(const std::vector<Layer>& layers, bool onto, const Exec& exec) {
  std::vector<int64_t> grad_sizes, basis_sizes;
  for (const Layer& l : layers)
    grad_sizes.push_back(l.groups * l.rows * l.d), basis_sizes.push_back(l.groups * l.d * l.k);
  List<T> grads(grad_sizes, 1, [] { return nearest<T>(uniform(-1, 1)); });
  List<U> bases(basis_sizes, 1, [] { return nearest<U>(uniform(-0.3, 0.3)); });
  std::vector<Projection> list;
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& s = layers[l];
    list.push_back({grads.now[l].device(),
                    bases.now[l].device(),
                    s.groups,
                    s.rows,
                    s.d,
                    s.k,
                    {s.d * s.k, s.transposed ? 1 : s.k, s.transposed ? s.d : 1}});
  }
  CHECK(project<B>(Format<T>::dtype, Format<U>::dtype, list.data(), static_cast<int64_t>(list.size()), onto, exec) == 0,
        "error code");
  grads.fetch(), bases.fetch();
  bases.check_unchanged("bases");
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& s = layers[l];
    const auto basis = [&](int64_t g, int64_t i, int64_t j) -> Real {
      return value(bases.before[l][g * s.d * s.k + (s.transposed ? j * s.d + i : i * s.k + j)]);
    };
    const auto grad = [&](int64_t g, int64_t r, int64_t i) -> Real {
      return value(grads.before[l][(g * s.rows + r) * s.d + i]);
    };
    for (int64_t g = 0; g < s.groups; ++g)
      for (int64_t r = 0; r < s.rows; ++r) {
        std::vector<Real> coefficient(static_cast<size_t>(s.k)), scale(static_cast<size_t>(s.k));
        for (int64_t j = 0; j < s.k; ++j)
          for (int64_t i = 0; i < s.d; ++i) {
            const Real term = grad(g, r, i) * basis(g, i, j);
            coefficient[static_cast<size_t>(j)] += term, scale[static_cast<size_t>(j)] += std::fabs(term);
          }
        for (int64_t i = 0; i < s.d; ++i) {
          Real sum = 0, terms = 1;
          for (int64_t j = 0; j < s.k; ++j) {
            sum += coefficient[static_cast<size_t>(j)] * basis(g, i, j);
            terms += scale[static_cast<size_t>(j)] * std::fabs(basis(g, i, j));
          }
          const Real want = onto ? sum : grad(g, r, i) - sum;
          const bool rounds_on_store = !std::is_same_v<T, acc_t<T>>;
          const Real tolerance = 16 * terms * spacing<acc_t<T>>(1.0) +
                                 (rounds_on_store ? 0.51 * spacing<T>(static_cast<double>(want)) : 0.0);
          check_close(value(grads.now[l][(g * s.rows + r) * s.d + i]), want, tolerance, r, i);
        }
      }
  }
}

const Case project_case("project", [] {
  const std::vector<Layer> layers = {{1, 1, 1, 1, false},    {1, 5, 7, 3, true},     {1, 13, 64, 0, false},
                                     {1, 0, 9, 2, false},    {1, 12, 65, 65, false}, {1, 97, 33, 17, true},
                                     {3, 7, 20, 6, false},   {1, 200, 12, 5, false}, {1, 7, 300, 270, true},
                                     {2, 25, 259, 16, false}};
  on_dtypes([&]<class T>(Tag<T>) {
    on_backends([&]<Backend B>(const Exec& exec) {
      for (const bool onto : {false, true}) {
        const Scope scope(onto ? "onto" : "out");
        projections<B, T, T>(layers, onto, exec);
        if constexpr (!std::is_same_v<T, double>) projections<B, T, float>(layers, onto, exec);
        projections<B, T, T>({}, onto, exec);
      }
    });
  });
});

#endif

}  // namespace
}  // namespace unlearn_ext::test
