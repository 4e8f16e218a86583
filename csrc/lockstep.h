// The C ABI of the CPU kernels, called from Python through ctypes.
//
// Matrices are row-major and contiguous. Legend: M rows, K in, N out, E ensemble members, A actions, T time, B batch.
// Every function is safe to call from several threads on different data. Nothing here allocates memory that the caller
// must free, and no function keeps a pointer after it returns.
#pragma once
#include <stdint.h>

#define LS_API extern "C" __attribute__((visibility("default")))

// Activations, in the order of lockstep.kernels.mlp.ACTIVATIONS.
enum LsActivation { LS_NONE, LS_TANH, LS_RELU, LS_ELU, LS_SILU, LS_GELU, LS_SIGMOID };
enum LsDtype { LS_FP32, LS_BF16 };

// A chain of dense layers. weights[l] is [E][sizes[l]][sizes[l+1]], biases[l] is [E][sizes[l+1]] or null.
// num_members = 0 means one chain without an ensemble dimension.
struct LsMlp {
  int32_t num_layers;
  int32_t activation;         // after every layer but the last
  int32_t output_activation;  // after the last
  int32_t dtype;              // LsDtype of the operands of products; sums are fp32
  int64_t num_members;
  const int64_t* sizes;             // num_layers + 1
  const float* const* weights;      // num_layers
  const float* const* biases;       // num_layers, or null; single entries may be null
};

LS_API int32_t ls_cpu_level();  // best build for this processor: 0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 with bf16
LS_API int32_t ls_built_level();
LS_API int32_t ls_interface();  // of the headers that this was compiled with, see setup.py
LS_API void ls_set_num_threads(int32_t num_threads);
LS_API int32_t ls_num_threads();

// y [E][M][N] = the chain applied to x: [M][K] shared by all members, or [E][M][K] when x_per_member.
// `saved` (null: inference) receives what the backward pass needs: for every layer in order its output (all but the
// last) and, for silu and gelu, its pre-activation; each block is [E][M][width].
LS_API void ls_mlp_forward(const LsMlp* mlp, const float* x, float* y, float* saved, int64_t num_rows,
                           int32_t x_per_member);
// Gradients of a scalar with respect to x (dx null: not wanted) and to parameters (dweights null: not wanted; laid out
// like the parameters; dbiases entries may be null).
LS_API void ls_mlp_backward(const LsMlp* mlp, const float* x, const float* y, const float* saved, const float* dy,
                            float* dx, float* const* dweights, float* const* dbiases, int64_t num_rows,
                            int32_t x_per_member);

// Categorical heads. A row of logits holds `num_blocks` independent choices of block_sizes[b] logits; actions are
// [M][num_blocks]; logprob and entropy are sums over blocks, in order. Returns -1, or the first row whose action is
// out of range (nothing is written then). The backward call expects actions that passed.
LS_API int64_t ls_categorical_evaluate(const float* logits, const int64_t* actions, float* logprob, float* entropy,
                                       int64_t num_rows, const int64_t* block_sizes, int64_t num_blocks);
// dlogits from the gradients of logprob and entropy; either may be null.
LS_API void ls_categorical_backward(const float* logits, const int64_t* actions, const float* dlogprob,
                                    const float* dentropy, float* dlogits, int64_t num_rows,
                                    const int64_t* block_sizes, int64_t num_blocks);
// Gumbel-max with the given uniforms [M][sum of sizes]; uniform null takes the mode (the first maximum).
LS_API void ls_categorical_sample(const float* logits, const float* uniform, int64_t* actions, float* logprob,
                                  int64_t num_rows, const int64_t* block_sizes, int64_t num_blocks);

// Diagonal normal. log_std_stride is 0 for log_std [A] shared by rows, A for [M][A]. normal null takes the mean.
LS_API void ls_gaussian_evaluate(const float* mean, const float* log_std, int64_t log_std_stride, const float* actions,
                                 float* logprob, float* entropy, int64_t num_rows, int64_t num_actions);
LS_API void ls_gaussian_backward(const float* mean, const float* log_std, int64_t log_std_stride, const float* actions,
                                 const float* dlogprob, const float* dentropy, float* dmean, float* dlog_std,
                                 int64_t num_rows, int64_t num_actions);
