// Tiles of quantised matrices: integer sums over 16 or 32 inputs, exact on every build, then
// acc = fma(float(sum), weight scale * row scale, acc) and, with minima, acc = fma(minimum, row scale * sum of x, acc).
//
// Stored codes are unsigned, code + offset, because the dot-product instruction multiplies unsigned by signed bytes; an
// integer sum starts at -offset * (sum of x) and so ends at the sum that is meant.
#include "packed.h"

namespace {

constexpr int NV = (int)INT_PANEL / VLEN;
#if VLEN == 16
constexpr int MAX_ROWS = TILE_ROWS;  // 12 sums and 12 accumulators of 32 registers
#elif VLEN == 8
constexpr int MAX_ROWS = 4;  // 8 sums of 16 registers, see packed_int_avx2.h
#else
constexpr int MAX_ROWS = 2;
#endif
// With AVX2: codes of a panel that stay in the first-level cache while rows pass by. Few rows wait for memory, which is faster
// as one stream: their tiles are of two rows, which take a panel whole, and the next block is fetched into that cache too.
constexpr i64 BLOCK_BYTES = 1 << 14, SMALL_BLOCK_BYTES = 1 << 13;
constexpr i64 FEW_ROWS = 8;
constexpr int WHOLE_ROWS = 2;
constexpr i64 UNPACK_FROM = 2 * MAX_ROWS + 1;  // rows; from here on nibbles are spelled out once for all tiles

ALWAYS_INLINE vi load_bytes(const uint8_t* p) { return as_int(load((const float*)p)); }
ALWAYS_INLINE void store_bytes(uint8_t* p, vi v) { store((float*)p, as_float(v)); }

// acc[lane] += sum over 4 bytes of w[lane] (unsigned) * x (signed).
ALWAYS_INLINE vi dot4(vi acc, vi w, int32_t x) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#elif VLEN == 16
  const __m512i all = _mm512_set1_epi32(x);
  const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(all, 8), 8), odd = _mm512_srai_epi16(all, 8);
  const __m512i low = _mm512_and_si512((__m512i)w, _mm512_set1_epi16(0xff)), high = _mm512_srli_epi16((__m512i)w, 8);
  return acc + (vi)_mm512_madd_epi16(low, even) + (vi)_mm512_madd_epi16(high, odd);
#else
  for (int t = 0; t < 4; t++) acc += (w >> (8 * t) & 255) * (int32_t)(int8_t)(x >> (8 * t));
  return acc;
#endif
}

ALWAYS_INLINE vi look_up(vi nibbles, const uint8_t* table) {
#if VLEN == 16
  const __m512i places = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table));
  return (vi)_mm512_shuffle_epi8(places, (__m512i)nibbles);
#elif VLEN == 8
  const __m256i places = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
  return (vi)_mm256_shuffle_epi8(places, (__m256i)nibbles);
#else
  uint8_t bytes[VLEN * 4];
  memcpy(bytes, &nibbles, sizeof(bytes));
  for (uint8_t& b : bytes) b = table[b & 15];
  vi values;
  memcpy(&values, bytes, sizeof(bytes));
  return values;
#endif
}

template <int KIND>
ALWAYS_INLINE vi low_codes(vi stored, const uint8_t* table) {
  const vi nibbles = stored & 0x0f0f0f0f;
  return KIND == LS_PACKED_TABLE ? look_up(nibbles, table) : nibbles;
}
template <int KIND>
ALWAYS_INLINE vi high_codes(vi stored, const uint8_t* table) {
  return low_codes<KIND>(stored >> 4, table);
}

// VLEN scales from place j on; fp16 is widened exactly.
ALWAYS_INLINE vf load_scales(const uint8_t* p, i64 width, int j) {
  if (width == 4) return load((const float*)p + j);
#if VLEN == 16
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)((const uint16_t*)p + j)));
#elif VLEN == 8
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)((const uint16_t*)p + j)));
#else
  uint16_t half[VLEN];
  memcpy(half, (const uint16_t*)p + j, sizeof(half));
  vi bits;
  for (int l = 0; l < VLEN; l++) bits[l] = half[l];
  const vf size = as_float((bits & 0x7fff) << 13) * splat(0x1p112f);
  return as_float(as_int(size) | ((bits & 0x8000) << 16));
#endif
}

struct TileArgs {
  const LsPackedSpec* spec;
  const uint8_t* w;  // the panel
  i64 num_groups, unit_bytes, code_bytes;
  const int8_t* x;  // of the first row, and so on
  const float* scale;
  const int32_t* start;
  const float* moment;
  const float* bias;  // of the panel, or null
  float* y;
  i64 num;  // outputs of the panel that exist
  i64 ahead;  // bytes from a code to the one to fetch
  bool from_y;  // the chains go on where y left them
};

ALWAYS_INLINE vf load_columns(const float* p, i64 num) {
  return num >= VLEN ? load(p) : num > 0 ? load_part(p, num) : splat(0.0f);
}

