// One vector type and the elementary functions built on it. The same source serves every instruction set: VLEN and a
// handful of primitives change, the sequence of operations an element goes through does not.
//
// The build passes -ffp-contract=off, so a multiply-add is fused exactly where `fma` says so. That is what makes two
// kernels which inline the same function agree bit for bit.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define VLEN 16
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__)
#define VLEN 8
#include <immintrin.h>
#else
#define VLEN 4
#endif

typedef int64_t i64;
typedef float vf __attribute__((vector_size(VLEN * 4)));
typedef int32_t vi __attribute__((vector_size(VLEN * 4)));
typedef float vf_unaligned __attribute__((vector_size(VLEN * 4), aligned(4), may_alias));

#define ALWAYS_INLINE static inline __attribute__((always_inline))

ALWAYS_INLINE vf load(const float* p) { return *(const vf_unaligned*)p; }
ALWAYS_INLINE void store(float* p, vf v) { *(vf_unaligned*)p = v; }
ALWAYS_INLINE vf splat(float x) { return x - (vf){}; }
ALWAYS_INLINE vf as_float(vi x) { return (vf)x; }
ALWAYS_INLINE vi as_int(vf x) { return (vi)x; }
ALWAYS_INLINE vf select(vi mask, vf yes, vf no) { return as_float((as_int(yes) & mask) | (as_int(no) & ~mask)); }

