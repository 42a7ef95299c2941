#include "kernels/pack.h"

#include "core/apply_cpu.h"
#include "core/bits_cpu.h"

namespace unlearn_ext {
namespace {

// Calls f(mask, packed, i, numel) for every word of every mask, i its first flag. Eight scalars of a mask are as much
// work as one of a list.
template <class F>
void for_each_word(const Slice<2>* slices, int64_t count, const Exec& exec, const F& f) {
  parallel_for(exec, total_words(slices, count), 8 * kGrain / kWord, [&](int64_t first, int64_t last) {
    walk(slices, count, first, last, [&](int64_t t, int64_t begin, int64_t end) {
      auto* mask = static_cast<uint8_t*>(slices[t].data[0]);
      auto* packed = static_cast<uint8_t*>(slices[t].data[1]);
      for (int64_t i = begin; i < end; i += kWord) f(mask, packed, i, slices[t].numel);
    });
  });
}

}  // namespace

template <>
int pack_masks<kBackend>(const Slice<2>* slices, int64_t count, const Exec& exec) {
  for_each_word(slices, count, exec, [](const uint8_t* mask, uint8_t* packed, int64_t i, int64_t numel) {
    const int64_t n = std::min(kWord, numel - i);
    uint8_t last[kWord] = {};
    const uint8_t* flags = mask + i;
    if (n < kWord) flags = static_cast<const uint8_t*>(memcpy(last, flags, static_cast<size_t>(n)));
    const uint64_t word = word_of_flags(flags);
    if (n == kWord)
      memcpy(packed + i / 8, &word, sizeof(word));
    else
      memcpy(packed + i / 8, &word, static_cast<size_t>((n + 7) / 8));
  });
  return 0;
}

template <>
int unpack_masks<kBackend>(const Slice<2>* slices, int64_t count, const Exec& exec) {
  for_each_word(slices, count, exec, [](uint8_t* mask, const uint8_t* packed, int64_t i, int64_t numel) {
    const uint64_t word = mask_word(packed, i, numel);
    if (numel - i >= kWord) {
      flags_of_word(word, mask + i);
    } else {
      uint8_t last[kWord];
      flags_of_word(word, last);
      memcpy(mask + i, last, static_cast<size_t>(numel - i));
    }
  });
  return 0;
}

}  // namespace unlearn_ext
