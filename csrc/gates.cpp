// Gates of recurrent cells, one step or whole sequences. A lane is a hidden unit and every lane goes through the same
// operations, so that a row's bits depend on the row alone, also where the hidden size leaves part of a vector.
#include "gemm.h"
#include "lockstep.h"
#include "pool.h"

namespace {

constexpr i64 ROWS_PER_TASK = 48;         // a multiple of the tile height
constexpr i64 PARALLEL_FLOPS = 1 << 21;  // below it a second thread costs more than it brings

ALWAYS_INLINE vf get(const float* p, i64 n) { return n == VLEN ? load(p) : load_part(p, n); }
ALWAYS_INLINE void put(float* p, vf v, i64 n) { n == VLEN ? store(p, v) : store_part(p, v, n); }
ALWAYS_INLINE vf sigmoid_slope(vf s) { return s * (splat(1.0f) - s); }
ALWAYS_INLINE vf tanh_slope(vf t) { return splat(1.0f) - t * t; }

template <typename F>
ALWAYS_INLINE void over_units(i64 rows, i64 hidden, F&& body) {
  for (i64 r = 0; r < rows; r++)
    for (i64 j = 0; j < hidden; j += VLEN) body(r, j, hidden - j < VLEN ? hidden - j : (i64)VLEN);
}

void copy_unless_start(const float* from, const uint8_t* starts, float* to, i64 rows, i64 hidden) {
  for (i64 r = 0; r < rows; r++) {
    if (starts[r])
      memset(to + r * hidden, 0, (size_t)hidden * sizeof(float));
    else
      memmove(to + r * hidden, from + r * hidden, (size_t)hidden * sizeof(float));
  }
}
void add_into(const float* from, float* to, i64 num) {
  for (i64 i = 0; i < num; i += VLEN) {
    i64 n = num - i < VLEN ? num - i : (i64)VLEN;
    put(to + i, get(to + i, n) + get(from + i, n), n);
  }
}
void copy_or_zero(const float* from, float* to, i64 num) {
  if (from)
    memcpy(to, from, (size_t)num * sizeof(float));
  else
    memset(to, 0, (size_t)num * sizeof(float));
}

// Rows run through time on their own, so they are what threads share.
template <typename F>
void over_row_blocks(i64 rows, i64 flops, F&& body) {
  bool split = flops >= PARALLEL_FLOPS && pool_threads() > 1;
  i64 block = split ? ROWS_PER_TASK : rows;
  if (rows == 0) return;
  parallel_for((rows + block - 1) / block, [&](i64 task) {
    i64 r0 = task * block;
    body(r0, rows - r0 < block ? rows - r0 : block);
  });
}

void parameter_gradients(const float* inputs, const float* dpre, i64 rows, i64 hidden, i64 width, float* dweight,
                         float* dbias) {
  for (i64 j = 0; j < width; j += VLEN) {
    i64 n = width - j < VLEN ? width - j : (i64)VLEN;
    vf sum = splat(0.0f);
    for (i64 r = 0; r < rows; r++) sum = sum + get(dpre + r * width + j, n);
    put(dbias + j, sum, n);
  }
  i64 panels = (width + 63) / 64;
  parallel_for(2 * rows * hidden * width < PARALLEL_FLOPS ? 1 : panels, [&](i64 task) {
    bool whole = 2 * rows * hidden * width < PARALLEL_FLOPS;
    i64 j = whole ? 0 : task * 64, n = whole ? width : (width - j < 64 ? width - j : 64);
    gemm_f32({inputs, hidden, true, dpre + j, width, dweight + j, width, hidden, n, rows, START_ZERO, nullptr});
  });
}

}  // namespace

void ls_lstm_gates(const float* pre, const float* c, float* h_out, float* c_out, int64_t rows, int64_t hidden) {
  over_units(rows, hidden, [&](i64 r, i64 j, i64 n) {
    const float* gates = pre + r * 4 * hidden + j;
    vf i = vsigmoid(get(gates, n)), f = vsigmoid(get(gates + hidden, n));
    vf g = vtanh(get(gates + 2 * hidden, n)), o = vsigmoid(get(gates + 3 * hidden, n));
    vf cell = f * get(c + r * hidden + j, n) + i * g;
    put(c_out + r * hidden + j, cell, n);
    put(h_out + r * hidden + j, o * vtanh(cell), n);
  });
}