#if VLEN == 8
#include "packed_int_avx2.h"
#else
template <int KIND, int SUB, int MR>
__attribute__((noinline)) void tile(const TileArgs& a) {
  const LsPackedSpec& spec = *a.spec;
  const i64 num_inputs = spec.num_inputs, num_sub = num_inputs / SUB, num_blocks = num_inputs / ROW_BLOCK;
  const i64 subs_per_group = spec.group / SUB, scale_bytes = spec.scale_bytes, minimum_bytes = spec.minimum_bytes;
  vf acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++)
      acc[i][j] = a.bias ? load_columns(a.bias + j * VLEN, a.num - j * VLEN) : splat(0.0f);
  const uint8_t* w = a.w;
  const int8_t* x = a.x;
  for (i64 g = 0, sub = 0; g < a.num_groups; g++) {
    const uint8_t* scales = w + a.code_bytes;
    for (i64 s = 0; s < subs_per_group; s++, sub++, x += SUB) {
      vi dot[MR][NV];
#pragma GCC unroll 8
      for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) dot[i][j] = vi{} + a.start[i * num_sub + sub];
      constexpr int STEPS = SUB / (KIND == LS_PACKED_BYTES ? 4 : 8);
#pragma GCC unroll 8
      for (int p = 0; p < STEPS; p++, w += 4 * INT_PANEL) {
        __builtin_prefetch(w + PREFETCH_AHEAD);
        __builtin_prefetch(w + PREFETCH_AHEAD + 64);
        if (MR <= 2) asm volatile("" ::: "memory");  // keeps the prefetches apart, which the compiler would gather
        vi row[NV];
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) row[j] = load_bytes(w + j * VLEN * 4);
        if (KIND == LS_PACKED_BYTES) {
#pragma GCC unroll 8
          for (int i = 0; i < MR; i++) {
            int32_t four;
            memcpy(&four, x + i * num_inputs + 4 * p, 4);
#pragma GCC unroll 8
            for (int j = 0; j < NV; j++) dot[i][j] = dot4(dot[i][j], row[j], four);
          }
        } else {
          vi low[NV], high[NV];
#pragma GCC unroll 8
          for (int j = 0; j < NV; j++) {
            low[j] = low_codes<KIND>(row[j], spec.table);
            high[j] = high_codes<KIND>(row[j], spec.table);
          }
#pragma GCC unroll 8
          for (int i = 0; i < MR; i++) {
            int32_t four[2];
            memcpy(four, x + i * num_inputs + 8 * p, 8);
#pragma GCC unroll 8
            for (int j = 0; j < NV; j++) dot[i][j] = dot4(dot[i][j], low[j], four[0]);
#pragma GCC unroll 8
            for (int j = 0; j < NV; j++) dot[i][j] = dot4(dot[i][j], high[j], four[1]);
          }
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < NV; j++) {
        const vf scale = load_scales(scales, scale_bytes, j * VLEN);
#pragma GCC unroll 8
        for (int i = 0; i < MR; i++) {
          const vf both = scale * splat(a.scale[i * num_blocks + sub * SUB / ROW_BLOCK]);
          acc[i][j] = fma(__builtin_convertvector(dot[i][j], vf), both, acc[i][j]);
        }
      }
      if (minimum_bytes) {
#pragma GCC unroll 8
        for (int j = 0; j < NV; j++) {
          const vf minimum = load_scales(scales + INT_PANEL * scale_bytes, minimum_bytes, j * VLEN);
#pragma GCC unroll 8
          for (int i = 0; i < MR; i++) acc[i][j] = fma(minimum, splat(a.moment[i * num_sub + sub]), acc[i][j]);
        }
      }
    }
    for (i64 at = 0; at < a.unit_bytes - a.code_bytes; at += 64) __builtin_prefetch(w + at + PREFETCH_AHEAD);
    w += a.unit_bytes - a.code_bytes;
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 8
    for (int j = 0; j < NV; j++) {
      float* to = a.y + i * spec.num_outputs + j * VLEN;
      const i64 num = a.num - j * VLEN;
      if (num >= VLEN)
        store(to, acc[i][j]);
      else if (num > 0)
        store_part(to, acc[i][j], num);
    }
}
#endif

typedef void (*Tile)(const TileArgs&);
#if VLEN == 16
#define TILES(kind, sub)                                                                                     \
  {                                                                                                          \
    tile<kind, sub, 1>, tile<kind, sub, 2>, tile<kind, sub, 3>, tile<kind, sub, 4>, tile<kind, sub, 5>,      \
        tile<kind, sub, 6>                                                                                   \
  }
#elif VLEN == 8
#define TILES(kind, sub) \
  {                                                                                                                \
    tile<kind, sub, 1>, tile<kind, sub, 2>, tile<kind, sub, 3>, tile<kind, sub, 4>, tile<kind, sub, 1, false>,     \
        tile<kind, sub, 2, false>, tile<kind, sub, 3, false>, tile<kind, sub, 4, false>                            \
  }
#else
#define TILES(kind, sub) \
  { tile<kind, sub, 1>, tile<kind, sub, 2> }
#endif
#define BOTH_SUBS(kind) \
  { TILES(kind, 16), TILES(kind, 32) }
