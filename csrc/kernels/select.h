// Global selections over lists of scores: counts for a dampening sweep, an exact quantile of importance ratios, and
// exact top-k masks. Integer counts only, so results do not depend on the order of work.
#pragma once

#include "core/lists.h"
#include "core/radix.h"
#include "kernels/dampen.h"

namespace unlearn_ext {

// Adds to counts[a * count + t] the number of scalars of tensor t with forget > alphas[a] * full.
// slices: importance_full, importance_forget, both of `dtype` (f32 or f64). alphas: [n_alphas], on the host.
template <Backend B>
int selected_counts(DType dtype, const Slice<2>* slices, int64_t count, const double* alphas, int64_t n_alphas,
                    int64_t* counts, const Exec& exec);

// The q-quantile, linearly interpolated, of forget / full over the finite ratios of all tensors. slices as above.
// result: one value of `dtype`, NaN if no ratio is finite; *n_finite: how many are.
template <Backend B>
int ratio_quantile(DType dtype, const Slice<2>* slices, int64_t count, double q, void* result, int64_t* n_finite,
                   void* scratch, const Exec& exec);

// Packed masks of the k first-ranked scores over all tensors, 0 < k <= total; ties go to the lowest tensor, then the
// lowest index, and NaN ranks last. slices: scores of `dtype`, packed mask [ceil(numel / 8)].
// A CPU counts the NaN scores into *n_nan and writes no mask if there are any.
template <Backend B>
int topk_mask(DType dtype, const Slice<2>* slices, int64_t count, int64_t k, bool largest, int64_t* n_nan,
              void* scratch, const Exec& exec);

// Where a selection stands: up to two ranks on their way to their keys.
template <class A>
struct SelectState {
  Cursor<A> cursor[2];
  int64_t total;    // keys counted
  double fraction;  // of the way from the first rank to the second
  int64_t tied;     // keys that share the first rank's, once its last digit is known
};

// Ties are shared out by chunks of scores. A tensor adds at most one chunk to the kTieChunks of an undivided list.
inline constexpr int64_t kTieChunks = 65536;

constexpr int64_t tie_chunk(int64_t total) {
  const int64_t size = std::max((total + kTieChunks - 1) / kTieChunks, int64_t{16384});
  return (size + kWord - 1) / kWord * kWord;
}

// Bytes of scratch of ratio_quantile and topk_mask, 8-byte aligned: the state, two histograms, a count per tie chunk.
constexpr int64_t select_scratch_bytes(int64_t total, int64_t count) {
  const int64_t chunks = total / tie_chunk(total) + count + 1;
  return static_cast<int64_t>(sizeof(SelectState<double>)) + 8 * (2 * kBins + chunks);
}

// Ratio of a scalar as counted by the quantile; NaN stands for a ratio that is left out.
template <class A>
UNLEARN_HD A importance_ratio(A full, A forget) {
  return forget / full;
}

// The quantile between the two keys found; NaN if nothing was counted.
template <class A>
UNLEARN_HD A interpolate(const SelectState<A>& state) {
  if (state.total == 0) return bit_cast<A>(static_cast<Key<A>>(~Key<A>(0)));
  const double low = value_of<A>(state.cursor[0].prefix), high = value_of<A>(state.cursor[1].prefix);
  return static_cast<A>(low + (high - low) * state.fraction);
}

// Keys in selection order: the first-ranked score has the smallest key, NaN the largest.
template <class A>
UNLEARN_HD Key<A> selection_key(A score, bool largest) {
  const Key<A> key = key_of(score);
  return score != score ? static_cast<Key<A>>(~Key<A>(0)) : largest ? static_cast<Key<A>>(~key) : key;
}

}  // namespace unlearn_ext
