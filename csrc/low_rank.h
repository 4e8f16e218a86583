// Low-rank additions to the rows of a product (Hu et al. 2021). An output element is one chain: it starts at what the base
// matrix gave and takes the R terms in rising order, whatever rows, runs, tasks and threads there are.
//
// Legend: M rows, K inputs, R rank, N columns of one part of the output.
#pragma once
#include "lockstep.h"

// Rows first_row .. last_row - 1 of x [M][K] add scale * (x a) b to columns first_column .. first_column + N - 1 of y.
struct LsLowRankRun {
  const float* a;  // [K][R]
  const float* b;  // [R][N]
  int64_t first_row, last_row, rank, first_column, num_columns;
  float scale;
  int32_t reserved;
};
// y [M][y_stride]. Runs that meet in rows and columns are added one after another in no order that is promised; callers
// give each row and column to one run.
LS_API void ls_low_rank(const float* x, float* y, const LsLowRankRun* runs, int64_t num_runs, int64_t num_inputs,
                        int64_t y_stride);
