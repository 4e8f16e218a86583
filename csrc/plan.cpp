// A policy's act in one call. Every step is the public op of the same name on the same bytes, so that composing the
// ops gives the same bits.
#include "lockstep.h"
#include "pool.h"
#include "simd.h"

namespace {

void normalise(const LsPlan* plan, const float* obs, float* out) {
  const vf hi = splat(plan->norm_clip), lo = splat(-plan->norm_clip);
  for (i64 r = 0; r < plan->num_rows; r++)
    for (i64 d = 0; d < plan->num_obs; d += VLEN) {
      i64 n = plan->num_obs - d < VLEN ? plan->num_obs - d : (i64)VLEN;
      vf x = load_part(obs + r * plan->num_obs + d, n);
      x = (x - load_part(plan->norm_mean + d, n)) * load_part(plan->norm_inv_std + d, n);
      store_part(out + r * plan->num_obs + d, at_most(at_least(x, lo), hi), n);
    }
}

void choose(const LsPlan* plan, const float* uniform) {
  const i64 num = plan->num_actions;
  for (i64 r = 0; r < plan->num_rows; r++) {
    const float* q = plan->head_input + r * num;
    i64 best = 0;
    for (i64 a = 1; a < num; a++) best = q[a] > q[best] ? a : best;
    if (uniform && uniform[2 * r] < plan->epsilon) {
      best = (i64)(uniform[2 * r + 1] * (float)num);
      best = best < num ? best : num - 1;
    }
    plan->choices[r] = best;
  }
}

void act(const LsPlan* plan, const float* noise) {
  const i64 rows = plan->num_rows, num = plan->num_actions;
  switch (plan->head) {
    case LS_HEAD_CATEGORICAL:
      return ls_categorical_sample(plan->head_input, noise, plan->choices, plan->logprob, rows, plan->block_sizes,
                                   plan->num_blocks);
    case LS_HEAD_GAUSSIAN:
      return ls_gaussian_sample(plan->head_input, plan->log_std, 0, noise, plan->actions, plan->logprob, rows, num);
    case LS_HEAD_SQUASHED:
      return ls_squashed_sample(plan->head_input, plan->head_input + num, 2 * num, plan->log_std_min, plan->log_std_max,
                                noise, plan->actions, plan->logprob, rows, num);
    case LS_HEAD_TANH:
      memcpy(plan->actions, plan->head_input, (size_t)(rows * num) * sizeof(float));
      return;
    default:
      choose(plan, noise);
  }
}

}  // namespace

void ls_plan_run(const LsPlan* plan, const float* obs, uint64_t seed, const int64_t* streams, const int64_t* positions,
                 int32_t deterministic) {
  const i64 rows = plan->num_rows, num = plan->num_actions;
  if (plan->norm_mean)
    normalise(plan, obs, plan->features);
  else
    memcpy(plan->features, obs, (size_t)(rows * plan->num_obs) * sizeof(float));
  ls_mlp_forward(plan->actor, plan->features, plan->head_input, nullptr, rows, 0);
  if (plan->critic) ls_mlp_forward(plan->critic, plan->features, plan->value, nullptr, rows, 0);
  const float* noise = nullptr;
  if (!deterministic && plan->head != LS_HEAD_TANH) {
    float* buffer = (float*)scratch(SCRATCH_PACK_A, rows * (num + 2) * (i64)sizeof(float));
    if (plan->head == LS_HEAD_CATEGORICAL)
      ls_uniform(seed, streams, positions, buffer, rows, num);
    else if (plan->head == LS_HEAD_ARGMAX)
      ls_uniform(seed, streams, positions, buffer, rows, 2);
    else
      ls_normal(seed, streams, positions, buffer, rows, num);
    noise = buffer;
  }
  act(plan, noise);
}
