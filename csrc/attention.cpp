// Causal attention through a paged cache: a running softmax over blocks of BLOCK keys at absolute positions.
//
// A row is one query head of one token. Its scores are chains of multiply-adds over the head dim in rising order, its sums
// run lane by lane over blocks and are folded once at the end, its output adds keys in rising order. Keys that it may not
// see take no part: their weight is zero in the sums, and their values are never multiplied. Which rows share a register
// or a thread changes none of this. Pages of codes are decoded a block at a time, whatever the number of rows.
#include "kv_codes.h"
#include "language.h"
#include "pool.h"
#include "simd.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace {

typedef uint16_t bf16;

constexpr i64 TILE = LS_PAGE;
constexpr i64 TILES = 4;
constexpr i64 BLOCK = TILE * TILES;
constexpr int NV = TILE / VLEN;                         // vectors of a tile
constexpr int BUDGET = VLEN == 16 ? 16 : 8;             // accumulators in registers
constexpr int ROWS = VLEN == 16 ? 8 : VLEN == 8 ? 4 : 2;  // rows that share a load
constexpr i64 TASK_ROWS = 64;
constexpr i64 SERIAL_WORK = 1 << 17;  // multiply-adds below which a second thread costs more than it brings
constexpr float LOWEST = -3e38f;      // where a running maximum starts: finite, so that LOWEST - LOWEST is 0

template <int R>
constexpr int tiles_at_once() {
  return R * NV * 4 <= BUDGET ? 4 : R * NV * 2 <= BUDGET ? 2 : 1;
}
template <int R>
constexpr int vectors_at_once() {
  return R * 4 <= BUDGET ? 4 : R * 2 <= BUDGET ? 2 : 1;
}

ALWAYS_INLINE float widen(float x) { return x; }
ALWAYS_INLINE float widen(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
ALWAYS_INLINE void narrow(float x, float* to) { *to = x; }
ALWAYS_INLINE void narrow(float x, bf16* to) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  *to = x != x ? (bf16)0x7fc0 : (bf16)rounded;
}

ALWAYS_INLINE vf load_key(const float* p) { return load(p); }
ALWAYS_INLINE vf load_key(const bf16* p) {
#if VLEN == 16
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif VLEN == 8
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  vf r;
  for (int i = 0; i < VLEN; i++) r[i] = widen(p[i]);
  return r;
#endif
}
ALWAYS_INLINE vf load_some(const float* p, i64 n) { return load_part(p, n); }
ALWAYS_INLINE vf load_some(const bf16* p, i64 n) {
  float lane[VLEN] = {};
  for (i64 i = 0; i < n; i++) lane[i] = widen(p[i]);
  return load(lane);
}

ALWAYS_INLINE vf larger(vf a, vf b) { return at_least(a, b); }
// Every lane receives the largest.
ALWAYS_INLINE vf spread_max(vf v) {
  vi lane;
  for (int i = 0; i < VLEN; i++) lane[i] = i;
  for (int half = VLEN / 2; half > 0; half /= 2) v = larger(v, __builtin_shuffle(v, lane ^ half));
  return v;
}
ALWAYS_INLINE vi lanes() {
  vi lane;
  for (int i = 0; i < VLEN; i++) lane[i] = i;
  return lane;
}

// Scores of R rows against up to `num_tiles` tiles of a block: s[r][tile][16] = q . k. Keys ahead are fetched meanwhile.
template <int R, int TP, typename KV>
ALWAYS_INLINE void score_tiles(const float* q, const KV* const* tiles, const KV* const* ahead, i64 dim, float* s) {
  vf sum[R][TP * NV];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < TP * NV; c++) sum[r][c] = splat(0.0f);
  for (i64 d = 0; d < dim; d++) {
    vf key[TP * NV];
#pragma GCC unroll 16
    for (int c = 0; c < TP * NV; c++) key[c] = load_key(tiles[c / NV] + d * TILE + (c % NV) * VLEN);
    if (ahead && (sizeof(KV) == 4 || d % 2 == 0))
#pragma GCC unroll 16
      for (int c = 0; c < TP; c++) __builtin_prefetch(ahead[c] + d * TILE, 0, 2);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      vf x = splat(q[d * R + r]);
#pragma GCC unroll 16
      for (int c = 0; c < TP * NV; c++) sum[r][c] = fma(x, key[c], sum[r][c]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int c = 0; c < TP * NV; c++) store(s + r * BLOCK + c * VLEN, sum[r][c]);
}

