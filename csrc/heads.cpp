// Policy heads. A lane is a row: sums over actions run in rising order inside a lane, so a row's bits depend on nothing
// but the row. Evaluate and sample share the same log-probability function, hence its bits.
#include "lockstep.h"
#include "simd.h"

namespace {

// A choice whose logit is below this distance from the maximum has probability 0 in float32; its entropy term is 0.
constexpr float FLOOR = -87.3f;
constexpr float HALF_LOG_TWO_PI = 0.91893853320467274f;
constexpr float LOG_TWO = 0.69314718055994531f;
constexpr float ALMOST_ONE = 0.99999994f;  // the largest float below 1: squashed actions stay inside (-1, 1)

struct Softmax {
  vf max, log_sum;
};

Softmax softmax_of(const float* logits, i64 stride, i64 size, i64 rows) {
  vf max = load_column(logits, stride, 0, rows);
  for (i64 a = 1; a < size; a++) {
    vf x = load_column(logits, stride, a, rows);
    max = select(x > max, x, max);
  }
  // A row of -inf only has no distribution; finite arithmetic keeps the rows beside it unaffected.
  max = at_least(max, splat(-3e38f));
  vf sum = splat(0.0f);
  for (i64 a = 0; a < size; a++) sum = sum + vexp(load_column(logits, stride, a, rows) - max);
  return {max, vlog(sum)};
}
ALWAYS_INLINE vf logprob_of(vf logit, const Softmax& s) { return (logit - s.max) - s.log_sum; }
ALWAYS_INLINE vf entropy_term(vf logprob) {
  return select(logprob > splat(FLOOR), vexp(logprob) * logprob, splat(0.0f));
}

i64 total_of(const int64_t* sizes, i64 num) {
  i64 total = 0;
  for (i64 b = 0; b < num; b++) total += sizes[b];
  return total;
}

// The logit of each row's action.
vf pick(const float* logits, i64 stride, const int64_t* actions, i64 action_stride, i64 rows) {
  float lane[VLEN];
  for (i64 i = 0; i < VLEN; i++) {
    i64 r = i < rows ? i : 0;
    lane[i] = logits[r * stride + actions[r * action_stride]];
  }
  return load(lane);
}

template <typename F>
void over_rows(i64 num_rows, F&& body) {
  for (i64 r = 0; r < num_rows; r += VLEN) body(r, num_rows - r < VLEN ? num_rows - r : (i64)VLEN);
}

}  // namespace

int64_t ls_categorical_evaluate(const float* logits, const int64_t* actions, float* logprob, float* entropy,
                                int64_t num_rows, const int64_t* sizes, int64_t num_blocks) {
  const i64 stride = total_of(sizes, num_blocks);
  for (i64 i = 0; i < num_rows * num_blocks; i++)
    if (actions[i] < 0 || actions[i] >= sizes[i % num_blocks]) return i / num_blocks;
  over_rows(num_rows, [&](i64 r, i64 rows) {
    vf lp = splat(0.0f), ent = splat(0.0f);
    const float* block = logits + r * stride;
    for (i64 b = 0; b < num_blocks; block += sizes[b++]) {
      Softmax s = softmax_of(block, stride, sizes[b], rows);
      lp = lp + logprob_of(pick(block, stride, actions + r * num_blocks + b, num_blocks, rows), s);
      if (entropy)
        for (i64 a = 0; a < sizes[b]; a++) ent = ent - entropy_term(logprob_of(load_column(block, stride, a, rows), s));
    }
    store_part(logprob + r, lp, rows);
    if (entropy) store_part(entropy + r, ent, rows);
  });
  return -1;
}

