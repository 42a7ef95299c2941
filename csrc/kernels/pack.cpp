#include "kernels/pack.h"

#include "core/apply_cpu.h"
#include "core/bits_cpu.h"

namespace unlearn_ext {

template <>
int pack_mask<kBackend>(const uint8_t* mask, uint8_t* packed, int64_t numel, const Exec& exec) {
  parallel_for(exec, words_of(numel), 8 * kGrain / kWord, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kWord; i < std::min(end * kWord, numel); i += kWord) {
      const int64_t n = std::min(kWord, numel - i);
      uint8_t last[kWord] = {};
      const uint8_t* flags = mask + i;
      if (n < kWord) flags = static_cast<const uint8_t*>(memcpy(last, flags, static_cast<size_t>(n)));
      const uint64_t word = word_of_flags(flags);
      if (n == kWord)
        memcpy(packed + i / 8, &word, sizeof(word));
      else
        memcpy(packed + i / 8, &word, static_cast<size_t>((n + 7) / 8));
    }
  });
  return 0;
}

template <>
int unpack_mask<kBackend>(const uint8_t* packed, uint8_t* mask, int64_t numel, const Exec& exec) {
  parallel_for(exec, words_of(numel), 8 * kGrain / kWord, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kWord; i < std::min(end * kWord, numel); i += kWord) {
      const uint64_t word = mask_word(packed, i, numel);
      if (numel - i >= kWord) {
        flags_of_word(word, mask + i);
      } else {
        uint8_t last[kWord];
        flags_of_word(word, last);
        memcpy(mask + i, last, static_cast<size_t>(numel - i));
      }
    }
  });
  return 0;
}

}  // namespace unlearn_ext
