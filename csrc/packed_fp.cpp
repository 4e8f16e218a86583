// Tiles of float matrices. fp32: acc = fma(x[k], w[k], acc). bf16: pairs (k, k + 1) through the dot-product instruction
// where there is one, which adds k + 1 before k and takes subnormal numbers for zeros; else two multiply-adds, k before
// k + 1, with x spelled out as rounded float32.
//
// Narrow vectors take a panel in strips of 16 outputs, each a quarter of every row of 64: read so again and again they would
// use a quarter of the first-level cache's sets. For many rows a strip of some inputs is therefore copied out, as float32.
#include "packed.h"

namespace {

// Steps (inputs or pairs) of a panel that stay in the cache while rows pass by. Narrow vectors pass a block several times, a
// line of 64 bytes at once, and fetch the next block meanwhile: both lie in the first-level cache.
constexpr i64 K_BLOCK = VLEN == 16 ? 512 : 32, K_BLOCK_FROM = VLEN == 16 ? TILE_ROWS + 1 : 2;  // rows
constexpr i64 STRIP = 16, STRIP_INPUTS = 256, STRIP_FROM = 24;  // outputs and inputs of a strip, 16 KB; rows to copy it for
constexpr i64 X_STEP = HAVE_BF16_DOT ? 1 : 2;  // elements of x that a step of pairs reads

#if VLEN == 16
constexpr int WIDE = 4, FEW_VECTORS = 4, TILE_VECTORS = 4;
#else
constexpr int WIDE = 64 / VLEN, FEW_VECTORS = 4, TILE_VECTORS = 2;  // one row needs few registers and takes the panel as one stream
#endif

template <bool PAIRS>
ALWAYS_INLINE vf step(vf acc, const int32_t* x, vi w) {
  if (!PAIRS) return fma(as_float(vi{} + x[0]), as_float(w), acc);
#if HAVE_BF16_DOT
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(x[0]), (__m512bh)w);
#else
  acc = fma(as_float(vi{} + x[0]), as_float(w << 16), acc);
  return fma(as_float(vi{} + x[1]), as_float(w & (int32_t)0xffff0000), acc);
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

// MR rows, NV vectors of outputs from `w` on, whose steps lie W_STRIDE elements apart; `num` of the outputs exist. from_y: the
// chain goes on where y left it.
template <bool PAIRS, int MR, int NV, i64 W_STRIDE>
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
    const int32_t* at = w + p * W_STRIDE;
    vi row[NV];
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) {
      row[j] = load_int(at + j * VLEN);
      if (W_STRIDE == FLOAT_PANEL && j * VLEN % 16 == 0) {
        constexpr i64 AHEAD = NV * VLEN == FLOAT_PANEL ? PREFETCH_AHEAD : K_BLOCK * FLOAT_PANEL * 4;
        __builtin_prefetch((const char*)(at + j * VLEN) + AHEAD);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
      for (int j = 0; j < NV; j++) acc[i][j] = step<PAIRS>(acc[i][j], x + i * x_stride + p * (PAIRS ? X_STEP : 1), row[j]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) store_columns(y + i * y_stride + j * VLEN, acc[i][j], num - j * VLEN);
}

typedef void (*Tile)(const int32_t*, i64, const int32_t*, i64, const float*, bool, float*, i64, i64);
#define TILES(pairs, one, few, more, stride)                                                             \
  {                                                                                                      \
    tile<pairs, 1, one, stride>, tile<pairs, 2, few, stride>, tile<pairs, 3, few, stride>,               \
        tile<pairs, 4, more, stride>, tile<pairs, 5, more, stride>, tile<pairs, 6, more, stride>         \
  }
const Tile tiles[2][TILE_ROWS] = {TILES(false, WIDE, FEW_VECTORS, TILE_VECTORS, FLOAT_PANEL),
                                  TILES(true, WIDE, FEW_VECTORS, TILE_VECTORS, FLOAT_PANEL)};

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
  const i64 num_inputs = spec.num_inputs, pairs = (num_inputs + 1) / 2, stride = pairs * X_STEP;
  void* memory = scratch(SCRATCH_PACKED_ROWS, num_rows * stride * 4);
  const i64 rows_per_task = 1 + (1 << 16) / num_inputs;
  parallel_for((num_rows + rows_per_task - 1) / rows_per_task, [&](i64 task) {
    const i64 end = (task + 1) * rows_per_task < num_rows ? (task + 1) * rows_per_task : num_rows;
    for (i64 i = task * rows_per_task; i < end; i++) {
#if HAVE_BF16_DOT
      round_pairs(x + i * num_inputs, (uint16_t*)memory + i * stride * 2, num_inputs);
#else
      float* to = (float*)memory + i * stride;
      round_to_bf16(x + i * num_inputs, to, num_inputs);
      if (num_inputs % 2) to[num_inputs] = 0.0f;
#endif
    }
  });
  return {memory, stride};
}

