// The PPO loss and its gradient in one pass (Schulman et al. 2017, eq. 7 and 9). Sums are kept in double, in row order.
#include "lockstep.h"
#include "simd.h"

void ls_ppo_surrogate(const float* logprob, const float* entropy, const float* value, const float* old_logprob,
                      const float* advantage, const float* returns, const float* old_value, const uint8_t* mask,
                      float clip, float value_clip, float value_coef, float entropy_coef, int64_t num, float* loss,
                      float* stats, float* dlogprob, float* dentropy, float* dvalue) {
  double count = 0;
  for (i64 i = 0; i < num; i++) count += mask ? mask[i] != 0 : 1;
  const float inv = count > 0 ? (float)(1.0 / count) : 0.0f;
  double policy = 0, value_loss = 0, ent = 0, kl = 0, clipped = 0, deviation = 0;
  for (i64 r = 0; r < num; r += VLEN) {
    i64 rows = num - r < VLEN ? num - r : VLEN;
    float on[VLEN];
    for (i64 i = 0; i < VLEN; i++) on[i] = i < rows && (!mask || mask[r + i]) ? 1.0f : 0.0f;
    const vi live = load(on) > splat(0.0f);
    const vf one = splat(1.0f), zero = splat(0.0f);
    vf log_ratio = select(live, load_part(logprob + r, rows) - load_part(old_logprob + r, rows), zero);
    vf ratio = vexp(log_ratio);
    vf adv = load_part(advantage + r, rows);
    vf bounded = at_most(at_least(ratio, splat(1.0f - clip)), splat(1.0f + clip));
    vf plain = ratio * adv, limited = bounded * adv;
    vi use_plain = plain <= limited;
    vf objective = select(use_plain, plain, limited);
    store_part(dlogprob + r, select(live & use_plain, -plain * splat(inv), zero), rows);
    store_part(dentropy + r, select(live, splat(-entropy_coef * inv), zero), rows);
    vf v = load_part(value + r, rows), target = load_part(returns + r, rows), error = v - target;
    vf square = error * error, slope = error;
    if (value_clip >= 0.0f) {
      vf old = load_part(old_value + r, rows), moved = v - old;
      vf held = old + at_most(at_least(moved, splat(-value_clip)), splat(value_clip));
      vf held_error = held - target, held_square = held_error * held_error;
      vi inside = vabs(moved) <= splat(value_clip);
      vi take_held = held_square > square;
      square = select(take_held, held_square, square);
      slope = select(take_held & ~inside, zero, slope);
    }
    store_part(dvalue + r, select(live, splat(value_coef * inv) * slope, zero), rows);
    vf deviation_now = vabs(ratio - one), kl_now = (ratio - one) - log_ratio, ent_now = load_part(entropy + r, rows);
    for (i64 i = 0; i < rows; i++) {
      if (!live[i]) continue;
      policy -= objective[i];
      value_loss += 0.5 * square[i];
      ent += ent_now[i];
      kl += kl_now[i];
      clipped += deviation_now[i] > clip;
      // A NaN ratio must show, and NaN > x is false.
      if (!(deviation_now[i] <= deviation)) deviation = deviation_now[i];
    }
  }
  const double scale = count > 0 ? 1.0 / count : 0.0;
  const double totals[6] = {policy * scale, value_loss * scale, ent * scale, kl * scale, clipped * scale, deviation};
  for (int i = 0; i < 6; i++) stats[i] = (float)totals[i];
  *loss = (float)(totals[0] + value_coef * totals[1] - entropy_coef * totals[2]);
}
