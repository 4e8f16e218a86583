// Gradient of causal attention over short whole sequences. The weights are computed again from queries and keys; a task is one
// kv head of one sequence, so that nothing is shared and no sum depends on the number of threads.
//
// Scores go a vector of keys at a time, their gradients a vector of D; no reduction depends on what else is in the batch.
#include <algorithm>
#include <cmath>

#include "language.h"
#include "pool.h"
#include "simd.h"

namespace {

struct Head {
  const LsAttentionBackward& call;
  float* keys;      // [D][N], N padded to whole vectors with zeros
  float* values;    // [D][N]
  float* p;         // [N]
  float* dscore;    // [N], and behind it the slopes of the soft cap [N]
  i64 padded;       // N
};

// Scores and d weight of one query for keys begin .. end - 1, whole vectors.
void scores(const Head& head, const float* q, const float* dout, i64 begin, i64 end) {
  const i64 dim = head.call.head_dim;
  const float scale = head.call.scale;
  for (i64 j = begin; j < end; j += VLEN) {
    vf p = splat(0.0f), dweight = splat(0.0f);
    for (i64 d = 0; d < dim; d++) {
      p = fma(splat(q[d] * scale), load(head.keys + d * head.padded + j), p);
      dweight = fma(splat(dout[d]), load(head.values + d * head.padded + j), dweight);
    }
    store(head.p + j, p);
    store(head.dscore + j, dweight);
  }
}

// dq += ds k, dk += ds q, dv += p dout.
void spread(float* __restrict dq, float* __restrict dk, float* __restrict dv, const float* q, const float* k,
            const float* dout, float ds, float p, i64 dim) {
  i64 d = 0;
  for (; d + VLEN <= dim; d += VLEN) {
    store(dq + d, fma(splat(ds), load(k + d), load(dq + d)));
    store(dk + d, fma(splat(ds), load(q + d), load(dk + d)));
    store(dv + d, fma(splat(p), load(dout + d), load(dv + d)));
  }
  for (; d < dim; d++) {
    dq[d] += ds * k[d];
    dk[d] += ds * q[d];
    dv[d] += p * dout[d];
  }
}

// One query: weights p over keys first .. i, then its part of the gradients.
void one_query(const Head& head, i64 start, i64 i, i64 h, i64 g) {
  const LsAttentionBackward& call = head.call;
  const i64 dim = call.head_dim;
  const float* q = call.q + (start + i) * call.q_stride + h * dim;
  const float* dout = call.dout + ((start + i) * call.num_heads + h) * dim;
  float* dq = call.dq + ((start + i) * call.num_heads + h) * dim;
  for (i64 d = 0; d < dim; d++) dq[d] = 0.0f;
  // Nobody reads this query where another sequence that begins alike has computed it.
  bool asked = false;
  for (i64 d = 0; d < dim; d++) asked |= dout[d] != 0.0f;
  if (!asked) return;
  const i64 first = call.window > 0 ? std::max<i64>(0, i - call.window + 1) : 0;
  const i64 begin = first / VLEN * VLEN, end = (i + VLEN) / VLEN * VLEN;
  float* p = head.p;
  float* dscore = head.dscore;
  scores(head, q, dout, begin, end);
  if (call.softcap != 0.0f)
    for (i64 j = first; j <= i; j++) p[j] = call.softcap * tanhf(p[j] / call.softcap);
  float top = p[first];
  for (i64 j = first; j <= i; j++) top = std::max(top, p[j]);
  // exp(p - top), and its slope where scores were capped, from the capped score itself.
  float sum = 0.0f, along = 0.0f;
  const float inverse = call.softcap != 0.0f ? 1.0f / call.softcap : 0.0f;
  float weights[VLEN];
  for (i64 j = begin; j < end; j += VLEN) {
    store(weights, vexp(load(p + j) - splat(top)));
    for (i64 lane = 0; lane < VLEN; lane++) {
      const i64 key = j + lane;
      if (key < first || key > i) continue;
      sum += weights[lane];
      along += weights[lane] * dscore[key];
      const float capped = p[key] * inverse;
      p[key] = weights[lane];
      if (call.softcap != 0.0f) head.dscore[key + head.padded] = 1.0f - capped * capped;
    }
  }
  along /= sum;
  for (i64 j = first; j <= i; j++) {
    const float weight = p[j] / sum;
    float ds = weight * (dscore[j] - along) * call.scale;
    if (call.softcap != 0.0f) ds *= head.dscore[j + head.padded];
    const i64 row = ((start + j) * call.kv_heads + g) * dim;
    spread(dq, call.dk + row, call.dv + row, q, call.k + row, dout, ds, weight, dim);
  }
}

void one_head(const LsAttentionBackward& call, i64 s, i64 g) {
  const i64 start = call.seq_starts[s], num = call.seq_starts[s + 1] - start, dim = call.head_dim;
  const i64 padded = (num + VLEN - 1) / VLEN * VLEN;
  float* memory = (float*)scratch(SCRATCH_ATTENTION, (2 * dim + 3) * padded * (i64)sizeof(float));
  Head head = {call, memory, memory + dim * padded, memory + 2 * dim * padded, memory + (2 * dim + 1) * padded, padded};
  for (i64 d = 0; d < dim; d++)
    for (i64 j = num; j < padded; j++) head.keys[d * padded + j] = head.values[d * padded + j] = 0.0f;
  for (i64 j = 0; j < num; j++) {
    const i64 row = ((start + j) * call.kv_heads + g) * dim;
    for (i64 d = 0; d < dim; d++) {
      head.keys[d * padded + j] = call.k[row + d];
      head.values[d * padded + j] = call.v[row + d];
      call.dk[row + d] = call.dv[row + d] = 0.0f;
    }
  }
  const i64 heads = call.num_heads / call.kv_heads;
  for (i64 h = g * heads; h < (g + 1) * heads; h++)
    for (i64 i = 0; i < num; i++) one_query(head, start, i, h, g);
}

}  // namespace

void ls_attention_backward(const LsAttentionBackward* call) {
  parallel_for(call->num_seqs * call->kv_heads,
               [&](i64 task) { one_head(*call, task / call->kv_heads, task % call->kv_heads); });
}
