// Splits products with packed matrices into tasks: some panels of one matrix times some of its rows.
#include "packed.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

constexpr i64 TASK_BYTES = 1 << 16;  // weights a task reads at least, so that taking it costs little beside
constexpr i64 COMPUTED_ROWS = 24;  // from here on a panel takes longer to compute with than to read
constexpr i64 TASK_INPUTS = 1 << 19;  // inputs of all rows of a task, about what the second-level cache keeps as int8

struct Expert {
  const uint8_t* weight;
  i64 row_lo, row_hi;
  const float* bias;
  i64 first_task, row_parts;
};

void run(const LsPackedSpec& spec, Expert* experts, i64 num_experts, const float* x, float* y, i64 num_rows) {
  const bool floats = spec.group == 0;
  const i64 panel = floats ? FLOAT_PANEL : INT_PANEL, bytes = panel_bytes(spec);
  const i64 num_panels = (spec.num_outputs + panel - 1) / panel;
  FloatRows float_rows = {};
  IntRows int_rows = {};
  if (floats)
    float_rows = prepare_float_rows(spec, x, num_rows);
  else
    int_rows = prepare_int_rows(spec, x, num_rows);
  const i64 panels_per_task = num_rows >= COMPUTED_ROWS || bytes >= TASK_BYTES ? 1 : (TASK_BYTES + bytes - 1) / bytes;
  const i64 panel_parts = (num_panels + panels_per_task - 1) / panels_per_task;
  i64 task_rows = TASK_INPUTS / spec.num_inputs / 6 * 6;
  task_rows = task_rows < 48 ? 48 : task_rows > 240 ? 240 : task_rows;  // a multiple of every tile height
  i64 num_tasks = 0;
  for (i64 e = 0; e < num_experts; e++) {
    experts[e].row_parts = (experts[e].row_hi - experts[e].row_lo + task_rows - 1) / task_rows;
    experts[e].first_task = num_tasks;
    num_tasks += experts[e].row_parts * panel_parts;
  }
  parallel_for(num_tasks, [&](i64 task) {
    i64 lo = 0, hi = num_experts;  // the last expert whose first task is not above `task`, hence one that has rows
    while (hi - lo > 1) {
      const i64 middle = (lo + hi) / 2;
      (experts[middle].first_task <= task ? lo : hi) = middle;
    }
    const Expert& expert = experts[lo];
    const i64 mine = task - expert.first_task;
    // The parts of rows that share a panel are neighbours, so that the panel is still in the cache.
    const i64 first_panel = mine / expert.row_parts * panels_per_task, part = mine % expert.row_parts;
    PanelJob job;
    job.spec = &spec;
    job.panel = expert.weight + first_panel * bytes;
    job.num_panels = num_panels - first_panel < panels_per_task ? num_panels - first_panel : panels_per_task;
    job.first_column = first_panel * panel;
    job.row_lo = expert.row_lo + part * task_rows;
    job.row_hi = job.row_lo + task_rows < expert.row_hi ? job.row_lo + task_rows : expert.row_hi;
    job.bias = expert.bias;
    job.y = y;
    if (floats)
      run_float_panels(job, float_rows);
    else
      run_int_panels(job, int_rows);
  });
}

}  // namespace

void ls_packed_linear(const LsPackedSpec* spec, const uint8_t* weight, const float* x, const float* bias, float* y,
                      int64_t num_rows) {
  Expert expert = {weight, 0, num_rows, bias, 0, 0};
  run(*spec, &expert, 1, x, y, num_rows);
}

void ls_grouped_linear(const LsPackedSpec* spec, const uint8_t* const* weights, const int64_t* starts,
                       int64_t num_experts, const float* x, const float* bias, float* y) {
  Expert* experts = (Expert*)scratch(SCRATCH_PACKED_TASKS, num_experts * (i64)sizeof(Expert));
  i64 used = 0;
  for (i64 e = 0; e < num_experts; e++) {
    if (starts[e] == starts[e + 1]) continue;
    experts[used++] = {weights[e], starts[e], starts[e + 1], bias ? bias + e * spec->num_outputs : nullptr, 0, 0};
  }
  run(*spec, experts, used, x, y, starts[num_experts]);
}

void ls_advise_huge_pages(void* start, int64_t num_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(start, (size_t)num_bytes, MADV_HUGEPAGE);
#else
  (void)start;
  (void)num_bytes;
#endif
}
