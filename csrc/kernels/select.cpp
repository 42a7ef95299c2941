#include "kernels/select.h"

#include "core/apply_cpu.h"
#include "core/bits_cpu.h"

namespace unlearn_ext {
namespace {

void atomic_add(unsigned long long& total, unsigned long long value) {
  __atomic_fetch_add(&total, value, __ATOMIC_RELAXED);
}
void atomic_add(int64_t& total, int64_t value) { __atomic_fetch_add(&total, value, __ATOMIC_RELAXED); }

// Counts of one thread, a histogram per cursor. Several copies, used in turn, keep equal digits that follow one another
// from waiting for each other's increments.
class LocalHistogram {
 public:
  // Counts bins[j] for every set bit j.
  void add(const int32_t (&bins)[kWord], uint64_t word) {
    pending_ += __builtin_popcountll(word);
    if (~word == 0) {
      for (int j = 0; j < kWord; ++j) ++counts_[j % kCopies][bins[j]];
      return;
    }
    for (; word != 0; word &= word - 1) {
      const int j = __builtin_ctzll(word);
      ++counts_[j % kCopies][bins[j]];
    }
  }

  // Called often enough that 32-bit counts cannot overflow.
  void flush_if_full(unsigned long long* histogram) {
    if (pending_ >= int64_t{1} << 30) flush(histogram);
  }

  void flush(unsigned long long* histogram) {
    for (int bin = 0; bin < 2 * kBins; ++bin) {
      unsigned long long sum = 0;
      for (int copy = 0; copy < kCopies; ++copy) sum += counts_[copy][bin];
      if (sum != 0) atomic_add(histogram[bin], sum);
    }
    memset(counts_, 0, sizeof(counts_));
    pending_ = 0;
  }

