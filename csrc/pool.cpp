// Main thread: publishes a job, runs tasks, waits until every task is done; a worker that never came is not waited for,
// so that a processor which is busy with something else costs its share and no more.
// Workers: spin for a new job for some microseconds, offer the processor for some more, then sleep on a condition
// variable; woken by pool_run.
// End: workers are daemons of the process; a fork leaves none in the child, which starts its own at its first job.
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>

namespace {

constexpr int MAX_THREADS = 64;
constexpr int SPINS = 3000;    // about 40 microseconds
constexpr int OFFERS = 300;    // calls of sched_yield before sleep, each at least half a microsecond

struct Pool {
  pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER;  // held by the caller whose job is running
  pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
  int num_threads = 1;   // wanted, the caller included
  int num_workers = 0;   // started
  // Job number in the upper half, tasks that nobody has taken yet in the lower. A task is taken by a compare-exchange of
  // both: it succeeds only while the job that `fn` was read for still has tasks left, and only then is `fn` its own.
  uint64_t claim = 0;
  int sleepers = 0;
  TaskFn fn = nullptr;
  void* context = nullptr;
  int64_t num_tasks = 0;
  int64_t done = 0;
  int active_limit = 0;  // workers with an index below it take part
};

Pool pool;
thread_local bool inside_job = false;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

void work() {
  bool before = inside_job;
  inside_job = true;
  uint64_t seen = __atomic_load_n(&pool.claim, __ATOMIC_ACQUIRE);
  while ((uint32_t)seen != 0) {
    TaskFn fn = __atomic_load_n(&pool.fn, __ATOMIC_RELAXED);
    void* context = __atomic_load_n(&pool.context, __ATOMIC_RELAXED);
    int64_t task = __atomic_load_n(&pool.num_tasks, __ATOMIC_RELAXED) - (int64_t)(uint32_t)seen;
    if (!__atomic_compare_exchange_n(&pool.claim, &seen, seen - 1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) continue;
    fn(context, task);
    __atomic_fetch_add(&pool.done, 1, __ATOMIC_RELEASE);
    seen = __atomic_load_n(&pool.claim, __ATOMIC_ACQUIRE);
  }
  inside_job = before;
}

inline uint32_t current_job() { return (uint32_t)(__atomic_load_n(&pool.claim, __ATOMIC_ACQUIRE) >> 32); }

struct WorkerArgs {
  int index;
  uint32_t seen;
};

void* worker_main(void* raw) {
  WorkerArgs args = *(WorkerArgs*)raw;
  free(raw);
  uint32_t seen = args.seen;
  for (;;) {
    for (int waits = 0; current_job() == seen && waits < SPINS + OFFERS; waits++)
      if (waits < SPINS)
        relax();
      else
        sched_yield();
    if (current_job() == seen) {
      pthread_mutex_lock(&pool.lock);
      pool.sleepers++;
      while (current_job() == seen) pthread_cond_wait(&pool.wake, &pool.lock);
      pool.sleepers--;
      pthread_mutex_unlock(&pool.lock);
    }
    seen = current_job();
    if (args.index < __atomic_load_n(&pool.active_limit, __ATOMIC_RELAXED)) work();
  }
  return nullptr;
}

void child_after_fork() {
  int num_threads = pool.num_threads;
  pool = Pool();
  pool.num_threads = num_threads;
  inside_job = false;
}

void ensure_workers() {
  static bool registered = false;
  if (!registered) {
    pthread_atfork(nullptr, nullptr, child_after_fork);
    registered = true;
  }
  while (pool.num_workers < pool.num_threads - 1) {
    WorkerArgs* args = (WorkerArgs*)malloc(sizeof(WorkerArgs));
    args->index = pool.num_workers;
    args->seen = current_job();
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_t thread;
    int failed = pthread_create(&thread, &attr, worker_main, args);
    pthread_attr_destroy(&attr);
    if (failed) {
      free(args);
      break;
    }
    pool.num_workers++;
  }
}

struct ThreadScratch {
  void* memory[NUM_SCRATCH] = {};
  int64_t size[NUM_SCRATCH] = {};
  ~ThreadScratch() {
    for (void* p : memory) free(p);
  }
};
thread_local ThreadScratch thread_scratch;

}  // namespace

void pool_set_threads(int num_threads) {
  pthread_mutex_lock(&pool.owner);
  pool.num_threads = num_threads < 1 ? 1 : (num_threads > MAX_THREADS ? MAX_THREADS : num_threads);
  pthread_mutex_unlock(&pool.owner);
}

int pool_threads() { return pool.num_threads; }

void pool_run(TaskFn fn, void* context, int64_t num_tasks) {
  if (num_tasks <= 1 || inside_job || pthread_mutex_trylock(&pool.owner) != 0) {
    for (int64_t i = 0; i < num_tasks; i++) fn(context, i);
    return;
  }
  ensure_workers();
  __atomic_store_n(&pool.fn, fn, __ATOMIC_RELAXED);
  __atomic_store_n(&pool.context, context, __ATOMIC_RELAXED);
  __atomic_store_n(&pool.num_tasks, num_tasks, __ATOMIC_RELAXED);
  __atomic_store_n(&pool.active_limit, pool.num_threads - 1, __ATOMIC_RELAXED);
  __atomic_store_n(&pool.done, 0, __ATOMIC_RELAXED);
  pthread_mutex_lock(&pool.lock);
  __atomic_store_n(&pool.claim, (uint64_t)(current_job() + 1) << 32 | (uint64_t)num_tasks, __ATOMIC_RELEASE);
  if (pool.sleepers) pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.lock);
  work();
  for (int waits = 0; __atomic_load_n(&pool.done, __ATOMIC_ACQUIRE) != num_tasks; waits++)
    if (waits < SPINS)
      relax();
    else
      sched_yield();  // the worker that is late may be waiting for this processor
  pthread_mutex_unlock(&pool.owner);
}

void* scratch(ScratchSlot slot, int64_t num_bytes) {
  ThreadScratch& mine = thread_scratch;
  if (mine.size[slot] < num_bytes) {
    free(mine.memory[slot]);
    int64_t size = (num_bytes + num_bytes / 2 + 4095) / 4096 * 4096;
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, (size_t)size) != 0) abort();
    mine.memory[slot] = memory;
    mine.size[slot] = size;
  }
  return mine.memory[slot];
}
