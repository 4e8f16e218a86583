// Main thread: publishes a job, runs tasks, waits until every worker has left the job.
// Workers: spin for a new job number for some microseconds, then sleep on a condition variable; woken by pool_run.
// End: workers are daemons of the process; a fork leaves none in the child, which starts its own at its first job.
#include "pool.h"

#include <pthread.h>
#include <stdlib.h>

namespace {

constexpr int MAX_THREADS = 64;
constexpr int SPINS = 4000;

struct Pool {
  pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER;  // held by the caller whose job is running
  pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
  int num_threads = 1;   // wanted, the caller included
  int num_workers = 0;   // started
  uint64_t job = 0;      // incremented per job
  int sleepers = 0;
  TaskFn fn = nullptr;
  void* context = nullptr;
  int64_t num_tasks = 0;
  int64_t next_task = 0;
  int active_limit = 0;  // workers with an index below it take part
  int busy = 0;          // workers that have not left the job yet
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
  TaskFn fn = pool.fn;
  void* context = pool.context;
  int64_t num_tasks = pool.num_tasks;
  for (;;) {
    int64_t task = __atomic_fetch_add(&pool.next_task, 1, __ATOMIC_RELAXED);
    if (task >= num_tasks) break;
    fn(context, task);
  }
  inside_job = before;
}

struct WorkerArgs {
  int index;
  uint64_t seen;
};

void* worker_main(void* raw) {
  WorkerArgs args = *(WorkerArgs*)raw;
  free(raw);
  uint64_t seen = args.seen;
  for (;;) {
    int spins = 0;
    while (__atomic_load_n(&pool.job, __ATOMIC_ACQUIRE) == seen && spins < SPINS) {
      relax();
      spins++;
    }
    if (__atomic_load_n(&pool.job, __ATOMIC_ACQUIRE) == seen) {
      pthread_mutex_lock(&pool.lock);
      pool.sleepers++;
      while (__atomic_load_n(&pool.job, __ATOMIC_ACQUIRE) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
      pool.sleepers--;
      pthread_mutex_unlock(&pool.lock);
    }
    seen = __atomic_load_n(&pool.job, __ATOMIC_ACQUIRE);
    if (args.index < pool.active_limit) work();
    __atomic_fetch_sub(&pool.busy, 1, __ATOMIC_RELEASE);
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
    args->seen = pool.job;
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
  pool.fn = fn;
  pool.context = context;
  pool.num_tasks = num_tasks;
  pool.active_limit = pool.num_threads - 1;
  __atomic_store_n(&pool.next_task, 0, __ATOMIC_RELAXED);
  __atomic_store_n(&pool.busy, pool.num_workers, __ATOMIC_RELAXED);
  pthread_mutex_lock(&pool.lock);
  __atomic_fetch_add(&pool.job, 1, __ATOMIC_RELEASE);
  if (pool.sleepers) pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.lock);
  work();
  while (__atomic_load_n(&pool.busy, __ATOMIC_ACQUIRE) != 0) relax();
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
