// Products with matrices laid out once and read often. The layout is told in lockstep/kernels/packed_linear/weight.py.
//
// An output element is one chain over rising k that starts at the bias, whatever tile, task or thread computes it.
#pragma once
#include "gemm.h"
#include "lockstep.h"
#include "pool.h"

constexpr i64 FLOAT_PANEL = 64, INT_PANEL = 32, ROW_BLOCK = 32;
constexpr int TILE_ROWS = 6;
constexpr i64 PREFETCH_AHEAD = 8192;  // bytes; with 4096 one core streamed 4-bit weights 8 % slower

// Rows of the next tile when `left` remain: 8 rows are two tiles of 4 rather than 6 and 2.
inline i64 tile_rows(i64 left, i64 most) {
  const i64 num_tiles = (left + most - 1) / most;
  return (left + num_tiles - 1) / num_tiles;
}

// Rows lo .. hi of x times panels of one matrix.
struct PanelJob {
  const LsPackedSpec* spec;
  const uint8_t* panel;  // the first panel
  i64 num_panels;
  i64 first_column;
  i64 row_lo, row_hi;
  const float* bias;  // of the matrix, or null
  float* y;           // [M][N]
};

// x as the tiles of floats read it: fp32 as it is, bf16 as pairs (with the instruction) or rounded values (without).
struct FloatRows {
  const void* data;
  i64 stride;  // in elements of 4 bytes
};
FloatRows prepare_float_rows(const LsPackedSpec& spec, const float* x, i64 num_rows);
void run_float_panels(const PanelJob& job, const FloatRows& rows);

// x rounded to int8 per ROW_BLOCK inputs. A sub-block is the 16 or 32 inputs whose products are summed as integers.
struct IntRows {
  int8_t* codes;   // [M][K], or wide: 16-bit integers, of four neighbours in the order 0 2 1 3
  i64 code_bytes;  // of an input: 1, wide 2
  float* scale;    // [M][K / ROW_BLOCK]
  int32_t* start;  // [M][K / sub]: -offset * sum of the sub-block, which takes the codes' offset out of the product
  float* moment;   // [M][K / sub]: scale * sum, what a minimum is multiplied by
};
IntRows prepare_int_rows(const LsPackedSpec& spec, const float* x, i64 num_rows);
void run_int_panels(const PanelJob& job, const IntRows& rows);

inline i64 panel_bytes(const LsPackedSpec& s) {
  if (s.kind == LS_PACKED_FP32) return s.num_inputs * FLOAT_PANEL * 4;
  if (s.kind == LS_PACKED_BF16) return (s.num_inputs + 1) / 2 * FLOAT_PANEL * 4;
  i64 codes = s.group * INT_PANEL / (s.kind == LS_PACKED_BYTES ? 1 : 2);
  return s.num_inputs / s.group * (codes + INT_PANEL * (s.scale_bytes + s.minimum_bytes));
}