LS_API void ls_gaussian_sample(const float* mean, const float* log_std, int64_t log_std_stride, const float* normal,
                               float* actions, float* logprob, int64_t num_rows, int64_t num_actions);
// tanh-squashed; mean, log_std and their gradients are [M][stride] each. log_std is clamped to its bounds, outside of
// which its gradient is 0. normal null takes tanh(mean).
LS_API void ls_squashed_sample(const float* mean, const float* log_std, int64_t stride, float log_std_min,
                               float log_std_max, const float* normal, float* actions, float* logprob,
                               int64_t num_rows, int64_t num_actions);
LS_API void ls_squashed_backward(const float* log_std, int64_t stride, float log_std_min, float log_std_max,
                                 const float* normal, const float* actions, const float* dactions,
                                 const float* dlogprob, float* dmean, float* dlog_std, int64_t num_rows,
                                 int64_t num_actions);

// Recurrent cells. pre [M][4H] holds the gates i, f, g, o; in and re [M][3H] hold r, z, n, and
// n = tanh(in_n + sigmoid(r) re_n). Gradients that are null on the way in are zero.
LS_API void ls_lstm_gates(const float* pre, const float* c, float* h_out, float* c_out, int64_t num_rows,
                          int64_t hidden);
LS_API void ls_lstm_gates_backward(const float* pre, const float* c, const float* c_out, const float* dh,
                                   const float* dc_out, float* dpre, float* dc, int64_t num_rows, int64_t hidden);
LS_API void ls_gru_gates(const float* in, const float* re, const float* h, float* h_out, int64_t num_rows,
                         int64_t hidden);
LS_API void ls_gru_gates_backward(const float* in, const float* re, const float* h, const float* dh_out, float* din,
                                  float* dre, float* dh, int64_t num_rows, int64_t hidden);
// T steps: pre[t] = h_before[t] weight + bias + inputs[t], h_before[t] = starts[t] ? 0 : h[t - 1]. h, c, h_before and
// c_before are [T][M][H], pre and inputs [T][M][4H] (GRU: re and inputs [T][M][3H]); all are written for the backward.
LS_API void ls_lstm_sequence(const float* inputs, const float* weight, const float* bias, const uint8_t* starts,
                             const float* h0, const float* c0, float* h, float* c, float* h_before, float* c_before,
                             float* pre, int64_t num_steps, int64_t num_rows, int64_t hidden);
LS_API void ls_lstm_sequence_backward(const float* weight, const uint8_t* starts, const float* c,
                                      const float* h_before, const float* c_before, const float* pre, const float* dh,
                                      const float* dh_last, const float* dc_last, float* dinputs, float* dweight,
                                      float* dbias, float* dh0, float* dc0, int64_t num_steps, int64_t num_rows,
                                      int64_t hidden);
LS_API void ls_gru_sequence(const float* inputs, const float* weight, const float* bias, const uint8_t* starts,
                            const float* h0, float* h, float* h_before, float* re, int64_t num_steps,
                            int64_t num_rows, int64_t hidden);
LS_API void ls_gru_sequence_backward(const float* inputs, const float* weight, const uint8_t* starts,
                                     const float* h_before, const float* re, const float* dh, const float* dh_last,
                                     float* dinputs, float* dre, float* dweight, float* dbias, float* dh0,
                                     int64_t num_steps, int64_t num_rows, int64_t hidden);

// PPO loss: loss [1], stats [6] = policy loss, value loss, entropy, approx kl, clip fraction, max |ratio - 1|; the
// gradients of the loss are written at once. value_clip < 0: no value clipping. mask (bytes) may be null.
LS_API void ls_ppo_surrogate(const float* logprob, const float* entropy, const float* value, const float* old_logprob,
                             const float* advantage, const float* returns, const float* old_value, const uint8_t* mask,
                             float clip, float value_clip, float value_coef, float entropy_coef, int64_t num,
                             float* loss, float* stats, float* dlogprob, float* dentropy, float* dvalue);

// One optimiser step over several tensors; returns the global gradient norm. max_norm < 0: no clipping.
// `step` is the number of this step, from 1.
LS_API double ls_adam(float* const* params, const float* const* grads, float* const* exp_avgs,
                      float* const* exp_avg_sqs, const int64_t* sizes, int64_t num_tensors, double lr, double beta1,
                      double beta2, double eps, double weight_decay, int64_t step, double max_norm);
