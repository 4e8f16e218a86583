// A pool of persistent threads. Tasks are numbered; which thread runs a task never changes what the task computes.
#pragma once
#include <stdint.h>

typedef void (*TaskFn)(void* context, int64_t task);

void pool_set_threads(int num_threads);
int pool_threads();
// Runs fn(context, 0 .. num_tasks-1); returns when all are done. Falls back to a plain loop when the pool is busy with
// another caller, so that two Python threads never wait for each other.
void pool_run(TaskFn fn, void* context, int64_t num_tasks);

template <typename F>
static inline void parallel_for(int64_t num_tasks, F&& body) {
  if (num_tasks <= 1 || pool_threads() <= 1) {
    for (int64_t i = 0; i < num_tasks; i++) body(i);
    return;
  }
  pool_run([](void* context, int64_t task) { (*(F*)context)(task); }, (void*)&body, num_tasks);
}

// Scratch memory of the calling thread, 64-byte aligned, grown on demand and kept. Slots do not overlap.
enum ScratchSlot {
  SCRATCH_PACK_A,
  SCRATCH_PACK_B,
  SCRATCH_ACT_0,
  SCRATCH_ACT_1,
  SCRATCH_WEIGHTS,
  SCRATCH_PLAN,
  SCRATCH_MINIBATCH,
  SCRATCH_ATTENTION,
  SCRATCH_PACKED_ROWS,
  SCRATCH_PACKED_PANEL,
  SCRATCH_PACKED_TASKS,
  SCRATCH_LOW_RANK,
  NUM_SCRATCH
};
void* scratch(ScratchSlot slot, int64_t num_bytes);
