// The softmax of a row of logits, as log-probabilities and sampling share it: the same bits in both.
#pragma once
#include <algorithm>

#include "language.h"
#include "rows.h"

ALWAYS_INLINE bool any(vi mask) {
#if VLEN == 16
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif VLEN == 8
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  bool found = false;
  for (int i = 0; i < VLEN; i++) found |= mask[i] != 0;
  return found;
#endif
}

// The temperature is a divisor, as in the naive twin: a product with its inverse would round differently.
struct Scaled {
  const float* logits;
  float temperature;

  vf vector(i64 i, i64 n) const {
    vf x = get(logits + i, n);
    return temperature == 1.0f ? x : x / splat(temperature);
  }
  float one(i64 i) const { return temperature == 1.0f ? logits[i] : logits[i] / temperature; }
};

struct LogSum {
  float top;     // NaN: the row has no finite maximum, or holds a NaN
  double total;  // of exp(logit - top)
};

// The largest of a row; NaN where the row holds one.
ALWAYS_INLINE float row_max(const Scaled& row, i64 from, i64 size) {
  vf best[4], odd = splat(0.0f);
  for (int c = 0; c < 4; c++) best[c] = splat(-INFINITY);
  i64 i = from;
  const i64 end = from + size;
  for (; i + 4 * VLEN <= end; i += 4 * VLEN)
    for (int c = 0; c < 4; c++) {
      vf x = row.vector(i + c * VLEN, VLEN);
      best[c] = select(x > best[c], x, best[c]);
      odd = as_float(as_int(odd) | (x != x));
    }
  for (; i < end; i += VLEN) {
    const i64 n = part(end, i, VLEN);
    vf x = row.vector(i, n);
    vi lane;
    for (int l = 0; l < VLEN; l++) lane[l] = l;
    x = select(lane < (int32_t)n, x, splat(-INFINITY));
    best[0] = select(x > best[0], x, best[0]);
    odd = as_float(as_int(odd) | (x != x));
  }
  vf top = best[0];
  for (int c = 1; c < 4; c++) top = select(best[c] > top, best[c], top);
  if (any(as_int(odd))) return NAN;
  return fold_max(top);
}

ALWAYS_INLINE float sum_of_powers(const Scaled& row, i64 from, i64 size, float top) {
  const vf peak = splat(top);
  const i64 whole = size / VLEN * VLEN;
  vf sum[4] = {};
  i64 i = 0;
  for (; i + 4 * VLEN <= whole; i += 4 * VLEN)
    for (int c = 0; c < 4; c++) sum[c] = sum[c] + vexp(row.vector(from + i + c * VLEN, VLEN) - peak);
  for (int c = 0; i < whole; i += VLEN, c++) sum[c] = sum[c] + vexp(row.vector(from + i, VLEN) - peak);
  float last[VLEN] = {};
  if (whole < size) {
    store(last, vexp(row.vector(from + whole, size - whole) - peak));
    for (i64 l = size - whole; l < VLEN; l++) last[l] = 0.0f;
  }
  return fold(((sum[0] + sum[1]) + (sum[2] + sum[3])) + load(last));
}

// A maximum and a sum for every block of columns, joined with the blocks before: float inside a block, double between.
ALWAYS_INLINE LogSum log_sum_of(const Scaled& row, i64 vocab) {
  LogSum out = {-INFINITY, 0.0};
  for (i64 from = 0; from < vocab; from += LS_LOGPROB_BLOCK) {
    const i64 size = part(vocab, from, LS_LOGPROB_BLOCK);
    const float top = row_max(row, from, size);
    if (top != top || top == INFINITY) return {NAN, 0.0};
    if (top == -INFINITY) continue;
    const double sum = (double)sum_of_powers(row, from, size, top);
    if (top > out.top) {
      out.total = out.top == -INFINITY ? sum : out.total * exp((double)out.top - (double)top) + sum;
      out.top = top;
    } else {
      out.total += sum * exp((double)top - (double)out.top);
    }
  }
  return out.top == -INFINITY ? LogSum{NAN, 0.0} : out;
}
ALWAYS_INLINE float logprob_of(float logit, const LogSum& sum) {
  return (float)((double)(logit - sum.top) - log(sum.total));
}

// The first row, in order, for which a parallel loop left a mark.
ALWAYS_INLINE i64 first_mark(const int8_t* marks, i64 num) {
  for (i64 r = 0; r < num; r++)
    if (marks[r]) return r;
  return -1;
}
ALWAYS_INLINE int8_t* clean_marks(i64 num) {
  int8_t* marks = (int8_t*)scratch(SCRATCH_PLAN, num);
  memset(marks, 0, (size_t)num);
  return marks;
}

// Puts the `num` largest into `ids`, falling, equal ones by rising id. A heap holds the weakest kept one at its root.
static inline void largest(const Scaled& row, i64 vocab, i64 num, int64_t* ids) {
  auto stronger = [&](int64_t a, int64_t b) {
    const float x = row.one(a), y = row.one(b);
    return x > y || (x == y && a < b);
  };
  for (i64 i = 0; i < num; i++) ids[i] = i;
  std::make_heap(ids, ids + num, stronger);
  vf bar = splat(row.one(ids[0]));
  for (i64 i = num; i < vocab; i += VLEN) {
    const i64 n = part(vocab, i, VLEN);
    if (!any(row.vector(i, n) > bar)) continue;
    for (i64 j = i; j < i + n; j++) {
      if (!stronger(j, ids[0])) continue;
      std::pop_heap(ids, ids + num, stronger);
      ids[num - 1] = j;
      std::push_heap(ids, ids + num, stronger);
      bar = splat(row.one(ids[0]));
    }
  }
  std::sort(ids, ids + num, stronger);
}
