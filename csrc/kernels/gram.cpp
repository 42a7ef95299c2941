#include "kernels/gram.h"

#include <atomic>

#include "core/apply_cpu.h"
#include "core/gemm_cpu.h"
#include "core/shuffled.h"
#include "kernels/gram_shifts_cpu.h"

namespace unlearn_ext {
namespace {

// panel[k][j] = column first_column + j of row first_row + k, zero past the last column. The loop over rows is
// innermost so that it runs along the last image axis.
template <class T>
void pack_patches(const Patches& p, const T* data, int64_t first_row, int64_t rows, int64_t first_column, int width,
                  acc_t<T>* panel) {
  for (int j = 0; j < width; ++j) {
    const int64_t column = first_column + j;
    if (column >= p.columns()) {
      for (int64_t k = 0; k < rows; ++k) panel[k * width + j] = 0;
      continue;
    }
    const int64_t tap[] = {p.tap(0, column), p.tap(1, column), p.tap(2, column)}, channel = p.channel_of(column);
    for (int64_t k = 0; k < rows;) {
      const int64_t row = first_row + k, sample = p.sample_of(row), at2 = p.position(2, row);
      const int64_t run = std::min(p.out[2] - at2, rows - k);
      const int64_t y0 = p.source(0, p.position(0, row), tap[0]), y1 = p.source(1, p.position(1, row), tap[1]),
                    y2 = p.source(2, at2, tap[2]);
      const bool inside = y0 >= 0 && y0 < p.in[0] && y1 >= 0 && y1 < p.in[1];
      // Of the run, positions [low, high) look at the image and the others at padding.
      const auto first_from = [&](int64_t y) {
        const int64_t i = (y - y2 + p.stride[2] - 1) / p.stride[2];
        return y <= y2 ? int64_t{0} : std::min(i, run);
      };
      const int64_t low = inside ? first_from(0) : run, high = std::max(low, inside ? first_from(p.in[2]) : run);
      acc_t<T>* to = panel + k * width + j;
      for (int64_t i = 0; i < low; ++i) to[i * width] = 0;
      if (low < high) {
        const T* from = data + sample * p.sample_stride + channel * p.channel_stride + y0 * p.space_stride[0] +
                        y1 * p.space_stride[1] + (y2 + low * p.stride[2]) * p.space_stride[2];
        const int64_t step = p.stride[2] * p.space_stride[2];
        if (step == 1)
          for (int64_t i = low; i < high; ++i) to[i * width] = acc_t<T>(from[i - low]);
        else
          for (int64_t i = low; i < high; ++i) to[i * width] = acc_t<T>(from[(i - low) * step]);
      }
      for (int64_t i = high; i < run; ++i) to[i * width] = 0;
      k += run;
    }
  }
}

// The same for plain rows, copied along the columns.
template <class T>
void pack_rows(const Patches& p, const T* data, int64_t first_row, int64_t rows, int64_t first_column, int width,
               acc_t<T>* panel) {
  const int64_t inside = std::min<int64_t>(width, p.channels - first_column);
  for (int64_t k = 0; k < rows; ++k, panel += width) {
    const T* from = data + (first_row + k) * p.sample_stride + first_column * p.channel_stride;
    if (p.channel_stride == 1) {
      if (inside == width)
        for (int j = 0; j < width; ++j) panel[j] = acc_t<T>(from[j]);
      else
        for (int64_t j = 0; j < inside; ++j) panel[j] = acc_t<T>(from[j]);
    } else {
      for (int64_t j = 0; j < inside; ++j) panel[j] = acc_t<T>(from[j * p.channel_stride]);
    }
    for (int64_t j = std::max<int64_t>(inside, 0); j < width; ++j) panel[j] = 0;
  }
}

// Columns [begin, end) of rows as consecutive panels of `width` columns.
template <class T>
void pack_block(const Patches& p, const T* data, int64_t first_row, int64_t rows, int64_t begin, int64_t end, int width,
                acc_t<T>* panels) {
  const bool plain =
      p.positions() == 1 && p.window() == 1 && p.padding[0] == 0 && p.padding[1] == 0 && p.padding[2] == 0;
  for (int64_t column = begin; column < end; column += width, panels += rows * width) {
    if (plain)
      pack_rows(p, data, first_row, rows, column, width, panels);
    else
      pack_patches(p, data, first_row, rows, column, width, panels);
  }
}

// total[i][j] += X^T X for i in [i0, i1), j in [j0, j1), i <= j, over rows [first, last).
template <class T, class G>
void accumulate_tile(const Patches& p, const T* data, int64_t first, int64_t last, int64_t i0, int64_t i1, int64_t j0,
                     int64_t j1, acc_t<T>* panel_a, acc_t<T>* panel_b, G* total) {
  using A = acc_t<T>;
  constexpr int kCols = kTileCols<A>;
  const int64_t d = p.columns();
  for (int64_t row = first; row < last; row += kGramDepth) {
    const int64_t depth = std::min(kGramDepth, last - row);
    pack_block(p, data, row, depth, i0, i1, kTileRows, panel_a);
    pack_block(p, data, row, depth, j0, j1, kCols, panel_b);
    for (int64_t j = j0; j < j1; j += kCols) {
      const A* b = panel_b + (j - j0) * depth;
      const int64_t columns = std::min<int64_t>(kCols, j1 - j);
      for (int64_t i = i0; i < i1 && i < j + columns; i += kTileRows) {
        A product[kTileRows][kCols];
        multiply_panels<A>(panel_a + (i - i0) * depth, b, depth, product, false);
        const int64_t stop = std::min<int64_t>(kTileRows, i1 - i);
        for (int64_t r = 0; r < stop; ++r) {
          G* out = total + (i + r) * d + j;
          for (int64_t n = std::max<int64_t>(0, i + r - j); n < columns; ++n) out[n] += static_cast<G>(product[r][n]);
        }
      }
    }
  }
}

// Whether all images of all groups are finite. Neighbours in memory are read one after the other.
template <class T>
bool are_finite(const Patches& p, const T* data, int64_t groups, int64_t group_stride, const Exec& exec) {
  const bool channels_adjacent = p.channel_stride < p.space_stride[2];
  const int64_t inner = channels_adjacent ? p.channels : p.in[2], outer = channels_adjacent ? p.in[2] : p.channels;
  const int64_t inner_step = channels_adjacent ? p.channel_stride : p.space_stride[2],
                outer_step = channels_adjacent ? p.space_stride[2] : p.channel_stride;
  std::atomic<bool> all{true};
  parallel_for(exec, p.samples * groups, 1, [&](int64_t begin, int64_t end) {
    uint32_t other = 0;
    for (int64_t i = begin; i < end; ++i)
      for (int64_t z = 0; z < p.in[0]; ++z)
        for (int64_t y = 0; y < p.in[1]; ++y) {
          const T* from = data + i / groups * p.sample_stride + i % groups * group_stride + z * p.space_stride[0] +
                          y * p.space_stride[1];
          for (int64_t k = 0; k < outer; ++k, from += outer_step)
            for (int64_t n = 0; n < inner; ++n) other |= !is_finite(acc_t<T>(from[n * inner_step]));
        }
    if (other != 0) all.store(false, std::memory_order_relaxed);
  });
  return all.load(std::memory_order_relaxed);
}

// In squares whose lines are all in the cache.
template <class G>
void mirror_tile(G* gram, int64_t d, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  constexpr int64_t kSide = 8;
  for (int64_t jb = j0; jb < j1; jb += kSide)
    for (int64_t ib = i0; ib < std::min(i1, jb + kSide); ib += kSide)
      for (int64_t j = jb, last = std::min(j1, jb + kSide); j < last; ++j) {
        const int64_t until = std::min(std::min(i1, j), ib + kSide);
        for (int64_t i = ib; i < until; ++i) gram[j * d + i] = gram[i * d + j];
      }
}

// A number's pair of blocks (i, j), i <= j.
void pair_at(int64_t number, int64_t& i, int64_t& j) {
  i = number, j = 0;
  while (i > j) i -= ++j;
}

// A tile of the matrix by its number: f(its ranges of columns).
template <class F>
void on_tile(int64_t d, int64_t tile, const F& f) {
  int64_t i, j;
  pair_at(tile, i, j);
  f(i * kGramTile, std::min(d, (i + 1) * kGramTile), j * kGramTile, std::min(d, (j + 1) * kGramTile));
}

// totals[split][group][d][d] += the products of each split's patches, upper triangles.
template <class T, class G>
void add_patches(const Patches& p, const T* images, int64_t groups, int64_t group_stride, int64_t splits, G* totals,
                 const Exec& exec) {
  using A = acc_t<T>;
  const int64_t d = p.columns(), rows = p.rows(), tiles = pairs_of(d, kGramTile);
  const int64_t run = ((rows + splits - 1) / splits + kGramDepth - 1) / kGramDepth * kGramDepth;
  const Shuffled order(splits * groups * tiles);  // tiles on the diagonal are half the work
  parallel_for(exec, splits * groups * tiles, 1, [&](int64_t begin, int64_t end) {
    const int64_t panel = (kGramTile + kTileCols<A>)*kGramDepth;
    const PanelMemory memory(2 * panel * static_cast<int64_t>(sizeof(A)));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t task = order[i], group = task / tiles % groups, split = task / tiles / groups;
      const T* data = images + group * group_stride;
      G* total = totals + (split * groups + group) * d * d;
      on_tile(d, task % tiles, [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
        accumulate_tile<T, G>(p, data, split * run, std::min(rows, (split + 1) * run), i0, i1, j0, j1, memory.at<A>(0),
                              memory.at<A>(panel), total);
      });
    }
  });
}

// The same by products of shifted images.
template <class T, class G>
void add_shifts(const Patches& p, const T* images, int64_t groups, int64_t group_stride, int64_t splits, G* totals,
                const Exec& exec) {
  const int64_t d = p.columns(), pairs = pairs_of(p.channels, kGramShiftBlock);
  const int64_t chunks = GramChunks(p).count(), run = (chunks + splits - 1) / splits;
  const Shuffled order(splits * groups * pairs);  // a block beside itself is half the work
  parallel_for(exec, splits * groups * pairs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t task = order[t], group = task / pairs % groups, split = task / pairs / groups;
      int64_t i, j;
      pair_at(task % pairs, i, j);
      ShiftedBlocks<T, G> products(p, i * kGramShiftBlock, j * kGramShiftBlock);
      products.add(images + group * group_stride, split * run, std::min(chunks, (split + 1) * run));
      products.write(totals + (split * groups + group) * d * d);
    }
  });
}

}  // namespace

