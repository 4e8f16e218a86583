// Forward and backward of dense chains. Rows are taken in chunks that stay in cache through all layers; a chunk's
// contribution to a weight gradient continues the fp32 chain of the chunk before it, so the chunk size is invisible.
#include "gemm.h"
#include "lockstep.h"
#include "pool.h"

namespace {

constexpr i64 CHUNK = 192;          // rows; a multiple of the tile height
constexpr i64 PARALLEL_FLOPS = 1 << 21;  // below it a second thread costs more than it brings

template <typename F>
void map_flat(float* out, i64 num, F&& f) {
  i64 i = 0;
  for (; i + VLEN <= num; i += VLEN) store(out + i, f(i, (i64)VLEN));
  if (i < num) store_part(out + i, f(i, num - i), num - i);
}
ALWAYS_INLINE vf get(const float* p, i64 i, i64 n) { return n == VLEN ? load(p + i) : load_part(p + i, n); }

constexpr float GELU_A = 0.7978845608028654f, GELU_B = 0.044715f;

void activate(int32_t kind, const float* z, float* y, i64 num) {
  const vf one = splat(1.0f), half = splat(0.5f), zero = splat(0.0f);
  switch (kind) {
    case LS_TANH:
      return map_flat(y, num, [&](i64 i, i64 n) { return vtanh(get(z, i, n)); });
    case LS_RELU:
      return map_flat(y, num, [&](i64 i, i64 n) {
        vf x = get(z, i, n);
        return select(x < zero, zero, x);
      });
    case LS_ELU:
      return map_flat(y, num, [&](i64 i, i64 n) {
        vf x = get(z, i, n);
        return select(x < zero, vexpm1(x), x);
      });
    case LS_SILU:
      return map_flat(y, num, [&](i64 i, i64 n) {
        vf x = get(z, i, n);
        return x * vsigmoid(x);
      });
    case LS_GELU:
      return map_flat(y, num, [&](i64 i, i64 n) {
        vf x = get(z, i, n);
        vf t = vtanh(splat(GELU_A) * fma(splat(GELU_B) * x, x * x, x));
        return half * x * (one + t);
      });
    case LS_SIGMOID:
      return map_flat(y, num, [&](i64 i, i64 n) { return vsigmoid(get(z, i, n)); });
    default:
      if (z != y) memcpy(y, z, (size_t)num * sizeof(float));
  }
}

// dz = dy * f'(.), from the output where that is enough and from the pre-activation for silu and gelu.
void activate_backward(int32_t kind, const float* y, const float* z, const float* dy, float* dz, i64 num) {
  const vf one = splat(1.0f), half = splat(0.5f), zero = splat(0.0f);
  switch (kind) {
    case LS_TANH:
      return map_flat(dz, num, [&](i64 i, i64 n) {
        vf t = get(y, i, n);
        return get(dy, i, n) * (one - t * t);
      });
    case LS_RELU:
      return map_flat(dz, num, [&](i64 i, i64 n) { return select(get(y, i, n) > zero, get(dy, i, n), zero); });
    case LS_ELU:
      return map_flat(dz, num, [&](i64 i, i64 n) {
        vf t = get(y, i, n), d = get(dy, i, n);
        return select(t > zero, d, d * (t + one));
      });
    case LS_SILU:
      return map_flat(dz, num, [&](i64 i, i64 n) {
        vf x = get(z, i, n), s = vsigmoid(x);
        return get(dy, i, n) * (s * (one + x * (one - s)));
      });
    case LS_GELU:
      return map_flat(dz, num, [&](i64 i, i64 n) {
        vf x = get(z, i, n), x2 = x * x;
        vf t = vtanh(splat(GELU_A) * fma(splat(GELU_B) * x, x2, x));
        vf inner = splat(GELU_A) * fma(splat(3.0f * GELU_B), x2, one);
        return get(dy, i, n) * (half * (one + t) + half * x * (one - t * t) * inner);
      });
    case LS_SIGMOID:
      return map_flat(dz, num, [&](i64 i, i64 n) {
        vf s = get(y, i, n);
        return get(dy, i, n) * (s * (one - s));
      });
    default:
      if (dz != dy) memcpy(dz, dy, (size_t)num * sizeof(float));
  }
}

bool needs_preactivation(int32_t kind) { return kind == LS_SILU || kind == LS_GELU; }
int32_t activation_of(const LsMlp* mlp, i64 l) {
  return l == mlp->num_layers - 1 ? mlp->output_activation : mlp->activation;
}
i64 members_of(const LsMlp* mlp) { return mlp->num_members ? mlp->num_members : 1; }
i64 widest(const LsMlp* mlp) {
  i64 width = 0;
  for (i64 l = 0; l <= mlp->num_layers; l++) width = mlp->sizes[l] > width ? mlp->sizes[l] : width;
  return width;
}
const float* bias_of(const LsMlp* mlp, i64 l, i64 e) {
  if (!mlp->biases || !mlp->biases[l]) return nullptr;
  return mlp->biases[l] + e * mlp->sizes[l + 1];
}

// Where layer l's blocks lie in `saved`.
struct SavedBlocks {
  float* y;  // null for the last layer, whose output is the result itself
  float* z;  // null unless the activation needs it
};
SavedBlocks saved_blocks(const LsMlp* mlp, float* saved, i64 layer, i64 rows) {
  SavedBlocks out = {nullptr, nullptr};
  for (i64 l = 0; l <= layer; l++) {
    i64 block = members_of(mlp) * rows * mlp->sizes[l + 1];
    out = {nullptr, nullptr};
    if (l < mlp->num_layers - 1) {
      out.y = saved;
      saved += block;
    }
    if (needs_preactivation(activation_of(mlp, l))) {
      out.z = saved;
      saved += block;
    }
  }
  return out;
}

// The right-hand operand of one product in the form the dtype's kernel reads.
struct Operand {
  const float* f32 = nullptr;
  i64 stride = 0;
  const uint32_t* pairs = nullptr;
  i64 pair_stride = 0;
};

i64 operand_bytes(const LsMlp* mlp, i64 k, i64 n) {
  if (mlp->dtype != LS_BF16) return 0;
#if HAVE_BF16_DOT
  return ((k + 1) / 2) * round_up(n, 16) * 4;
#else
  return round_up(k * n * 4, 64);
#endif
}

Operand prepare_weight(const LsMlp* mlp, const float* w, i64 k, i64 n, char* memory) {
  Operand out;
  out.f32 = w;
  out.stride = n;
  if (mlp->dtype == LS_BF16) {
#if HAVE_BF16_DOT
    out.pair_stride = round_up(n, 16);
    pack_pairs_along_column(w, k, n, n, (uint32_t*)memory, out.pair_stride);
    out.pairs = (const uint32_t*)memory;
#else
    round_to_bf16(w, (float*)memory, k * n);
    out.f32 = (const float*)memory;
#endif
  }
  return out;
}

void layer_forward(const LsMlp* mlp, const float* x, i64 rows, i64 k, i64 n, const Operand& w, const float* bias,
                   float* z) {
  Start start = bias ? START_BIAS : START_ZERO;
  if (mlp->dtype == LS_BF16) {
#if HAVE_BF16_DOT
    i64 stride = round_up((k + 1) / 2, 8);
    uint32_t* a = (uint32_t*)scratch(SCRATCH_PACK_A, rows * stride * 4);
    pack_pairs_along_row(x, rows, k, k, a, stride);
    return gemm_pairs({a, stride, false, w.pairs, w.pair_stride, z, n, rows, n, (k + 1) / 2, start, bias});
#else
    float* a = (float*)scratch(SCRATCH_PACK_A, rows * k * 4);
    round_to_bf16(x, a, rows * k);
    return gemm_f32({a, k, false, w.f32, w.stride, z, n, rows, n, k, start, bias});
#endif
  }
  gemm_f32({x, k, false, w.f32, w.stride, z, n, rows, n, k, start, bias});
}

i64 rows_per_task(i64 rows, i64 flops) {
  int threads = flops < PARALLEL_FLOPS ? 1 : pool_threads();
  if (threads == 1) return CHUNK;
  i64 chunk = round_up((rows + 2 * threads - 1) / (2 * threads), 6);
  return chunk < CHUNK ? chunk : CHUNK;
}
i64 flops_per_row(const LsMlp* mlp) {
  i64 total = 0;
  for (i64 l = 0; l < mlp->num_layers; l++) total += 2 * mlp->sizes[l] * mlp->sizes[l + 1];
  return total * members_of(mlp);
}

}  // namespace