// target += tau * (source - target)
LS_API void ls_polyak(float* const* targets, const float* const* sources, const int64_t* sizes, int64_t num_tensors,
                      float tau);

// Scans over time, [T][N] each. Booleans are bytes. `valid` may be null.
LS_API void ls_gae(const float* reward, const float* value, const float* next_value, const uint8_t* terminated,
                   const uint8_t* ended, const uint8_t* valid, float gamma, float lam, float* advantage,
                   int64_t num_steps, int64_t num);
LS_API void ls_discounted_return(const float* reward, const uint8_t* ended, const float* start, float gamma,
                                 float* running, float* end, int64_t num_steps, int64_t num);
LS_API void ls_vtrace(const float* log_rhos, const float* reward, const float* value, const float* next_value,
                      const uint8_t* terminated, const uint8_t* ended, const uint8_t* valid, float gamma, float lam,
                      float rho_bar, float c_bar, float* vs, float* advantage, int64_t num_steps, int64_t num);
// n-step returns of the transitions (t, env) of a ring [T][N]; `newest` is the row written last.
LS_API void ls_nstep_returns(const float* reward, const uint8_t* terminated, const uint8_t* ended, const int64_t* t,
                             const int64_t* env, int64_t newest, int64_t n, float gamma, float* returns,
                             float* discount, int64_t* last_t, int64_t num_steps, int64_t num, int64_t num_samples);

// Counter-based noise: Philox4x32-10 with key = seed and counter = (column / 4, stream, position); out is [M][columns].
LS_API void ls_philox(const uint32_t* counter, const uint32_t* key, uint32_t* out);
LS_API void ls_noise_bits(uint64_t seed, const int64_t* streams, const int64_t* positions, uint32_t* out,
                          int64_t num_rows, int64_t num_columns);
LS_API void ls_uniform(uint64_t seed, const int64_t* streams, const int64_t* positions, float* out, int64_t num_rows,
                       int64_t num_columns);
LS_API void ls_normal(uint64_t seed, const int64_t* streams, const int64_t* positions, float* out, int64_t num_rows,
                      int64_t num_columns);
// num draws from 0..size-1. A draw takes two uniforms of the one row (stream, position): column i, and column num + i for
// the bits below its 23.
LS_API void ls_uniform_index(uint64_t seed, int64_t stream, int64_t position, int64_t size, int64_t* out, int64_t num);

// A whole act: normalise, actor, head, critic. Null pointers leave a part out.
enum LsHead { LS_HEAD_CATEGORICAL, LS_HEAD_GAUSSIAN, LS_HEAD_SQUASHED, LS_HEAD_TANH, LS_HEAD_ARGMAX };
struct LsPlan {
  const LsMlp* actor;
  const LsMlp* critic;
  const float* norm_mean;
  const float* norm_inv_std;
  const float* log_std;        // gaussian: [A]; null: the actor's second half
  const int64_t* block_sizes;  // categorical
  float* features;             // [M][D], what the networks read
  float* head_input;           // [M][actor outputs]
  float* actions;              // [M][A], continuous heads
  int64_t* choices;            // [M][blocks], discrete heads
  float* logprob;              // [M]
  float* value;                // [M]
  int32_t head;                // LsHead
  float norm_clip;
  float log_std_min, log_std_max;  // squashed: the actor's log_std is clamped to these
  float epsilon;                   // argmax: chance of a uniform choice
  int32_t reserved;
  int64_t num_rows, num_obs, num_actions, num_blocks;
};
// streams and positions [M] key the noise; they are not read when deterministic.
LS_API void ls_plan_run(const LsPlan* plan, const float* obs, uint64_t seed, const int64_t* streams,
                        const int64_t* positions, int32_t deterministic);

