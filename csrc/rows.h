// Loops over rows and their elements that more than one row-wise kernel needs.
#pragma once
#include "pool.h"
#include "simd.h"

ALWAYS_INLINE vf get(const float* p, i64 n) { return n == VLEN ? load(p) : load_part(p, n); }
ALWAYS_INLINE void put(float* p, vf v, i64 n) { n == VLEN ? store(p, v) : store_part(p, v, n); }
ALWAYS_INLINE i64 part(i64 size, i64 at, i64 step) { return size - at < step ? size - at : step; }

// Lane i + lane i + half, until one is left: the same tree whatever the row.
ALWAYS_INLINE float fold(vf v) {
  float lane[VLEN];
  store(lane, v);
  for (i64 half = VLEN / 2; half > 0; half /= 2)
    for (i64 i = 0; i < half; i++) lane[i] += lane[i + half];
  return lane[0];
}
ALWAYS_INLINE float fold_max(vf v) {
  float lane[VLEN];
  store(lane, v);
  for (i64 half = VLEN / 2; half > 0; half /= 2)
    for (i64 i = 0; i < half; i++) lane[i] = lane[i + half] > lane[i] ? lane[i + half] : lane[i];
  return lane[0];
}

// body(at, n) for vectors of a row of `size` elements.
template <typename F>
ALWAYS_INLINE void over_vectors(i64 size, F&& body) {
  i64 at = 0;
  for (; at + VLEN <= size; at += VLEN) body(at, (i64)VLEN);
  if (at < size) body(at, size - at);
}

// Sum over a row of term(at, n): four chains of vectors, joined in one order.
template <typename F>
ALWAYS_INLINE float row_sum(i64 size, F&& term) {
  vf sum[4] = {};
  i64 at = 0;
  for (; at + 4 * VLEN <= size; at += 4 * VLEN)
    for (i64 c = 0; c < 4; c++) sum[c] = sum[c] + term(at + c * VLEN, (i64)VLEN);
  for (i64 c = 0; at < size; c++, at += VLEN) sum[c] = sum[c] + term(at, part(size, at, VLEN));
  return fold((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// body(first row, rows) over blocks of rows; threads join in when there is enough to do.
template <typename F>
ALWAYS_INLINE void over_row_blocks(i64 num_rows, i64 block, i64 elements_per_row, F&& body) {
  if (num_rows == 0) return;
  i64 step = num_rows * elements_per_row < (1 << 16) ? num_rows : block;
  parallel_for((num_rows + step - 1) / step, [&](i64 task) { body(task * step, part(num_rows, task * step, step)); });
}
