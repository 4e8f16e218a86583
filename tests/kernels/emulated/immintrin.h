// Stands for the compiler's header of this name where kernels are built for instructions that this processor lacks:
// AVX2 stays the compiler's, AVX-512 becomes functions of SIMDe (https://github.com/simd-everywhere/simde, 0.8.2). For
// `make test-emulated` alone; docs/results/README.md says what it found.
#pragma once

// The build defines these for our sources. The compiler and SIMDe must not believe them.
#if defined(__AVX512BF16__)
#define EMULATED_WITH_BF16 1
#endif
#undef __AVX512F__
#undef __AVX512BW__
#undef __AVX512DQ__
#undef __AVX512VL__
#undef __AVX512VNNI__
#undef __AVX512BF16__

#include_next <immintrin.h>
#include <stdint.h>
#include <string.h>
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// Calls rather than copies in every unrolled tile: the compiler takes minutes with those.
#define EMULATED static __attribute__((noinline, unused))

// Functions that this SIMDe lacks.
EMULATED __m128i emulated_cvtepi32_epi8(__m512i a) {
  int32_t from[16];
  int8_t to[16];
  memcpy(from, &a, 64);
  for (int i = 0; i < 16; i++) to[i] = (int8_t)from[i];
  return _mm_loadu_si128((const __m128i*)to);
}
template <typename Byte>
EMULATED __m512i emulated_widen(__m128i a) {
  Byte from[16];
  int32_t to[16];
  memcpy(from, &a, 16);
  for (int i = 0; i < 16; i++) to[i] = from[i];
  __m512i result;
  memcpy(&result, to, 64);
  return result;
}
EMULATED int32_t emulated_reduce_add_epi32(__m512i a) {
  uint32_t lane[16], sum = 0;
  memcpy(lane, &a, 64);
  for (uint32_t x : lane) sum += x;
  return (int32_t)sum;
}
EMULATED void emulated_mask_storeu_epi32(void* to, uint8_t mask, __m256i a) {
  int32_t lane[8];
  memcpy(lane, &a, 32);
  for (int i = 0; i < 8; i++)
    if (mask >> i & 1) memcpy((char*)to + 4 * i, lane + i, 4);
}

EMULATED __m512i emulated_dpbusd_epi32(__m512i acc, __m512i x, __m512i y) {
  return simde_mm512_dpbusd_epi32(acc, x, y);
}
EMULATED __m512i emulated_madd_epi16(__m512i x, __m512i y) { return simde_mm512_madd_epi16(x, y); }
EMULATED __m512i emulated_shuffle_epi8(__m512i x, __m512i y) { return simde_mm512_shuffle_epi8(x, y); }

// Masked lanes are neither read nor written, whereas SIMDe reads them all: a row may end at the end of its memory.
EMULATED __m512 emulated_maskz_loadu_ps(uint16_t mask, const void* from) {
  float lane[16] = {};
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) memcpy(lane + i, (const char*)from + 4 * i, 4);
  __m512 result;
  memcpy(&result, lane, 64);
  return result;
}
EMULATED void emulated_mask_storeu_512(void* to, uint16_t mask, const void* lanes) {
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) memcpy((char*)to + 4 * i, (const char*)lanes + 4 * i, 4);
}
EMULATED void emulated_mask_storeu_ps(void* to, uint16_t mask, __m512 a) { emulated_mask_storeu_512(to, mask, &a); }
EMULATED void emulated_mask_storeu_epi32_512(void* to, uint16_t mask, __m512i a) {
  emulated_mask_storeu_512(to, mask, &a);
}

// bf16 as Intel's manual has VCVTNEPS2BF16 and VDPBF16PS: the odd product is added before the even one, each fused and
// rounded to the nearest even; subnormal numbers are zeros on the way in and out.
static inline uint32_t emulated_no_subnormal(uint32_t bits) { return bits & 0x7f800000u ? bits : bits & 0x80000000u; }
EMULATED __m256bh emulated_cvtneps_pbh(__m512 a) {
  uint32_t from[16];
  uint16_t to[16];
  memcpy(from, &a, 64);
  for (int i = 0; i < 16; i++) {
    const uint32_t bits = emulated_no_subnormal(from[i]);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    to[i] = (uint16_t)(nan ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  __m256bh result;
  memcpy(&result, to, 32);
  return result;
}
EMULATED void emulated_multiply_add(float acc[16], const uint32_t x[16], const uint32_t y[16], int odd) {
  for (int i = 0; i < 16; i++) {
    uint32_t bits[3] = {odd ? x[i] & 0xffff0000u : x[i] << 16, odd ? y[i] & 0xffff0000u : y[i] << 16, 0};
    memcpy(bits + 2, acc + i, 4);
    float value[3];
    for (uint32_t& b : bits) b = emulated_no_subnormal(b);
    memcpy(value, bits, 12);
    // The product of two bf16 is exact, but for one too large or too small for float32.
    const float sum = __builtin_fmaf(value[0], value[1], value[2]);
    memcpy(bits, &sum, 4);
    bits[0] = emulated_no_subnormal(bits[0]);
    memcpy(acc + i, bits, 4);
  }
}
EMULATED __m512 emulated_dpbf16_ps(__m512 acc, __m512bh x, __m512bh y) {
  float sum[16];
  uint32_t pairs[2][16];
  memcpy(sum, &acc, 64);
  memcpy(pairs[0], &x, 64);
  memcpy(pairs[1], &y, 64);
  emulated_multiply_add(sum, pairs[0], pairs[1], 1);
  emulated_multiply_add(sum, pairs[0], pairs[1], 0);
  memcpy(&acc, sum, 64);
  return acc;
}

#undef _mm512_cvtepi32_epi8
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepu8_epi32
#undef _mm512_reduce_add_epi32
#undef _mm256_mask_storeu_epi32
#undef _mm512_maskz_loadu_ps
#undef _mm512_mask_storeu_ps
#undef _mm512_mask_storeu_epi32
#undef _mm512_cvtneps_pbh
#undef _mm512_dpbusd_epi32
#undef _mm512_madd_epi16
#undef _mm512_shuffle_epi8
#undef _mm512_dpbf16_ps
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
#define _mm512_cvtepi8_epi32 emulated_widen<int8_t>
#define _mm512_cvtepu8_epi32 emulated_widen<uint8_t>
#define _mm512_reduce_add_epi32 emulated_reduce_add_epi32
#define _mm256_mask_storeu_epi32 emulated_mask_storeu_epi32
#define _mm512_maskz_loadu_ps emulated_maskz_loadu_ps
#define _mm512_mask_storeu_ps emulated_mask_storeu_ps
#define _mm512_mask_storeu_epi32 emulated_mask_storeu_epi32_512
#define _mm512_dpbusd_epi32 emulated_dpbusd_epi32
#define _mm512_madd_epi16 emulated_madd_epi16
#define _mm512_shuffle_epi8 emulated_shuffle_epi8
#define _mm512_cvtneps_pbh emulated_cvtneps_pbh
#define _mm512_dpbf16_ps emulated_dpbf16_ps

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#if defined(EMULATED_WITH_BF16)
#define __AVX512VNNI__ 1
#define __AVX512BF16__ 1
#endif