void ls_mlp_forward(const LsMlp* mlp, const float* x, float* y, float* saved, int64_t rows, int32_t x_per_member) {
  const i64 members = members_of(mlp), layers = mlp->num_layers, width = widest(mlp);
  i64 bytes = 0;
  for (i64 l = 0; l < layers; l++) bytes += operand_bytes(mlp, mlp->sizes[l], mlp->sizes[l + 1]);
  char* packed = bytes ? (char*)scratch(SCRATCH_WEIGHTS, bytes * members) : nullptr;
  Operand stack_operands[16];
  Operand* operands = members * layers <= 16 ? stack_operands
                                             : (Operand*)scratch(SCRATCH_PLAN, members * layers * (i64)sizeof(Operand));
  for (i64 e = 0; e < members; e++)
    for (i64 l = 0; l < layers; l++) {
      i64 k = mlp->sizes[l], n = mlp->sizes[l + 1];
      operands[e * layers + l] = prepare_weight(mlp, mlp->weights[l] + e * k * n, k, n, packed);
      packed += operand_bytes(mlp, k, n);
    }
  const i64 chunk = rows_per_task(rows, flops_per_row(mlp) * rows), num_chunks = (rows + chunk - 1) / chunk;
  parallel_for(members * num_chunks, [&](i64 task) {
    i64 e = task / num_chunks, r0 = task % num_chunks * chunk, num = rows - r0 < chunk ? rows - r0 : chunk;
    const float* in = x + ((x_per_member ? e * rows : 0) + r0) * mlp->sizes[0];
    for (i64 l = 0; l < layers; l++) {
      i64 k = mlp->sizes[l], n = mlp->sizes[l + 1], offset = (e * rows + r0) * n;
      float *out = nullptr, *pre = nullptr;
      if (saved) {
        SavedBlocks blocks = saved_blocks(mlp, saved, l, rows);
        out = blocks.y ? blocks.y + offset : nullptr;
        pre = blocks.z ? blocks.z + offset : nullptr;
      }
      if (l == layers - 1) out = y + offset;
      if (!out) out = (float*)scratch(l % 2 ? SCRATCH_ACT_1 : SCRATCH_ACT_0, num * width * (i64)sizeof(float));
      layer_forward(mlp, in, num, k, n, operands[e * layers + l], bias_of(mlp, l, e), pre ? pre : out);
      activate(activation_of(mlp, l), pre ? pre : out, out, num * n);
      in = out;
    }
  });
}