template <int R, typename KV>
ALWAYS_INLINE void score_block(const float* q, const KV* const* tiles, const KV* const* ahead, i64 first, i64 end,
                               i64 dim, float* s) {
  constexpr int TP = tiles_at_once<R>();
  i64 t = first;
  for (; t + TP <= end; t += TP)
    score_tiles<R, TP>(q, tiles + t, ahead ? ahead + t : nullptr, dim, s + t * TILE);
  for (; t < end; t++) score_tiles<R, 1>(q, tiles + t, ahead ? ahead + t : nullptr, dim, s + t * TILE);
}

// acc[r][at ..] += sum of s[r][j] v[j] over keys from .. end - 1 of a block, in rising order.
template <int R, int DV, bool PARTIAL, typename KV>
ALWAYS_INLINE void add_values(const float* s, const KV* const* tiles, const KV* const* ahead, i64 from, i64 end, i64 at,
                              i64 dim, float* acc, i64 acc_stride) {
  vf sum[R][DV];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int c = 0; c < DV; c++) sum[r][c] = load(acc + r * acc_stride + at + c * VLEN);
  for (i64 t = from / TILE; t * TILE < end; t++) {
    const i64 first = from > t * TILE ? from - t * TILE : 0, last = end - t * TILE < TILE ? end - t * TILE : TILE;
    const KV* values = tiles[t] + at;
    const float* weight = s + t * TILE;
    for (i64 j = first; j < last; j++) {
      vf value[DV];
#pragma GCC unroll 16
      for (int c = 0; c < DV; c++)
        value[c] = PARTIAL ? load_some(values + j * dim, dim - at) : load_key(values + j * dim + c * VLEN);
      if (ahead)
#pragma GCC unroll 16
        for (int c = 0; c < DV; c++)
          if (sizeof(KV) == 4 || c % 2 == 0) __builtin_prefetch(ahead[t] + at + j * dim + c * VLEN, 0, 2);
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        vf x = splat(weight[r * BLOCK + j]);
#pragma GCC unroll 16
        for (int c = 0; c < DV; c++) sum[r][c] = fma(x, value[c], sum[r][c]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int c = 0; c < DV; c++) store(acc + r * acc_stride + at + c * VLEN, sum[r][c]);
}

template <int R, typename KV>
ALWAYS_INLINE void add_block(const float* s, const KV* const* tiles, const KV* const* ahead, i64 from, i64 end, i64 dim,
                             float* acc, i64 acc_stride) {
  if (from >= end) return;
  constexpr int DV = vectors_at_once<R>();
  i64 at = 0;
  for (; at + DV * VLEN <= dim; at += DV * VLEN)
    add_values<R, DV, false>(s, tiles, ahead, from, end, at, dim, acc, acc_stride);
  for (; at + VLEN <= dim; at += VLEN) add_values<R, 1, false>(s, tiles, ahead, from, end, at, dim, acc, acc_stride);
  if (at < dim) add_values<R, 1, true>(s, tiles, ahead, from, end, at, dim, acc, acc_stride);
}

// out[d * stride + r] = rows[r][d].
ALWAYS_INLINE void weave(const float* const* rows, i64 num, i64 dim, float* out, i64 stride) {
  i64 r = 0;
#if defined(__SSE__)
  for (; r + 4 <= num; r += 4) {
    i64 d = 0;
    for (; d + 4 <= dim; d += 4) {
      __m128 a = _mm_loadu_ps(rows[r] + d), b = _mm_loadu_ps(rows[r + 1] + d);
      __m128 c = _mm_loadu_ps(rows[r + 2] + d), e = _mm_loadu_ps(rows[r + 3] + d);
      _MM_TRANSPOSE4_PS(a, b, c, e);
      _mm_storeu_ps(out + d * stride + r, a);
      _mm_storeu_ps(out + (d + 1) * stride + r, b);
      _mm_storeu_ps(out + (d + 2) * stride + r, c);
      _mm_storeu_ps(out + (d + 3) * stride + r, e);
    }
    for (; d < dim; d++)
      for (i64 i = r; i < r + 4; i++) out[d * stride + i] = rows[i][d];
  }
#endif
  for (; r < num; r++)
    for (i64 d = 0; d < dim; d++) out[d * stride + r] = rows[r][d];
}

struct Span {
  i64 from, end;  // keys of a block that a row sees
};

// What rows of one (sequence, kv head) carry from block to block.
struct Rows {
  float* q;    // per group of up to ROWS rows: [D][rows of the group]
  float* acc;  // [rows][acc_stride]
  float* sum;  // [rows][TILE], lane by lane
  float* top;  // [rows]
  i64 acc_stride, dim;
};

// Scores of one row into weights; the running maximum and sums move along.
ALWAYS_INLINE void weigh_row(const LsAttention& a, const Rows& rows, i64 row, float* s, Span sees, i64 first, i64 end) {
  vf best = splat(-INFINITY);
  const vf scale = splat(a.scale);
  for (i64 c = first * NV; c < end * NV; c++) {
    vf x = load(s + c * VLEN) * scale;
    if (a.softcap != 0.0f) x = splat(a.softcap) * vtanh(x / splat(a.softcap));
    if (c * VLEN < sees.from || (c + 1) * VLEN > sees.end) {
      vi key = lanes() + (int32_t)(c * VLEN);
      x = select((key >= (int32_t)sees.from) & (key < (int32_t)sees.end), x, splat(-INFINITY));
    }
    best = larger(best, x);
    store(s + c * VLEN, x);
  }
  best = spread_max(best);
  vf top = splat(rows.top[row]);
  float* sum = rows.sum + row * TILE;
  if (best[0] > top[0]) {
    vf old = vexp(top - best);
    for (int c = 0; c < NV; c++) store(sum + c * VLEN, load(sum + c * VLEN) * old);
    float* acc = rows.acc + row * rows.acc_stride;
    for (i64 d = 0; d < rows.acc_stride; d += VLEN) store(acc + d, load(acc + d) * old);
    top = best;
    rows.top[row] = best[0];
  }
  vf part[TILES * NV];
  for (int c = 0; c < TILES * NV; c++) part[c] = splat(0.0f);
  for (i64 c = first * NV; c < end * NV; c++) {
    part[c] = vexp(load(s + c * VLEN) - top);
    store(s + c * VLEN, part[c]);
  }
  for (int c = 0; c < NV; c++) {
    vf total = (part[c] + part[NV + c]) + (part[2 * NV + c] + part[3 * NV + c]);
    store(sum + c * VLEN, load(sum + c * VLEN) + total);
  }
}

template <typename KV>
struct Tiles {
  const KV *k[TILES], *v[TILES];
  const KV *k_ahead[TILES], *v_ahead[TILES];
  bool has_ahead;
};

// R rows against one block. spans[r] rise with r.
template <int R, typename KV>
void rows_block(const LsAttention& a, const Rows& rows, i64 row, const Span* spans, const Tiles<KV>& tiles, float* s) {
  const i64 from = spans[0].from, end = spans[R - 1].end;
  if (from >= BLOCK || end <= 0) return;
  const i64 first = (from < 0 ? 0 : from) / TILE, last = ((end < BLOCK ? end : BLOCK) + TILE - 1) / TILE;
  score_block<R>(rows.q + row * rows.dim, tiles.k, tiles.has_ahead ? tiles.k_ahead : nullptr, first, last, rows.dim, s);
  for (int r = 0; r < R; r++) weigh_row(a, rows, row + r, s + r * BLOCK, spans[r], first, last);
  // Keys that all rows see go through together; what only some see, before and after, row by row.
  auto clip = [](i64 x) { return x < 0 ? (i64)0 : x > BLOCK ? BLOCK : x; };
  const i64 together = clip(spans[R - 1].from), apart = clip(spans[0].end);
  const KV* const* ahead = tiles.has_ahead ? tiles.v_ahead : nullptr;
  float* acc = rows.acc + row * rows.acc_stride;
  const bool shared = together < apart;
  for (int r = 0; r < R; r++) {
    const i64 stop = shared ? together : clip(spans[r].end);
    add_block<1>(s + r * BLOCK, tiles.v, (const KV* const*)nullptr, clip(spans[r].from), stop, rows.dim,
                 acc + r * rows.acc_stride, rows.acc_stride);
  }
  if (!shared) return;
  add_block<R>(s, tiles.v, ahead, together, apart, rows.dim, acc, rows.acc_stride);
  for (int r = 0; r < R; r++)
    add_block<1>(s + r * BLOCK, tiles.v, (const KV* const*)nullptr, apart, clip(spans[r].end), rows.dim,
                 acc + r * rows.acc_stride, rows.acc_stride);
}

template <int R, typename KV>
struct ByCount {
  static void run(i64 num, const LsAttention& a, const Rows& rows, i64 row, const Span* spans, const Tiles<KV>& tiles,
                  float* s) {
    if (num == R) return rows_block<R>(a, rows, row, spans, tiles, s);
    ByCount<R - 1, KV>::run(num, a, rows, row, spans, tiles, s);
  }
};
template <typename KV>
struct ByCount<0, KV> {
  static void run(i64, const LsAttention&, const Rows&, i64, const Span*, const Tiles<KV>&, float*) {}
};

// Row after row of a task: heads of a token, then the next token.
struct Place {
  i64 token = 0, head = 0;
  void next(i64 heads) {
    if (++head == heads) {
      head = 0;
      token++;
    }
  }
};

// Tokens of one sequence and the heads that share kv head g.
template <typename KV>
struct Task {
  const LsAttention& a;
  i64 heads, seq, group, token, num_tokens;  // token: row of q; the first of this task

  i64 position(i64 t) const { return a.context_lens[seq] - (a.seq_starts[seq + 1] - t); }
  i64 cell(i64 p) const { return (i64)a.pages[seq * a.pages_stride + p] * a.kv_heads + group; }
  i64 page(i64 p) const { return cell(p) * a.head_dim * TILE; }

  void pack(const Rows& rows, i64 num_rows) const {
    Place at_head;
    for (i64 row = 0; row < num_rows; row += ROWS) {
      const i64 num = num_rows - row < ROWS ? num_rows - row : (i64)ROWS;
      const float* from[ROWS];
      for (i64 r = 0; r < num; r++) {
        const i64 t = token + at_head.token, h = group * heads + at_head.head;
        at_head.next(heads);
        from[r] = a.q + t * a.q_stride + h * a.head_dim;
        rows.top[row + r] = a.sinks ? a.sinks[h] : LOWEST;
        memset(rows.sum + (row + r) * TILE, 0, TILE * sizeof(float));
        if (a.sinks) rows.sum[(row + r) * TILE] = 1.0f;
      }
      weave(from, num, a.head_dim, rows.q + row * a.head_dim, num);
    }
    memset(rows.acc, 0, (size_t)(num_rows * rows.acc_stride) * sizeof(float));
  }

  void finish(const Rows& rows, i64 num_rows) const {
    Place at_head;
    for (i64 row = 0; row < num_rows; row++) {
      float* lane = rows.sum + row * TILE;
      for (i64 half = TILE / 2; half > 0; half /= 2)
        for (i64 i = 0; i < half; i++) lane[i] += lane[i + half];
      const vf total = splat(lane[0]);
      float* acc = rows.acc + row * rows.acc_stride;
      for (i64 d = 0; d < rows.acc_stride; d += VLEN) store(acc + d, load(acc + d) / total);
      const i64 t = token + at_head.token, h = group * heads + at_head.head;
      at_head.next(heads);
      memcpy(a.out + (t * a.num_heads + h) * a.head_dim, acc, (size_t)a.head_dim * sizeof(float));
    }
  }

  // Tiles end .. of a block lie past the last key that a row of this task sees; they repeat the last one and are not read.
  void point(i64 block, i64 last_page, const KV** k, const KV** v) const {
    for (i64 t = 0; t < TILES; t++) {
      const i64 p = block * TILES + t < last_page ? block * TILES + t : last_page;
      k[t] = (const KV*)a.k_pages + page(p);
      v[t] = (const KV*)a.v_pages + page(p);
    }
  }

  template <typename T>
  void all_rows(const Rows& rows, i64 num_rows, i64 block, const Tiles<T>& tiles, float* s) const {
    Span spans[ROWS];
    Place at_head;
    for (i64 row = 0; row < num_rows; row += ROWS) {
      const i64 num = num_rows - row < ROWS ? num_rows - row : (i64)ROWS;
      for (i64 r = 0; r < num; r++) {
        const i64 at = position(token + at_head.token);
        at_head.next(heads);
        const i64 start = a.window > 0 && at + 1 > a.window ? at + 1 - a.window : 0;
        spans[r] = {start - block * BLOCK, at + 1 - block * BLOCK};
      }
      ByCount<ROWS, T>::run(num, a, rows, row, spans, tiles, s);
    }
  }

  void run() const {
    const i64 dim = a.head_dim, num_rows = num_tokens * heads, stride = (dim + VLEN - 1) / VLEN * VLEN;
    constexpr bool coded = IsCoded<KV>::value;
    const bool widened = coded || (sizeof(KV) != 4 && num_rows > ROWS);
    const i64 wide = widened ? BLOCK * dim : 0, queries = (num_rows * dim + 15) / 16 * 16;
    float* memory = (float*)scratch(SCRATCH_ATTENTION, (i64)sizeof(float) * (queries + num_rows * (stride + TILE) +
                                                                            (num_rows + 15) / 16 * 16 +
                                                                            ROWS * BLOCK + 2 * wide));
    float* s = memory;
    Rows rows = {s + ROWS * BLOCK, nullptr, nullptr, nullptr, stride, dim};
    rows.acc = rows.q + queries;
    rows.sum = rows.acc + num_rows * stride;
    rows.top = rows.sum + num_rows * TILE;
    float* wide_k = rows.top + (num_rows + 15) / 16 * 16;
    pack(rows, num_rows);

    const i64 first_seen = position(token) + 1 - a.window;
    const i64 last = position(token + num_tokens - 1), last_page = last / TILE;
    const i64 start = (a.window > 0 && first_seen > 0 ? first_seen : 0) / BLOCK;
    Tiles<float> floats;
    floats.has_ahead = false;
    for (i64 t = 0; t < TILES; t++) {
      floats.k[t] = wide_k + t * TILE * dim;
      floats.v[t] = wide_k + (TILES + t) * TILE * dim;
    }
    if constexpr (coded) {
      const i64 first_page = a.window > 0 && first_seen > 0 ? first_seen / TILE : 0;
      for (i64 block = start; block * BLOCK <= last; block++) {
        for (i64 t = 0; t < TILES; t++) {
          const i64 p = block * TILES + t;
          if (p >= first_page && p <= last_page)
            decode(p, wide_k + t * TILE * dim, wide_k + (TILES + t) * TILE * dim);
          if (p + TILES <= last_page) fetch(p + TILES);
        }
        all_rows(rows, num_rows, block, floats, s);
      }
    } else {
      Tiles<KV> tiles;
      for (i64 block = start; block * BLOCK <= last; block++) {
        point_within(block, first_seen, last_page, tiles.k, tiles.v);
        tiles.has_ahead = num_rows <= ROWS && (block + 1) * BLOCK <= last;
        if (tiles.has_ahead) point(block + 1, last_page, tiles.k_ahead, tiles.v_ahead);
        if (!widened) {
          all_rows(rows, num_rows, block, tiles, s);
          continue;
        }
        for (i64 t = 0; t < TILES && block * TILES + t <= last_page; t++)
          for (i64 i = 0; i < TILE * dim; i++) {
            wide_k[t * TILE * dim + i] = widen(tiles.k[t][i]);
            wide_k[(TILES + t) * TILE * dim + i] = widen(tiles.v[t][i]);
          }
        all_rows(rows, num_rows, block, floats, s);
      }
    }
    finish(rows, num_rows);
  }

  const uint8_t* codes(const void* pages, i64 p) const {
    return (const uint8_t*)pages + cell(p) * KV::width(a.head_dim) * TILE;
  }

  void decode(i64 p, float* k, float* v) const {
    const i64 scales = cell(p) * KV::SCALES * TILE;
    decode_keys(codes(a.k_pages, p), a.k_scales + scales, a.head_dim, k, KV());
    decode_values(codes(a.v_pages, p), a.v_scales + scales, a.head_dim, v, KV());
  }

  void fetch(i64 p) const {
    const uint8_t *k = codes(a.k_pages, p), *v = codes(a.v_pages, p);
    for (i64 at = 0; at < KV::width(a.head_dim) * TILE; at += 64) {
      __builtin_prefetch(k + at, 0, 2);
      __builtin_prefetch(v + at, 0, 2);
    }
  }

  // As `point`; pages before a window may have been given back, so the first one that is needed stands in for them.
  void point_within(i64 block, i64 first_seen, i64 last_page, const KV** k, const KV** v) const {
    const i64 first_page = a.window > 0 && first_seen > 0 ? first_seen / TILE : 0;
    point(block, last_page, k, v);
    for (i64 t = 0; t < TILES && block * TILES + t < first_page; t++) {
      k[t] = (const KV*)a.k_pages + page(first_page);
      v[t] = (const KV*)a.v_pages + page(first_page);
    }
  }
};

// New keys and values of one sequence and kv head into their pages; with shared rows, those of all its tokens.
template <typename KV>
void write(const LsAttention& a, i64 seq, i64 group) {
  const i64 dim = a.head_dim, length = a.context_lens[seq], num_new = a.seq_starts[seq + 1] - a.seq_starts[seq];
  if (num_new == 0) return;
  const i64 base = a.reads ? a.whole_starts[seq] : a.seq_starts[seq + 1] - length;
  for (i64 at = a.reads ? 0 : length - num_new, num = 0; at < length; at += num) {
    num = TILE - at % TILE < length - at ? TILE - at % TILE : length - at;
    const i64 cell = (i64)a.pages[seq * a.pages_stride + at / TILE] * a.kv_heads + group;
    const float *from_k[TILE], *from_v[TILE];
    for (i64 i = 0; i < num; i++) {
      const i64 row = a.reads ? a.reads[base + at + i] : base + at + i;
      from_k[i] = a.k + row * a.k_stride + group * dim;
      from_v[i] = a.v + row * a.v_stride + group * dim;
    }
    if constexpr (IsCoded<KV>::value) {
      for (i64 i = 0; i < num; i++) {
        const i64 width = KV::width(dim), page = cell * width * TILE, in_page = at % TILE + i;
        const i64 scales = cell * KV::SCALES * TILE + in_page;
        encode(from_k[i], dim, (uint8_t*)a.k_pages + page + in_page, TILE, a.k_scales + scales, KV());
        encode(from_v[i], dim, (uint8_t*)a.v_pages + page + in_page * width, 1, a.v_scales + scales, KV());
      }
    } else {
      KV* k = (KV*)a.k_pages + cell * dim * TILE + at % TILE;
      KV* v = (KV*)a.v_pages + cell * dim * TILE + (at % TILE) * dim;
      if constexpr (sizeof(KV) == 4) {
        weave(from_k, num, dim, k, TILE);
        for (i64 i = 0; i < num; i++) memcpy(v + i * dim, from_v[i], (size_t)dim * sizeof(float));
      } else {
        for (i64 i = 0; i < num; i++)
          for (i64 d = 0; d < dim; d++) {
            narrow(from_k[i][d], k + d * TILE + i);
            narrow(from_v[i][d], v + i * dim + d);
          }
      }
    }
  }
}

template <typename KV>
void attend(const LsAttention& a, bool parallel) {
  const i64 heads = a.num_heads / a.kv_heads, step = TASK_ROWS / heads > 0 ? TASK_ROWS / heads : 1;
  auto over = [&](i64 num, auto body) {
    if (parallel)
      parallel_for(num, [&](i64 task) { body(task); });
    else
      for (i64 i = 0; i < num; i++) body(i);
  };
  over(a.num_seqs * a.kv_heads, [&](i64 task) { write<KV>(a, task / a.kv_heads, task % a.kv_heads); });
  i64* ends = (i64*)scratch(SCRATCH_PLAN, a.num_seqs * (i64)sizeof(i64));
  i64 total = 0;
  for (i64 s = 0; s < a.num_seqs; s++) ends[s] = total += (a.seq_starts[s + 1] - a.seq_starts[s] + step - 1) / step;
  over(total * a.kv_heads, [&](i64 task) {
    // From the last block of a sequence to the first: the longest come first.
    const i64 index = task / a.kv_heads, group = task % a.kv_heads;
    i64 low = 0, high = a.num_seqs - 1;
    while (low < high) {
      const i64 middle = (low + high) / 2;
      if (ends[middle] > index)
        high = middle;
      else
        low = middle + 1;
    }
    const i64 token = a.seq_starts[low] + (ends[low] - 1 - index) * step, left = a.seq_starts[low + 1] - token;
    Task<KV>{a, heads, low, group, token, left < step ? left : step}.run();
  });
}

}  // namespace

