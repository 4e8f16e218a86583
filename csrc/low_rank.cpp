// Low-rank additions; see low_rank.h.
#include "low_rank.h"

#include "pool.h"
#include "rows.h"

namespace {

constexpr i64 ROWS = 4;            // of a tile
constexpr i64 ROW_CHUNK = 32;      // rows of a task
constexpr i64 COLUMN_CHUNK = 512;  // columns of a task
constexpr i64 ALONE = 1 << 16;     // multiply-adds below which threads are not worth waking

i64 pieces(i64 size, i64 step) { return (size + step - 1) / step; }

// h[r][j] = scale * sum over k of x[r][k] a[k][j], rows of a tile beside each other so that their chains overlap.
template <int R>
void down_tile(const LsLowRankRun& run, const float* x, float* h, i64 num_inputs, i64 at, i64 n) {
  vf acc[R] = {};
  const float* a = run.a + at;
  for (i64 k = 0; k < num_inputs; k++, a += run.rank) {
    const vf w = get(a, n);
    for (int r = 0; r < R; r++) acc[r] = fma(splat(x[r * num_inputs + k]), w, acc[r]);
  }
  for (int r = 0; r < R; r++) put(h + r * run.rank + at, acc[r] * splat(run.scale), n);
}

// y[r][c] = y[r][c] + sum over j of h[r][j] b[j][c] as one chain.
template <int R>
void up_tile(const LsLowRankRun& run, const float* h, float* y, i64 y_stride, i64 at, i64 n) {
  vf acc[R];
  for (int r = 0; r < R; r++) acc[r] = get(y + r * y_stride + at, n);
  const float* b = run.b + at;
  for (i64 j = 0; j < run.rank; j++, b += run.num_columns) {
    const vf w = get(b, n);
    for (int r = 0; r < R; r++) acc[r] = fma(splat(h[r * run.rank + j]), w, acc[r]);
  }
  for (int r = 0; r < R; r++) put(y + r * y_stride + at, acc[r], n);
}

template <typename F4, typename F1>
ALWAYS_INLINE void over_tiles(i64 first, i64 last, F4&& four, F1&& one) {
  i64 row = first;
  for (; row + ROWS <= last; row += ROWS) four(row);
  for (; row < last; row++) one(row);
}

void down(const LsLowRankRun& run, const float* x, float* h, i64 num_inputs, i64 first, i64 last) {
  over_vectors(run.rank, [&](i64 at, i64 n) {
    over_tiles(
        first, last,
        [&](i64 r) { down_tile<ROWS>(run, x + (run.first_row + r) * num_inputs, h + r * run.rank, num_inputs, at, n); },
        [&](i64 r) { down_tile<1>(run, x + (run.first_row + r) * num_inputs, h + r * run.rank, num_inputs, at, n); });
  });
}

void up(const LsLowRankRun& run, const float* h, float* y, i64 y_stride, i64 first, i64 last, i64 column, i64 columns) {
  float* y_part = y + run.first_column + column;
  LsLowRankRun here = run;
  here.b = run.b + column;
  over_vectors(columns, [&](i64 at, i64 n) {
    over_tiles(
        first, last,
        [&](i64 r) { up_tile<ROWS>(here, h + r * run.rank, y_part + (run.first_row + r) * y_stride, y_stride, at, n); },
        [&](i64 r) { up_tile<1>(here, h + r * run.rank, y_part + (run.first_row + r) * y_stride, y_stride, at, n); });
  });
}

// Where each run's tasks and its part of h begin.
struct Place {
  i64 h, down_task, up_task;
};

i64 find(const Place* places, i64 num_runs, i64 Place::* task_of, i64 task) {
  i64 lo = 0, hi = num_runs;
  while (hi - lo > 1) {
    const i64 middle = (lo + hi) / 2;
    (places[middle].*task_of <= task ? lo : hi) = middle;
  }
  return lo;
}

}  // namespace

void ls_low_rank(const float* x, float* y, const LsLowRankRun* runs, int64_t num_runs, int64_t num_inputs,
                 int64_t y_stride) {
  i64 floats = 0, work = 0;
  for (i64 i = 0; i < num_runs; i++) {
    const i64 rows = runs[i].last_row - runs[i].first_row;
    floats += rows * runs[i].rank;
    work += rows * runs[i].rank * (num_inputs + runs[i].num_columns);
  }
  const i64 places_bytes = pieces(num_runs * (i64)sizeof(Place), 64) * 64;
  char* memory = (char*)scratch(SCRATCH_LOW_RANK, places_bytes + floats * (i64)sizeof(float));
  Place* places = (Place*)memory;
  float* h = (float*)(memory + places_bytes);
  Place next = {};
  for (i64 i = 0; i < num_runs; i++) {
    places[i] = next;
    const i64 rows = runs[i].last_row - runs[i].first_row, chunks = pieces(rows, ROW_CHUNK);
    next.h += rows * runs[i].rank;
    next.down_task += chunks;
    next.up_task += chunks * pieces(runs[i].num_columns, COLUMN_CHUNK);
  }
  auto down_task = [&](i64 task) {
    const i64 i = find(places, num_runs, &Place::down_task, task);
    const i64 first = (task - places[i].down_task) * ROW_CHUNK, rows = runs[i].last_row - runs[i].first_row;
    down(runs[i], x, h + places[i].h, num_inputs, first, first + part(rows, first, ROW_CHUNK));
  };
  auto up_task = [&](i64 task) {
    const i64 i = find(places, num_runs, &Place::up_task, task);
    const i64 rows = runs[i].last_row - runs[i].first_row, chunks = pieces(rows, ROW_CHUNK);
    const i64 mine = task - places[i].up_task, column = mine / chunks * COLUMN_CHUNK, first = mine % chunks * ROW_CHUNK;
    up(runs[i], h + places[i].h, y, y_stride, first, first + part(rows, first, ROW_CHUNK), column,
       part(runs[i].num_columns, column, COLUMN_CHUNK));
  };
  if (work < ALONE) {
    for (i64 task = 0; task < next.down_task; task++) down_task(task);
    for (i64 task = 0; task < next.up_task; task++) up_task(task);
    return;
  }
  parallel_for(next.down_task, [&](i64 task) { down_task(task); });
  parallel_for(next.up_task, [&](i64 task) { up_task(task); });
}