template <>
int gram_accumulate<kBackend>(const Patches& patches, int64_t groups, int64_t group_stride, DType gram_dtype,
                              void* gram, void* partial, const Exec& exec) {
  const int64_t d = patches.columns(), tiles = pairs_of(d, kGramTile), splits = gram_partials(patches, groups);
  visit(patches.dtype, [&]<class T>(Tag<T>) {
    visit_accumulator(gram_dtype, [&]<class G>(Tag<G>) {
      const T* images = static_cast<const T*>(patches.data);
      G* totals = static_cast<G*>(splits > 1 ? partial : gram);
      if (splits > 1) memset(partial, 0, static_cast<size_t>(splits * groups * d * d) * sizeof(G));
      if (gram_by_shifts(patches) && are_finite(patches, images, groups, group_stride, exec))
        add_shifts(patches, images, groups, group_stride, splits, totals, exec);
      else
        add_patches(patches, images, groups, group_stride, splits, totals, exec);
      parallel_for(exec, groups * tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t group = task / tiles;
          G* out = static_cast<G*>(gram) + group * d * d;
          on_tile(d, task % tiles, [&](int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
            for (int64_t split = 0; splits > 1 && split < splits; ++split) {
              const G* total = totals + (split * groups + group) * d * d;
              for (int64_t i = i0; i < i1; ++i)
                for (int64_t j = std::max(i, j0); j < j1; ++j) out[i * d + j] += total[i * d + j];
            }
            mirror_tile(out, d, i0, i1, j0, j1);
          });
        }
      });
    });
  });
  return 0;
}

}  // namespace unlearn_ext
