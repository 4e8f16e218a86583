#include "gemm.h"

#include "pool.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace {

#if VLEN == 16
constexpr int MAX_MR = 6, MAX_NV = 4;  // 24 accumulators of 32 registers
#else
constexpr int MAX_MR = 6, MAX_NV = 2;  // 12 of 16
#endif
constexpr i64 K_BLOCK = 512;
constexpr i64 FAR_APART = 512, MANY_ROWS = 128;

template <int MR, int NV, bool TRANSPOSED, bool PART>
__attribute__((noinline)) void tile_f32(const float* a, i64 a_stride, const float* b, i64 b_stride, float* c,
                                        i64 c_stride, i64 k, i64 last, Start start, const float* bias, bool relu) {
  vf acc[MR][NV];
#pragma GCC unroll 8
  for (int j = 0; j < NV; j++) {
    const bool part = PART && j == NV - 1;
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      if (start == START_ZERO) {
        acc[i][j] = splat(0.0f);
      } else {
        const float* from = start == START_BIAS ? bias + j * VLEN : c + i * c_stride + j * VLEN;
        acc[i][j] = part ? load_part(from, last) : load(from);
      }
    }
  }
  for (i64 p = 0; p < k; p++) {
    vf row[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++)
      row[j] = PART && j == NV - 1 ? load_part(b + p * b_stride + j * VLEN, last) : load(b + p * b_stride + j * VLEN);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      vf x = splat(TRANSPOSED ? a[p * a_stride + i] : a[i * a_stride + p]);
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) acc[i][j] = fma(x, row[j], acc[i][j]);
    }
  }
  if (relu) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) acc[i][j] = at_least(acc[i][j], splat(0.0f));
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) {
      if (PART && j == NV - 1)
        store_part(c + i * c_stride + j * VLEN, acc[i][j], last);
      else
        store(c + i * c_stride + j * VLEN, acc[i][j]);
    }
}

typedef void (*TileF32)(const float*, i64, const float*, i64, float*, i64, i64, i64, Start, const float*, bool);

template <bool TRANSPOSED, bool PART>
struct TilesF32 {
#define ROW(mr) \
  { tile_f32<mr, 1, TRANSPOSED, PART>, tile_f32<mr, 2, TRANSPOSED, PART>, ROW_WIDE(mr) }
#if VLEN == 16
#define ROW_WIDE(mr) tile_f32<mr, 3, TRANSPOSED, PART>, tile_f32<mr, 4, TRANSPOSED, PART>
#else
#define ROW_WIDE(mr)
#endif
  static constexpr TileF32 table[MAX_MR][MAX_NV] = {ROW(1), ROW(2), ROW(3), ROW(4), ROW(5), ROW(6)};
};

const TileF32 (*const tiles_f32[2][2])[MAX_NV] = {{TilesF32<false, false>::table, TilesF32<false, true>::table},
                                                  {TilesF32<true, false>::table, TilesF32<true, true>::table}};

}  // namespace

void gemm_f32(const Gemm& g) {
  const i64 panel = MAX_NV * VLEN;
  for (i64 k0 = 0; k0 == 0 || k0 < g.k; k0 += K_BLOCK) {
    i64 kb = g.k - k0 < K_BLOCK ? g.k - k0 : K_BLOCK;
    Start start = k0 ? START_C : g.start;
    const bool relu = g.relu && k0 + K_BLOCK >= g.k;
    for (i64 j = 0; j < g.n; j += panel) {
      i64 width = g.n - j < panel ? g.n - j : panel;
      i64 nv = (width + VLEN - 1) / VLEN, last = width - (nv - 1) * VLEN;
      const TileF32(*table)[MAX_NV] = tiles_f32[g.a_transposed][last < VLEN];
      const float* b = g.b + k0 * g.b_stride + j;
      i64 b_stride = g.b_stride;
      if (g.b_stride > FAR_APART && g.m > MANY_ROWS) {
        // Rows of B that lie far apart share few cache sets; a packed panel is read without conflicts. Up to 512 columns
        // the copy costs more than it brings, 2% at 256 rows and 10% at 32.
        float* packed = (float*)scratch(SCRATCH_PACK_B, kb * nv * VLEN * (i64)sizeof(float));
        for (i64 p = 0; p < kb; p++)
          for (i64 v = 0; v < nv; v++) {
            const float* from = b + p * g.b_stride + v * VLEN;
            store(packed + (p * nv + v) * VLEN, v == nv - 1 && last < VLEN ? load_part(from, last) : load(from));
          }
        b = packed;
        b_stride = nv * VLEN;
      }
      for (i64 i = 0; i < g.m; i += MAX_MR) {
        i64 mr = g.m - i < MAX_MR ? g.m - i : MAX_MR;
        const float* a = g.a_transposed ? g.a + k0 * g.a_stride + i : g.a + i * g.a_stride + k0;
        table[mr - 1][nv - 1](a, g.a_stride, b, b_stride, g.c + i * g.c_stride + j, g.c_stride, kb, last, start,
                              g.bias ? g.bias + j : nullptr, relu);
      }
    }
  }
}