void ls_categorical_backward(const float* logits, const int64_t* actions, const float* dlogprob, const float* dentropy,
                             float* dlogits, int64_t num_rows, const int64_t* sizes, int64_t num_blocks) {
  const i64 stride = total_of(sizes, num_blocks);
  over_rows(num_rows, [&](i64 r, i64 rows) {
    vf dlp = dlogprob ? load_part(dlogprob + r, rows) : splat(0.0f);
    vf dent = dentropy ? load_part(dentropy + r, rows) : splat(0.0f);
    i64 offset = r * stride;
    for (i64 b = 0; b < num_blocks; offset += sizes[b++]) {
      const float* block = logits + offset;
      Softmax s = softmax_of(block, stride, sizes[b], rows);
      vf ent = splat(0.0f);
      if (dentropy)
        for (i64 a = 0; a < sizes[b]; a++) ent = ent - entropy_term(logprob_of(load_column(block, stride, a, rows), s));
      for (i64 a = 0; a < sizes[b]; a++) {
        vf lp = logprob_of(load_column(block, stride, a, rows), s);
        vf p = vexp(lp);
        // d logprob / d logit = 1[a = action] - p;  d entropy / d logit = -p (logprob + entropy)
        vf g = select(p > splat(0.0f), -p * (dlp + dent * (lp + ent)), splat(0.0f));
        store_column(dlogits + offset, stride, a, rows, g);
      }
      for (i64 i = 0; i < rows; i++)
        if (dlogprob) dlogits[offset + i * stride + actions[(r + i) * num_blocks + b]] += dlogprob[r + i];
    }
  });
}

void ls_categorical_sample(const float* logits, const float* uniform, int64_t* actions, float* logprob,
                           int64_t num_rows, const int64_t* sizes, int64_t num_blocks) {
  const i64 stride = total_of(sizes, num_blocks);
  over_rows(num_rows, [&](i64 r, i64 rows) {
    vf total = splat(0.0f);
    i64 offset = r * stride;
    for (i64 b = 0; b < num_blocks; offset += sizes[b++]) {
      const float* block = logits + offset;
      Softmax s = softmax_of(block, stride, sizes[b], rows);
      vf best = splat(-INFINITY);
      vi arg = {};
      for (i64 a = 0; a < sizes[b]; a++) {
        vf score = load_column(block, stride, a, rows);
        if (uniform) score = score - vlog(-vlog(load_column(uniform + offset, stride, a, rows)));
        vi better = score > best;
        best = select(better, score, best);
        arg = (better & (int32_t)a) | (~better & arg);
      }
      for (i64 i = 0; i < rows; i++) actions[(r + i) * num_blocks + b] = arg[i];
      total = total + logprob_of(pick(block, stride, actions + r * num_blocks + b, num_blocks, rows), s);
    }
    if (logprob) store_part(logprob + r, total, rows);
  });
}

namespace {

ALWAYS_INLINE vf gaussian_term(vf mean, vf log_std, vf action) {
  vf z = (action - mean) * vexp(-log_std);
  return splat(-0.5f) * z * z - log_std - splat(HALF_LOG_TWO_PI);
}
ALWAYS_INLINE vf log_std_column(const float* log_std, i64 stride, i64 r, i64 a, i64 rows) {
  return load_column(log_std + r * stride, stride, a, rows);
}

}  // namespace

void ls_gaussian_evaluate(const float* mean, const float* log_std, int64_t stride, const float* actions,
                          float* logprob, float* entropy, int64_t num_rows, int64_t num_actions) {
  over_rows(num_rows, [&](i64 r, i64 rows) {
    vf lp = splat(0.0f), ent = splat(0.0f);
    for (i64 a = 0; a < num_actions; a++) {
      vf ls = log_std_column(log_std, stride, r, a, rows);
      lp = lp + gaussian_term(load_column(mean + r * num_actions, num_actions, a, rows), ls,
                              load_column(actions + r * num_actions, num_actions, a, rows));
      ent = ent + (ls + splat(0.5f + HALF_LOG_TWO_PI));
    }
    store_part(logprob + r, lp, rows);
    if (entropy) store_part(entropy + r, ent, rows);
  });
}

void ls_gaussian_backward(const float* mean, const float* log_std, int64_t stride, const float* actions,
                          const float* dlogprob, const float* dentropy, float* dmean, float* dlog_std,
                          int64_t num_rows, int64_t num_actions) {
  if (dlog_std && stride == 0)
    for (i64 a = 0; a < num_actions; a++) dlog_std[a] = 0.0f;
  over_rows(num_rows, [&](i64 r, i64 rows) {
    vf dlp = dlogprob ? load_part(dlogprob + r, rows) : splat(0.0f);
    vf dent = dentropy ? load_part(dentropy + r, rows) : splat(0.0f);
    i64 offset = r * num_actions;
    for (i64 a = 0; a < num_actions; a++) {
      vf inv_std = vexp(-log_std_column(log_std, stride, r, a, rows));
      vf z = (load_column(actions + offset, num_actions, a, rows) - load_column(mean + offset, num_actions, a, rows)) *
             inv_std;
      if (dmean) store_column(dmean + offset, num_actions, a, rows, dlp * z * inv_std);
      if (!dlog_std) continue;
      vf g = dlp * (z * z - splat(1.0f)) + dent;
      if (stride)
        store_column(dlog_std + offset, num_actions, a, rows, g);
      else
        for (i64 i = 0; i < rows; i++) dlog_std[a] += g[i];
    }
  });
}

