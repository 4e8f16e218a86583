// Norms over rows. A row's sums take one order, so its bits depend on the row alone.
#include "language.h"
#include "rows.h"

namespace {

constexpr i64 BLOCK = 16;

ALWAYS_INLINE float inverse_root(float sum, i64 width, float eps) {
  return 1.0f / __builtin_sqrtf(sum / (float)width + eps);
}
ALWAYS_INLINE float mean_of(const float* x, i64 width) {
  return row_sum(width, [&](i64 i, i64 n) { return get(x + i, n); }) / (float)width;
}
// The padding of a partial vector is not centred with the rest, so it is masked out again.
ALWAYS_INLINE vf centred(const float* x, float mean, i64 n) {
  if (n == VLEN) return load(x) - splat(mean);
  float lane[VLEN] = {};
  for (i64 i = 0; i < n; i++) lane[i] = x[i] - mean;
  return load(lane);
}
ALWAYS_INLINE float centred_squares(const float* x, float mean, i64 width) {
  return row_sum(width, [&](i64 i, i64 n) {
    vf c = centred(x + i, mean, n);
    return c * c;
  });
}

void rms_row(const float* x, const float* residual, const float* weight, float eps, float offset, float* total,
             float* y, i64 width) {
  if (residual) over_vectors(width, [&](i64 i, i64 n) { put(total + i, get(x + i, n) + get(residual + i, n), n); });
  const float* in = residual ? total : x;
  float sum = row_sum(width, [&](i64 i, i64 n) {
    vf v = get(in + i, n);
    return v * v;
  });
  const vf inverse = splat(inverse_root(sum, width, eps)), shift = splat(offset);
  over_vectors(width, [&](i64 i, i64 n) { put(y + i, get(in + i, n) * inverse * (get(weight + i, n) + shift), n); });
}

void layer_row(const float* x, const float* weight, const float* bias, float eps, float* y, i64 width) {
  const float mean = mean_of(x, width);
  const vf inverse = splat(inverse_root(centred_squares(x, mean, width), width, eps));
  over_vectors(width, [&](i64 i, i64 n) {
    vf v = (get(x + i, n) - splat(mean)) * inverse;
    if (weight) v = v * get(weight + i, n);
    if (bias) v = v + get(bias + i, n);
    put(y + i, v, n);
  });
}

struct Norm {
  const float* weight;
  float eps, offset;
  bool is_centred;
  i64 width;
};

// With h = (x - mean) / deviation and u = dy * scale: dx = (u - [mean u] - h mean(u h)) / deviation; the bracket is the
// layer norm's.
void backward_row(const Norm& norm, const float* x, const float* dy, const float* dtotal, float* dx, float* dweight,
                  float* dbias) {
  const i64 width = norm.width;
  auto scaled = [&](i64 i, i64 n) {
    vf g = get(dy + i, n);
    return norm.weight ? g * (get(norm.weight + i, n) + splat(norm.offset)) : g;
  };
  const float mean = norm.is_centred ? mean_of(x, width) : 0.0f;
  const float inverse = inverse_root(centred_squares(x, mean, width), width, norm.eps);
  const float dot = row_sum(width, [&](i64 i, i64 n) { return scaled(i, n) * centred(x + i, mean, n); });
  const vf along = splat(dot * inverse / (float)width);
  const vf shift = splat(norm.is_centred ? row_sum(width, scaled) / (float)width : 0.0f);
  over_vectors(width, [&](i64 i, i64 n) {
    vf hat = (get(x + i, n) - splat(mean)) * splat(inverse), g = get(dy + i, n);
    vf d = (scaled(i, n) - shift - hat * along) * splat(inverse);
    put(dx + i, dtotal ? d + get(dtotal + i, n) : d, n);
    if (dweight) put(dweight + i, get(dweight + i, n) + g * hat, n);
    if (dbias) put(dbias + i, get(dbias + i, n) + g, n);
  });
}

}  // namespace

void ls_rms_norm(const float* x, const float* residual, const float* weight, float eps, float offset, float* total,
                 float* y, int64_t num_rows, int64_t width) {
  over_row_blocks(num_rows, BLOCK, width, [&](i64 first, i64 rows) {
    for (i64 r = first; r < first + rows; r++)
      rms_row(x + r * width, residual ? residual + r * width : nullptr, weight, eps, offset,
              total ? total + r * width : nullptr, y + r * width, width);
  });
}

void ls_layer_norm(const float* x, const float* weight, const float* bias, float eps, float* y, int64_t num_rows,
                   int64_t width) {
  over_row_blocks(num_rows, BLOCK, width, [&](i64 first, i64 rows) {
    for (i64 r = first; r < first + rows; r++) layer_row(x + r * width, weight, bias, eps, y + r * width, width);
  });
}

void ls_norm_backward(const float* x, const float* weight, float eps, float offset, const float* dy,
                      const float* dtotal, float* dx, float* dweight, float* dbias, int64_t num_rows, int64_t width,
                      int32_t is_centred) {
  const Norm norm = {weight, eps, offset, is_centred != 0, width};
  parallel_for((num_rows + LS_NORM_ROWS - 1) / LS_NORM_ROWS, [&](i64 task) {
    float* dw = dweight ? dweight + task * width : nullptr;
    float* db = dbias ? dbias + task * width : nullptr;
    if (dw) memset(dw, 0, (size_t)width * sizeof(float));
    if (db) memset(db, 0, (size_t)width * sizeof(float));
    const i64 first = task * LS_NORM_ROWS, end = first + part(num_rows, first, LS_NORM_ROWS);
    for (i64 r = first; r < end; r++)
      backward_row(norm, x + r * width, dy + r * width, dtotal ? dtotal + r * width : nullptr, dx + r * width, dw, db);
  });
}
