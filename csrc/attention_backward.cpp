// Gradient of causal attention over short whole sequences: five small matrix products for each chunk of queries, whose
// weights are computed again from queries and keys. A task is one kv head, of one sequence where no rows are shared, so that
// no sum depends on the number of threads.
//
// Legend: X tokens of a sequence, N the same in whole vectors, D head dim, C queries of a chunk, W keys that a chunk sees.
#include <algorithm>

#include "gemm.h"
#include "language.h"
#include "rows.h"

namespace {

constexpr i64 CHUNK = 24;  // queries; a multiple of the tile's rows that wastes little above the diagonal

// What one kv head of one sequence is copied into, and what it adds up.
struct Memory {
  float *keys, *values;            // [X][D]
  float *keys_apart, *values_apart;  // [D][N]
  float *dkeys, *dvalues;          // [X][D]
  float *weight, *dscore;          // [C][N]
  float* slope;                    // [N]
  i64 padded;                      // N

  static i64 floats(i64 num, i64 dim) {
    const i64 padded = round_up(num, VLEN);
    return 4 * padded * dim + 2 * padded * dim + (2 * CHUNK + 1) * padded;
  }
  Memory(float* from, i64 num, i64 dim) : padded(round_up(num, VLEN)) {
    auto take = [&](i64 size) {
      float* here = from;
      from += size;
      return here;
    };
    const i64 size = padded * dim;
    keys = take(size), values = take(size);
    keys_apart = take(size), values_apart = take(size);
    dkeys = take(size), dvalues = take(size);
    weight = take(CHUNK * padded), dscore = take(CHUNK * padded);
    slope = take(padded);
  }
};

// The row that holds token j of a sequence.
ALWAYS_INLINE i64 row_of(const LsAttentionBackward& call, i64 s, i64 j) {
  return call.reads ? call.reads[call.whole_starts[s] + j] : call.seq_starts[s] + j;
}

// Scores and d weight of one query, keys 0 .. width - 1 of which it sees from .. end - 1 -> its weights and d scores, zeros
// where it sees nothing. slope [N] is needed where scores are capped.
void one_query(const LsAttentionBackward& call, float* weight, float* dscore, float* slope, i64 from, i64 end, i64 width) {
  vi lane;
  for (int i = 0; i < VLEN; i++) lane[i] = i;
  const vf scale = splat(call.scale), cap = splat(call.softcap);
  const bool capped = call.softcap != 0.0f;
  const i64 first = from / VLEN * VLEN, last = (end - 1) / VLEN * VLEN;
  // Only the vectors at either end hold keys that are not seen.
  auto only_seen = [&](i64 j, vf x, vf other) {
    if (j > first && j < last) return x;
    const vi at = lane + (int32_t)j;
    return select((at >= (int32_t)from) & (at < (int32_t)end), x, other);
  };
  vf top = splat(-INFINITY);
  for (i64 j = first; j <= last; j += VLEN) {
    vf x = load(weight + j) * scale;
    if (capped) {
      const vf t = vtanh(x / cap);
      store(slope + j, scale * (splat(1.0f) - t * t));
      x = cap * t;
    }
    x = only_seen(j, x, splat(-INFINITY));
    store(weight + j, x);
    top = select(x > top, x, top);
  }
  top = splat(fold_max(top));
  vf sum = {}, along = {};
  for (i64 j = first; j <= last; j += VLEN) {
    const vf e = only_seen(j, vexp(load(weight + j) - top), splat(0.0f));
    const vf d = only_seen(j, load(dscore + j), splat(0.0f));
    store(weight + j, e);
    store(dscore + j, d);
    sum = sum + e;
    along = along + e * d;
  }
  const vf inverse = splat(1.0f / fold(sum)), mean = splat(fold(along)) * inverse;
  for (i64 j = first; j <= last; j += VLEN) {
    const vf p = load(weight + j) * inverse;
    store(weight + j, p);
    store(dscore + j, p * (load(dscore + j) - mean) * (capped ? load(slope + j) : scale));
  }
  for (i64 j = 0; j < width; j += VLEN)
    if (j < first || j > last) {
      store(weight + j, splat(0.0f));
      store(dscore + j, splat(0.0f));
    }
}

// to = from, or to += from: rows of D.
void copy_row(const float* from, float* to, i64 dim) {
  over_vectors(dim, [&](i64 d, i64 n) { put(to + d, get(from + d, n), n); });
}
void add_row(const float* from, float* to, i64 dim) {
  over_vectors(dim, [&](i64 d, i64 n) { put(to + d, get(to + d, n) + get(from + d, n), n); });
}

bool all_zero(const float* dout, i64 stride, i64 rows, i64 dim) {
  for (i64 r = 0; r < rows; r++)
    for (i64 d = 0; d < dim; d++)
      if (dout[r * stride + d] != 0.0f) return false;
  return true;
}

// Queries first .. first + rows - 1 of sequence s, by their places in it.
void one_chunk(const LsAttentionBackward& call, const Memory& m, i64 first, i64 rows, i64 query_row, i64 h) {
  const i64 dim = call.head_dim, stride = call.num_heads * dim;
  const float *q = call.q + query_row * call.q_stride + h * dim, *dout = call.dout + query_row * stride + h * dim;
  float* dq = call.dq + query_row * stride + h * dim;
  if (all_zero(dout, stride, rows, dim)) {  // nobody reads these queries
    for (i64 r = 0; r < rows; r++) memset(dq + r * stride, 0, (size_t)dim * sizeof(float));
    return;
  }
  const i64 begin = call.window > 0 && first + 1 > call.window ? (first + 1 - call.window) / VLEN * VLEN : 0;
  const i64 num = first + rows - begin, width = round_up(num, VLEN);
  const Start zero = START_ZERO, more = START_C;
  auto product = [&](const float* a, i64 a_stride, bool turned, const float* b, i64 b_stride, float* c, i64 c_stride,
                     i64 rows_of_c, i64 columns, i64 k, Start start) {
    gemm_f32({a, a_stride, turned, b, b_stride, c, c_stride, rows_of_c, columns, k, start, nullptr});
  };
  product(q, call.q_stride, false, m.keys_apart + begin, m.padded, m.weight, m.padded, rows, width, dim, zero);
  product(dout, stride, false, m.values_apart + begin, m.padded, m.dscore, m.padded, rows, width, dim, zero);
  for (i64 r = 0; r < rows; r++) {
    const i64 from = call.window > 0 ? std::max<i64>(0, first + r + 1 - call.window) - begin : 0;
    one_query(call, m.weight + r * m.padded, m.dscore + r * m.padded, m.slope, from, first + r + 1 - begin, width);
  }
  product(m.dscore, m.padded, false, m.keys + begin * dim, dim, dq, stride, rows, dim, num, zero);
  product(m.dscore, m.padded, true, q, call.q_stride, m.dkeys + begin * dim, dim, num, dim, rows, more);
  product(m.weight, m.padded, true, dout, stride, m.dvalues + begin * dim, dim, num, dim, rows, more);
}

void one_head(const LsAttentionBackward& call, i64 s, i64 g) {
  const i64 queries = call.seq_starts[s + 1] - call.seq_starts[s], dim = call.head_dim;
  if (queries == 0) return;
  const i64 num = call.reads ? call.whole_starts[s + 1] - call.whole_starts[s] : queries;
  Memory m((float*)scratch(SCRATCH_ATTENTION, Memory::floats(num, dim) * (i64)sizeof(float)), num, dim);
  const i64 stride = call.kv_heads * dim;
  for (i64 j = 0; j < num; j++) {
    const i64 at = row_of(call, s, j) * stride + g * dim;
    copy_row(call.k + at, m.keys + j * dim, dim);
    copy_row(call.v + at, m.values + j * dim, dim);
  }
  memset(m.keys + num * dim, 0, (size_t)((m.padded - num) * dim) * sizeof(float));
  memset(m.values + num * dim, 0, (size_t)((m.padded - num) * dim) * sizeof(float));
  transpose(m.keys, m.padded, dim, dim, m.keys_apart, m.padded);
  transpose(m.values, m.padded, dim, dim, m.values_apart, m.padded);
  memset(m.dkeys, 0, (size_t)(2 * m.padded * dim) * sizeof(float));
  const i64 heads = call.num_heads / call.kv_heads, skipped = num - queries;
  for (i64 h = g * heads; h < (g + 1) * heads; h++)
    for (i64 i = 0; i < queries; i += CHUNK)
      one_chunk(call, m, skipped + i, part(queries, i, CHUNK), call.seq_starts[s] + i, h);
  for (i64 j = 0; j < num; j++) {
    const i64 at = row_of(call, s, j) * stride + g * dim;
    add_row(m.dkeys + j * dim, call.dk + at, dim);
    add_row(m.dvalues + j * dim, call.dv + at, dim);
  }
}

}  // namespace

void ls_attention_backward(const LsAttentionBackward* call) {
  if (!call->reads)
    return parallel_for(call->num_seqs * call->kv_heads,
                        [&](i64 task) { one_head(*call, task / call->kv_heads, task % call->kv_heads); });
  // Sequences add to the rows that they share, one after another.
  parallel_for(call->kv_heads, [&](i64 g) {
    for (i64 s = 0; s < call->num_seqs; s++) one_head(*call, s, g);
  });
}