#if VLEN == 8
// Rows against one panel, a copied strip after the other.
void run_strips(const PanelJob& job, const FloatRows& rows, const int32_t* panel, i64 column) {
  static const Tile strip_tiles[TILE_ROWS] = TILES(false, 2, 2, 2, STRIP);
  const bool pairs = job.spec->kind == LS_PACKED_BF16;
  const i64 num_outputs = job.spec->num_outputs, inputs = pairs ? (job.spec->num_inputs + 1) / 2 * 2 : job.spec->num_inputs;
  int32_t* strip = (int32_t*)scratch(SCRATCH_PACKED_PANEL, STRIP_INPUTS * STRIP * 4);
  const i64 num_tiles = (job.row_hi - job.row_lo + TILE_ROWS - 1) / TILE_ROWS;
  for (i64 k = 0; k < inputs; k += STRIP_INPUTS) {
    const i64 now = inputs - k < STRIP_INPUTS ? inputs - k : STRIP_INPUTS;
    // What the next block of inputs or the next panel will copy is fetched while tiles are computed, a share with each.
    const char* ahead = (const char*)(panel + (pairs ? k / 2 : k) * FLOAT_PANEL) + (pairs ? now / 2 : now) * FLOAT_PANEL * 4;
    const i64 share = STRIP_INPUTS * FLOAT_PANEL * 4 / (pairs ? 2 : 1) / 4 / num_tiles / 64 * 64 + 64;
    for (i64 j = 0; j < FLOAT_PANEL && column + j < num_outputs; j += STRIP) {
      const int32_t* from = panel + (pairs ? k / 2 : k) * FLOAT_PANEL + j;
      for (i64 t = 0; t < (pairs ? now / 2 : now); t++)
        for (i64 c = 0; c < STRIP; c += VLEN) {
          const vi w = load_int(from + t * FLOAT_PANEL + c);
          if (pairs) {
            store((float*)strip + 2 * t * STRIP + c, as_float(w << 16));
            store((float*)strip + (2 * t + 1) * STRIP + c, as_float(w & (int32_t)0xffff0000));
          } else {
            store((float*)strip + t * STRIP + c, as_float(w));
          }
        }
      for (i64 i = job.row_lo, mr = 0; i < job.row_hi; i += mr) {
        mr = tile_rows(job.row_hi - i, TILE_ROWS);
        for (i64 byte = 0; byte < share; byte += 64) __builtin_prefetch(ahead + byte, 0, 2);
        ahead += share;
        strip_tiles[mr - 1]((const int32_t*)rows.data + i * rows.stride + k, rows.stride, strip, now,
                            job.bias ? job.bias + column + j : nullptr, k > 0, job.y + i * num_outputs + column + j,
                            num_outputs, num_outputs - column - j);
      }
    }
  }
}
#endif

void run_float_panels(const PanelJob& job, const FloatRows& rows) {
  const LsPackedSpec& spec = *job.spec;
  const bool pairs = spec.kind == LS_PACKED_BF16;
  const i64 steps = pairs ? (spec.num_inputs + 1) / 2 : spec.num_inputs, num_outputs = spec.num_outputs;
  const i64 block = job.row_hi - job.row_lo >= K_BLOCK_FROM ? K_BLOCK : steps;
  for (i64 panel = 0; panel < job.num_panels; panel++) {
    const i64 column = job.first_column + panel * FLOAT_PANEL;
    const int32_t* w = (const int32_t*)job.panel + panel * steps * FLOAT_PANEL;
#if VLEN == 8
    if (job.row_hi - job.row_lo >= STRIP_FROM) {
      run_strips(job, rows, w, column);
      continue;
    }
#endif
    for (i64 p = 0; p < steps; p += block) {
      const i64 now = steps - p < block ? steps - p : block;
      for (i64 i = job.row_lo, mr = 0; i < job.row_hi; i += mr) {
        mr = tile_rows(job.row_hi - i, TILE_ROWS);
        const i64 vectors = mr == 1 ? WIDE : mr <= 3 ? FEW_VECTORS : TILE_VECTORS;
        for (i64 j = 0; j < FLOAT_PANEL && column + j < num_outputs; j += vectors * VLEN)
          tiles[pairs][mr - 1]((const int32_t*)rows.data + i * rows.stride + p * (pairs ? X_STEP : 1), rows.stride, w + p * FLOAT_PANEL + j,
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
