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
                   float* z, bool relu) {
  Start start = bias ? START_BIAS : START_ZERO;
  if (mlp->dtype == LS_BF16) {
#if HAVE_BF16_DOT
    i64 stride = round_up((k + 1) / 2, 8);
    uint32_t* a = (uint32_t*)scratch(SCRATCH_PACK_A, rows * stride * 4);
    pack_pairs_along_row(x, rows, k, k, a, stride);
    return gemm_pairs({a, stride, false, w.pairs, w.pair_stride, z, n, rows, n, (k + 1) / 2, start, bias, relu});
#else
    float* a = (float*)scratch(SCRATCH_PACK_A, rows * k * 4);
    round_to_bf16(x, a, rows * k);
    return gemm_f32({a, k, false, w.f32, w.stride, z, n, rows, n, k, start, bias, relu});
#endif
  }
  gemm_f32({x, k, false, w.f32, w.stride, z, n, rows, n, k, start, bias, relu});
}

// Threads that a call of this many operations is worth.
i64 threads_for(i64 flops) { return flops < PARALLEL_FLOPS ? 1 : pool_threads(); }
// About two tasks for each thread, `groups` of which share the same rows.
i64 rows_per_task(i64 rows, i64 groups, i64 threads) {
  if (threads == 1) return CHUNK;
  i64 chunk = round_up((rows * groups + 2 * threads - 1) / (2 * threads), 2);  // pairs of rows stay together
  return chunk < CHUNK ? chunk : CHUNK;
}
template <typename F>
void share(i64 threads, i64 num_tasks, F&& body) {
  if (threads > 1) return parallel_for(num_tasks, [&](i64 i) { body(i); });
  for (i64 i = 0; i < num_tasks; i++) body(i);
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
  const i64 threads = threads_for(flops_per_row(mlp) * rows);
  share(bytes ? threads : 1, members, [&](i64 e) {
    char* at = packed + e * bytes;
    for (i64 l = 0; l < layers; l++) {
      i64 k = mlp->sizes[l], n = mlp->sizes[l + 1];
      operands[e * layers + l] = prepare_weight(mlp, mlp->weights[l] + e * k * n, k, n, at);
      at += operand_bytes(mlp, k, n);
    }
  });
  const i64 chunk = rows_per_task(rows, members, threads), num_chunks = (rows + chunk - 1) / chunk;
  share(threads, members * num_chunks, [&](i64 task) {
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
      const int32_t kind = activation_of(mlp, l);
      layer_forward(mlp, in, num, k, n, operands[e * layers + l], bias_of(mlp, l, e), pre ? pre : out, kind == LS_RELU);
      if (kind != LS_RELU) activate(kind, pre ? pre : out, out, num * n);
      in = out;
    }
  });
}

