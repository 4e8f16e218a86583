// Log-probabilities of tokens. A row's bits depend on the row alone.
#include "logits.h"
int64_t ls_token_logprobs(const float* logits, const int64_t* tokens, float temperature, float* logprob,
                          int64_t num_rows, int64_t vocab) {
  for (i64 r = 0; r < num_rows; r++)
    if (tokens[r] < 0 || tokens[r] >= vocab) return -2 - r;
  int8_t* marks = clean_marks(num_rows);
  over_row_blocks(num_rows, 1, vocab, [&](i64 first, i64 rows) {
    for (i64 r = first; r < first + rows; r++) {
      const Scaled row = {logits + r * vocab, temperature};
      const LogSum sum = log_sum_of(row, vocab);
      marks[r] = sum.top != sum.top;
      logprob[r] = logprob_of(row.one(tokens[r]), sum);
    }
  });
  return first_mark(marks, num_rows);
}

void ls_token_logprobs_backward(const float* logits, const int64_t* tokens, float temperature, const float* dlogprob,
                                float* dlogits, int64_t num_rows, int64_t vocab) {
  over_row_blocks(num_rows, 1, vocab, [&](i64 first, i64 rows) {
    for (i64 r = first; r < first + rows; r++) {
      const Scaled row = {logits + r * vocab, temperature};
      const LogSum sum = log_sum_of(row, vocab);
      const float g = dlogprob[r] / temperature;
      const vf top = splat(sum.top), factor = splat((float)(-(double)g / sum.total));
      float* out = dlogits + r * vocab;
      over_vectors(vocab, [&](i64 i, i64 n) { put(out + i, vexp(row.vector(i, n) - top) * factor, n); });
      out[tokens[r]] += g;
    }
  });
}

int64_t ls_top_logprobs(const float* logits, int64_t num, int64_t* ids, float* logprob, int64_t num_rows,
                        int64_t vocab) {
  int8_t* marks = clean_marks(num_rows);
  over_row_blocks(num_rows, 1, vocab, [&](i64 first, i64 rows) {
    for (i64 r = first; r < first + rows; r++) {
      const Scaled row = {logits + r * vocab, 1.0f};
      const LogSum sum = log_sum_of(row, vocab);
      marks[r] = sum.top != sum.top;
      if (marks[r]) continue;
      largest(row, vocab, num, ids + r * num);
      for (i64 i = 0; i < num; i++) logprob[r * num + i] = logprob_of(row.logits[ids[r * num + i]], sum);
    }
  });
  return first_mark(marks, num_rows);
}
