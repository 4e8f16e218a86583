// Gradients of a soft actor-critic minibatch in two calls, before and after the critics' optimiser step. Every step is
// the public op of the same name on the same bytes, so that composing the ops gives the same bits.
#include <initializer_list>

#include "minibatch.h"

namespace {

constexpr i64 MAX_LAYERS = 64;

// One network of an ensemble as a chain of its own; with `first_input` > 0 a chain that reads only the inputs from there
// on, which is what a gradient with respect to those inputs needs.
struct Member {
  LsMlp mlp;
  int64_t sizes[MAX_LAYERS + 1];
  const float* weights[MAX_LAYERS];
  const float* biases[MAX_LAYERS];
  float* dweights[MAX_LAYERS];
  float* dbiases[MAX_LAYERS];

  Member(const LsMlp* ensemble, i64 e, float* const* all_dweights, float* const* all_dbiases, i64 first_input = 0) {
    mlp = *ensemble;
    mlp.num_members = 0;
    for (i64 l = 0; l < mlp.num_layers; l++) {
      const i64 k = ensemble->sizes[l], n = ensemble->sizes[l + 1];
      const float* bias = ensemble->biases ? ensemble->biases[l] : nullptr;
      sizes[l] = k;
      sizes[l + 1] = n;
      weights[l] = ensemble->weights[l] + e * k * n;
      biases[l] = bias ? bias + e * n : nullptr;
      dweights[l] = all_dweights ? all_dweights[l] + e * k * n : nullptr;
      dbiases[l] = all_dbiases && all_dbiases[l] ? all_dbiases[l] + e * n : nullptr;
    }
    weights[0] += first_input * sizes[1];
    sizes[0] -= first_input;
    mlp.sizes = sizes;
    mlp.weights = weights;
    mlp.biases = biases;
  }
};

// What a minibatch keeps between the two calls. F features, A actions, E critics, B rows.
struct Minibatch {
  i64 num, num_features, num_actions, num_critics, critic_saved;
  float *features, *next_features, *reward, *discount;    // [B, F], [B]
  float *joined, *next_joined;                            // [B, F + A]
  float *params, *next_params, *dparams, *actor_saved;    // [B, 2A]
  float *action, *next_action, *daction;                  // [B, A]
  float *logprob, *next_logprob, *dlogprob, *target;      // [B]
  float *values, *dvalues, *saved;                        // [E, B]
  float *picked_values, *picked_saved, *picked_daction;   // of the rows of a critic, packed
  int64_t *picked, *num_picked;                           // [E, B], [E]
  char* end;
};

Minibatch lay_out(const LsSoftActorCritic* sac, i64 num) {
  Minibatch b;
  b.num = num;
  b.num_features = sac->actor->sizes[0];
  b.num_actions = sac->actor->sizes[sac->actor->num_layers] / 2;
  b.num_critics = sac->critics->num_members;
  b.critic_saved = saved_per_row(sac->critics);
  const i64 width = b.num_features + b.num_actions, rows = b.num_critics * num;
  Arena arena = {(char*)sac->memory};
  for (float** each : {&b.features, &b.next_features}) *each = arena.floats(num * b.num_features);
  for (float** each : {&b.reward, &b.discount, &b.logprob, &b.next_logprob, &b.dlogprob, &b.target})
    *each = arena.floats(num);
  for (float** each : {&b.joined, &b.next_joined}) *each = arena.floats(num * width);
  for (float** each : {&b.params, &b.next_params, &b.dparams}) *each = arena.floats(2 * num * b.num_actions);
  for (float** each : {&b.action, &b.next_action, &b.daction}) *each = arena.floats(num * b.num_actions);
  b.actor_saved = arena.floats(num * saved_per_row(sac->actor));
  for (float** each : {&b.values, &b.dvalues, &b.picked_values}) *each = arena.floats(rows);
  for (float** each : {&b.saved, &b.picked_saved}) *each = arena.floats(rows * b.critic_saved);
  b.picked_daction = arena.floats(rows * b.num_actions);
  b.picked = (int64_t*)arena.floats(2 * rows);
  b.num_picked = (int64_t*)arena.floats(2 * b.num_critics);
  b.end = arena.at;
  return b;
}

void gather(const LsSoftActorCritic* sac, const int64_t* index, const Minibatch& b) {
  constexpr i64 AHEAD = 8;  // rows of a large buffer lie far apart
  const i64 num_features = b.num_features, num_actions = b.num_actions, width = num_features + num_actions;
  for (i64 i = 0; i < b.num; i++) {
    if (i + AHEAD < b.num) {
      const i64 later = index[i + AHEAD];
      for (i64 at = 0; at < num_features; at += 16) {
        __builtin_prefetch(sac->features + later * num_features + at);
        __builtin_prefetch(sac->next_features + later * num_features + at);
      }
      __builtin_prefetch(sac->action + later * num_actions);
      __builtin_prefetch(sac->reward + later);
      __builtin_prefetch(sac->discount + later);
    }
    const float* features = sac->features + index[i] * num_features;
    const float* next_features = sac->next_features + index[i] * num_features;
    const size_t bytes = (size_t)num_features * sizeof(float);
    memcpy(b.features + i * num_features, features, bytes);
    memcpy(b.next_features + i * num_features, next_features, bytes);
    memcpy(b.joined + i * width, features, bytes);
    memcpy(b.next_joined + i * width, next_features, bytes);
    memcpy(b.joined + i * width + num_features, sac->action + index[i] * num_actions,
           (size_t)num_actions * sizeof(float));
    b.reward[i] = sac->reward[index[i]];
    b.discount[i] = sac->discount[index[i]];
  }
}

// The action columns of joined [B, F + A].
void set_actions(const Minibatch& b, float* joined, const float* action) {
  const i64 width = b.num_features + b.num_actions;
  for (i64 i = 0; i < b.num; i++)
    memcpy(joined + i * width + b.num_features, action + i * b.num_actions, (size_t)b.num_actions * sizeof(float));
}

// The critic with the smallest value of row i: the first of equals; NaN counts as the smallest.
i64 smallest(const Minibatch& b, i64 i) {
  i64 best = 0;
  for (i64 e = 1; e < b.num_critics; e++)
    if (b.values[best * b.num + i] == b.values[best * b.num + i] &&
        !(b.values[e * b.num + i] >= b.values[best * b.num + i]))
      best = e;
  return best;
}

// Tasks of about the same size: a thread for each where there are no more threads than tasks, which saves the waiting
// inside; else one after the other, each on all threads.
template <typename F>
void for_each_task(const LsSoftActorCritic* sac, i64 num, i64 num_tasks, F&& body) {
  constexpr i64 WORTH_A_THREAD = 1 << 20;
  i64 flops = 0;
  for (i64 l = 0; l < sac->actor->num_layers; l++) flops += 2 * num * sac->actor->sizes[l] * sac->actor->sizes[l + 1];
  if (pool_threads() <= num_tasks && flops > WORTH_A_THREAD) return parallel_for(num_tasks, [&](i64 i) { body(i); });
  for (i64 i = 0; i < num_tasks; i++) body(i);
}

// Rows of a block [B, width] of what the forward pass saved, packed.
float* pick_rows(const float* from, float* to, const int64_t* picked, i64 num_picked, i64 width) {
  for (i64 i = 0; i < num_picked; i++)
    memcpy(to + i * width, from + picked[i] * width, (size_t)width * sizeof(float));
  return to + num_picked * width;
}

// d(sum of dvalues * values)/d(action) of critic e, on the rows whose smallest value is its own: on the others its
// gradient is zero, and so is all that follows from it.
void action_gradient(const LsSoftActorCritic* sac, const Minibatch& b, i64 e) {
  const Member critic(sac->critics, e, nullptr, nullptr, b.num_features);
  const int64_t* picked = b.picked + e * b.num;
  const i64 num = b.num_picked[e];
  if (num == 0) return;
  const float* from = b.saved + e * b.num * b.critic_saved;
  float* const saved = b.picked_saved + e * b.num * b.critic_saved;
  float* to = saved;
  for (i64 l = 0; l < critic.mlp.num_layers; l++) {
    const i64 width = critic.sizes[l + 1];
    for (i64 block = saved_blocks_of(&critic.mlp, l); block > 0; block--) {
      to = pick_rows(from, to, picked, num, width);
      from += b.num * width;
    }
  }
  float* values = b.picked_values + e * b.num;
  pick_rows(b.values + e * b.num, values, picked, num, 1);
  float* daction = b.picked_daction + e * b.num * b.num_actions;
  // The input is read for weight gradients only.
  ls_mlp_backward(&critic.mlp, b.joined, values, saved, b.dvalues, daction, nullptr, nullptr, num, 0);
  for (i64 i = 0; i < num; i++)
    memcpy(b.daction + picked[i] * b.num_actions, daction + i * b.num_actions,
           (size_t)b.num_actions * sizeof(float));
}

}  // namespace