namespace {

ALWAYS_INLINE void transpose_4x4(const float* in, i64 in_stride, float* out, i64 out_stride) {
#if defined(__SSE__)
  __m128 a = _mm_loadu_ps(in), b = _mm_loadu_ps(in + in_stride);
  __m128 c = _mm_loadu_ps(in + 2 * in_stride), d = _mm_loadu_ps(in + 3 * in_stride);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(out, a);
  _mm_storeu_ps(out + out_stride, b);
  _mm_storeu_ps(out + 2 * out_stride, c);
  _mm_storeu_ps(out + 3 * out_stride, d);
#else
  for (i64 r = 0; r < 4; r++)
    for (i64 c = 0; c < 4; c++) out[c * out_stride + r] = in[r * in_stride + c];
#endif
}

}  // namespace

void transpose(const float* in, i64 rows, i64 cols, i64 in_stride, float* out, i64 out_stride) {
  constexpr i64 B = 16;
  for (i64 r0 = 0; r0 < rows; r0 += B)
    for (i64 c0 = 0; c0 < cols; c0 += B) {
      const i64 r_end = r0 + B < rows ? r0 + B : rows, c_end = c0 + B < cols ? c0 + B : cols;
      i64 r = r0;
      for (; r + 4 <= r_end; r += 4) {
        i64 c = c0;
        for (; c + 4 <= c_end; c += 4)
          transpose_4x4(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
        for (; c < c_end; c++)
          for (i64 i = r; i < r + 4; i++) out[c * out_stride + i] = in[i * in_stride + c];
      }
      for (; r < r_end; r++)
        for (i64 c = c0; c < c_end; c++) out[c * out_stride + r] = in[r * in_stride + c];
    }
}

void round_to_bf16(const float* in, float* out, i64 num) {
  for (i64 i = 0; i < num; i += VLEN) {
    i64 n = num - i < VLEN ? num - i : VLEN;
    vf x = n < VLEN ? load_part(in + i, n) : load(in + i);
    vi bits = as_int(x);
    vi rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & (int32_t)0xffff0000;
    vf y = select(x != x, x, as_float(rounded));
    if (n < VLEN)
      store_part(out + i, y, n);
    else
      store(out + i, y);
  }
}

#if HAVE_BF16_DOT
namespace {

ALWAYS_INLINE __mmask16 mask16(i64 n) { return (__mmask16)(n >= 16 ? 0xffff : (1u << n) - 1); }

template <int MR, int NV, bool TRANSPOSED>
__attribute__((noinline)) void tile_pairs(const uint32_t* a, i64 a_stride, const uint32_t* b, i64 b_stride, float* c,
                                          i64 c_stride, i64 k, i64 last, Start start, const float* bias,
                                          bool relu) {
  __m512 acc[MR][NV];
  const __mmask16 part = mask16(last);
#pragma GCC unroll 8
  for (int j = 0; j < NV; j++) {
    const __mmask16 mask = j == NV - 1 ? part : (__mmask16)0xffff;
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      if (start == START_ZERO)
        acc[i][j] = _mm512_setzero_ps();
      else
        acc[i][j] = _mm512_maskz_loadu_ps(mask, start == START_BIAS ? bias + j * 16 : c + i * c_stride + j * 16);
    }
  }
  for (i64 p = 0; p < k; p++) {
    __m512i row[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) row[j] = _mm512_loadu_si512(b + p * b_stride + j * 16);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      __m512i x = _mm512_set1_epi32((int)(TRANSPOSED ? a[p * a_stride + i] : a[i * a_stride + p]));
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], (__m512bh)x, (__m512bh)row[j]);
    }
  }
  if (relu) {
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) acc[i][j] = (__m512)at_least((vf)acc[i][j], splat(0.0f));
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++)
      _mm512_mask_storeu_ps(c + i * c_stride + j * 16, j == NV - 1 ? part : (__mmask16)0xffff, acc[i][j]);
}