void ls_gaussian_sample(const float* mean, const float* log_std, int64_t stride, const float* normal, float* actions,
                        float* logprob, int64_t num_rows, int64_t num_actions) {
  over_rows(num_rows, [&](i64 r, i64 rows) {
    vf lp = splat(0.0f);
    i64 offset = r * num_actions;
    for (i64 a = 0; a < num_actions; a++) {
      vf m = load_column(mean + offset, num_actions, a, rows), ls = log_std_column(log_std, stride, r, a, rows);
      vf action = m;
      if (normal) action = m + vexp(ls) * load_column(normal + offset, num_actions, a, rows);
      lp = lp + gaussian_term(m, ls, action);
      store_column(actions + offset, num_actions, a, rows, action);
    }
    if (logprob) store_part(logprob + r, lp, rows);
  });
}

// log N(n) - log_std - log(1 - tanh(u)^2), the last as 2 (log 2 - u - softplus(-2u)) (SAC, appendix C).
void ls_squashed_sample(const float* mean, const float* log_std, int64_t stride, float log_std_min, float log_std_max,
                        const float* normal, float* actions, float* logprob, int64_t num_rows, int64_t num_actions) {
  const vf lo = splat(log_std_min), hi = splat(log_std_max);
  over_rows(num_rows, [&](i64 r, i64 rows) {
    vf lp = splat(0.0f);
    i64 offset = r * num_actions;
    for (i64 a = 0; a < num_actions; a++) {
      vf n = normal ? load_column(normal + offset, num_actions, a, rows) : splat(0.0f);
      vf ls = at_most(at_least(load_column(log_std + r * stride, stride, a, rows), lo), hi);
      vf u = load_column(mean + r * stride, stride, a, rows) + vexp(ls) * n;
      vf action = at_most(at_least(vtanh(u), splat(-ALMOST_ONE)), splat(ALMOST_ONE));
      vf correction = splat(2.0f) * (splat(LOG_TWO) - u - vsoftplus(splat(-2.0f) * u));
      lp = lp + (splat(-0.5f) * n * n - ls - splat(HALF_LOG_TWO_PI) - correction);
      store_column(actions + offset, num_actions, a, rows, action);
    }
    if (logprob) store_part(logprob + r, lp, rows);
  });
}

void ls_squashed_backward(const float* log_std, int64_t stride, float log_std_min, float log_std_max,
                          const float* normal, const float* actions, const float* dactions, const float* dlogprob,
                          float* dmean, float* dlog_std, int64_t num_rows, int64_t num_actions) {
  const vf lo = splat(log_std_min), hi = splat(log_std_max);
  over_rows(num_rows, [&](i64 r, i64 rows) {
    vf dlp = dlogprob ? load_part(dlogprob + r, rows) : splat(0.0f);
    i64 offset = r * num_actions;
    for (i64 a = 0; a < num_actions; a++) {
      vf t = load_column(actions + offset, num_actions, a, rows);
      vf da = dactions ? load_column(dactions + offset, num_actions, a, rows) : splat(0.0f);
      // d action / du = 1 - tanh^2;  d logprob / du = 2 tanh(u)
      vf du = da * (splat(1.0f) - t * t) + dlp * (t + t);
      vf ls = load_column(log_std + r * stride, stride, a, rows);
      vf scaled = vexp(ls) * load_column(normal + offset, num_actions, a, rows);
      store_column(dmean + r * stride, stride, a, rows, du);
      store_column(dlog_std + r * stride, stride, a, rows,
                   select((ls < lo) | (ls > hi), splat(0.0f), du * scaled - dlp));
    }
  });
}