int64_t ls_sac_memory(const LsSoftActorCritic* sac, int64_t num) {
  return lay_out(sac, num).end - (char*)sac->memory;
}

int64_t ls_sac_critic_gradients(const LsSoftActorCritic* sac, const int64_t* index, const float* normal, float alpha,
                                int64_t num, float* entropy, float* stats) {
  for (i64 i = 0; i < num; i++)
    if (index[i] < 0 || index[i] >= sac->num_rows) return i;
  const Minibatch b = lay_out(sac, num);
  gather(sac, index, b);
  for_each_task(sac, num, 2, [&](i64 next) {
    float* params = next ? b.next_params : b.params;
    float* action = next ? b.next_action : b.action;
    ls_mlp_forward(sac->actor, next ? b.next_features : b.features, params, next ? nullptr : b.actor_saved, num, 0);
    ls_squashed_sample(params, params + b.num_actions, 2 * b.num_actions, sac->log_std_min, sac->log_std_max,
                       normal + next * num * b.num_actions, action, next ? b.next_logprob : b.logprob, num,
                       b.num_actions);
    if (next) set_actions(b, b.next_joined, action);
  });
  for_each_task(sac, num, b.num_critics, [&](i64 e) {
    const Member target(sac->target, e, nullptr, nullptr);
    ls_mlp_forward(&target.mlp, b.next_joined, b.values + e * num, nullptr, num, 0);
  });
  for (i64 i = 0; i < num; i++) {
    const float soft = alpha * -b.next_logprob[i];
    const float next_value = b.values[smallest(b, i) * num + i] + soft;
    const float bootstrap = b.discount[i] * next_value;
    b.target[i] = b.reward[i] + bootstrap;
    entropy[i] = -b.logprob[i];
  }
  const float share = (float)(1.0 / (double)num);
  for_each_task(sac, num, b.num_critics, [&](i64 e) {
    const Member critic(sac->critics, e, sac->critic_dweights, sac->critic_dbiases);
    float *values = b.values + e * num, *dvalues = b.dvalues + e * num, *saved = b.saved + e * num * b.critic_saved;
    ls_mlp_forward(&critic.mlp, b.joined, values, saved, num, 0);
    for (i64 i = 0; i < num; i++) dvalues[i] = (values[i] - b.target[i]) * share;
    ls_mlp_backward(&critic.mlp, b.joined, values, saved, dvalues, nullptr, critic.dweights, critic.dbiases, num, 0);
  });
  double loss = 0, value_sum = 0;
  for (i64 e = 0; e < b.num_critics; e++)
    for (i64 i = 0; i < num; i++) {
      loss += 0.5 * (double)(b.values[e * num + i] - b.target[i]) * b.dvalues[e * num + i];
      value_sum += b.values[e * num + i];
    }
  stats[0] = (float)loss;
  stats[1] = (float)(value_sum / (double)(num * b.num_critics));
  return -1;
}