typedef void (*TilePairs)(const uint32_t*, i64, const uint32_t*, i64, float*, i64, i64, i64, Start, const float*, bool);
#define PAIR_ROW(mr, t) \
  { tile_pairs<mr, 1, t>, tile_pairs<mr, 2, t>, tile_pairs<mr, 3, t>, tile_pairs<mr, 4, t> }
#define PAIR_TABLE(t) \
  { PAIR_ROW(1, t), PAIR_ROW(2, t), PAIR_ROW(3, t), PAIR_ROW(4, t), PAIR_ROW(5, t), PAIR_ROW(6, t) }
const TilePairs tiles_pairs[2][MAX_MR][MAX_NV] = {PAIR_TABLE(false), PAIR_TABLE(true)};

// bf16 bits of 16 floats, one per 32-bit lane.
ALWAYS_INLINE __m512i bf16_lanes(__m512 x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); }

}  // namespace

void gemm_pairs(const GemmPairs& g) {
  // b_stride is a multiple of 16 pairs and padded with zeros, so that whole vectors can be loaded.
  for (i64 k0 = 0; k0 == 0 || k0 < g.k; k0 += K_BLOCK) {
    i64 kb = g.k - k0 < K_BLOCK ? g.k - k0 : K_BLOCK;
    Start start = k0 ? START_C : g.start;
    const bool relu = g.relu && k0 + K_BLOCK >= g.k;
    for (i64 j = 0; j < g.n; j += 64) {
      i64 width = g.n - j < 64 ? g.n - j : 64;
      i64 nv = (width + 15) / 16, last = width - (nv - 1) * 16;
      for (i64 i = 0; i < g.m; i += MAX_MR) {
        i64 mr = g.m - i < MAX_MR ? g.m - i : MAX_MR;
        const uint32_t* a = g.a_transposed ? g.a + k0 * g.a_stride + i : g.a + i * g.a_stride + k0;
        tiles_pairs[g.a_transposed][mr - 1][nv - 1](a, g.a_stride, g.b + k0 * g.b_stride + j, g.b_stride,
                                                    g.c + i * g.c_stride + j, g.c_stride, kb, last, start,
                                                    g.bias ? g.bias + j : nullptr, relu);
      }
    }
  }
}

void pack_pairs_along_row(const float* in, i64 rows, i64 cols, i64 in_stride, uint32_t* out, i64 out_stride) {
  for (i64 r = 0; r < rows; r++)
    for (i64 c = 0; c < cols; c += 16) {
      __m512 x = _mm512_maskz_loadu_ps(mask16(cols - c), in + r * in_stride + c);
      __m256i y = (__m256i)_mm512_cvtneps_pbh(x);
      i64 pairs = (cols - c + 1) / 2;
      _mm256_mask_storeu_epi32(out + r * out_stride + c / 2, (__mmask8)(pairs >= 8 ? 0xff : (1u << pairs) - 1), y);
    }
}

void pack_pairs_along_column(const float* in, i64 rows, i64 cols, i64 in_stride, uint32_t* out, i64 out_stride) {
  i64 padded = round_up(cols, 16) < out_stride ? round_up(cols, 16) : out_stride;
  for (i64 r = 0; r < rows; r += 2)
    for (i64 c = 0; c < cols; c += 16) {
      __mmask16 mask = mask16(cols - c);
      __m512i even = bf16_lanes(_mm512_maskz_loadu_ps(mask, in + r * in_stride + c));
      __m512i odd = r + 1 < rows ? bf16_lanes(_mm512_maskz_loadu_ps(mask, in + (r + 1) * in_stride + c))
                                 : _mm512_setzero_si512();
      _mm512_mask_storeu_epi32(out + r / 2 * out_stride + c, mask16(padded - c),
                               _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}

void transpose_pairs(const uint32_t* in, i64 rows, i64 cols, i64 in_stride, uint32_t* out, i64 out_stride) {
  i64 padded = round_up(rows, 16);
  transpose((const float*)in, rows, cols, in_stride, (float*)out, out_stride);
  for (i64 c = 0; c < cols; c++)
    for (i64 r = rows; r < padded; r++) out[c * out_stride + r] = 0;
}
#endif
