// Matrix products whose every output element is one chain of fused multiply-adds over the reduction index, in rising
// order, starting at the bias. Tiles, threads and the number of rows change which elements share a register, never the
// chain. Blocking the reduction stores and reloads the fp32 partial sum, which is exact.
#pragma once
#include "simd.h"

enum Start { START_ZERO, START_BIAS, START_C };

// C[M,N] = start + A B. A is [M,K] row-major, or with `a_transposed` [K,M] row-major. a_stride, b_stride, c_stride are
// row strides in elements.
struct Gemm {
  const float* a;
  i64 a_stride;
  bool a_transposed;
  const float* b;
  i64 b_stride;
  float* c;
  i64 c_stride;
  i64 m, n, k;
  Start start;
  const float* bias;
  bool relu = false;  // of the result, before it is stored
};
void gemm_f32(const Gemm& g);

// The same with operands already in bf16 pairs (see pack_*): a is [M][k2] pairs along the row, or with `a_transposed`
// [k2][M]; b is [k2][N]. Strides count pairs; k counts pairs. Exists where the hardware has bf16 dot products.
struct GemmPairs {
  const uint32_t* a;
  i64 a_stride;
  bool a_transposed;
  const uint32_t* b;
  i64 b_stride;
  float* c;
  i64 c_stride;
  i64 m, n, k;
  Start start;
  const float* bias;
  bool relu = false;
};
#if defined(__AVX512BF16__)
#define HAVE_BF16_DOT 1
void gemm_pairs(const GemmPairs& g);
#else
#define HAVE_BF16_DOT 0
#endif

ALWAYS_INLINE i64 round_up(i64 x, i64 to) { return (x + to - 1) / to * to; }

void transpose(const float* in, i64 rows, i64 cols, i64 in_stride, float* out, i64 out_stride);
void round_to_bf16(const float* in, float* out, i64 num);  // values stay float32
#if HAVE_BF16_DOT
// [rows][cols] float32 -> [rows][ceil(cols/2)] pairs of neighbours in a row; the odd end is padded with 0.
void pack_pairs_along_row(const float* in, i64 rows, i64 cols, i64 in_stride, uint32_t* out, i64 out_stride);
// [rows][cols] float32 -> [ceil(rows/2)][cols] pairs of neighbours in a column.
void pack_pairs_along_column(const float* in, i64 rows, i64 cols, i64 in_stride, uint32_t* out, i64 out_stride);
void transpose_pairs(const uint32_t* in, i64 rows, i64 cols, i64 in_stride, uint32_t* out, i64 out_stride);
#endif
