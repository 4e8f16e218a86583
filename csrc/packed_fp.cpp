// Tiles of float matrices. fp32: acc = fma(x[k], w[k], acc). bf16: pairs (k, k + 1) through the dot-product instruction
// where there is one, else two multiply-adds in its order.
#include "packed.h"

namespace {

constexpr i64 K_BLOCK = 512;  // steps (inputs or pairs) of a panel that stay in the cache while rows pass by

#if VLEN == 16
constexpr int WIDE = 4, TILE_VECTORS = 4;
#else
constexpr int WIDE = 64 / VLEN, TILE_VECTORS = 2;  // one row needs few registers and takes the panel as one stream
#endif

template <bool PAIRS>
ALWAYS_INLINE vf step(vf acc, int32_t x, vi w) {
  if (!PAIRS) return fma(as_float(vi{} + x), as_float(w), acc);
#if HAVE_BF16_DOT
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(x), (__m512bh)w);
#else
  const int32_t high = (int32_t)0xffff0000;
  acc = fma(as_float(vi{} + (int32_t)((uint32_t)x << 16)), as_float((w & 0xffff) << 16), acc);
  return fma(as_float(vi{} + (x & high)), as_float(w & high), acc);
#endif
}

ALWAYS_INLINE vi load_int(const int32_t* p) { return as_int(load((const float*)p)); }

ALWAYS_INLINE vf load_columns(const float* p, i64 num) {
  return num >= VLEN ? load(p) : num > 0 ? load_part(p, num) : splat(0.0f);
}
ALWAYS_INLINE void store_columns(float* p, vf v, i64 num) {
  if (num >= VLEN)
    store(p, v);
  else if (num > 0)
    store_part(p, v, num);
}

// MR rows, NV vectors of a panel's outputs from `w` on; `num` of them exist. from_y: the chain goes on where y left it.
template <bool PAIRS, int MR, int NV>
__attribute__((noinline)) void tile(const int32_t* x, i64 x_stride, const int32_t* w, i64 steps, const float* bias,
                                    bool from_y, float* y, i64 y_stride, i64 num) {
  vf acc[MR][NV];
#pragma GCC unroll 16
  for (int j = 0; j < NV; j++)
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      const float* from = from_y ? y + i * y_stride : bias;
      acc[i][j] = from ? load_columns(from + j * VLEN, num - j * VLEN) : splat(0.0f);
    }
  for (i64 p = 0; p < steps; p++) {
    const int32_t* at = w + p * FLOAT_PANEL;
    vi row[NV];
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) {
      row[j] = load_int(at + j * VLEN);
      if (j * VLEN % 16 == 0) __builtin_prefetch((const char*)(at + j * VLEN) + PREFETCH_AHEAD);
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
      for (int j = 0; j < NV; j++) acc[i][j] = step<PAIRS>(acc[i][j], x[i * x_stride + p], row[j]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) store_columns(y + i * y_stride + j * VLEN, acc[i][j], num - j * VLEN);
}

typedef void (*Tile)(const int32_t*, i64, const int32_t*, i64, const float*, bool, float*, i64, i64);
#define TILES(pairs)                                                                                            \
  {                                                                                                             \
    tile<pairs, 1, WIDE>, tile<pairs, 2, TILE_VECTORS>, tile<pairs, 3, TILE_VECTORS>,                           \
        tile<pairs, 4, TILE_VECTORS>, tile<pairs, 5, TILE_VECTORS>, tile<pairs, 6, TILE_VECTORS>                \
  }
const Tile tiles[2][TILE_ROWS] = {TILES(false), TILES(true)};

ALWAYS_INLINE uint16_t bf16_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40);  // a NaN stays one
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void round_pairs(const float* in, uint16_t* out, i64 num) {
  i64 k = 0;
#if HAVE_BF16_DOT
  for (; k + 16 <= num; k += 16)
    _mm256_storeu_si256((__m256i*)(out + k), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(in + k)));
#endif
  for (; k < num; k++) out[k] = bf16_bits(in[k]);
  if (num % 2) out[num] = 0;
}

ALWAYS_INLINE float widen(uint16_t bits) {
  uint32_t word = (uint32_t)bits << 16;
  float x;
  memcpy(&x, &word, 4);
  return x;
}

// 16 outputs of a panel for all k: rows of the weight become columns.
void pack_strip_fp32(const void* weight, bool is_bf16, i64 rows, i64 num_inputs, float* out) {
  if (!is_bf16) transpose((const float*)weight, rows, num_inputs, num_inputs, out, FLOAT_PANEL);
  for (i64 r = 0; r < 16; r++) {
    if (r < rows && !is_bf16) continue;
    const uint16_t* from = (const uint16_t*)weight + r * num_inputs;
    for (i64 k = 0; k < num_inputs; k++) out[k * FLOAT_PANEL + r] = r < rows ? widen(from[k]) : 0.0f;
  }
}