// Gradients of a PPO minibatch of a dense actor and critic on the same features, for rows picked from arrays of
// num_rows rows. The head is categorical or gaussian with log_std [A].
struct LsActorCritic {
  const LsMlp* actor;
  const LsMlp* critic;
  const float* log_std;
  const int64_t* block_sizes;
  const float* features;   // [R][D]
  const void* action;      // int64 [R][blocks] or float [R][A]
  const float* logprob;    // [R], when the action was drawn
  const float* advantage;  // [R], as estimated; the return is advantage + value
  const float* value;      // [R], when the action was drawn
  float* const* actor_dweights;
  float* const* actor_dbiases;
  float* const* critic_dweights;
  float* const* critic_dbiases;
  float* dlog_std;
  int32_t head;       // LsHead
  int32_t normalise;  // advantages to zero mean and unit deviation over the minibatch
  float clip, value_clip, value_coef, entropy_coef;
  int64_t num_rows, num_blocks;
};
// Writes all gradients and stats [6] of ls_ppo_surrogate. Returns -1; the first row i whose action is out of range; or
// -2 - i where index[i] is (nothing is written then).
LS_API int64_t ls_actor_critic_gradients(const LsActorCritic* actor_critic, const int64_t* index, int64_t num,
                                         float* stats);
// Gradients of a Q-learning minibatch: Huber loss (delta 1) of online(features)[action] against
// reward + discount * target(next_features)[best], for rows picked from arrays of num_rows rows. `best` is the maximum of
// the target network, or of the online one when is_double.
struct LsQLearning {
  const LsMlp* online;
  const LsMlp* target;
  const float* features;       // [R][D]
  const float* next_features;  // [R][D]
  const int64_t* action;       // [R]
  const float* reward;         // [R]
  const float* discount;       // [R], 0 after a termination
  float* const* dweights;
  float* const* dbiases;
  int64_t num_rows;
  int32_t is_double;
  int32_t reserved;
};
// Writes all gradients, |TD error| [num] and stats [2]: its mean, and the mean of the targets. weight [num] may be null.
// Returns -1; the first i whose action is out of range; or -2 - i where index[i] is (nothing is written then).
LS_API int64_t ls_q_gradients(const LsQLearning* q, const int64_t* index, const float* weight, int64_t num,
                              float* error, float* stats);
// Gradients of a soft actor-critic minibatch (continuous actions, squashed Gaussian head), for rows picked from arrays of
// num_rows rows. The critics read features and action side by side; the target critics have their sizes.
struct LsSoftActorCritic {
  const LsMlp* actor;
  const LsMlp* critics;
  const LsMlp* target;
  const float* features;       // [R][F]
  const float* next_features;  // [R][F]
  const float* action;         // [R][A]
  const float* reward;         // [R]
  const float* discount;       // [R], 0 after a termination
  float* const* actor_dweights;
  float* const* actor_dbiases;
  float* const* critic_dweights;
  float* const* critic_dbiases;
  float* memory;               // ls_sac_memory bytes, which the second call finds as the first one left them
  int64_t num_rows;
  float log_std_min, log_std_max;
};
LS_API int64_t ls_sac_memory(const LsSoftActorCritic* sac, int64_t num);
// Writes the critics' gradients, the entropy [num] of actions sampled at the features with normal [0], and stats [2]:
// critic loss, mean value. normal is [2][num][A]: for the features, for the next ones. Returns -1, or the first i whose
// index is out of range (nothing is written then).
LS_API int64_t ls_sac_critic_gradients(const LsSoftActorCritic* sac, const int64_t* index, const float* normal,
                                       float alpha, int64_t num, float* entropy, float* stats);
// Writes the actor's gradients on the same minibatch, against the critics as they are now, and stats [2]: mean entropy,
// mean value.
LS_API void ls_sac_actor_gradients(const LsSoftActorCritic* sac, const float* normal, float alpha, int64_t num,
                                   float* stats);
// (x - mean) / (deviation + 1e-8) with the unbiased deviation, over the rows where mask (bytes, may be null) is not 0;
// fewer than two rows: x itself. out may be x.
LS_API void ls_normalise(const float* x, const uint8_t* mask, float* out, int64_t num);

// Prioritised replay: a binary tree of float64 sums and minima over `capacity` (a power of two) leaves; node 1 is the
// root, leaf i is node capacity + i.
LS_API void ls_sumtree_update(double* sums, double* minima, int64_t capacity, const int64_t* index,
                              const double* value, int64_t num);
LS_API void ls_sumtree_find(const double* sums, int64_t capacity, const double* prefix, int64_t* index, int64_t num);
// outs[s][b] = sources[s][idx[b]], rows of row_bytes[s] bytes.
LS_API void ls_gather_rows(const void* const* sources, void* const* outs, const int64_t* row_bytes,
                           int64_t num_sources, const int64_t* index, int64_t num);