void ls_sac_actor_gradients(const LsSoftActorCritic* sac, const float* normal, float alpha, int64_t num,
                            float* stats) {
  const Minibatch b = lay_out(sac, num);
  set_actions(b, b.joined, b.action);
  for_each_task(sac, num, b.num_critics, [&](i64 e) {
    const Member critic(sac->critics, e, nullptr, nullptr);
    ls_mlp_forward(&critic.mlp, b.joined, b.values + e * num, b.saved + e * num * b.critic_saved, num, 0);
  });
  const float rate = (float)(-1.0 / (double)num);
  double value_sum = 0, entropy_sum = 0;
  for (i64 e = 0; e < b.num_critics; e++) b.num_picked[e] = 0;
  for (i64 i = 0; i < num; i++) {
    const i64 e = smallest(b, i);
    b.picked[e * num + b.num_picked[e]++] = i;
    b.dvalues[i] = rate;
    b.dlogprob[i] = -(alpha * rate);
    value_sum += b.values[e * num + i];
    entropy_sum -= b.logprob[i];
  }
  for_each_task(sac, num, b.num_critics, [&](i64 e) { action_gradient(sac, b, e); });
  ls_squashed_backward(b.params + b.num_actions, 2 * b.num_actions, sac->log_std_min, sac->log_std_max, normal, b.action,
                       b.daction, b.dlogprob, b.dparams, b.dparams + b.num_actions, num, b.num_actions);
  ls_mlp_backward(sac->actor, b.features, b.params, b.actor_saved, b.dparams, nullptr, sac->actor_dweights,
                  sac->actor_dbiases, num, 0);
  stats[0] = (float)(entropy_sum / (double)num);
  stats[1] = (float)(value_sum / (double)num);
}
