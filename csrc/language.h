// The C ABI of the kernels of language models; conventions as in lockstep.h.
//
// Legend: M rows, E width, T packed tokens, S sequences, H query heads, G kv heads, D head dim, R rows of logits, V vocab.
#pragma once
#include <stdint.h>

#include "lockstep.h"

// y = x / sqrt(mean(x^2) + eps) * (offset + weight), rows of E. residual (null: none) is added to x first and the sum is
// written to `total`.
LS_API void ls_rms_norm(const float* x, const float* residual, const float* weight, float eps, float offset,
                        float* total, float* y, int64_t num_rows, int64_t width);
// y = (x - mean) / sqrt(variance + eps) * weight + bias; weight and bias may be null.
LS_API void ls_layer_norm(const float* x, const float* weight, const float* bias, float eps, float* y,
                          int64_t num_rows, int64_t width);
// Gradients of either norm (`centred`: of the second). dtotal (null: none) is added to dx. dweight and dbias (null: not
// wanted) receive one partial sum of [E] for every LS_NORM_ROWS rows.
enum { LS_NORM_ROWS = 64 };
LS_API void ls_norm_backward(const float* x, const float* weight, float eps, float offset, const float* dy,
                             const float* dtotal, float* dx, float* dweight, float* dbias, int64_t num_rows,
                             int64_t width, int32_t centred);

// Rotates the first 2R of D dimensions of x [T][H][D], whose tokens lie x_stride floats apart; y is contiguous.
// direction -1 turns back. Returns -1, or the first token whose position is outside of the tables [P][R].
LS_API int64_t ls_rope(const float* x, int64_t x_stride, const int64_t* positions, const float* cos, const float* sin,
                       float* y, int64_t num_tokens, int64_t num_heads, int64_t head_dim, int64_t num_pairs,
                       int64_t table_rows, int32_t interleaved, float direction);

// Activations in the order of lockstep.kernels.activation.KINDS.
enum LsGate { LS_GATE_SILU, LS_GATE_GELU_TANH, LS_GATE_GELU, LS_GATE_RELU };
LS_API void ls_activate(const float* x, float* y, int64_t num, int32_t kind);
LS_API void ls_activate_backward(const float* x, const float* dy, float* dx, int64_t num, int32_t kind);
// y [M][F] = act(gate) * up for rows of gate [F], up [F].
LS_API void ls_gated(const float* gate_up, float* y, int64_t num_rows, int64_t width, int32_t kind);
LS_API void ls_gated_backward(const float* gate_up, const float* dy, float* dgate_up, int64_t num_rows, int64_t width,
                              int32_t kind);

// Causal attention of new tokens through pages of PAGE keys: writes their keys and values, then every query reads the keys
// of its sequence up to its own position. Sequence s owns tokens seq_starts[s] .. seq_starts[s + 1] - 1, the last of
// context_lens[s] keys; page p of it is pages[s * pages_stride + p].
//
// Pages of codes: int8 holds x = scale * code with scale = max |x| / 127; int4 holds x = low + scale * code with code in
// 0 .. 15, and dims i and ceil(D / 2) + i of a head in one byte, i in its low half. Each head of each token has its own
// numbers. A head with an element that is not finite decodes to NaN.
enum { LS_PAGE = 16 };
enum LsKvDtype { LS_KV_FP32, LS_KV_BF16, LS_KV_INT8, LS_KV_INT4 };
struct LsAttention {
  const float* q;        // [T][H][D], tokens q_stride floats apart
  const float* k;        // [T][G][D]
  const float* v;        // [T][G][D]
  float* out;            // [T][H][D] contiguous
  void* k_pages;         // [num_pages][G][D][PAGE] of dtype; of int4 ceil(D / 2) bytes for D
  void* v_pages;         // [num_pages][G][PAGE][D]
  float* k_scales;       // beside codes [num_pages][G][PAGE] of scale, then for int4 [PAGE] of low; else null
  float* v_scales;
  const int32_t* seq_starts;
  const int32_t* context_lens;
  const int32_t* pages;
  const float* sinks;    // [H] or null
  int64_t q_stride, k_stride, v_stride, pages_stride;
  int64_t num_tokens, num_seqs, num_heads, kv_heads, head_dim, num_pages;
  int64_t window;        // 0: all
  float scale, softcap;  // softcap 0: none
  int32_t dtype;         // LsKvDtype of the pages
  int32_t reserved;
  // Or null: a training step in which sequences share rows. Token j of sequence s is row reads[whole_starts[s] + j] of k and
  // v, and all of its context_lens[s] tokens are written; seq_starts counts the queries, its newest tokens, which it has alone.
  const int64_t* reads;
  const int32_t* whole_starts;  // [S + 1]
};
// Returns -1; s for a sequence with a page outside of the pool; or -2 - s for one whose rows do not fit its context.
LS_API int64_t ls_attention(const LsAttention* attention);

