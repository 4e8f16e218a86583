// Rotary embedding: separate products and sums, the bits of the naive twin.
#include "language.h"
#include "rows.h"

namespace {

ALWAYS_INLINE void rotate_halves(const float* x, const float* cos, const float* sin, vf direction, float* y, i64 pairs) {
  over_vectors(pairs, [&](i64 i, i64 n) {
    vf a = get(x + i, n), b = get(x + pairs + i, n), c = get(cos + i, n), s = get(sin + i, n) * direction;
    put(y + i, a * c - b * s, n);
    put(y + pairs + i, b * c + a * s, n);
  });
}

void rotate_neighbours(const float* x, const float* cos, const float* sin, float direction, float* y, i64 pairs) {
  for (i64 i = 0; i < pairs; i++) {
    const float a = x[2 * i], b = x[2 * i + 1], c = cos[i], s = sin[i] * direction;
    y[2 * i] = a * c - b * s;
    y[2 * i + 1] = b * c + a * s;
  }
}

}  // namespace

int64_t ls_rope(const float* x, int64_t x_stride, const int64_t* positions, const float* cos, const float* sin,
                float* y, int64_t num_tokens, int64_t num_heads, int64_t head_dim, int64_t num_pairs,
                int64_t table_rows, int32_t interleaved, float direction) {
  for (i64 t = 0; t < num_tokens; t++)
    if (positions[t] < 0 || positions[t] >= table_rows) return t;
  const i64 rest = head_dim - 2 * num_pairs;
  over_row_blocks(num_tokens, 16, num_heads * head_dim, [&](i64 first, i64 rows) {
    for (i64 t = first; t < first + rows; t++) {
      const float *c = cos + positions[t] * num_pairs, *s = sin + positions[t] * num_pairs;
      for (i64 h = 0; h < num_heads; h++) {
        const float* from = x + t * x_stride + h * head_dim;
        float* to = y + (t * num_heads + h) * head_dim;
        if (interleaved)
          rotate_neighbours(from, c, s, direction, to, num_pairs);
        else
          rotate_halves(from, c, s, splat(direction), to, num_pairs);
        memcpy(to + 2 * num_pairs, from + 2 * num_pairs, (size_t)rest * sizeof(float));
      }
    }
  });
  return -1;
}
