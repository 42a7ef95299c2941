// Between bytes that are flags and words of bits, 64 at a time. Included by kernel files only, each built once per
// instruction set: the unnamed namespace keeps every build's copy to itself.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "core/lists.h"

namespace unlearn_ext {
namespace {

// Bit j is set where flags[j] is not 0.
inline uint64_t word_of_flags(const uint8_t* flags) {
#if defined(__AVX512BW__)
  const __m512i bytes = _mm512_loadu_si512(flags);
  return _mm512_test_epi8_mask(bytes, bytes);
#elif defined(__AVX2__)
  uint64_t word = 0;
  for (int half = 0; half < 2; ++half) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(flags) + half);
    const auto clear = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256())));
    word |= uint64_t{~clear} << (32 * half);
  }
  return word;
#else
  uint64_t word = 0;
  for (int byte = 0; byte < 8; ++byte) {
    uint64_t eight;
    memcpy(&eight, flags + 8 * byte, 8);
    // Each flag folded onto its lowest bit; the product then collects bit j of flag j in the top byte.
    eight |= eight >> 4 & 0x0f0f0f0f0f0f0f0fu;
    eight |= eight >> 2 & 0x0303030303030303u;
    eight |= eight >> 1;
    word |= ((eight & 0x0101010101010101u) * 0x0102040810204080u >> 56) << (8 * byte);
  }
  return word;
#endif
}

// flags[j] = bit j, as 0 or 1.
inline void flags_of_word(uint64_t word, uint8_t* flags) {
#if defined(__AVX512BW__)
  _mm512_storeu_si512(flags, _mm512_maskz_set1_epi8(word, 1));
#elif defined(__AVX2__)
  for (int half = 0; half < 2; ++half) {
    const __m256i bits = _mm256_set1_epi32(static_cast<int>(word >> (32 * half)));
    // Byte j receives the byte of the word that holds bit j, keeps that bit, and turns it into 1.
    const __m256i spread =
        _mm256_shuffle_epi8(bits, _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
    const __m256i own = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
    const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, own), own);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(flags) + half, _mm256_and_si256(set, _mm256_set1_epi8(1)));
  }
#else
  for (int byte = 0; byte < 8; ++byte) {
    // A copy of the eight bits in every byte, of which byte j keeps bit j; adding 0x7f carries it into the top bit.
    const uint64_t kept = (word >> (8 * byte) & 0xffu) * 0x0101010101010101u & 0x8040201008040201u;
    const uint64_t eight = (kept + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
    memcpy(flags + 8 * byte, &eight, 8);
  }
#endif
}

}  // namespace
}  // namespace unlearn_ext