namespace {

// sums [num] += column sums of dz. Four vectors of columns at a time: one alone would wait for its own additions.
void bias_gradient(const float* dz, i64 rows, i64 stride, i64 num, float* sums, bool first) {
  constexpr i64 WIDE = 4 * VLEN;
  i64 j = 0;
  for (; j + WIDE <= num; j += WIDE) {
    vf sum[4];
    for (int v = 0; v < 4; v++) sum[v] = first ? splat(0.0f) : load(sums + j + v * VLEN);
    for (i64 r = 0; r < rows; r++)
      for (int v = 0; v < 4; v++) sum[v] = sum[v] + load(dz + r * stride + j + v * VLEN);
    for (int v = 0; v < 4; v++) store(sums + j + v * VLEN, sum[v]);
  }
  for (; j < num; j += VLEN) {
    i64 w = num - j < VLEN ? num - j : VLEN;
    vf sum = first ? splat(0.0f) : get(sums + j, 0, w);
    for (i64 r = 0; r < rows; r++) sum = sum + get(dz + r * stride, j, w);
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

// What dw += x^T dz reads of one layer of one member, rows [0, rows) of a chunk.
struct WeightTask {
  const float *x, *dz;
  uint32_t *x_pairs, *dz_pairs;  // bf16: pairs of rows; or both rounded to bf16 where there is no such product
  i64 k, n;
};
i64 pairs_bytes(i64 rows, i64 cols) { return round_up((rows + 1) / 2 * 2 * round_up(cols, 16) * 4, 64); }

// The bf16 form of rows [r0, r0 + num) of both operands; r0 is even.
void prepare_rows(const WeightTask& t, i64 r0, i64 num) {
#if HAVE_BF16_DOT
  const i64 ks = round_up(t.k, 16), ns = round_up(t.n, 16);
  pack_pairs_along_column(t.x + r0 * t.k, num, t.k, t.k, t.x_pairs + r0 / 2 * ks, ks);
  pack_pairs_along_column(t.dz + r0 * t.n, num, t.n, t.n, t.dz_pairs + r0 / 2 * ns, ns);
#else
  round_to_bf16(t.x + r0 * t.k, (float*)t.x_pairs + r0 * t.k, num * t.k);
  round_to_bf16(t.dz + r0 * t.n, (float*)t.dz_pairs + r0 * t.n, num * t.n);
#endif
}

// Columns [j, j + w) of dw += x^T dz and of db += column sums of dz.
void weight_gradient(const LsMlp* mlp, const WeightTask& t, i64 rows, i64 j, i64 w, float* dw, float* db, bool first) {
  const i64 k = t.k, n = t.n;
  const Start start = first ? START_ZERO : START_C;
  if (db) bias_gradient(t.dz + j, rows, n, w, db + j, first);
  if (mlp->dtype == LS_FP32 && n <= VLEN / 2 && k > 2 * n)
    return narrow_weight_gradient(t.x, t.dz, rows, k, n, dw, first);
  const float *a = t.x, *b = t.dz;
  if (mlp->dtype == LS_BF16) {
#if HAVE_BF16_DOT
    const i64 ks = round_up(k, 16), ns = round_up(n, 16);
    return gemm_pairs({t.x_pairs, ks, true, t.dz_pairs + j, ns, dw + j, n, k, w, (rows + 1) / 2, start, nullptr});
#else
    a = (const float*)t.x_pairs;
    b = (const float*)t.dz_pairs;
#endif
  }
  gemm_f32({a, k, true, b + j, n, dw + j, n, k, w, rows, start, nullptr});
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
  if (mlp->dtype == LS_BF16) {
#if HAVE_BF16_DOT
    i64 stride = round_up((n + 1) / 2, 8);
    uint32_t* a = (uint32_t*)scratch(SCRATCH_PACK_A, rows * stride * 4);
    pack_pairs_along_row(dz, rows, n, n, a, stride);
    return gemm_pairs({a, stride, false, w.pairs, w.pair_stride, dx, k, rows, k, (n + 1) / 2, start, nullptr});
#else
    float* a = (float*)scratch(SCRATCH_PACK_A, rows * n * 4);
    round_to_bf16(dz, a, rows * n);
    dz = a;
#endif
  }
  gemm_f32({dz, n, false, w.f32, w.stride, dx, k, rows, k, n, start, nullptr});
}

constexpr i64 PANEL = 64;  // columns of a weight gradient that one task computes

// A backward pass over a chunk of rows of some members: first the deltas of all layers, by rows; then the weight
// gradients, by columns.
struct Backward {
  const LsMlp* mlp;
  const float *x, *y, *saved, *dy;
  float* dx;
  float* const* dweights;
  float* const* dbiases;
  i64 rows;
  bool x_per_member;
  Operand* transposed;  // [members][layers]
  WeightTask* tasks;    // [members][layers], filled for the members at work

  // Where the chunk's deltas lie; called once for each member and chunk.
  char* place(i64 e, i64 r0, i64 num, char* at) {
    const i64 layers = mlp->num_layers;
    for (i64 l = 0; l < layers; l++) {
      const i64 k = mlp->sizes[l], n = mlp->sizes[l + 1];
      WeightTask& t = tasks[e * layers + l];
      t.k = k;
      t.n = n;
      t.x = l == 0 ? x + ((x_per_member ? e * rows : 0) + r0) * k
                   : saved_blocks(mlp, (float*)saved, l - 1, rows).y + (e * rows + r0) * k;
      if (l == layers - 1 && mlp->output_activation == LS_NONE) {
        t.dz = dy + (e * rows + r0) * n;
      } else {
        t.dz = (float*)at;
        at += round_up(num * n * 4, 64);
      }
      if (mlp->dtype == LS_BF16 && dweights) {
        t.x_pairs = (uint32_t*)at;
        t.dz_pairs = (uint32_t*)(at + pairs_bytes(num, k));
        at += pairs_bytes(num, k) + pairs_bytes(num, n);
      }
    }
    return at;
  }
  i64 place_bytes(i64 num) {
    i64 bytes = 0;
    for (i64 l = 0; l < mlp->num_layers; l++) {
      const i64 k = mlp->sizes[l], n = mlp->sizes[l + 1];
      bytes += round_up(num * n * 4, 64);
      if (mlp->dtype == LS_BF16 && dweights) bytes += pairs_bytes(num, k) + pairs_bytes(num, n);
    }
    return bytes;
  }

  // Rows [b, b + num) of the chunk that starts at row r0.
  void deltas(i64 e, i64 r0, i64 b, i64 num) {
    const i64 layers = mlp->num_layers;
    for (i64 l = layers - 1; l >= 0; l--) {
      const WeightTask& t = tasks[e * layers + l];
      const i64 k = t.k, n = t.n, offset = (e * rows + r0 + b) * n;
      const SavedBlocks here = saved_blocks(mlp, (float*)saved, l, rows);
      const bool top = l == layers - 1;
      float* dz = (float*)t.dz + b * n;
      if (activation_of(mlp, l) != LS_NONE)
        activate_backward(activation_of(mlp, l), (top ? y : here.y) + offset, here.z ? here.z + offset : nullptr,
                          top ? dy + offset : dz, dz, num * n);
      if (mlp->dtype == LS_BF16 && dweights) prepare_rows(t, b, num);
      if (l > 0)
        input_gradient(mlp, dz, num, k, n, transposed[e * layers + l], (float*)tasks[e * layers + l - 1].dz + b * k,
                       true);
      else if (dx)
        input_gradient(mlp, dz, num, k, n, transposed[e * layers], dx + ((x_per_member ? e * rows : 0) + r0 + b) * k,
                       x_per_member || e == 0);
    }
  }

  i64 panels(i64 l) { return (mlp->sizes[l + 1] + PANEL - 1) / PANEL; }
  i64 total_panels() {
    i64 total = 0;
    for (i64 l = 0; l < mlp->num_layers; l++) total += panels(l);
    return total;
  }
  void weights(i64 e, i64 panel, i64 num, bool first) {
    i64 l = mlp->num_layers - 1;
    for (; panel >= panels(l); l--) panel -= panels(l);
    const WeightTask& t = tasks[e * mlp->num_layers + l];
    const i64 j = panel * PANEL, w = t.n - j < PANEL ? t.n - j : PANEL;
    weight_gradient(mlp, t, num, j, w, dweights[l] + e * t.k * t.n,
                    dbiases && dbiases[l] ? dbiases[l] + e * t.n : nullptr, first);
  }
};

}  // namespace

void ls_mlp_backward(const LsMlp* mlp, const float* x, const float* y, const float* saved, const float* dy, float* dx,
                     float* const* dweights, float* const* dbiases, int64_t rows, int32_t x_per_member) {
  const i64 members = members_of(mlp), layers = mlp->num_layers;
  const i64 threads = threads_for(2 * flops_per_row(mlp) * rows);
  const i64 chunk = 2 * CHUNK * threads;
  i64 bytes = 0;
  for (i64 l = 0; l < layers; l++) bytes += round_up(transposed_bytes(mlp->sizes[l], mlp->sizes[l + 1]), 64);
  char* weights_memory = (char*)scratch(SCRATCH_WEIGHTS, bytes * members);
  const i64 table = round_up(members * layers * (i64)sizeof(Operand), 64);
  char* tables = (char*)scratch(SCRATCH_PLAN, table + members * layers * (i64)sizeof(WeightTask));
  Backward pass = {mlp,  x,    y,           saved,           dy, dx, dweights, dbiases, rows, x_per_member != 0,
                   (Operand*)tables, (WeightTask*)(tables + table)};
  share(threads, members * layers, [&](i64 task) {
    const i64 e = task / layers, l = task % layers, k = mlp->sizes[l], n = mlp->sizes[l + 1];
    if (l == 0 && !dx) return;
    char* at = weights_memory + e * bytes;
    for (i64 i = 0; i < l; i++) at += round_up(transposed_bytes(mlp->sizes[i], mlp->sizes[i + 1]), 64);
    pass.transposed[task] = prepare_transposed(mlp, mlp->weights[l] + e * k * n, k, n, at);
  });
  // One thread takes a member at a time, which stays in its cache; several share out all members at once.
  const i64 group = threads == 1 ? 1 : members;
  // Members that add to one dx do so in order, which is up to the task of their rows.
  const bool in_order = dx && !x_per_member;
  for (i64 e0 = 0; e0 < members; e0 += group)
    for (i64 r0 = 0; r0 < rows; r0 += chunk) {
      const i64 num = rows - r0 < chunk ? rows - r0 : chunk;
      const i64 block = rows_per_task(num, in_order ? 1 : group, threads), blocks = (num + block - 1) / block;
      char* at = (char*)scratch(SCRATCH_ACT_0, group * pass.place_bytes(num));
      for (i64 e = e0; e < e0 + group; e++) at = pass.place(e, r0, num, at);
      share(threads, in_order ? blocks : blocks * group, [&](i64 task) {
        const i64 b = task % blocks * block, size = num - b < block ? num - b : block;
        if (!in_order) return pass.deltas(e0 + task / blocks, r0, b, size);
        for (i64 e = e0; e < e0 + group; e++) pass.deltas(e, r0, b, size);
      });
      const i64 panels = pass.total_panels();
      if (dweights)
        share(threads, panels * group,
              [&](i64 task) { pass.weights(e0 + task / panels, task % panels, num, r0 == 0); });
    }
}