namespace {

// Splits a product's output columns into panels for the pool.
template <typename F>
void over_panels(i64 n, i64 flops, F&& body) {
  i64 panels = flops < PARALLEL_FLOPS || pool_threads() == 1 ? 1 : (n + 63) / 64;
  i64 width = panels == 1 ? n : 64;
  parallel_for(panels, [&](i64 p) { body(p * width, n - p * width < width ? n - p * width : width); });
}

// sums [n] += column sums of dz. Four vectors of columns at a time: one alone would wait for its own additions.
void bias_gradient(const float* dz, i64 rows, i64 n, float* sums, bool first) {
  constexpr i64 WIDE = 4 * VLEN;
  i64 j = 0;
  for (; j + WIDE <= n; j += WIDE) {
    vf sum[4];
    for (int v = 0; v < 4; v++) sum[v] = first ? splat(0.0f) : load(sums + j + v * VLEN);
    for (i64 r = 0; r < rows; r++)
      for (int v = 0; v < 4; v++) sum[v] = sum[v] + load(dz + r * n + j + v * VLEN);
    for (int v = 0; v < 4; v++) store(sums + j + v * VLEN, sum[v]);
  }
  for (; j < n; j += VLEN) {
    i64 w = n - j < VLEN ? n - j : VLEN;
    vf sum = first ? splat(0.0f) : get(sums + j, 0, w);
    for (i64 r = 0; r < rows; r++) sum = sum + get(dz + r * n, j, w);
    store_part(sums + j, sum, w);
  }
}

// dw += x^T dz where dz is so narrow that a vector along it would be mostly empty: dw^T = dz^T x has the same chains.
void narrow_weight_gradient(const float* x, const float* dz, i64 rows, i64 k, i64 n, float* dw, bool first) {
  float* turned = (float*)scratch(SCRATCH_PACK_A, n * k * (i64)sizeof(float));
  if (!first) transpose(dw, k, n, n, turned, k);
  gemm_f32({dz, n, true, x, k, turned, k, n, k, rows, first ? START_ZERO : START_C, nullptr});
  transpose(turned, n, k, k, dw, n);
}

// dw += x^T dz over `rows` rows, and db += column sums of dz.
void weight_gradient(const LsMlp* mlp, const float* x, const float* dz, i64 rows, i64 k, i64 n, float* dw, float* db,
                     bool first) {
  Start start = first ? START_ZERO : START_C;
  if (db) bias_gradient(dz, rows, n, db, first);
  if (mlp->dtype == LS_FP32 && n <= VLEN / 2 && k > 2 * n) return narrow_weight_gradient(x, dz, rows, k, n, dw, first);
  const float *a = x, *b = dz;
  if (mlp->dtype == LS_BF16) {
#if HAVE_BF16_DOT
    i64 pairs = (rows + 1) / 2, ka = round_up(k, 16), nb = round_up(n, 16);
    uint32_t* pa = (uint32_t*)scratch(SCRATCH_PACK_A, pairs * ka * 4);
    uint32_t* pb = (uint32_t*)scratch(SCRATCH_PACK_B, pairs * nb * 4);
    pack_pairs_along_column(x, rows, k, k, pa, ka);
    pack_pairs_along_column(dz, rows, n, n, pb, nb);
    return over_panels(n, 2 * rows * k * n, [&](i64 j, i64 w) {
      gemm_pairs({pa, ka, true, pb + j, nb, dw + j, n, k, w, pairs, start, nullptr});
    });
#else
    float* ra = (float*)scratch(SCRATCH_PACK_A, rows * (k + n) * 4);
    round_to_bf16(x, ra, rows * k);
    round_to_bf16(dz, ra + rows * k, rows * n);
    a = ra;
    b = ra + rows * k;
#endif
  }
  over_panels(n, 2 * rows * k * n, [&](i64 j, i64 w) {
    gemm_f32({a, k, true, b + j, n, dw + j, n, k, w, rows, start, nullptr});
  });
}

// W^T ready to be the right-hand operand of dx = dz W^T; [n][k].
i64 transposed_bytes(i64 k, i64 n) { return round_up(n + 1, 2) * round_up(k, 16) * 4 * 2; }
Operand prepare_transposed(const LsMlp* mlp, const float* w, i64 k, i64 n, char* memory) {
  Operand out;
#if HAVE_BF16_DOT
  if (mlp->dtype == LS_BF16) {
    i64 half = (n + 1) / 2, half_stride = round_up(half, 8);
    out.pair_stride = round_up(k, 16);
    uint32_t* rows = (uint32_t*)scratch(SCRATCH_PACK_A, k * half_stride * 4);
    pack_pairs_along_row(w, k, n, n, rows, half_stride);
    transpose_pairs(rows, k, half, half_stride, (uint32_t*)memory, out.pair_stride);
    out.pairs = (const uint32_t*)memory;
    return out;
  }
#endif
  out.stride = round_up(k, VLEN);
  out.f32 = (const float*)memory;
  transpose(w, k, n, n, (float*)memory, out.stride);
  if (mlp->dtype == LS_BF16) round_to_bf16(out.f32, (float*)memory, n * out.stride);
  return out;
}

void input_gradient(const LsMlp* mlp, const float* dz, i64 rows, i64 k, i64 n, const Operand& w, float* dx,
                    bool first) {
  Start start = first ? START_ZERO : START_C;
  i64 chunk = rows_per_task(rows, 2 * rows * k * n), num_chunks = (rows + chunk - 1) / chunk;
  parallel_for(num_chunks, [&](i64 task) {
    i64 r0 = task * chunk, num = rows - r0 < chunk ? rows - r0 : chunk;
    const float* a = dz + r0 * n;
    if (mlp->dtype == LS_BF16) {
#if HAVE_BF16_DOT
      i64 stride = round_up((n + 1) / 2, 8);
      uint32_t* pa = (uint32_t*)scratch(SCRATCH_PACK_A, num * stride * 4);
      pack_pairs_along_row(a, num, n, n, pa, stride);
      gemm_pairs({pa, stride, false, w.pairs, w.pair_stride, dx + r0 * k, k, num, k, (n + 1) / 2, start, nullptr});
      return;
#else
      float* ra = (float*)scratch(SCRATCH_PACK_A, num * n * 4);
      round_to_bf16(a, ra, num * n);
      a = ra;
#endif
    }
    gemm_f32({a, n, false, w.f32, w.stride, dx + r0 * k, k, num, k, n, start, nullptr});
  });
}

}  // namespace

