// Activations of feed-forward layers and their slopes, elementwise.
#include "language.h"
#include "rows.h"

namespace {

constexpr float TANH_SCALE = 0.7978845608028654f;  // sqrt(2 / pi)
constexpr float TANH_CUBIC = 0.044715f;
constexpr float HALF_ROOT = 0.7071067811865476f;
constexpr float NORMAL_SCALE = 0.3989422804014327f;  // 1 / sqrt(2 pi)

// A quotient of odd and even polynomials, within a few units of the last place; beyond 4 it is 1 in float32.
ALWAYS_INLINE vf verf(vf x) {
  x = at_most(at_least(x, splat(-4.0f)), splat(4.0f));
  vf z = x * x;
  vf p = splat(-2.72614225801306e-10f);
  p = fma(p, z, splat(2.77068142495902e-08f));
  p = fma(p, z, splat(-2.10102402082508e-06f));
  p = fma(p, z, splat(-5.69250639462346e-05f));
  p = fma(p, z, splat(-7.34990630326855e-04f));
  p = fma(p, z, splat(-2.95459980854025e-03f));
  p = fma(p, z, splat(-1.60960333262415e-02f));
  vf q = splat(-1.45660718464996e-05f);
  q = fma(q, z, splat(-2.13374055278905e-04f));
  q = fma(q, z, splat(-1.68282697438203e-03f));
  q = fma(q, z, splat(-7.37332916720468e-03f));
  q = fma(q, z, splat(-1.42647390514189e-02f));
  return x * p / q;
}

struct Silu {
  ALWAYS_INLINE vf value(vf x) { return x / (splat(1.0f) + vexp(-x)); }
  ALWAYS_INLINE vf slope(vf x) {
    vf s = vsigmoid(x);
    return s * (splat(1.0f) + x * (splat(1.0f) - s));
  }
};
struct GeluTanh {
  ALWAYS_INLINE vf squashed(vf x) { return vtanh(splat(TANH_SCALE) * (x + splat(TANH_CUBIC) * x * x * x)); }
  ALWAYS_INLINE vf value(vf x) { return splat(0.5f) * x * (splat(1.0f) + squashed(x)); }
  ALWAYS_INLINE vf slope(vf x) {
    vf t = squashed(x), inner = splat(TANH_SCALE) * (splat(1.0f) + splat(3.0f * TANH_CUBIC) * x * x);
    return splat(0.5f) * (splat(1.0f) + t) + splat(0.5f) * x * (splat(1.0f) - t * t) * inner;
  }
};
struct Gelu {
  ALWAYS_INLINE vf cumulative(vf x) { return splat(0.5f) * (splat(1.0f) + verf(x * splat(HALF_ROOT))); }
  ALWAYS_INLINE vf value(vf x) { return x * cumulative(x); }
  ALWAYS_INLINE vf slope(vf x) { return cumulative(x) + x * splat(NORMAL_SCALE) * vexp(splat(-0.5f) * x * x); }
};
struct Relu {
  ALWAYS_INLINE vf value(vf x) { return at_least(x, splat(0.0f)); }
  ALWAYS_INLINE vf slope(vf x) { return select(x > splat(0.0f), splat(1.0f), splat(0.0f)); }
};

template <typename F>
void with_kind(int32_t kind, F&& body) {
  if (kind == LS_GATE_SILU) return body(Silu());
  if (kind == LS_GATE_GELU_TANH) return body(GeluTanh());
  if (kind == LS_GATE_GELU) return body(Gelu());
  body(Relu());
}

constexpr i64 CHUNK = 4096;

}  // namespace

void ls_activate(const float* x, float* y, int64_t num, int32_t kind) {
  with_kind(kind, [&](auto act) {
    over_row_blocks((num + CHUNK - 1) / CHUNK, 4, CHUNK, [&](i64 first, i64 chunks) {
      const i64 from = first * CHUNK;
      over_vectors(part(num, from, chunks * CHUNK), [&](i64 i, i64 n) {
        put(y + from + i, decltype(act)::value(get(x + from + i, n)), n);
      });
    });
  });
}

void ls_activate_backward(const float* x, const float* dy, float* dx, int64_t num, int32_t kind) {
  with_kind(kind, [&](auto act) {
    over_row_blocks((num + CHUNK - 1) / CHUNK, 4, CHUNK, [&](i64 first, i64 chunks) {
      const i64 from = first * CHUNK;
      over_vectors(part(num, from, chunks * CHUNK), [&](i64 i, i64 n) {
        put(dx + from + i, get(dy + from + i, n) * decltype(act)::slope(get(x + from + i, n)), n);
      });
    });
  });
}

void ls_gated(const float* gate_up, float* y, int64_t num_rows, int64_t width, int32_t kind) {
  with_kind(kind, [&](auto act) {
    over_row_blocks(num_rows, 4, 2 * width, [&](i64 first, i64 rows) {
      for (i64 r = first; r < first + rows; r++) {
        const float* gate = gate_up + 2 * r * width;
        over_vectors(width, [&](i64 i, i64 n) {
          put(y + r * width + i, decltype(act)::value(get(gate + i, n)) * get(gate + width + i, n), n);
        });
      }
    });
  });
}

void ls_gated_backward(const float* gate_up, const float* dy, float* dgate_up, int64_t num_rows, int64_t width,
                       int32_t kind) {
  with_kind(kind, [&](auto act) {
    over_row_blocks(num_rows, 4, 2 * width, [&](i64 first, i64 rows) {
      for (i64 r = first; r < first + rows; r++) {
        const float* gate = gate_up + 2 * r * width;
        float* dgate = dgate_up + 2 * r * width;
        over_vectors(width, [&](i64 i, i64 n) {
          vf g = get(gate + i, n), up = get(gate + width + i, n), d = get(dy + r * width + i, n);
          put(dgate + i, d * up * decltype(act)::slope(g), n);
          put(dgate + width + i, d * decltype(act)::value(g), n);
        });
      }
    });
  });
}
