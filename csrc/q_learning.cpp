// Gradients of a Q-learning minibatch in one call. Every step is the public op of the same name on the same bytes, so
// that composing the ops gives the same bits.
#include "minibatch.h"

namespace {

struct Minibatch {
  float *features, *next_features, *reward, *discount, *values, *next_values, *chooser, *dvalues, *saved;
  int64_t* action;
};

Minibatch allocate(const LsQLearning* q, i64 num) {
  const i64 num_obs = q->online->sizes[0], width = q->online->sizes[q->online->num_layers];
  const i64 saved = saved_per_row(q->online);
  const i64 bytes =
      2 * room(num * num_obs) + 2 * room(num) + room(2 * num) + 4 * room(num * width) + room(num * saved);
  Arena arena = {(char*)scratch(SCRATCH_MINIBATCH, bytes)};
  Minibatch b;
  b.features = arena.floats(num * num_obs);
  b.next_features = arena.floats(num * num_obs);
  b.reward = arena.floats(num);
  b.discount = arena.floats(num);
  b.action = (int64_t*)arena.floats(2 * num);
  float** const per_value[] = {&b.values, &b.next_values, &b.chooser, &b.dvalues};
  for (float** each : per_value) *each = arena.floats(num * width);
  b.saved = arena.floats(num * saved);
  return b;
}

// The first maximum; NaN counts as the largest.
i64 first_maximum(const float* x, i64 num) {
  i64 best = 0;
  for (i64 a = 1; a < num; a++)
    if (x[best] == x[best] && !(x[a] <= x[best])) best = a;
  return best;
}

}  // namespace

int64_t ls_q_gradients(const LsQLearning* q, const int64_t* index, const float* weight, int64_t num, float* error,
                       float* stats) {
  const i64 width = q->online->sizes[q->online->num_layers];
  for (i64 i = 0; i < num; i++) {
    if (index[i] < 0 || index[i] >= q->num_rows) return -2 - i;
    if (q->action[index[i]] < 0 || q->action[index[i]] >= width) return i;
  }
  const Minibatch b = allocate(q, num);
  const i64 row_bytes = q->online->sizes[0] * (i64)sizeof(float);
  const void* sources[] = {q->features, q->next_features, q->reward, q->discount, q->action};
  void* outs[] = {b.features, b.next_features, b.reward, b.discount, b.action};
  const i64 bytes[] = {row_bytes, row_bytes, 4, 4, 8};
  ls_gather_rows(sources, outs, bytes, 5, index, num);
  ls_mlp_forward(q->target, b.next_features, b.next_values, nullptr, num, 0);
  const float* chooser = b.next_values;
  if (q->is_double) {
    ls_mlp_forward(q->online, b.next_features, b.chooser, nullptr, num, 0);
    chooser = b.chooser;
  }
  ls_mlp_forward(q->online, b.features, b.values, b.saved, num, 0);
  memset(b.dvalues, 0, (size_t)(num * width) * sizeof(float));
  const float share = (float)(1.0 / (double)num);
  double error_sum = 0, target_sum = 0;
  for (i64 i = 0; i < num; i++) {
    const float next = b.next_values[i * width + first_maximum(chooser + i * width, width)];
    const float target = b.reward[i] + b.discount[i] * next;
    const float delta = b.values[i * width + b.action[i]] - target;
    float slope = (delta < -1.0f ? -1.0f : delta > 1.0f ? 1.0f : delta) * share;
    if (weight) slope *= weight[i];
    b.dvalues[i * width + b.action[i]] = slope;
    error[i] = delta < 0.0f ? -delta : delta;
    error_sum += error[i];
    target_sum += target;
  }
  stats[0] = (float)(error_sum / (double)num);
  stats[1] = (float)(target_sum / (double)num);
  ls_mlp_backward(q->online, b.features, b.values, b.saved, b.dvalues, nullptr, q->dweights, q->dbiases, num, 0);
  return -1;
}