void ls_lstm_gates_backward(const float* pre, const float* c, const float* c_out, const float* dh, const float* dc_out,
                            float* dpre, float* dc, int64_t rows, int64_t hidden) {
  over_units(rows, hidden, [&](i64 r, i64 j, i64 n) {
    const i64 at = r * hidden + j;
    const float* gates = pre + 4 * r * hidden + j;
    float* out = dpre + 4 * r * hidden + j;
    vf i = vsigmoid(get(gates, n)), f = vsigmoid(get(gates + hidden, n));
    vf g = vtanh(get(gates + 2 * hidden, n)), o = vsigmoid(get(gates + 3 * hidden, n));
    vf squashed = vtanh(get(c_out + at, n));
    vf dhv = dh ? get(dh + at, n) : splat(0.0f);
    vf dcell = (dc_out ? get(dc_out + at, n) : splat(0.0f)) + dhv * o * tanh_slope(squashed);
    put(out, dcell * g * sigmoid_slope(i), n);
    put(out + hidden, dcell * get(c + at, n) * sigmoid_slope(f), n);
    put(out + 2 * hidden, dcell * i * tanh_slope(g), n);
    put(out + 3 * hidden, dhv * squashed * sigmoid_slope(o), n);
    put(dc + at, dcell * f, n);
  });
}

void ls_gru_gates(const float* in, const float* re, const float* h, float* h_out, int64_t rows, int64_t hidden) {
  over_units(rows, hidden, [&](i64 row, i64 j, i64 num) {
    const float *a = in + 3 * row * hidden + j, *b = re + 3 * row * hidden + j;
    vf r = vsigmoid(get(a, num) + get(b, num));
    vf z = vsigmoid(get(a + hidden, num) + get(b + hidden, num));
    vf n = vtanh(get(a + 2 * hidden, num) + r * get(b + 2 * hidden, num));
    put(h_out + row * hidden + j, (splat(1.0f) - z) * n + z * get(h + row * hidden + j, num), num);
  });
}

void ls_gru_gates_backward(const float* in, const float* re, const float* h, const float* dh_out, float* din,
                           float* dre, float* dh, int64_t rows, int64_t hidden) {
  over_units(rows, hidden, [&](i64 row, i64 j, i64 num) {
    const i64 at = row * hidden + j;
    const float *a = in + 3 * row * hidden + j, *b = re + 3 * row * hidden + j;
    float *da = din + 3 * row * hidden + j, *db = dre + 3 * row * hidden + j;
    vf r = vsigmoid(get(a, num) + get(b, num));
    vf z = vsigmoid(get(a + hidden, num) + get(b + hidden, num));
    vf re_n = get(b + 2 * hidden, num);
    vf n = vtanh(get(a + 2 * hidden, num) + r * re_n);
    vf d = get(dh_out + at, num);
    vf dn = d * (splat(1.0f) - z) * tanh_slope(n);
    vf dz = d * (get(h + at, num) - n) * sigmoid_slope(z);
    vf dr = dn * re_n * sigmoid_slope(r);
    put(da, dr, num);
    put(da + hidden, dz, num);
    put(da + 2 * hidden, dn, num);
    put(db, dr, num);
    put(db + hidden, dz, num);
    put(db + 2 * hidden, dn * r, num);
    put(dh + at, d * z, num);
  });
}

void ls_lstm_sequence(const float* inputs, const float* weight, const float* bias, const uint8_t* starts,
                      const float* h0, const float* c0, float* h, float* c, float* h_before, float* c_before,
                      float* pre, int64_t steps, int64_t rows, int64_t hidden) {
  const i64 width = 4 * hidden, state = rows * hidden;
  over_row_blocks(rows, 2 * steps * rows * hidden * width, [&](i64 r0, i64 num) {
    for (i64 t = 0; t < steps; t++) {
      const i64 at = t * state + r0 * hidden, at_pre = (t * rows + r0) * width;
      const uint8_t* start = starts + t * rows + r0;
      copy_unless_start(t ? h + at - state : h0 + r0 * hidden, start, h_before + at, num, hidden);
      copy_unless_start(t ? c + at - state : c0 + r0 * hidden, start, c_before + at, num, hidden);
      gemm_f32({h_before + at, hidden, false, weight, width, pre + at_pre, width, num, width, hidden, START_BIAS,
                bias});
      add_into(inputs + at_pre, pre + at_pre, num * width);
      ls_lstm_gates(pre + at_pre, c_before + at, h + at, c + at, num, hidden);
    }
  });
}