void ls_mlp_backward(const LsMlp* mlp, const float* x, const float* y, const float* saved, const float* dy, float* dx,
                     float* const* dweights, float* const* dbiases, int64_t rows, int32_t x_per_member) {
  const i64 members = members_of(mlp), layers = mlp->num_layers, width = widest(mlp);
  // Larger chunks when threads share a chunk; the result is the same.
  const i64 chunk = CHUNK * (pool_threads() > 1 ? pool_threads() * 2 : 2);
  i64 bytes = 0;
  for (i64 l = 0; l < layers; l++) bytes += round_up(transposed_bytes(mlp->sizes[l], mlp->sizes[l + 1]), 64);
  char* memory = (char*)scratch(SCRATCH_WEIGHTS, bytes);
  for (i64 e = 0; e < members; e++) {
    Operand transposed[64];
    char* at = memory;
    for (i64 l = dx ? 0 : 1; l < layers; l++) {
      i64 k = mlp->sizes[l], n = mlp->sizes[l + 1];
      transposed[l] = prepare_transposed(mlp, mlp->weights[l] + e * k * n, k, n, at);
      at += round_up(transposed_bytes(k, n), 64);
    }
    for (i64 r0 = 0; r0 < rows; r0 += chunk) {
      i64 num = rows - r0 < chunk ? rows - r0 : chunk;
      float* dz = (float*)scratch(SCRATCH_ACT_0, num * width * (i64)sizeof(float));
      float* next = (float*)scratch(SCRATCH_ACT_1, num * width * (i64)sizeof(float));
      const float* grad = dy + (e * rows + r0) * mlp->sizes[layers];
      for (i64 l = layers - 1; l >= 0; l--) {
        i64 k = mlp->sizes[l], n = mlp->sizes[l + 1], offset = (e * rows + r0) * n;
        SavedBlocks here = saved_blocks(mlp, (float*)saved, l, rows);
        const float* out = (l == layers - 1 ? y : here.y) + offset;
        const float* input = l == 0 ? x + ((x_per_member ? e * rows : 0) + r0) * k
                                    : saved_blocks(mlp, (float*)saved, l - 1, rows).y + (e * rows + r0) * k;
        const float* delta = grad;
        if (activation_of(mlp, l) != LS_NONE) {
          activate_backward(activation_of(mlp, l), out, here.z ? here.z + offset : nullptr, grad, dz, num * n);
          delta = dz;
        }
        if (dweights)
          weight_gradient(mlp, input, delta, num, k, n, dweights[l] + e * k * n,
                          dbiases && dbiases[l] ? dbiases[l] + e * n : nullptr, r0 == 0);
        if (l > 0) {
          input_gradient(mlp, delta, num, k, n, transposed[l], next, true);
          float* swap = dz;
          dz = next;
          next = swap;
          grad = dz;
        } else if (dx) {
          bool shared = !x_per_member;
          input_gradient(mlp, delta, num, k, n, transposed[0], dx + ((shared ? 0 : e * rows) + r0) * k,
                         !shared || e == 0);
        }
      }
    }
  }
}