 private:
  static constexpr int kCopies = 4;
  uint32_t counts_[kCopies][2 * kBins] = {};
  int64_t pending_ = 0;
};

// Digits of pass `pass` of the keys of one word, those of the second cursor behind those of the first, and a bit for
// every key that counts and shares a cursor's prefix. key_at(data, i, key) gives key i and whether it counts at all.
// Always inlined: with n a constant, the usual case, the loop vectorises; with n a variable GCC runs it one by one.
template <class A, class KeyAt>
UNLEARN_ALWAYS_INLINE inline uint64_t word_digits(void* const* data, int64_t begin, int n, Key<A> first, Key<A> second,
                                                  bool two, int pass, const KeyAt& key_at, int32_t (&bins)[kWord]) {
  const int above = pass == 0 ? 0 : digit_shift<A>(pass - 1);
  const Key<A> any = pass == 0 ? ~Key<A>(0) : Key<A>(0);  // before the first digit every key shares the prefix
  uint8_t found[kWord] = {};
  UNLEARN_INDEPENDENT
  for (int j = 0; j < n; ++j) {
    Key<A> key;
    const bool counted = key_at(data, begin + j, key);
    const bool in_first = ((key ^ first) >> above & ~any) == 0;
    const bool in_second = two & ((key ^ second) >> above == 0);
    bins[j] = digit_of<A>(key, pass) + (in_first ? 0 : kBins);
    found[j] = counted & (in_first | in_second);
  }
  return word_of_flags(found);
}

// Histograms, [2][kBins], of the digits of pass `pass` of the keys that share a cursor's prefix.
template <class A, int N, class KeyAt>
void count_digits(const Slice<N>* slices, int64_t count, const SelectState<A>& state, int pass,
                  unsigned long long* histogram, const Exec& exec, const KeyAt& key_at) {
  memset(histogram, 0, 2 * kBins * sizeof(*histogram));
  const Key<A> first = state.cursor[0].prefix, second = state.cursor[1].prefix;
  const bool two = first != second;
  parallel_for(exec, total_words(slices, count), kGrain / kWord, [=](int64_t from, int64_t to) {
    LocalHistogram local;
    walk(slices, count, from, to, [&](int64_t t, int64_t begin, int64_t end) {
      int32_t bins[kWord];
      int64_t i = begin;
      for (; i + kWord <= end; i += kWord) {
        local.add(bins, word_digits<A>(slices[t].data, i, kWord, first, second, two, pass, key_at, bins));
        local.flush_if_full(histogram);
      }
      if (i < end)
        local.add(bins,
                  word_digits<A>(slices[t].data, i, static_cast<int>(end - i), first, second, two, pass, key_at, bins));
    });
    local.flush(histogram);
  });
}

// Follows both cursors from the first digit to the last. on_total(n) may place them once the keys are counted.
template <class A, int N, class KeyAt, class OnTotal>
void descend_all(const Slice<N>* slices, int64_t count, SelectState<A>& state, unsigned long long* histogram,
                 const Exec& exec, const KeyAt& key_at, const OnTotal& on_total) {
  for (int pass = 0; pass < kPasses<A>; ++pass) {
    count_digits<A>(slices, count, state, pass, histogram, exec, key_at);
    if (pass == 0) {
      state.total = 0;
      for (int bin = 0; bin < kBins; ++bin) state.total += static_cast<int64_t>(histogram[bin]);
      if (!on_total(state.total)) return;
    }
    const bool two = state.cursor[0].prefix != state.cursor[1].prefix;
    state.cursor[0].descend(histogram, pass);
    state.cursor[1].descend(histogram + (two ? kBins : 0), pass);
  }
}

template <class T>
Key<acc_t<T>> score_key(void* const* data, int64_t i, bool largest) {
  return selection_key<acc_t<T>>(static_cast<const T*>(data[0])[i], largest);
}

// One word of scores against the threshold: bit j of *before and *tied. Inlined for the reason given at word_digits.
template <class T>
UNLEARN_ALWAYS_INLINE inline void compare_word(void* const* data, int64_t i, int n, bool largest,
                                               Key<acc_t<T>> threshold, uint64_t* before, uint64_t* tied) {
  uint8_t less[kWord] = {}, equal[kWord] = {};
  UNLEARN_INDEPENDENT
  for (int j = 0; j < n; ++j) {
    const Key<acc_t<T>> key = score_key<T>(data, i + j, largest);
    less[j] = key < threshold;
    equal[j] = key == threshold;
  }
  *before = word_of_flags(less);
  *tied = word_of_flags(equal);
}

// f(chunk, t, begin, end) for every tie chunk, in parallel.
template <class F>
void for_each_tie_chunk(const Slice<2>* slices, int64_t count, int64_t size, const Exec& exec, const F& f) {
  int64_t chunks = 0;
  for (int64_t t = 0; t < count; ++t) chunks += (slices[t].numel + size - 1) / size;
  parallel_for(exec, chunks, 1, [&](int64_t first, int64_t last) {
    int64_t start = 0;
    for (int64_t t = 0; t < count && start < last; ++t) {
      const int64_t here = (slices[t].numel + size - 1) / size;
      for (int64_t c = std::max(first, start); c < std::min(last, start + here); ++c)
        f(c, t, (c - start) * size, std::min((c - start + 1) * size, slices[t].numel));
      start += here;
    }
  });
}

// The lowest n set bits of bits.
uint64_t lowest_bits(uint64_t bits, int64_t n) {
  uint64_t kept = 0;
  for (; n > 0 && bits != 0; --n) {
    kept |= bits & -bits;
    bits &= bits - 1;
  }
  return kept;
}

template <class T>
void write_masks(const Slice<2>* slices, int64_t count, bool largest, const SelectState<acc_t<T>>& state, int64_t* ties,
                 const Exec& exec) {
  const Key<acc_t<T>> threshold = state.cursor[0].prefix;
  int64_t total = 0, chunks = 0;
  for (int64_t t = 0; t < count; ++t) total += slices[t].numel;
  const int64_t size = tie_chunk(total);
  for_each_tie_chunk(slices, count, size, exec, [&](int64_t c, int64_t t, int64_t begin, int64_t end) {
    int64_t found = 0;
    for (int64_t i = begin; i < end; ++i) found += score_key<T>(slices[t].data, i, largest) == threshold;
    ties[c] = found;
  });
  for (int64_t t = 0; t < count; ++t) chunks += (slices[t].numel + size - 1) / size;
  int64_t left = state.cursor[0].rank + 1;  // ties to select
  for (int64_t c = 0; c < chunks; ++c) {
    ties[c] = std::min(ties[c], left);
    left -= ties[c];
  }
  for_each_tie_chunk(slices, count, size, exec, [&](int64_t c, int64_t t, int64_t begin, int64_t end) {
    auto* packed = static_cast<uint8_t*>(slices[t].data[1]);
    int64_t share = ties[c];
    for (int64_t i = begin; i < end; i += kWord) {
      const int n = static_cast<int>(std::min(kWord, end - i));
      uint64_t before, tied;
      if (n == kWord)
        compare_word<T>(slices[t].data, i, kWord, largest, threshold, &before, &tied);
      else
        compare_word<T>(slices[t].data, i, n, largest, threshold, &before, &tied);
      const int64_t here = __builtin_popcountll(tied);
      const uint64_t word = before | (here <= share ? tied : lowest_bits(tied, share));
      share -= std::min(here, share);
      memcpy(packed + i / 8, &word, static_cast<size_t>((n + 7) / 8));
    }
  });
}

}  // namespace

template <>
int selected_counts<kBackend>(DType dtype, const Slice<2>* slices, int64_t count, const double* alphas,
                              int64_t n_alphas, int64_t* counts, const Exec& exec) {
  constexpr int64_t kBlock = 1024;  // scalars compared with every alpha while they are in the first-level cache
  visit_accumulator(dtype, [&]<class A>(Tag<A>) {
    for_each_range(slices, count, exec, [&](int64_t t, int64_t begin, int64_t end) {
      const A* full = static_cast<const A*>(slices[t].data[0]);
      const A* forget = static_cast<const A*>(slices[t].data[1]);
      for (int64_t from = begin; from < end; from += kBlock) {
        const int64_t to = std::min(from + kBlock, end), n = to - from;
        A fulls[kBlock], forgets[kBlock];
        for (int64_t i = 0; i < n; ++i) {
          const Comparable<A> pair = comparable(full[from + i], forget[from + i]);
          fulls[i] = pair.full;
          forgets[i] = pair.forget;
        }
        for (int64_t a = 0; a < n_alphas; ++a) {
          const A alpha = static_cast<A>(alphas[a]);
          int32_t found = 0;
          for (int64_t i = 0; i < n; ++i) found += exceeds(alpha, Comparable<A>{fulls[i], forgets[i]});
          if (found != 0) atomic_add(counts[a * count + t], int64_t{found});
        }
      }
    });
  });
  return 0;
}

template <>
int ratio_quantile<kBackend>(DType dtype, const Slice<2>* slices, int64_t count, double q, void* result,
                             int64_t* n_finite, void* scratch, const Exec& exec) {
  visit_accumulator(dtype, [&]<class A>(Tag<A>) {
    SelectState<A> state{};
    const auto key_at = [](void* const* data, int64_t i, Key<A>& key) UNLEARN_ALWAYS_INLINE {
      const A ratio = importance_ratio(static_cast<const A*>(data[0])[i], static_cast<const A*>(data[1])[i]);
      key = key_of(ratio);
      return is_finite(ratio);
    };
    descend_all(slices, count, state, static_cast<unsigned long long*>(scratch), exec, key_at, [&](int64_t n) {
      if (n > 0) state.fraction = place_quantile(q, n, state.cursor);
      return n > 0;
    });
    *n_finite = state.total;
    *static_cast<A*>(result) = interpolate(state);
  });
  return 0;
}

template <>
int topk_mask<kBackend>(DType dtype, const Slice<2>* slices, int64_t count, int64_t k, bool largest, int64_t* n_nan,
                        void* scratch, const Exec& exec) {
  visit(dtype, [&]<class T>(Tag<T>) {
    using A = acc_t<T>;
    auto* histogram = static_cast<unsigned long long*>(scratch);
    SelectState<A> state{};
    state.cursor[0].rank = state.cursor[1].rank = k - 1;
    const auto key_at = [largest](void* const* data, int64_t i, Key<A>& key) UNLEARN_ALWAYS_INLINE {
      const A score = static_cast<const T*>(data[0])[i];
      key = selection_key<A>(score, largest);
      return score == score;
    };
    int64_t total = 0;
    for (int64_t t = 0; t < count; ++t) total += slices[t].numel;
    descend_all(slices, count, state, histogram, exec, key_at, [&](int64_t ordered) {
      *n_nan = total - ordered;
      return *n_nan == 0;
    });
    if (*n_nan != 0) return;
    write_masks<T>(slices, count, largest, state, reinterpret_cast<int64_t*>(histogram + 2 * kBins), exec);
  });
  return 0;
}

}  // namespace unlearn_ext
