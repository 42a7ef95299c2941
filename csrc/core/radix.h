// Exact order statistics by histograms over the bits of floats: no sort, no copy of the values, constant memory.
//
// A float maps to an unsigned key of the same order. The key of rank r is found digit by digit, highest first: count
// the digits of all keys that share the prefix found so far, step through the counts to the digit that holds r.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace unlearn_ext {

template <class A>
using Key = std::conditional_t<std::is_same_v<A, double>, uint64_t, uint32_t>;

// Order-preserving: smaller value, smaller key; -0 and +0 share one. Keys of NaN lie outside [key(-inf), key(+inf)].
template <class A>
UNLEARN_HD Key<A> key_of(A value) {
  using K = Key<A>;
  constexpr K kTop = K(1) << (8 * sizeof(K) - 1);
  const K bits = bit_cast<K>(value + A(0));  // -0 + 0 is +0
  return bits & kTop ? static_cast<K>(~bits) : static_cast<K>(bits | kTop);
}

template <class A>
UNLEARN_HD A value_of(Key<A> key) {
  using K = Key<A>;
  constexpr K kTop = K(1) << (8 * sizeof(K) - 1);
  return bit_cast<A>(key & kTop ? static_cast<K>(key ^ kTop) : static_cast<K>(~key));
}

inline constexpr int kDigitBits = 11;
inline constexpr int kBins = 1 << kDigitBits;

// Passes over a key: 3 for float, 6 for double.
template <class A>
constexpr int kPasses = (8 * static_cast<int>(sizeof(A)) + kDigitBits - 1) / kDigitBits;

// Bits below the digit of pass p; the last digit is narrower.
template <class A>
UNLEARN_HD int digit_shift(int pass) {
  const int shift = 8 * static_cast<int>(sizeof(A)) - kDigitBits * (pass + 1);
  return shift > 0 ? shift : 0;
}

template <class A>
UNLEARN_HD int digit_of(Key<A> key, int pass) {
  const int above = 8 * static_cast<int>(sizeof(A)) - kDigitBits * pass;  // bits not yet consumed
  const int width = above < kDigitBits ? above : kDigitBits;
  return static_cast<int>(key >> digit_shift<A>(pass) & ((Key<A>(1) << width) - 1));
}

// True where the digits of key before pass p are those of `prefix` (a key with the lower bits zero).
template <class A>
UNLEARN_HD bool has_prefix(Key<A> key, Key<A> prefix, int pass) {
  return pass == 0 || (key ^ prefix) >> digit_shift<A>(pass - 1) == 0;
}

// A rank on its way to a key: how many keys with the current prefix still lie before it.
template <class A>
struct Cursor {
  Key<A> prefix;
  int64_t rank;

  // Moves to the bin that holds the rank, among `bins` bins from `first` on, which must hold it.
  UNLEARN_HD void descend(const unsigned long long* histogram, int pass, int first = 0, int bins = kBins) {
    int bin = first;
    for (; bin < first + bins - 1 && rank >= static_cast<int64_t>(histogram[bin]); ++bin)
      rank -= static_cast<int64_t>(histogram[bin]);
    prefix |= static_cast<Key<A>>(bin) << digit_shift<A>(pass);
  }
};

// The two neighbours of the q-quantile among n ordered values, and how far it lies between them.
template <class A>
UNLEARN_HD double place_quantile(double q, int64_t n, Cursor<A> (&cursor)[2]) {
  const double position = q * static_cast<double>(n - 1);
  const int64_t low = static_cast<int64_t>(position);
  cursor[0].rank = low;
  cursor[1].rank = low + 1 < n ? low + 1 : n - 1;
  return position - static_cast<double>(low);
}

}  // namespace unlearn_ext
