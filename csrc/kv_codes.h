// Keys and values as int8 or int4 codes (language.h says what they mean): a head of a token into its page, and a page of a
// head back into floats. Included by attention.cpp alone.
#pragma once
#include "language.h"
#include "simd.h"

namespace {

struct Int8 {
  static constexpr int SCALES = 1;
  static i64 width(i64 dim) { return dim; }
};
struct Int4 {
  static constexpr int SCALES = 2;
  static i64 width(i64 dim) { return (dim + 1) / 2; }
};

template <typename KV>
struct IsCoded {
  static constexpr bool value = false;
};
template <>
struct IsCoded<Int8> {
  static constexpr bool value = true;
};
template <>
struct IsCoded<Int4> {
  static constexpr bool value = true;
};

constexpr float SMALLEST_SPREAD = 1e-30f;  // below it a spread counts as none: its inverse would overflow

// Half to even; |x| < 2^22.
ALWAYS_INLINE float to_integer(float x) {
  const float magic = 12582912.0f;
  float t = x + magic;
  return t - magic;
}

struct Code {
  float low, scale, inverse;
};

// NaN in scale and low where an element is not finite; such a head's codes are those of inverse 0.
ALWAYS_INLINE Code code_of(const float* x, i64 dim, float levels, bool centred) {
  float least = centred ? 0.0f : x[0], most = centred ? 0.0f : x[0], rest = 0.0f;
  for (i64 d = 0; d < dim; d++) {
    const float y = centred ? fabsf(x[d]) : x[d];
    least = y < least ? y : least;
    most = y > most ? y : most;
    rest += x[d] - x[d];
  }
  if (rest != 0.0f || rest != rest) return {NAN, NAN, 0.0f};
  const float spread = most - least;
  return {least, spread / levels, spread > SMALLEST_SPREAD ? levels / spread : 0.0f};
}

ALWAYS_INLINE int code(float x, const Code& c, float least, float most) {
  if (c.inverse == 0.0f) return 0;
  const float y = to_integer((x - c.low) * c.inverse);
  return (int)(y < least ? least : y > most ? most : y);
}

// codes: `step` bytes apart. scales: scale, and TILE floats on low.
ALWAYS_INLINE void encode(const float* x, i64 dim, void* codes, i64 step, float* scales, Int8) {
  const Code c = code_of(x, dim, 127.0f, true);
  int8_t* to = (int8_t*)codes;
  for (i64 d = 0; d < dim; d++) to[d * step] = (int8_t)code(x[d], c, -127.0f, 127.0f);
  scales[0] = c.scale;
}
ALWAYS_INLINE void encode(const float* x, i64 dim, void* codes, i64 step, float* scales, Int4) {
  const Code c = code_of(x, dim, 15.0f, false);
  const i64 half = (dim + 1) / 2;
  uint8_t* to = (uint8_t*)codes;
  for (i64 d = 0; d < half; d++) {
    const int above = half + d < dim ? code(x[half + d], c, 0.0f, 15.0f) : 0;
    to[d * step] = (uint8_t)(code(x[d], c, 0.0f, 15.0f) | above << 4);
  }
  scales[0] = c.scale;
  scales[LS_PAGE] = c.low;
}

// VLEN codes as integers.
ALWAYS_INLINE vi load_codes(const int8_t* p) {
#if VLEN == 16
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif VLEN == 8
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  vi r;
  for (int i = 0; i < VLEN; i++) r[i] = p[i];
  return r;
#endif
}
ALWAYS_INLINE vi load_codes(const uint8_t* p) {
#if VLEN == 16
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif VLEN == 8
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  vi r;
  for (int i = 0; i < VLEN; i++) r[i] = p[i];
  return r;
#endif
}
// The first n of them, the others 0: nothing behind is read.
template <typename T>
ALWAYS_INLINE vi load_codes_part(const T* p, i64 n) {
  T lane[VLEN] = {};
  memcpy(lane, p, (size_t)n);
  return load_codes(lane);
}
ALWAYS_INLINE vf floats(vi x) { return __builtin_convertvector(x, vf); }

// One page of one head: keys [D][PAGE] and values [PAGE][D] in floats.
ALWAYS_INLINE void decode_keys(const void* codes, const float* scales, i64 dim, float* to, Int8) {
  const int8_t* from = (const int8_t*)codes;
  for (i64 c = 0; c < LS_PAGE; c += VLEN) {
    const vf scale = load(scales + c);
    for (i64 d = 0; d < dim; d++) store(to + d * LS_PAGE + c, floats(load_codes(from + d * LS_PAGE + c)) * scale);
  }
}
ALWAYS_INLINE void decode_keys(const void* codes, const float* scales, i64 dim, float* to, Int4) {
  const uint8_t* from = (const uint8_t*)codes;
  const i64 half = (dim + 1) / 2;
  for (i64 c = 0; c < LS_PAGE; c += VLEN) {
    const vf scale = load(scales + c), low = load(scales + LS_PAGE + c);
    for (i64 d = 0; d < half; d++) {
      const vi both = load_codes(from + d * LS_PAGE + c);
      store(to + d * LS_PAGE + c, fma(floats(both & 15), scale, low));
      if (half + d < dim) store(to + (half + d) * LS_PAGE + c, fma(floats(both >> 4), scale, low));
    }
  }
}
ALWAYS_INLINE void decode_values(const void* codes, const float* scales, i64 dim, float* to, Int8) {
  for (i64 j = 0; j < LS_PAGE; j++) {
    const int8_t* from = (const int8_t*)codes + j * dim;
    const vf scale = splat(scales[j]);
    i64 d = 0;
    for (; d + VLEN <= dim; d += VLEN) store(to + j * dim + d, floats(load_codes(from + d)) * scale);
    if (d < dim) store_part(to + j * dim + d, floats(load_codes_part(from + d, dim - d)) * scale, dim - d);
  }
}
ALWAYS_INLINE void decode_values(const void* codes, const float* scales, i64 dim, float* to, Int4) {
  const i64 half = (dim + 1) / 2;
  for (i64 j = 0; j < LS_PAGE; j++) {
    const uint8_t* from = (const uint8_t*)codes + j * half;
    const vf scale = splat(scales[j]), low = splat(scales[LS_PAGE + j]);
    float *first = to + j * dim, *second = first + half;
    i64 d = 0;
    for (; d + VLEN <= dim - half; d += VLEN) {
      const vi both = load_codes(from + d);
      store(first + d, fma(floats(both & 15), scale, low));
      store(second + d, fma(floats(both >> 4), scale, low));
    }
    for (; d < half; d += VLEN) {
      const i64 left = half - d < VLEN ? half - d : (i64)VLEN, above = dim - half - d < left ? dim - half - d : left;
      const vi both = load_codes_part(from + d, left);
      const vf a = fma(floats(both & 15), scale, low), b = fma(floats(both >> 4), scale, low);
      for (i64 i = 0; i < left; i++) first[d + i] = a[i];
      for (i64 i = 0; i < above; i++) second[d + i] = b[i];
    }
  }
}

}  // namespace
