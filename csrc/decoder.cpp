// The decoder stack in one call; see decoder.h.
#include "decoder.h"

#include <string.h>

namespace {

using i64 = int64_t;
constexpr i64 BAD_POSITION = (i64)1 << 40;

i64 largest(i64 a, i64 b) { return a > b ? a : b; }

struct Stack {
  const LsDecoderSizes& sizes;
  const LsDecoderStep& step;
  i64 tokens, heads, qk_heads, all_heads;
  float *normed, *wide, *rotated, *mixed, *joined;
  const int64_t* run_starts;  // of the layer

  Stack(const LsDecoderSizes& s, const LsDecoderStep& t) : sizes(s), step(t), tokens(t.num_tokens) {
    heads = s.num_heads;
    qk_heads = heads + s.kv_heads;
    all_heads = qk_heads + s.kv_heads;
    float* next = t.scratch;
    auto take = [&](i64 floats_a_token) {
      float* here = next;
      next += floats_a_token * tokens;
      return here;
    };
    normed = take(s.width);
    wide = take(widest());
    rotated = take(qk_heads * s.head_dim);
    mixed = take(largest(heads * s.head_dim, s.hidden));
    joined = take(widest());
  }

  // q, k and v, or gate and up, of one token.
  i64 widest() const { return largest(all_heads * sizes.head_dim, largest(2 * sizes.hidden, sizes.width)); }

  void linear(const LsDecoderLinear& w, LsDecoderMatrix matrix, const float* x, i64 num_inputs, float* y) const {
    base(w, x, y);
    if (!step.runs) return;
    const i64 first = run_starts[matrix], num = run_starts[matrix + 1] - first;
    i64 total = 0;
    for (i64 p = 0; p < w.num_packs; p++) total += w.num_outputs[p];
    if (num) ls_low_rank(x, y, step.runs + first, num, num_inputs, total);
  }

  void base(const LsDecoderLinear& w, const float* x, float* y) const {
    if (w.num_packs == 1) return ls_packed_linear(w.spec[0], w.data[0], x, w.bias, y, tokens);
    i64 total = 0, first = 0;
    for (i64 p = 0; p < w.num_packs; p++) total += w.num_outputs[p];
    for (i64 p = 0; p < w.num_packs; first += w.num_outputs[p++]) {
      const i64 width = w.num_outputs[p];
      ls_packed_linear(w.spec[p], w.data[p], x, nullptr, joined, tokens);
      for (i64 t = 0; t < tokens; t++)
        memcpy(y + t * total + first, joined + t * width, (size_t)width * sizeof(float));
    }
    if (!w.bias) return;
    for (i64 t = 0; t < tokens; t++)
      for (i64 n = 0; n < total; n++) y[t * total + n] += w.bias[n];
  }

  // Heads of the joined q, k, v normed into `joined`, rotated into `rotated`. Returns the first bad token or -1.
  i64 turn(const LsDecoderLayer& layer, const LsDecoderPlace& place, const float* norm, i64 first, i64 num, float* to) {
    const i64 dim = sizes.head_dim, stride = all_heads * dim;
    const float* from = wide + first * dim;
    i64 from_stride = stride;
    if (norm) {
      for (i64 t = 0; t < tokens; t++)
        memcpy(joined + t * num * dim, from + t * stride, (size_t)(num * dim) * sizeof(float));
      ls_rms_norm(joined, nullptr, norm, layer.qk_eps, layer.qk_offset, joined, joined, tokens * num, dim);
      from = joined;
      from_stride = num * dim;
    }
    return ls_rope(from, from_stride, step.positions, place.cos, place.sin, to, tokens, num, dim, sizes.num_pairs,
                   place.table_rows, 0, 1.0f);
  }

  i64 attention(const LsDecoderLayer& layer, const LsDecoderPlace& place, float* y) {
    linear(layer.qkv, LS_DECODER_QKV, normed, sizes.width, wide);
    const i64 dim = sizes.head_dim;
    float* keys = rotated + tokens * heads * dim;
    i64 bad = turn(layer, place, layer.q_norm, 0, heads, rotated);
    if (bad < 0) bad = turn(layer, place, layer.k_norm, heads, sizes.kv_heads, keys);
    if (bad >= 0) return BAD_POSITION + bad;
    const LsAttention call = {rotated,
                              keys,
                              wide + qk_heads * dim,
                              mixed,
                              place.k_pages,
                              place.v_pages,
                              place.k_scales,
                              place.v_scales,
                              step.seq_starts,
                              step.context_lens,
                              step.pages,
                              nullptr,
                              heads * dim,
                              sizes.kv_heads * dim,
                              all_heads * dim,
                              step.pages_stride,
                              tokens,
                              step.num_seqs,
                              heads,
                              sizes.kv_heads,
                              dim,
                              step.num_pages,
                              layer.window,
                              layer.scale,
                              layer.softcap,
                              sizes.kv_dtype,
                              0};
    bad = ls_attention(&call);
    if (bad == -1) linear(layer.out, LS_DECODER_OUT, mixed, heads * dim, y);
    return bad;
  }

  void out_norm(const LsDecoderLayer& layer, const float* weight, float* y) const {
    if (weight) ls_rms_norm(y, nullptr, weight, layer.eps, layer.offset, y, y, tokens, sizes.width);
  }

  // (x, residual) -> (out, sum): the hidden state is the sum of the two.
  i64 run(const LsDecoderLayer& layer, const LsDecoderPlace& place, const float* x, const float* residual) {
    const i64 width = sizes.width;
    ls_rms_norm(x, residual, layer.attention_norm, layer.eps, layer.offset, step.sum, normed, tokens, width);
    i64 bad = attention(layer, place, step.out);
    if (bad != -1) return bad;
    out_norm(layer, layer.attention_out_norm, step.out);
    ls_rms_norm(step.out, residual ? step.sum : x, layer.mlp_norm, layer.eps, layer.offset, step.sum, normed, tokens,
                width);
    linear(layer.gate_up, LS_DECODER_GATE_UP, normed, width, wide);
    ls_gated(wide, mixed, tokens, sizes.hidden, sizes.gate);
    linear(layer.down, LS_DECODER_DOWN, mixed, sizes.hidden, step.out);
    out_norm(layer, layer.mlp_out_norm, step.out);
    return -1;
  }
};

}  // namespace

int64_t ls_decoder_scratch(const LsDecoderSizes* sizes) {
  LsDecoderStep one = {};
  one.num_tokens = 1;
  Stack stack(*sizes, one);
  return sizes->width + 2 * stack.widest() + stack.qk_heads * sizes->head_dim +
         largest(stack.heads * sizes->head_dim, sizes->hidden);
}

int64_t ls_decoder(const LsDecoderSizes* sizes, const LsDecoderLayer* layers, const LsDecoderPlace* places,
                   int64_t num_layers, const LsDecoderStep* step) {
  Stack stack(*sizes, *step);
  const float *x = step->x, *residual = step->residual;
  for (i64 l = 0; l < num_layers; l++) {
    stack.run_starts = step->run_starts + (step->runs ? l * LS_DECODER_MATRICES : 0);
    i64 bad = stack.run(layers[l], places[l], x, residual);
    if (bad != -1) return bad;
    x = step->out;
    residual = step->sum;
  }
  ls_rms_norm(x, residual, step->norm, step->eps, step->offset, step->sum, step->out, step->num_tokens, sizes->width);
  return -1;
}
