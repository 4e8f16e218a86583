// Tiles of quantised matrices for AVX2, which has no instruction that sums four products of bytes. Two ways, both exact:
//
// nibbles of 0..15: products of two neighbours are summed as 16-bit integers (maddubs), and a whole sub-block of 32 inputs
// still fits: 8 times * 2 * 15 * 127 = 30480. One widening a sub-block remains.
//
// codes of 0..255: even and odd bytes apart, as 16-bit integers against rows that were spelled out as such ("wide" rows).
//
// Included by packed_int.cpp, which says what a tile computes.
#pragma once

// Leaves a running sum where it is: the compiler would otherwise form all products of a sub-block first, for which there are
// not nearly enough registers.
ALWAYS_INLINE void hold(__m256i& v) { asm("" : "+x"(v)); }
ALWAYS_INLINE void hold(vi& v) { asm("" : "+x"(v)); }

// Weights of few rows are read once a step: what a cache holds beside them (the keys, the interpreter) had better stay. A
// 0.5B model in 4 bits decodes some 4 % faster than with prefetches that keep them, measured on Zen 3.
ALWAYS_INLINE void stream_ahead(const uint8_t* p) { __builtin_prefetch(p, 0, 0); }

// The codes of a later step. A strip of the whole panel fetches both lines of a step; the strips of a half fetch one each,
// of the next block, while they compute with this one.
template <int NJ>
ALWAYS_INLINE void fetch_ahead(const uint8_t* w, i64 ahead) {
  if (NJ == NV) {
    stream_ahead(w + PREFETCH_AHEAD);
    stream_ahead(w + PREFETCH_AHEAD + 64);
  } else {
    __builtin_prefetch(w + ahead);
  }
}

ALWAYS_INLINE vi pair_of(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  return vi{} + four;
}

