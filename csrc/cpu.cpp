#include "lockstep.h"
#include "pool.h"

int32_t ls_cpu_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // The top build uses both; every processor with bf16 dot products so far has the integer ones too.
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) return 3;
  if (avx2 && avx512) return 2;
  if (avx2) return 1;
#endif
  return 0;
}

int32_t ls_built_level() {
#if defined(__AVX512BF16__)
  return 3;
#elif defined(__AVX512F__)
  return 2;
#elif defined(__AVX2__)
  return 1;
#else
  return 0;
#endif
}

#ifndef LS_INTERFACE
#define LS_INTERFACE 0  // whoever compiles otherwise than by setup.py
#endif
int32_t ls_interface() { return LS_INTERFACE; }

void ls_set_num_threads(int32_t num_threads) { pool_set_threads(num_threads); }
int32_t ls_num_threads() { return pool_threads(); }