// Packed matrices; the layout is told in lockstep/kernels/packed_linear/weight.py. No gradient passes through here.
enum LsPackedKind { LS_PACKED_FP32, LS_PACKED_BF16, LS_PACKED_BYTES, LS_PACKED_NIBBLES, LS_PACKED_TABLE };
struct LsPackedSpec {
  int64_t kind;  // LsPackedKind
  int64_t num_outputs, num_inputs;
  int64_t group;          // inputs that share a scale; 0 for floats
  int64_t scale_bytes;    // 2 (fp16) or 4
  int64_t minimum_bytes;  // 0, 2 or 4
  int64_t offset;         // stored code - code
  int64_t expert_bytes;
  uint8_t table[16];      // LS_PACKED_TABLE: value + 128 of each nibble
};
// y [M][N] = x [M][K] W^T + bias (null: none).
LS_API void ls_packed_linear(const LsPackedSpec* spec, const uint8_t* weight, const float* x, const float* bias,
                             float* y, int64_t num_rows);
// Rows starts[e] .. starts[e + 1] take weights[e]; starts [num_experts + 1] rises from 0; bias [num_experts][N] or null.
LS_API void ls_grouped_linear(const LsPackedSpec* spec, const uint8_t* const* weights, const int64_t* starts,
                              int64_t num_experts, const float* x, const float* bias, float* y);
// weight [N][K] float32 or bf16 -> the panels of an fp32 or bf16 spec.
LS_API void ls_pack_float(const LsPackedSpec* spec, const void* weight, int32_t weight_is_bf16, uint8_t* out);
// Block formats of quantised files, in the order of lockstep/kernels/packed_linear/blocks.py.
enum LsBlock {
  LS_BLOCK_Q4_0,
  LS_BLOCK_Q4_1,
  LS_BLOCK_Q5_0,
  LS_BLOCK_Q5_1,
  LS_BLOCK_Q8_0,
  LS_BLOCK_Q2_K,
  LS_BLOCK_Q3_K,
  LS_BLOCK_Q4_K,
  LS_BLOCK_Q5_K,
  LS_BLOCK_Q6_K,
  LS_BLOCK_IQ4_NL,
  LS_BLOCK_IQ4_XS,
  LS_BLOCK_MXFP4,
  LS_NUM_BLOCKS
};
enum LsBlocksFound {
  LS_BLOCKS_WIDE_SCALE = 1,    // one that is not a half
  LS_BLOCKS_WIDE_MINIMUM = 2,
  LS_BLOCKS_BAD_SCALE = 4,     // one that is not finite
  LS_BLOCKS_BAD_MINIMUM = 8
};
// What the scales and minima of num_rows rows of blocks are like: LsBlocksFound, or'ed.
LS_API int32_t ls_scan_blocks(int32_t block, const uint8_t* const* rows, int64_t num_rows, int64_t num_inputs);
// spec->num_outputs rows of blocks -> the panels of `spec`, whose group, kind and offset are the format's.
LS_API void ls_pack_blocks(int32_t block, const LsPackedSpec* spec, const uint8_t* const* rows, uint8_t* out);
// y [num_rows][K] = outputs rows[i] of a packed matrix as numbers.
LS_API void ls_unpack_rows(const LsPackedSpec* spec, const uint8_t* data, const int64_t* rows, int64_t num_rows,
                           float* y);
// Asks the system to map [start, start + num_bytes) in 2 MB pages; a wish, without effect where there are none.
LS_API void ls_advise_huge_pages(void* start, int64_t num_bytes);

// Upper limits for benchmarks. ls_peak_operations: num_tasks times num_steps rounds of the widest multiply-add of a kind;
// returns how many operations (multiplications and additions) that was, 0 where the build lacks the instruction.
// ls_read_memory reads num_bytes (whole 64 KB) once; the result keeps the loop from being dropped.
enum LsPeak { LS_PEAK_FP32, LS_PEAK_BF16, LS_PEAK_INT8, LS_PEAK_NIBBLES };
LS_API double ls_peak_operations(int32_t kind, int64_t num_steps, int64_t num_tasks);
LS_API int64_t ls_read_memory(const uint8_t* from, int64_t num_bytes);
