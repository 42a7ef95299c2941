// Walks lists of tensors on the CPU. Included by kernel files only, each built once per instruction set: the unnamed
// namespace keeps every build's copy to itself.
#pragma once

#include "core/compiler.h"
#include "core/lists.h"

namespace unlearn_ext {
namespace {

// Work smaller than this many scalars is not worth waking a thread for.
constexpr int64_t kGrain = 32768;

template <class F>
void parallel_for(const Exec& exec, int64_t n, int64_t grain, const F& f) {
  exec.parallel_for(
      n, grain, [](const void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
      &f);
}

constexpr int64_t words_of(int64_t numel) { return (numel + kWord - 1) / kWord; }

template <int N>
int64_t total_words(const Slice<N>* slices, int64_t count) {
  int64_t words = 0;
  for (int64_t t = 0; t < count; ++t) words += words_of(slices[t].numel);
  return words;
}

// The parts of tensors that words [first, last) of all tensors together cover: f(t, begin, end), begin a multiple of
// kWord.
template <int N, class F>
void walk(const Slice<N>* slices, int64_t count, int64_t first, int64_t last, const F& f) {
  int64_t start = 0;  // of tensor t, in words over all tensors
  for (int64_t t = 0; t < count && start < last; ++t) {
    const int64_t here = words_of(slices[t].numel);
    const int64_t begin = std::max(first - start, int64_t{0}) * kWord;
    const int64_t end = std::min(std::min(last - start, here) * kWord, slices[t].numel);
    if (begin < end) f(t, begin, end);
    start += here;
  }
}

// Splits all tensors of the lists over threads.
template <int N, class F>
void for_each_range(const Slice<N>* slices, int64_t count, const Exec& exec, const F& f) {
  parallel_for(exec, total_words(slices, count), kGrain / kWord,
               [&](int64_t first, int64_t last) { walk(slices, count, first, last, f); });
}

template <class R, class Op, size_t... I>
void apply_range(const Op& op, void* const* data, int64_t begin, int64_t end, std::index_sequence<I...> indices) {
  [&](auto*... list) {
    UNLEARN_INDEPENDENT
    for (int64_t i = begin; i < end; ++i) apply_at<R>(op, Always{}, indices, list + i...);
  }(static_cast<typename R::template at<I>*>(data[I])...);
}

// The 64 mask bits of the scalars from `begin` on; bits past the end of the tensor are not read.
UNLEARN_HD uint64_t mask_word(const uint8_t* bits, int64_t begin, int64_t numel) {
  uint64_t word = 0;
  if (numel - begin >= kWord)
    memcpy(&word, bits + begin / 8, sizeof(word));
  else
    for (int64_t i = begin; i < numel; i += 8) word |= static_cast<uint64_t>(bits[i / 8]) << (i - begin);
  return word;
}

struct Bits32 {
  uint32_t value[32];
};
constexpr Bits32 make_bits32() {
  Bits32 bits{};
  for (int i = 0; i < 32; ++i) bits.value[i] = 1u << i;
  return bits;
}
constexpr Bits32 kBits32 = make_bits32();

// Shaped for GCC's vectoriser: halves of a word, since 64-bit lanes would halve its width; bits from a table, since it
// turns a shift and test into a 1-bit type it has no vectors of; a length that is no constant, since it unrolls
// constant loops completely beforehand. Scalar code here is eight times slower.
template <class R, class Op, size_t... I>
void apply_masked_word(const Op& op, void* const* data, int64_t begin, int64_t end, uint64_t word,
                       std::index_sequence<I...> indices) {
  [&](auto*... list) {
    for (; begin < end; begin += kWord / 2, word >>= kWord / 2) {
      const auto bits = static_cast<uint32_t>(word);
      const auto n = static_cast<uint32_t>(std::min(kWord / 2, end - begin));
      UNLEARN_INDEPENDENT
      for (uint32_t i = 0; i < n; ++i) apply_at<R>(op, (bits & kBits32.value[i]) != 0, indices, list + begin + i...);
    }
  }(static_cast<typename R::template at<I>*>(data[I])...);
}

// Words with up to this many set bits are taken bit by bit: that touches only the cache lines of those scalars.
constexpr int kFewBits = 3;

template <class R, class Op, size_t... I>
void apply_bits(const Op& op, void* const* data, int64_t begin, int64_t end, uint64_t word,
                std::index_sequence<I...> indices) {
  [&](auto*... list) {
    for (; word != 0; word &= word - 1) {
      const int64_t i = begin + __builtin_ctzll(word);
      if (i < end) apply_at<R>(op, Always{}, indices, list + i...);
    }
  }(static_cast<typename R::template at<I>*>(data[I])...);
}

template <class R, class Op>
int apply(const Op& op, const Slice<R::size>* slices, int64_t count, const Exec& exec) {
  for_each_range(slices, count, exec, [&](int64_t t, int64_t begin, int64_t end) {
    apply_range<R>(op, slices[t].data, begin, end, typename R::indices{});
  });
  return 0;
}

// Slices carry the packed mask behind the row. Words without a set bit cost one load of eight bytes: none of the
// lists is touched there. Runs of full words take the dense loop.
template <class R, class Op>
int apply_masked(const Op& op, const Slice<R::size + 1>* slices, int64_t count, const Exec& exec) {
  for_each_range(slices, count, exec, [&](int64_t t, int64_t begin, int64_t end) {
    const int64_t numel = slices[t].numel;
    void* const* data = slices[t].data;
    const auto* bits = static_cast<const uint8_t*>(data[R::size]);
    int64_t dense = begin;  // start of the pending run of full words
    for (int64_t i = begin; i < end; i += kWord) {
      const uint64_t word = kOnCleared<Op> ? ~mask_word(bits, i, numel) : mask_word(bits, i, numel);
      if (~word == 0) continue;
      if (dense < i) apply_range<R>(op, data, dense, i, typename R::indices{});
      const int64_t stop = std::min(i + kWord, end);
      if (__builtin_popcountll(word) <= kFewBits)
        apply_bits<R>(op, data, i, stop, word, typename R::indices{});
      else
        apply_masked_word<R>(op, data, i, stop, word, typename R::indices{});
      dense = i + kWord;
    }
    if (dense < end) apply_range<R>(op, data, dense, end, typename R::indices{});
  });
  return 0;
}

}  // namespace
}  // namespace unlearn_ext