// With AVX2, after those of a block's first rows, which fetch the next block, those of its other rows.
const Tile tiles[3][2][MAX_ROWS * (VLEN == 8 ? 2 : 1)] = {BOTH_SUBS(LS_PACKED_BYTES), BOTH_SUBS(LS_PACKED_NIBBLES),
                                    BOTH_SUBS(LS_PACKED_TABLE)};

// A panel of nibbles as a panel of bytes with the same scales and minima; stored codes keep their offset.
template <int KIND>
void spell_out(const LsPackedSpec& spec, const uint8_t* from, i64 num_groups, i64 code_bytes, i64 number_bytes,
               uint8_t* to) {
  for (i64 g = 0; g < num_groups; g++) {
    for (i64 at = 0; at < code_bytes; at += 4 * INT_PANEL)
      for (int j = 0; j < NV; j++) {
        const vi stored = load_bytes(from + at + j * VLEN * 4);
        store_bytes(to + 2 * at + j * VLEN * 4, low_codes<KIND>(stored, spec.table));
        store_bytes(to + 2 * at + 4 * INT_PANEL + j * VLEN * 4, high_codes<KIND>(stored, spec.table));
      }
    memcpy(to + 2 * code_bytes, from + code_bytes, (size_t)number_bytes);
    from += code_bytes + number_bytes;
    to += 2 * code_bytes + number_bytes;
  }
}

}  // namespace

void run_int_panels(const PanelJob& job, const IntRows& rows) {
  const LsPackedSpec& spec = *job.spec;
  const i64 num_inputs = spec.num_inputs, num_groups = num_inputs / spec.group, sub = spec.group == 16 ? 16 : 32;
  const i64 number_bytes = INT_PANEL * (spec.scale_bytes + spec.minimum_bytes), bytes = panel_bytes(spec);
  const i64 stored_bytes = bytes / num_groups - number_bytes;
  i64 kind = spec.kind, code_bytes = stored_bytes;
  uint8_t* spelled = nullptr;
  const bool unpacks = VLEN == 8 ? kind == LS_PACKED_TABLE : kind != LS_PACKED_BYTES;
  if (unpacks && job.row_hi - job.row_lo >= UNPACK_FROM) {
    spelled = (uint8_t*)scratch(SCRATCH_PACKED_PANEL, num_groups * (2 * stored_bytes + number_bytes));
    kind = LS_PACKED_BYTES;
    code_bytes = 2 * stored_bytes;
  }
  const bool few = VLEN == 8 && job.row_hi - job.row_lo <= FEW_ROWS;
  i64 groups_at_once = num_groups;
  if (VLEN == 8 && job.row_hi - job.row_lo > WHOLE_ROWS) {
    const i64 most = few ? SMALL_BLOCK_BYTES : BLOCK_BYTES;
    const i64 parts = (code_bytes * num_groups + most - 1) / most;
    groups_at_once = (num_groups + parts - 1) / parts;
    // A block of a row's scales begins with the part.
    if (spec.group < ROW_BLOCK) groups_at_once += groups_at_once % (ROW_BLOCK / spec.group);
  }
  const Tile* row_tiles = tiles[kind - LS_PACKED_BYTES][sub == 32];
  for (i64 panel = 0; panel < job.num_panels; panel++) {
    const i64 column = job.first_column + panel * INT_PANEL;
    TileArgs a = {};
    a.spec = &spec;
    a.w = job.panel + panel * bytes;
    if (spelled) {
      (spec.kind == LS_PACKED_TABLE ? spell_out<LS_PACKED_TABLE> : spell_out<LS_PACKED_NIBBLES>)(
          spec, a.w, num_groups, stored_bytes, number_bytes, spelled);
      a.w = spelled;
    }
    a.code_bytes = code_bytes;
    a.unit_bytes = code_bytes + number_bytes;
    a.bias = job.bias ? job.bias + column : nullptr;
    a.num = spec.num_outputs - column;
    const uint8_t* panel_start = a.w;
    for (i64 g = 0; g < num_groups; g += groups_at_once) {
      const i64 k = g * spec.group;
      a.num_groups = num_groups - g < groups_at_once ? num_groups - g : groups_at_once;
      a.w = panel_start + g * a.unit_bytes;
      a.from_y = g > 0;
      a.ahead = groups_at_once < num_groups ? a.unit_bytes * groups_at_once : PREFETCH_AHEAD;
      for (i64 i = job.row_lo, mr = 0; i < job.row_hi; i += mr) {
        mr = tile_rows(job.row_hi - i, few ? WHOLE_ROWS : MAX_ROWS);
        a.x = rows.codes + (i * num_inputs + k) * rows.code_bytes;
        a.scale = rows.scale + (i * num_inputs + k) / ROW_BLOCK;
        a.start = rows.start + (i * num_inputs + k) / sub;
        a.moment = rows.moment + (i * num_inputs + k) / sub;
        a.y = job.y + i * spec.num_outputs + column;
        row_tiles[mr - 1 + (VLEN == 8 && i > job.row_lo ? MAX_ROWS : 0)](a);
      }
    }
  }
}
