// Gradients of a PPO minibatch in one call. Every step is the public op of the same name on the same bytes, so that
// composing the ops gives the same bits.
#include "minibatch.h"

namespace {

struct Minibatch {
  float *features, *old_logprob, *advantage, *old_value, *returns;
  void* action;
  float *outputs, *value, *logprob, *entropy, *actor_saved, *critic_saved;
  float *doutputs, *dlogprob, *dentropy, *dvalue;
};

i64 action_bytes(const LsActorCritic* ac) {
  return ac->head == LS_HEAD_CATEGORICAL ? ac->num_blocks * (i64)sizeof(int64_t)
                                         : ac->actor->sizes[ac->actor->num_layers] * (i64)sizeof(float);
}

Minibatch allocate(const LsActorCritic* ac, i64 num) {
  const i64 num_obs = ac->actor->sizes[0], width = ac->actor->sizes[ac->actor->num_layers];
  const i64 actor_saved = saved_per_row(ac->actor), critic_saved = saved_per_row(ac->critic);
  const i64 action_floats = action_bytes(ac) / (i64)sizeof(float);
  const i64 bytes = room(num * num_obs) + room(num * action_floats) + 2 * room(num * width) + 10 * room(num) +
                    room(num * actor_saved) + room(num * critic_saved);
  Arena arena = {(char*)scratch(SCRATCH_MINIBATCH, bytes)};
  Minibatch b;
  b.features = arena.floats(num * num_obs);
  b.action = arena.floats(num * action_floats);
  b.outputs = arena.floats(num * width);
  b.doutputs = arena.floats(num * width);
  float** const per_row[] = {&b.old_logprob, &b.advantage, &b.old_value, &b.returns,  &b.value,
                             &b.logprob,     &b.entropy,   &b.dlogprob,  &b.dentropy, &b.dvalue};
  for (float** each : per_row) *each = arena.floats(num);
  b.actor_saved = arena.floats(num * actor_saved);
  b.critic_saved = arena.floats(num * critic_saved);
  return b;
}

void gather(const LsActorCritic* ac, const int64_t* index, i64 num, const Minibatch& b) {
  const void* sources[] = {ac->features, ac->action, ac->logprob, ac->advantage, ac->value};
  void* outs[] = {b.features, b.action, b.old_logprob, b.advantage, b.old_value};
  const i64 row_bytes[] = {ac->actor->sizes[0] * (i64)sizeof(float), action_bytes(ac), 4, 4, 4};
  ls_gather_rows(sources, outs, row_bytes, 5, index, num);
  for (i64 i = 0; i < num; i++) b.returns[i] = b.advantage[i] + b.old_value[i];
  if (ac->normalise) ls_normalise(b.advantage, nullptr, b.advantage, num);
}

// Both networks do about the same work: with two threads each gets one, with more the rows are shared out inside.
template <typename F>
void for_each_network(const LsActorCritic* ac, i64 num, F&& body) {
  constexpr i64 WORTH_A_THREAD = 1 << 20;
  i64 flops = 0;
  for (i64 l = 0; l < ac->actor->num_layers; l++) flops += 2 * num * ac->actor->sizes[l] * ac->actor->sizes[l + 1];
  if (pool_threads() == 2 && flops > WORTH_A_THREAD)
    return parallel_for(2, [&](i64 which) { body(which); });
  body(0);
  body(1);
}

}  // namespace

void ls_normalise(const float* x, const uint8_t* mask, float* out, int64_t num) {
  double sum = 0, square = 0;
  i64 count = 0;
  for (i64 i = 0; i < num; i++)
    if (!mask || mask[i]) {
      sum += x[i];
      count++;
    }
  if (count < 2) {
    memmove(out, x, (size_t)num * sizeof(float));
    return;
  }
  const double mean = sum / (double)count;
  for (i64 i = 0; i < num; i++)
    if (!mask || mask[i]) square += (x[i] - mean) * (x[i] - mean);
  const float centre = (float)mean, scale = (float)(sqrt(square / (double)(count - 1)) + 1e-8);
  for (i64 i = 0; i < num; i++) out[i] = (x[i] - centre) / scale;
}

int64_t ls_actor_critic_gradients(const LsActorCritic* ac, const int64_t* index, int64_t num, float* stats) {
  for (i64 i = 0; i < num; i++)
    if (index[i] < 0 || index[i] >= ac->num_rows) return -2 - i;
  const Minibatch b = allocate(ac, num);
  gather(ac, index, num, b);
  const i64 width = ac->actor->sizes[ac->actor->num_layers];
  const bool discrete = ac->head == LS_HEAD_CATEGORICAL;
  i64 bad = -1;
  for_each_network(ac, num, [&](i64 which) {
    if (which == 1) return ls_mlp_forward(ac->critic, b.features, b.value, b.critic_saved, num, 0);
    ls_mlp_forward(ac->actor, b.features, b.outputs, b.actor_saved, num, 0);
    if (discrete)
      bad = ls_categorical_evaluate(b.outputs, (const int64_t*)b.action, b.logprob, b.entropy, num, ac->block_sizes,
                                    ac->num_blocks);
    else
      ls_gaussian_evaluate(b.outputs, ac->log_std, 0, (const float*)b.action, b.logprob, b.entropy, num, width);
  });
  if (bad >= 0) return bad;
  float loss;
  ls_ppo_surrogate(b.logprob, b.entropy, b.value, b.old_logprob, b.advantage, b.returns, b.old_value, nullptr, ac->clip,
                   ac->value_clip, ac->value_coef, ac->entropy_coef, num, &loss, stats, b.dlogprob, b.dentropy,
                   b.dvalue);
  for_each_network(ac, num, [&](i64 which) {
    if (which == 1)
      return ls_mlp_backward(ac->critic, b.features, b.value, b.critic_saved, b.dvalue, nullptr, ac->critic_dweights,
                             ac->critic_dbiases, num, 0);
    if (discrete)
      ls_categorical_backward(b.outputs, (const int64_t*)b.action, b.dlogprob, b.dentropy, b.doutputs, num,
                              ac->block_sizes, ac->num_blocks);
    else
      ls_gaussian_backward(b.outputs, ac->log_std, 0, (const float*)b.action, b.dlogprob, b.dentropy, b.doutputs,
                           ac->dlog_std, num, width);
    ls_mlp_backward(ac->actor, b.features, b.outputs, b.actor_saved, b.doutputs, nullptr, ac->actor_dweights,
                    ac->actor_dbiases, num, 0);
  });
  return -1;
}