#if VLEN == 16
ALWAYS_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
ALWAYS_INLINE vf vsqrt(vf x) { return (vf)_mm512_sqrt_ps((__m512)x); }
ALWAYS_INLINE vf load_part(const float* p, i64 n) {
  return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
ALWAYS_INLINE void store_part(float* p, vf v, i64 n) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
}
#elif VLEN == 8
ALWAYS_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
ALWAYS_INLINE vf vsqrt(vf x) { return (vf)_mm256_sqrt_ps((__m256)x); }
ALWAYS_INLINE __m256i lanes_below(i64 n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
ALWAYS_INLINE vf load_part(const float* p, i64 n) { return (vf)_mm256_maskload_ps(p, lanes_below(n)); }
ALWAYS_INLINE void store_part(float* p, vf v, i64 n) { _mm256_maskstore_ps(p, lanes_below(n), (__m256)v); }
#else
ALWAYS_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
ALWAYS_INLINE vf vsqrt(vf x) {
  vf r;
  for (int i = 0; i < VLEN; i++) r[i] = __builtin_sqrtf(x[i]);
  return r;
}
ALWAYS_INLINE vf load_part(const float* p, i64 n) {
  vf r = {};
  for (i64 i = 0; i < n; i++) r[i] = p[i];
  return r;
}
ALWAYS_INLINE void store_part(float* p, vf v, i64 n) {
  for (i64 i = 0; i < n; i++) p[i] = v[i];
}
#endif

// x < lo ? lo : x, which keeps a NaN in x; so do the instructions, whose second operand is the answer when in doubt.
#if VLEN == 16
ALWAYS_INLINE vf at_least(vf x, vf lo) { return (vf)_mm512_max_ps((__m512)lo, (__m512)x); }
ALWAYS_INLINE vf at_most(vf x, vf hi) { return (vf)_mm512_min_ps((__m512)hi, (__m512)x); }
#elif VLEN == 8
ALWAYS_INLINE vf at_least(vf x, vf lo) { return (vf)_mm256_max_ps((__m256)lo, (__m256)x); }
ALWAYS_INLINE vf at_most(vf x, vf hi) { return (vf)_mm256_min_ps((__m256)hi, (__m256)x); }
#else
ALWAYS_INLINE vf at_least(vf x, vf lo) { return select(x < lo, lo, x); }
ALWAYS_INLINE vf at_most(vf x, vf hi) { return select(x > hi, hi, x); }
#endif
ALWAYS_INLINE vf vabs(vf x) { return as_float(as_int(x) & 0x7fffffff); }

// exp(x) = scale * (1 + em1) with |x - n ln 2| <= ln 2 / 2 and em1 = expm1 of that remainder; minimax degree 6.
struct ExpParts {
  vf scale, em1;
};
ALWAYS_INLINE ExpParts exp_parts(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits
  vf t = fma(x, splat(1.44269504088896341f), magic);
  vf n = t - magic;
  vf r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = splat(1.3946479884907603e-3f);
  p = fma(p, r, splat(8.366601541638374e-3f));
  p = fma(p, r, splat(4.166628047823906e-2f));
  p = fma(p, r, splat(0.1666654348373413f));
  p = fma(p, r, splat(0.5f));
  ExpParts out;
  out.em1 = fma(p, r * r, r);
  out.scale = as_float((as_int(t) << 23) + 0x3f800000);
  return out;
}
// 0 below -87.3 and +inf above 88.37, where the scale would leave the normal numbers.
ALWAYS_INLINE vf vexp(vf x) {
  ExpParts e = exp_parts(at_most(at_least(x, splat(-87.3f)), splat(88.37f)));
  vf y = fma(e.scale, e.em1, e.scale);
  y = select(x > splat(88.37f), splat(INFINITY), y);
  return select(x < splat(-87.3f), splat(0.0f), y);
}
ALWAYS_INLINE vf vexpm1(vf x) {
  ExpParts e = exp_parts(at_most(at_least(x, splat(-30.0f)), splat(88.0f)));
  return fma(e.scale, e.em1, e.scale - splat(1.0f));
}
ALWAYS_INLINE vf vtanh(vf x) {
  vf d = x + x;
  ExpParts e = exp_parts(at_most(at_least(d, splat(-19.0f)), splat(19.0f)));
  vf em1 = fma(e.scale, e.em1, e.scale - splat(1.0f));
  return em1 / (em1 + splat(2.0f));
}
ALWAYS_INLINE vf vsigmoid(vf x) { return splat(1.0f) / (splat(1.0f) + vexp(-x)); }

// 2 atanh(s) for 0 <= s^2 <= 1/9, as both logarithms need it.
ALWAYS_INLINE vf two_atanh(vf s) {
  vf z = s * s;
  vf p = splat(0.217987522482872f);
  p = fma(p, z, splat(0.17145936191082f));
  p = fma(p, z, splat(0.2230171263217926f));
  p = fma(p, z, splat(0.28568384051322937f));
  p = fma(p, z, splat(0.40000054240226746f));
  p = fma(p, z, splat(0.6666666865348816f));
  return fma(p * z, s, s + s);
}
// Natural logarithm of a positive normal number; 0 gives -inf, a negative number NaN.
ALWAYS_INLINE vf vlog(vf x) {
  vi bits = as_int(x);
  vi e = ((bits - 0x3f3504f3) >> 23);
  vf m = as_float(bits - (e << 23));  // in [sqrt(1/2), sqrt(2))
  vf f = m - splat(1.0f);
  vf n = __builtin_convertvector(e, vf);
  vf y = two_atanh(f / (splat(2.0f) + f));
  y = fma(n, splat(-2.12194440e-4f), y);
  y = fma(n, splat(0.693359375f), y);
  y = select(x == splat(0.0f), splat(-INFINITY), y);
  y = select(x == splat(INFINITY), x, y);
  return select((x < splat(0.0f)) | (x != x), splat(NAN), y);
}
// log(1 + exp(x)), stable on both sides.
ALWAYS_INLINE vf vsoftplus(vf x) {
  vf u = vexp(-vabs(x));
  vf y = two_atanh(u / (splat(2.0f) + u));
  return select(x > splat(0.0f), x + y, y);
}
// sin and cos of 2 pi u, 0 <= u <= 1.
ALWAYS_INLINE void vsincos_turns(vf u, vf* s_out, vf* c_out) {
  const vf magic = splat(12582912.0f);
  vf t4 = u * splat(4.0f);
  vf t = t4 + magic;
  vf f = t4 - (t - magic);  // in [-1/2, 1/2] quarter turns, exact
  vi q = as_int(t) & 3;
  vf z = f * f;
  vf s = splat(2.5954152806662023e-4f);
  s = fma(s, z, splat(-4.731966648250818e-3f));
  s = fma(s, z, splat(7.97005146741867e-2f));
  s = fma(s, z, splat(-0.645964503288269f));
  s = fma(s, z, splat(1.5707963705062866f)) * f;
  vf c = splat(9.040216682478786e-4f);
  c = fma(c, z, splat(-2.086028829216957e-2f));
  c = fma(c, z, splat(0.25366923213005066f));
  c = fma(c, z, splat(-1.2337005138397217f));
  c = fma(c, z, splat(1.0f));
  vi odd = -(q & 1);
  vf sn = select(odd, c, s), cs = select(odd, s, c);
  *s_out = as_float(as_int(sn) ^ ((q & 2) << 30));
  *c_out = as_float(as_int(cs) ^ (((q + 1) & 2) << 30));
}

// Column `a` of up to VLEN rows of a row-major matrix, lane = row; unused lanes repeat the first row, so that they hold
// ordinary values and cost no exception.
ALWAYS_INLINE vf load_column(const float* base, i64 row_stride, i64 a, i64 num_rows) {
  float lane[VLEN];
  for (i64 i = 0; i < VLEN; i++) lane[i] = base[(i < num_rows ? i : 0) * row_stride + a];
  return load(lane);
}
ALWAYS_INLINE void store_column(float* base, i64 row_stride, i64 a, i64 num_rows, vf v) {
  for (i64 i = 0; i < num_rows; i++) base[i * row_stride + a] = v[i];
}