void ls_lstm_sequence_backward(const float* weight, const uint8_t* starts, const float* c, const float* h_before,
                               const float* c_before, const float* pre, const float* dh, const float* dh_last,
                               const float* dc_last, float* dinputs, float* dweight, float* dbias, float* dh0,
                               float* dc0, int64_t steps, int64_t rows, int64_t hidden) {
  const i64 width = 4 * hidden, state = rows * hidden, stride = round_up(hidden, VLEN);
  float* transposed = (float*)scratch(SCRATCH_WEIGHTS, width * stride * (i64)sizeof(float));
  transpose(weight, hidden, width, width, transposed, stride);
  copy_or_zero(dh_last, dh0, state);
  copy_or_zero(dc_last, dc0, state);
  over_row_blocks(rows, 2 * steps * rows * hidden * width, [&](i64 r0, i64 num) {
    float *dh_now = dh0 + r0 * hidden, *dc_now = dc0 + r0 * hidden;
    for (i64 t = steps - 1; t >= 0; t--) {
      const i64 at = t * state + r0 * hidden;
      const uint8_t* start = starts + t * rows + r0;
      float* dpre = dinputs + (t * rows + r0) * width;
      if (dh) add_into(dh + at, dh_now, num * hidden);
      ls_lstm_gates_backward(pre + (t * rows + r0) * width, c_before + at, c + at, dh_now, dc_now, dpre, dc_now, num,
                             hidden);
      gemm_f32({dpre, width, false, transposed, stride, dh_now, hidden, num, hidden, width, START_ZERO, nullptr});
      copy_unless_start(dh_now, start, dh_now, num, hidden);
      copy_unless_start(dc_now, start, dc_now, num, hidden);
    }
  });
  parameter_gradients(h_before, dinputs, steps * rows, hidden, width, dweight, dbias);
}

void ls_gru_sequence(const float* inputs, const float* weight, const float* bias, const uint8_t* starts,
                     const float* h0, float* h, float* h_before, float* re, int64_t steps, int64_t rows,
                     int64_t hidden) {
  const i64 width = 3 * hidden, state = rows * hidden;
  over_row_blocks(rows, 2 * steps * rows * hidden * width, [&](i64 r0, i64 num) {
    for (i64 t = 0; t < steps; t++) {
      const i64 at = t * state + r0 * hidden, at_pre = (t * rows + r0) * width;
      copy_unless_start(t ? h + at - state : h0 + r0 * hidden, starts + t * rows + r0, h_before + at, num, hidden);
      gemm_f32({h_before + at, hidden, false, weight, width, re + at_pre, width, num, width, hidden, START_BIAS,
                bias});
      ls_gru_gates(inputs + at_pre, re + at_pre, h_before + at, h + at, num, hidden);
    }
  });
}

void ls_gru_sequence_backward(const float* inputs, const float* weight, const uint8_t* starts, const float* h_before,
                              const float* re, const float* dh, const float* dh_last, float* dinputs, float* dre,
                              float* dweight, float* dbias, float* dh0, int64_t steps, int64_t rows, int64_t hidden) {
  const i64 width = 3 * hidden, state = rows * hidden, stride = round_up(hidden, VLEN);
  float* transposed = (float*)scratch(SCRATCH_WEIGHTS, width * stride * (i64)sizeof(float));
  transpose(weight, hidden, width, width, transposed, stride);
  copy_or_zero(dh_last, dh0, state);
  over_row_blocks(rows, 2 * steps * rows * hidden * width, [&](i64 r0, i64 num) {
    float* dh_now = dh0 + r0 * hidden;
    for (i64 t = steps - 1; t >= 0; t--) {
      const i64 at = t * state + r0 * hidden, at_pre = (t * rows + r0) * width;
      if (dh) add_into(dh + at, dh_now, num * hidden);
      ls_gru_gates_backward(inputs + at_pre, re + at_pre, h_before + at, dh_now, dinputs + at_pre, dre + at_pre, dh_now,
                            num, hidden);
      gemm_f32({dre + at_pre, width, false, transposed, stride, dh_now, hidden, num, hidden, width, START_C, nullptr});
      copy_unless_start(dh_now, starts + t * rows + r0, dh_now, num, hidden);
    }
  });
  parameter_gradients(h_before, dre, steps * rows, hidden, width, dweight, dbias);
}