void pack_strip_bf16(const void* weight, bool is_bf16, i64 rows, i64 num_inputs, uint32_t* out) {
  constexpr i64 CHUNK = 128;  // inputs; 16 rows of them stay in the first-level cache
  uint16_t row[16][CHUNK];
  for (i64 k0 = 0; k0 < num_inputs; k0 += CHUNK) {
    const i64 width = num_inputs - k0 < CHUNK ? num_inputs - k0 : CHUNK;
    for (i64 r = 0; r < 16; r++) {
      if (r >= rows) {
        memset(row[r], 0, sizeof(row[r]));
      } else if (is_bf16) {
        memcpy(row[r], (const uint16_t*)weight + r * num_inputs + k0, (size_t)width * 2);
        if (width % 2) row[r][width] = 0;
      } else {
        round_pairs((const float*)weight + r * num_inputs + k0, row[r], width);
      }
    }
    const i64 last = (width + 1) / 2;
    transpose((const float*)&row[0][0], 16, last, CHUNK / 2, (float*)(out + k0 / 2 * FLOAT_PANEL), FLOAT_PANEL);
  }
}

}  // namespace

FloatRows prepare_float_rows(const LsPackedSpec& spec, const float* x, i64 num_rows) {
  if (spec.kind == LS_PACKED_FP32) return {x, spec.num_inputs};
  const i64 num_inputs = spec.num_inputs, pairs = (num_inputs + 1) / 2;
  uint16_t* out = (uint16_t*)scratch(SCRATCH_PACKED_ROWS, num_rows * pairs * 4);
  const i64 rows_per_task = 1 + (1 << 16) / num_inputs;
  parallel_for((num_rows + rows_per_task - 1) / rows_per_task, [&](i64 task) {
    const i64 end = (task + 1) * rows_per_task < num_rows ? (task + 1) * rows_per_task : num_rows;
    for (i64 i = task * rows_per_task; i < end; i++) round_pairs(x + i * num_inputs, out + i * pairs * 2, num_inputs);
  });
  return {out, pairs};
}

void run_float_panels(const PanelJob& job, const FloatRows& rows) {
  const LsPackedSpec& spec = *job.spec;
  const bool pairs = spec.kind == LS_PACKED_BF16;
  const i64 steps = pairs ? (spec.num_inputs + 1) / 2 : spec.num_inputs, num_outputs = spec.num_outputs;
  const i64 block = job.row_hi - job.row_lo > TILE_ROWS ? K_BLOCK : steps;
  for (i64 panel = 0; panel < job.num_panels; panel++) {
    const i64 column = job.first_column + panel * FLOAT_PANEL;
    const int32_t* w = (const int32_t*)job.panel + panel * steps * FLOAT_PANEL;
    for (i64 p = 0; p < steps; p += block) {
      const i64 now = steps - p < block ? steps - p : block;
      for (i64 i = job.row_lo; i < job.row_hi; i += TILE_ROWS) {
        const int mr = (int)(job.row_hi - i < TILE_ROWS ? job.row_hi - i : TILE_ROWS);
        const i64 vectors = mr == 1 ? WIDE : TILE_VECTORS;
        for (i64 j = 0; j < FLOAT_PANEL && column + j < num_outputs; j += vectors * VLEN)
          tiles[pairs][mr - 1]((const int32_t*)rows.data + i * rows.stride + p, rows.stride, w + p * FLOAT_PANEL + j,
                               now, job.bias ? job.bias + column + j : nullptr, p > 0,
                               job.y + i * num_outputs + column + j, num_outputs, num_outputs - column - j);
      }
    }
  }
}

void ls_pack_float(const LsPackedSpec* spec, const void* weight, int32_t weight_is_bf16, uint8_t* out) {
  const i64 num_outputs = spec->num_outputs, num_inputs = spec->num_inputs;
  const i64 bytes = panel_bytes(*spec), element = weight_is_bf16 ? 2 : 4;
  parallel_for((num_outputs + FLOAT_PANEL - 1) / FLOAT_PANEL, [&](i64 panel) {
    for (i64 strip = 0; strip < FLOAT_PANEL; strip += 16) {
      const i64 row = panel * FLOAT_PANEL + strip;
      const i64 left = num_outputs - row, rows = left < 0 ? 0 : left < 16 ? left : 16;
      const uint8_t* from = (const uint8_t*)weight + row * num_inputs * element;
      float* to = (float*)(out + panel * bytes) + strip;
      if (spec->kind == LS_PACKED_FP32)
        pack_strip_fp32(from, weight_is_bf16, rows, num_inputs, to);
      else
        pack_strip_bf16(from, weight_is_bf16, rows, num_inputs, (uint32_t*)to);
    }
  });
}