// Sums of a sub-block for MR rows and NJ vectors; w: the sub-block's first step, at the strip's first vector.
template <int SUB, int MR, int NJ, bool FETCHES>
ALWAYS_INLINE void nibble_sums(const uint8_t* w, const int8_t* x, i64 row_bytes, const int32_t* start,
                              i64 num_sub, i64 ahead, vi dot[MR][NJ]) {
  constexpr int STEPS = SUB / 8;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i sum[MR][NJ];
#pragma GCC unroll 8
  for (int p = 0; p < STEPS; p++, w += 4 * INT_PANEL) {
    if (FETCHES) fetch_ahead<NJ>(w, ahead);
    vi low[NJ], high[NJ];
#pragma GCC unroll 8
    for (int j = 0; j < NJ; j++) {
      const vi stored = load_bytes(w + j * VLEN * 4);
      low[j] = stored & 0x0f0f0f0f;
      high[j] = (stored >> 4) & 0x0f0f0f0f;
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      const int8_t* at = x + i * row_bytes + p * 8;
      const __m256i four = (__m256i)pair_of(at);
#pragma GCC unroll 8
      for (int j = 0; j < NJ; j++) {
        const __m256i products = _mm256_maddubs_epi16((__m256i)low[j], four);
        sum[i][j] = p == 0 ? products : _mm256_add_epi16(sum[i][j], products);
        hold(sum[i][j]);
      }
      const __m256i next = (__m256i)pair_of(at + 4);
#pragma GCC unroll 8
      for (int j = 0; j < NJ; j++) {
        sum[i][j] = _mm256_add_epi16(sum[i][j], _mm256_maddubs_epi16((__m256i)high[j], next));
        hold(sum[i][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NJ; j++) dot[i][j] = (vi)_mm256_madd_epi16(sum[i][j], ones) + start[i * num_sub];
}

// The same for codes of 0..255 and wide rows.
template <int KIND, int SUB, int MR, int NJ, bool FETCHES>
ALWAYS_INLINE void wide_sums(const uint8_t* w, const int8_t* x, i64 row_bytes, const int32_t* start,
                             i64 num_sub, i64 ahead, const uint8_t* table, vi dot[MR][NJ]) {
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NJ; j++) dot[i][j] = vi{} + start[i * num_sub];
  constexpr int HALVES = KIND == LS_PACKED_BYTES ? 1 : 2, STEPS = SUB / (4 * HALVES);
#pragma GCC unroll 8
  for (int p = 0; p < STEPS; p++, w += 4 * INT_PANEL) {
    if (FETCHES) fetch_ahead<NJ>(w, ahead);
#pragma GCC unroll 2
    for (int half = 0; half < HALVES; half++) {
      __m256i even[NJ], odd[NJ];
#pragma GCC unroll 8
      for (int j = 0; j < NJ; j++) {
        vi codes = load_bytes(w + j * VLEN * 4);
        if (KIND == LS_PACKED_TABLE) codes = half ? high_codes<KIND>(codes, table) : low_codes<KIND>(codes, table);
        even[j] = _mm256_and_si256((__m256i)codes, _mm256_set1_epi16(0xff));
        odd[j] = _mm256_srli_epi16((__m256i)codes, 8);
      }
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++) {
        const int8_t* at = x + i * row_bytes + (p * HALVES + half) * 8;
        const __m256i evens = (__m256i)pair_of(at), odds = (__m256i)pair_of(at + 4);
#pragma GCC unroll 8
        for (int j = 0; j < NJ; j++) {
          dot[i][j] += (vi)_mm256_madd_epi16(even[j], evens);
          hold(dot[i][j]);
        }
#pragma GCC unroll 8
        for (int j = 0; j < NJ; j++) {
          dot[i][j] += (vi)_mm256_madd_epi16(odd[j], odds);
          hold(dot[i][j]);
        }
      }
    }
  }
}

// MR rows, NJ vectors of the panel from vector `first` on.
template <int KIND, int SUB, int MR, int NJ, bool FETCHES>
ALWAYS_INLINE void strip(const TileArgs& a, int first) {
  const LsPackedSpec& spec = *a.spec;
  const i64 num_inputs = spec.num_inputs, num_sub = num_inputs / SUB, num_blocks = num_inputs / ROW_BLOCK;
  const i64 subs_per_group = spec.group / SUB, scale_bytes = spec.scale_bytes, minimum_bytes = spec.minimum_bytes;
  constexpr i64 X_BYTES = KIND == LS_PACKED_NIBBLES ? 1 : 2;  // of an input
  constexpr i64 SUB_BYTES = SUB * INT_PANEL / (KIND == LS_PACKED_BYTES ? 1 : 2);
  vf acc[MR][NJ];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NJ; j++) {
      const i64 at = (first + j) * VLEN;
      const float* from = a.from_y ? a.y + i * spec.num_outputs : a.bias;
      acc[i][j] = from ? load_columns(from + at, a.num - at) : splat(0.0f);
    }
  const uint8_t* w = a.w;
  const int8_t* x = a.x;
  for (i64 g = 0, sub = 0; g < a.num_groups; g++) {
    const uint8_t* scales = w + a.code_bytes;
    for (i64 s = 0; s < subs_per_group; s++, sub++, x += SUB * X_BYTES, w += SUB_BYTES) {
      vi dot[MR][NJ];
      const uint8_t* from = w + first * VLEN * 4;
      if (KIND == LS_PACKED_NIBBLES)
        nibble_sums<SUB, MR, NJ, FETCHES>(from, x, num_inputs * X_BYTES, a.start + sub, num_sub, a.ahead, dot);
      else
        wide_sums<KIND, SUB, MR, NJ, FETCHES>(from, x, num_inputs * X_BYTES, a.start + sub, num_sub, a.ahead, spec.table,
                                              dot);
#pragma GCC unroll 8
      for (int j = 0; j < NJ; j++) {
        const vf scale = load_scales(scales, scale_bytes, (first + j) * VLEN);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) {
          const vf both = scale * splat(a.scale[i * num_blocks + sub * SUB / ROW_BLOCK]);
          acc[i][j] = fma(__builtin_convertvector(dot[i][j], vf), both, acc[i][j]);
        }
      }
      if (minimum_bytes) {
#pragma GCC unroll 8
        for (int j = 0; j < NJ; j++) {
          const vf minimum = load_scales(scales + INT_PANEL * scale_bytes, minimum_bytes, (first + j) * VLEN);
#pragma GCC unroll 8
          for (int i = 0; i < MR; i++) acc[i][j] = fma(minimum, splat(a.moment[i * num_sub + sub]), acc[i][j]);
        }
      }
    }
    if (FETCHES && first == 0)
      for (i64 at = 0; at < a.unit_bytes - a.code_bytes; at += 64) __builtin_prefetch(w + at + a.ahead);
    w += a.unit_bytes - a.code_bytes;
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NJ; j++) {
      const i64 at = (first + j) * VLEN, num = a.num - at;
      float* to = a.y + i * spec.num_outputs + at;
      if (num >= VLEN)
        store(to, acc[i][j]);
      else if (num > 0)
        store_part(to, acc[i][j], num);
    }
}

// Few rows read the panel as one stream; more share their unpacking and take half of it at a time, for want of registers.
template <int KIND, int SUB, int MR, bool FETCHES = true>
__attribute__((noinline)) void tile(const TileArgs& a) {
  constexpr int NJ = MR <= WHOLE_ROWS ? NV : NV / 2;
#pragma GCC unroll 1
  for (int first = 0; first < NV; first += NJ) strip<KIND, SUB, MR, NJ, FETCHES>(a, first);
}
