// A stack of decoder layers in one call: the kernels of language.h and packed.h one after another, without the way through
// Python between them. Its bits are those of the single calls because it makes the same calls.
//
// Legend: T packed tokens, E width, H query heads, G kv heads, D head dim, F feed-forward width.
#pragma once
#include "language.h"
#include "low_rank.h"

enum { LS_DECODER_PACKS = 3 };
// The projections of a layer, in the order of their low-rank additions.
enum LsDecoderMatrix { LS_DECODER_QKV, LS_DECODER_OUT, LS_DECODER_GATE_UP, LS_DECODER_DOWN, LS_DECODER_MATRICES };

// One projection; several packed matrices (of different formats) lie beside each other in its output.
struct LsDecoderLinear {
  const LsPackedSpec* spec[LS_DECODER_PACKS];
  const uint8_t* data[LS_DECODER_PACKS];
  int64_t num_outputs[LS_DECODER_PACKS];
  const float* bias;  // or null
  int64_t num_packs;
};

struct LsDecoderLayer {
  const float* attention_norm;      // [E]
  const float* attention_out_norm;  // or null: on the output of attention
  const float* mlp_norm;            // [E]
  const float* mlp_out_norm;        // or null
  const float* q_norm;              // [D] or null
  const float* k_norm;
  LsDecoderLinear qkv, out, gate_up, down;
  float eps, offset, qk_eps, qk_offset, scale, softcap;
  int64_t window;
};

struct LsDecoderSizes {
  int64_t width, num_heads, kv_heads, head_dim, hidden;
  int64_t num_pairs;  // rotated
  int32_t gate;       // LsGate
  int32_t kv_dtype;
};

// Where one layer's keys, values and angles are in this step.
struct LsDecoderPlace {
  void* k_pages;
  void* v_pages;
  float* k_scales;  // or null: LsAttention
  float* v_scales;
  const float* cos;
  const float* sin;
  int64_t table_rows;
};

struct LsDecoderStep {
  const float* x;         // [T][E]
  const float* residual;  // [T][E] or null: added to x
  float* out;             // [T][E]: the final norm of the hidden state after the layers
  float* sum;             // [T][E]: that state
  float* scratch;         // [T][ls_decoder_scratch(sizes)]
  const int64_t* positions;
  const int32_t* seq_starts;
  const int32_t* context_lens;
  const int32_t* pages;
  int64_t pages_stride, num_pages, num_tokens, num_seqs;
  const float* norm;  // [E]: the final one
  float eps, offset;
  // Matrix m of layer l takes runs run_starts[LS_DECODER_MATRICES l + m] .. up to the next start; null: nobody has any.
  const LsLowRankRun* runs;
  const int64_t* run_starts;
};

// Floats of scratch a token needs.
LS_API int64_t ls_decoder_scratch(const LsDecoderSizes* sizes);
// Returns -1; or as ls_attention; or 1 << 40 plus the first token whose position is outside of the tables.
LS_API int64_t ls_decoder(const LsDecoderSizes* sizes, const LsDecoderLayer* layers, const LsDecoderPlace* places,
                          int64_t num_layers, const LsDecoderStep* step);
