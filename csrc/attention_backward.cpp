// Gradient of causal attention over short whole sequences. The weights are computed again from queries and keys; a task is one
// kv head of one sequence, so that nothing is shared and no sum depends on the number of threads.
//
// Rows of D, or of the N keys, are the inner loops, which the compiler turns into vectors: no reduction is vectorised, so the
// order of every sum is that of the source.
#include <algorithm>

#include "language.h"
#include "pool.h"
#include "simd.h"

namespace {

void add_scaled(float* __restrict y, const float* __restrict x, float a, i64 n) {
  for (i64 i = 0; i < n; i++) y[i] += a * x[i];
}

// One query: weights p over keys first .. last, then its part of the gradients.
struct Head {
  const LsAttentionBackward& call;
  float* keys;      // [D][N]
  float* values;    // [D][N]
  float* p;         // [N]
  float* dscore;    // [N]
  float* slope;     // [N]
  i64 num;          // N
};

void one_query(const Head& head, i64 start, i64 i, i64 h, i64 g) {
  const LsAttentionBackward& call = head.call;
  const i64 dim = call.head_dim, num = head.num;
  const float* q = call.q + (start + i) * call.q_stride + h * dim;
  const float* dout = call.dout + ((start + i) * call.num_heads + h) * dim;
  const i64 first = call.window > 0 ? std::max<i64>(0, i - call.window + 1) : 0;
  float* p = head.p;
  float* dscore = head.dscore;
  for (i64 j = first; j <= i; j++) p[j] = dscore[j] = 0.0f;
  for (i64 d = 0; d < dim; d++) {
    add_scaled(p + first, head.keys + d * num + first, q[d] * call.scale, i + 1 - first);
    add_scaled(dscore + first, head.values + d * num + first, dout[d], i + 1 - first);
  }
  if (call.softcap != 0.0f)
    for (i64 j = first; j <= i; j++) {
      float squashed = tanhf(p[j] / call.softcap);
      p[j] = call.softcap * squashed;
      head.slope[j] = 1.0f - squashed * squashed;
    }
  float top = p[first];
  for (i64 j = first; j <= i; j++) top = std::max(top, p[j]);
  float sum = 0.0f, along = 0.0f;
  for (i64 j = first; j <= i; j++) {
    p[j] = expf(p[j] - top);
    sum += p[j];
  }
  for (i64 j = first; j <= i; j++) {
    p[j] /= sum;
    along += p[j] * dscore[j];
  }
  float* dq = call.dq + ((start + i) * call.num_heads + h) * dim;
  for (i64 d = 0; d < dim; d++) dq[d] = 0.0f;
  for (i64 j = first; j <= i; j++) {
    float ds = p[j] * (dscore[j] - along) * call.scale;
    if (call.softcap != 0.0f) ds *= head.slope[j];
    const i64 row = ((start + j) * call.kv_heads + g) * dim;
    add_scaled(dq, call.k + row, ds, dim);
    add_scaled(call.dk + row, q, ds, dim);
    add_scaled(call.dv + row, dout, p[j], dim);
  }
}

void one_head(const LsAttentionBackward& call, i64 s, i64 g) {
  const i64 start = call.seq_starts[s], num = call.seq_starts[s + 1] - start, dim = call.head_dim;
  float* memory = (float*)scratch(SCRATCH_ATTENTION, (2 * dim + 3) * num * (i64)sizeof(float));
  Head head = {call, memory, memory + dim * num, nullptr, nullptr, nullptr, num};
  head.p = head.values + dim * num;
  head.dscore = head.p + num;
  head.slope = head.dscore + num;
  for (i64 j = 0; j < num; j++) {
    const i64 row = ((start + j) * call.kv_heads + g) * dim;
    for (i64 d = 0; d < dim; d++) {
      head.keys[d * num + j] = call.k[row + d];
      head.values[d * num + j] = call.v[row + d];
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
