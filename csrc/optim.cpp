// Multi-tensor optimiser steps: one call for all parameters of a network.
#include "lockstep.h"
#include "pool.h"
#include "simd.h"

namespace {

double square_sum(const float* g, i64 num) {
  typedef double vd __attribute__((vector_size(VLEN * 8)));
  vd sums[2] = {};
  i64 i = 0;
  for (; i + 2 * VLEN <= num; i += 2 * VLEN)
    for (int u = 0; u < 2; u++) {
      vd x = __builtin_convertvector(load(g + i + u * VLEN), vd);
      sums[u] = sums[u] + x * x;
    }
  double total = 0;
  for (; i < num; i++) total += (double)g[i] * g[i];
  for (int u = 0; u < 2; u++)
    for (int lane = 0; lane < VLEN; lane++) total += sums[u][lane];
  return total;
}

struct AdamScalars {
  vf clip, beta1, one_beta1, beta2, one_beta2, step_size, inv_sqrt_bias2, eps, decay;
};

ALWAYS_INLINE void adam_vector(vf* p, vf g, vf* m, vf* v, const AdamScalars& s) {
  g = g * s.clip;
  *m = *m + s.one_beta1 * (g - *m);
  *v = s.beta2 * *v + s.one_beta2 * g * g;
  vf denominator = vsqrt(*v) * s.inv_sqrt_bias2 + s.eps;
  *p = *p * s.decay - s.step_size * (*m / denominator);
}

constexpr i64 BLOCK = 1 << 14;           // elements of a task
constexpr i64 WORTH_A_THREAD = 1 << 16;  // elements

// body(tensor, begin, end) for all elements of all tensors, shared out between threads where there are enough of them;
// `aside` is one more task, which needs none of the others.
template <typename F, typename G>
void over_elements(const int64_t* sizes, i64 num_tensors, F&& body, G&& aside) {
  i64 num_blocks = 0, total = 0;
  for (i64 t = 0; t < num_tensors; t++) {
    num_blocks += (sizes[t] + BLOCK - 1) / BLOCK;
    total += sizes[t];
  }
  if (total < WORTH_A_THREAD || pool_threads() == 1) {
    aside();
    for (i64 t = 0; t < num_tensors; t++) body(t, (i64)0, (i64)sizes[t]);
    return;
  }
  parallel_for(1 + num_blocks, [&](i64 task) {
    if (task == 0) return aside();
    i64 t = 0, block = task - 1;
    for (; block >= (sizes[t] + BLOCK - 1) / BLOCK; t++) block -= (sizes[t] + BLOCK - 1) / BLOCK;
    const i64 end = (block + 1) * BLOCK;
    body(t, block * BLOCK, end < sizes[t] ? end : (i64)sizes[t]);
  });
}

}  // namespace

double ls_adam(float* const* params, const float* const* grads, float* const* exp_avgs, float* const* exp_avg_sqs,
               const int64_t* sizes, int64_t num_tensors, double lr, double beta1, double beta2, double eps,
               double weight_decay, int64_t step, double max_norm) {
  double norm = 0;
  auto measure = [&] {
    double total = 0;
    for (i64 t = 0; t < num_tensors; t++)
      if (grads[t]) total += square_sum(grads[t], sizes[t]);
    norm = sqrt(total);
  };
  double clip = 1.0;
  if (max_norm >= 0) {
    measure();
    clip = max_norm / (norm + 1e-6);
    if (clip > 1.0) clip = 1.0;
  }
  AdamScalars s;
  s.clip = splat((float)clip);
  s.beta1 = splat((float)beta1);
  s.one_beta1 = splat((float)(1.0 - beta1));
  s.beta2 = splat((float)beta2);
  s.one_beta2 = splat((float)(1.0 - beta2));
  s.step_size = splat((float)(lr / (1.0 - pow(beta1, (double)step))));
  s.inv_sqrt_bias2 = splat((float)(1.0 / sqrt(1.0 - pow(beta2, (double)step))));
  s.eps = splat((float)eps);
  s.decay = splat((float)(1.0 - lr * weight_decay));
  auto update = [&](i64 t, i64 begin, i64 end) {
    if (!grads[t]) return;
    float *p = params[t], *m = exp_avgs[t], *v = exp_avg_sqs[t];
    const float* g = grads[t];
    for (i64 i = begin; i < end; i += VLEN) {
      i64 n = end - i;
      if (n >= VLEN) {
        vf pv = load(p + i), mv = load(m + i), vv = load(v + i);
        adam_vector(&pv, load(g + i), &mv, &vv, s);
        store(p + i, pv);
        store(m + i, mv);
        store(v + i, vv);
      } else {
        vf pv = load_part(p + i, n), mv = load_part(m + i, n), vv = load_part(v + i, n);
        adam_vector(&pv, load_part(g + i, n), &mv, &vv, s);
        store_part(p + i, pv, n);
        store_part(m + i, mv, n);
        store_part(v + i, vv, n);
      }
    }
  };
  // Without clipping the norm is nobody's input.
  over_elements(sizes, num_tensors, update, [&] {
    if (max_norm < 0) measure();
  });
  return norm;
}

void ls_polyak(float* const* targets, const float* const* sources, const int64_t* sizes, int64_t num_tensors,
               float tau) {
  const vf rate = splat(tau);
  auto update = [&](i64 t, i64 begin, i64 end) {
    for (i64 i = begin; i < end; i += VLEN) {
      i64 n = end - i;
      float* target = targets[t] + i;
      if (n >= VLEN) {
        vf x = load(target);
        store(target, x + rate * (load(sources[t] + i) - x));
      } else {
        vf x = load_part(target, n);
        store_part(target, x + rate * (load_part(sources[t] + i, n) - x), n);
      }
    }
  };
  over_elements(sizes, num_tensors, update, [] {});
}