// Gradients of ls_attention over whole sequences, without sinks. Keys and values of a sequence are copied out: for short ones.
// Adds to dk and dv, which come as zeros.
struct LsAttentionBackward {
  const float* q;     // [T][H][D], tokens q_stride floats apart
  const float* k;     // [T][G][D] contiguous, rounded as the pages are
  const float* v;     // [T][G][D]
  const float* dout;  // [T][H][D] contiguous
  float* dq;          // [T][H][D] contiguous
  float* dk;          // [T][G][D]
  float* dv;          // [T][G][D]
  const int32_t* seq_starts;
  int64_t q_stride, num_seqs, num_heads, kv_heads, head_dim;
  int64_t window;     // 0: all
  float scale, softcap;
  const int64_t* reads;  // as in LsAttention
  const int32_t* whole_starts;
};
LS_API void ls_attention_backward(const LsAttentionBackward* call);

// log softmax(logits / temperature) at one token of each row. Sums are taken for every LS_LOGPROB_BLOCK columns and joined
// in double. Returns -1; r for a row whose maximum is not finite or that holds a NaN; or -2 - r where tokens[r] is out of
// range.
enum { LS_LOGPROB_BLOCK = 1024 };
LS_API int64_t ls_token_logprobs(const float* logits, const int64_t* tokens, float temperature, float* logprob,
                                 int64_t num_rows, int64_t vocab);
// dlogits = dlogprob (1[token] - p) / temperature.
LS_API void ls_token_logprobs_backward(const float* logits, const int64_t* tokens, float temperature,
                                       const float* dlogprob, float* dlogits, int64_t num_rows, int64_t vocab);
// The `num` largest of each row, falling, equal ones by rising id. Returns as ls_token_logprobs.
LS_API int64_t ls_top_logprobs(const float* logits, int64_t num, int64_t* ids, float* logprob, int64_t num_rows,
                               int64_t vocab);

// Draws a token of each row; the meaning of each argument is in lockstep.kernels.sampling. Returns -1; a row whose
// maximum is not finite or that holds a NaN; or -2 - r for a temperature that is negative or not finite.
struct LsSampling {
  const float* logits;  // [R][V]
  const float* temperature;
  const int64_t* top_k;
  const float* top_p;
  const float* min_p;
  const float* typical_p;
  const int64_t* seeds;
  const int64_t* positions;
  int64_t* tokens;   // [R]
  float* logprobs;   // [R]
  int64_t num_rows, vocab;
};
LS_API int64_t ls_sample_tokens(const LsSampling* sampling);
// Reads `tokens` and writes their log-probabilities among what the filters keep, and kept [R][V] (0 or 1). A token that
// they would have left out is counted in. Errors as above; -2 - R - r: token r is outside the vocabulary.
LS_API int64_t ls_score_tokens(const LsSampling* sampling, uint8_t* kept);
