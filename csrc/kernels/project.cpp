#include "kernels/project.h"

#include "core/apply_cpu.h"
#include "core/gemm_cpu.h"
#include "core/shuffled.h"

namespace unlearn_ext {
namespace {

constexpr int64_t kDepth = 256;      // of one pass over packed panels
constexpr int64_t kBlockRows = 96;   // gradient rows of one task, a multiple of every kTileRows
constexpr int64_t kLeastBlocks = 8;  // tasks a layer is cut into before blocks grow

// Rows per task: from the shape alone, so that results do not depend on the number of threads.
int64_t block_rows(const Projection& layer) {
  const int64_t share = (layer.rows * layer.groups + kLeastBlocks - 1) / kLeastBlocks;
  const int64_t rounded = (share + kTileRows - 1) / kTileRows * kTileRows;
  return std::min(std::max<int64_t>(rounded, kTileRows), kBlockRows);
}

// panel[k][j] = from[k * depth_stride + j * width_stride] for j < inside, zero up to width.
template <class T, class A>
void pack(const T* from, int64_t depth_stride, int64_t width_stride, int64_t depth, int64_t inside, int width,
          A* panel) {
  if (inside < width) memset(panel, 0, static_cast<size_t>(depth * width) * sizeof(*panel));
  if (width_stride <= depth_stride)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < inside; ++j) panel[k * width + j] = A(from[k * depth_stride + j * width_stride]);
  else
    for (int64_t j = 0; j < inside; ++j)
      for (int64_t k = 0; k < depth; ++k) panel[k * width + j] = A(from[k * depth_stride + j * width_stride]);
}

// Panels of one thread: the coefficients G U as [row panel][k][kTileRows], and both operands of a product.
template <class A>
struct Panels {
  A *coefficients, *a, *b;
};

template <class A>
constexpr int64_t panel_elements(int64_t k) {
  return kBlockRows * k + kBlockRows * kDepth + kTileCols<A> * kDepth;
}

template <class T, class U>
void project_block(const Projection& p, int64_t group, int64_t first, int64_t rows, bool onto,
                   const Panels<acc_t<T>>& panels) {
  using A = acc_t<T>;
  constexpr int kCols = kTileCols<A>;
  T* grad = static_cast<T*>(p.grad) + (group * p.rows + first) * p.d;
  const U* basis = static_cast<const U*>(p.basis) + group * p.basis_strides[0];
  const int64_t row_stride = p.basis_strides[1], column_stride = p.basis_strides[2];
  const int64_t row_panels = (rows + kTileRows - 1) / kTileRows;

  memset(panels.coefficients, 0, static_cast<size_t>(row_panels * kTileRows * p.k) * sizeof(A));
  for (int64_t depth0 = 0; depth0 < p.d; depth0 += kDepth) {
    const int64_t depth = std::min(kDepth, p.d - depth0);
    for (int64_t r = 0; r < row_panels; ++r)
      pack(grad + r * kTileRows * p.d + depth0, 1, p.d, depth, std::min<int64_t>(kTileRows, rows - r * kTileRows),
           kTileRows, panels.a + r * kTileRows * depth);
    for (int64_t n = 0; n < p.k; n += kCols) {
      const int64_t columns = std::min<int64_t>(kCols, p.k - n);
      pack(basis + depth0 * row_stride + n * column_stride, row_stride, column_stride, depth, columns, kCols, panels.b);
      for (int64_t r = 0; r < row_panels; ++r) {
        A product[kTileRows][kCols];
        multiply_panels<A>(panels.a + r * kTileRows * depth, panels.b, depth, product, false);
        A* out = panels.coefficients + (r * p.k + n) * kTileRows;
        for (int64_t c = 0; c < columns; ++c)
          for (int i = 0; i < kTileRows; ++i) out[c * kTileRows + i] += product[i][c];
      }
    }
  }

  // A column panel of the result at a time, all its rows, so that each part of the basis is packed once.
  for (int64_t n = 0; n < p.d; n += kCols) {
    const int64_t columns = std::min<int64_t>(kCols, p.d - n);
    A sums[kBlockRows / kTileRows][kTileRows][kCols];
    if (p.k == 0) memset(sums, 0, sizeof(sums));
    for (int64_t depth0 = 0; depth0 < p.k; depth0 += kDepth) {
      const int64_t depth = std::min(kDepth, p.k - depth0);
      pack(basis + n * row_stride + depth0 * column_stride, column_stride, row_stride, depth, columns, kCols, panels.b);
      for (int64_t r = 0; r < row_panels; ++r)
        multiply_panels<A>(panels.coefficients + (r * p.k + depth0) * kTileRows, panels.b, depth, sums[r], depth0 > 0);
    }
    for (int64_t i = 0; i < rows; ++i) {
      T* out = grad + i * p.d + n;
      const A* sum = sums[i / kTileRows][i % kTileRows];
      for (int64_t c = 0; c < columns; ++c) out[c] = store_as<T>(onto ? sum[c] : A(out[c]) - sum[c]);
    }
  }
}

template <class T, class U>
void project_layers(const Projection* layers, int64_t count, bool onto, const Exec& exec) {
  using A = acc_t<T>;
  const auto blocks_of = [](const Projection& p) { return p.groups * ((p.rows + block_rows(p) - 1) / block_rows(p)); };
  int64_t blocks = 0, widest = 0;
  for (int64_t l = 0; l < count; ++l) {
    blocks += blocks_of(layers[l]);
    widest = std::max(widest, layers[l].k);
  }
  const Shuffled order(blocks);
  parallel_for(exec, blocks, 1, [&](int64_t begin, int64_t end) {
    const PanelMemory memory(panel_elements<A>(widest) * static_cast<int64_t>(sizeof(A)));
    for (int64_t task = begin; task < end; ++task) {
      const Projection* p = layers;
      int64_t block = order[task];
      for (; block >= blocks_of(*p); ++p) block -= blocks_of(*p);
      const int64_t size = block_rows(*p), per_group = blocks_of(*p) / p->groups, first = block % per_group * size;
      const Panels<A> panels{memory.at<A>(0), memory.at<A>(kBlockRows * p->k),
                             memory.at<A>(kBlockRows * p->k + kBlockRows * kDepth)};
      project_block<T, U>(*p, block / per_group, first, std::min(size, p->rows - first), onto, panels);
    }
  });
}

}  // namespace

template <>
int project<kBackend>(DType dtype, DType basis_dtype, const Projection* layers, int64_t count, bool onto,
                      const Exec& exec) {
  visit(dtype, [&]<class T>(Tag<T>) {
    if (basis_dtype == DType::f32)
      project_layers<T, float>(layers, count, onto, exec);
    else
      project_layers<T, T>(layers, count, onto, exec);
  });
  return 0;
}

}  // namespace unlearn_ext
