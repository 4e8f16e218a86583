// Recurrences over time. The inner loop runs over environments and is vectorised by the compiler; each environment's
// chain is independent, so its bits do not depend on its neighbours.
#include "lockstep.h"
#include "simd.h"

// delta_t = r_t + gamma (1 - terminated_t) V(next_t) - V_t;  A_t = delta_t + gamma lam (1 - ended_t) A_{t+1}
void ls_gae(const float* reward, const float* value, const float* next_value, const uint8_t* terminated,
            const uint8_t* ended, const uint8_t* valid, float gamma, float lam, float* advantage, int64_t num_steps,
            int64_t num) {
  const float decay = gamma * lam;
  for (i64 n = 0; n < num; n++) {
    float trace = 0.0f;
    for (i64 t = num_steps - 1; t >= 0; t--) {
      i64 i = t * num + n;
      if (valid && !valid[i]) {
        advantage[i] = 0.0f;
        continue;
      }
      float bootstrap = terminated[i] ? 0.0f : next_value[i];
      float delta = reward[i] + gamma * bootstrap - value[i];
      trace = delta + decay * (ended[i] ? 0.0f : trace);
      advantage[i] = trace;
    }
  }
}

// R_t = r_t + gamma R_{t-1}; an episode's end restarts the sum after it has been recorded.
void ls_discounted_return(const float* reward, const uint8_t* ended, const float* start, float gamma, float* running,
                          float* end, int64_t num_steps, int64_t num) {
  for (i64 n = 0; n < num; n++) {
    float sum = start[n];
    for (i64 t = 0; t < num_steps; t++) {
      i64 i = t * num + n;
      sum = sum * gamma + reward[i];
      running[i] = sum;
      if (ended[i]) sum = 0.0f;
    }
    end[n] = sum;
  }
}

// Espeholt et al. 2018, eq. 1 in its recursive form (remark 1); the next state's v is V(next) where the trace is cut.
void ls_vtrace(const float* log_rhos, const float* reward, const float* value, const float* next_value,
               const uint8_t* terminated, const uint8_t* ended, const uint8_t* valid, float gamma, float lam,
               float rho_bar, float c_bar, float* vs, float* advantage, int64_t num_steps, int64_t num) {
  for (i64 n = 0; n < num; n++) {
    float excess = 0.0f;  // vs_{t+1} - V(x_{t+1})
    for (i64 t = num_steps - 1; t >= 0; t--) {
      i64 i = t * num + n;
      if (valid && !valid[i]) {
        vs[i] = value[i];
        advantage[i] = 0.0f;
        continue;
      }
      float w = expf(log_rhos[i]);
      float rho = w < rho_bar ? w : rho_bar, c = lam * (w < c_bar ? w : c_bar);
      float bootstrap = terminated[i] ? 0.0f : next_value[i];
      float carried = ended[i] ? 0.0f : excess;
      float delta = rho * (reward[i] + gamma * bootstrap - value[i]);
      advantage[i] = rho * (reward[i] + gamma * (bootstrap + carried) - value[i]);
      excess = delta + gamma * c * carried;
      vs[i] = value[i] + excess;
    }
  }
}

void ls_nstep_returns(const float* reward, const uint8_t* terminated, const uint8_t* ended, const int64_t* t,
                      const int64_t* env, int64_t newest, int64_t n, float gamma, float* returns, float* discount,
                      int64_t* last_t, int64_t num_steps, int64_t num, int64_t num_samples) {
  for (i64 s = 0; s < num_samples; s++) {
    i64 row = t[s];
    float sum = 0.0f, factor = 1.0f;
    for (i64 k = 0; k < n; k++) {
      i64 i = row * num + env[s];
      sum += factor * reward[i];
      factor *= gamma;
      last_t[s] = row;
      if (terminated[i]) factor = 0.0f;
      if (terminated[i] || ended[i] || row == newest) break;
      row = row + 1 == num_steps ? 0 : row + 1;
    }
    returns[s] = sum;
    discount[s] = factor;
  }
}