int64_t ls_attention(const LsAttention* attention) {
  const LsAttention& a = *attention;
  i64 work = 0;
  for (i64 s = 0; s < a.num_seqs; s++) {
    const i64 num = a.seq_starts[s + 1] - a.seq_starts[s], length = a.context_lens[s];
    if (num < 0 || length < num || a.seq_starts[s] < 0 || a.seq_starts[s + 1] > a.num_tokens) return -2 - s;
    if (num == 0) continue;
    const i64 oldest = length - num + 1 - a.window, end = (length + TILE - 1) / TILE;
    if (end > a.pages_stride) return s;
    for (i64 p = !a.reads && a.window > 0 && oldest > 0 ? oldest / TILE : 0; p < end; p++) {
      const int32_t page = a.pages[s * a.pages_stride + p];
      if (page < 0 || page >= a.num_pages) return s;
    }
    work += num * a.num_heads * a.head_dim * 2 * (a.window > 0 && a.window < length ? a.window : length);
  }
  const bool parallel = work >= SERIAL_WORK && pool_threads() > 1;
  switch (a.dtype) {
    case LS_KV_BF16: attend<bf16>(a, parallel); break;
    case LS_KV_INT8: attend<Int8>(a, parallel); break;
    case LS_KV_INT4: attend<Int4>(a, parallel); break;
    default: attend<float>(a, parallel);
  }
  return -1;
}
