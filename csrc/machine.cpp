// What this processor can do at most, for benchmarks to print beside what a kernel does: loops without any overhead.
#include "gemm.h"
#include "lockstep.h"
#include "pool.h"

namespace {

constexpr int CHAINS = 12;  // hides the latency of four to five cycles at two instructions a cycle

template <typename V, typename F>
float chains(i64 num_steps, V x, V y, F&& step) {
  static volatile int unknown = 0;
  const int seed = unknown;  // chains that the compiler could tell to be equal would become one
  V acc[CHAINS];
#pragma GCC unroll 16
  for (int c = 0; c < CHAINS; c++) acc[c] = V{} + (decltype(x[0] + x[0]))(seed + c);
  for (i64 s = 0; s < num_steps; s++) {
#pragma GCC unroll 16
    for (int c = 0; c < CHAINS; c++) acc[c] = step(acc[c], x, y);
  }
  V sum = V{};
#pragma GCC unroll 16
  for (int c = 0; c < CHAINS; c++) sum += acc[c];
  return (float)sum[0];
}

// Operations a lane of 32 bits does in a step; 0: this build has no such instruction.
double lane_operations(int32_t kind) {
  if (kind == LS_PEAK_FP32) return 2.0;
  if (kind == LS_PEAK_BF16) return HAVE_BF16_DOT ? 4.0 : 0.0;
#if defined(__AVX512VNNI__)
  return 8.0;
#elif VLEN == 8
  return kind == LS_PEAK_NIBBLES ? 8.0 : 4.0;
#else
  return 0.0;
#endif
}

#if VLEN == 8
// A product of constants that the compiler must form anew each time.
ALWAYS_INLINE vi unknown(vi x) {
  asm volatile("" : "+x"(x));
  return x;
}
#endif

float run(int32_t kind, i64 num_steps) {
  switch (kind) {
#if VLEN == 8
    case LS_PEAK_INT8:  // codes of 8 bits as 16, see packed_int_avx2.h
      return chains(num_steps, vi{} + 0x00010001, vi{} + 0x00020002, [](vi a, vi x, vi y) {
        return a + (vi)_mm256_madd_epi16((__m256i)unknown(x), (__m256i)y);
      });
    case LS_PEAK_NIBBLES:
      return chains(num_steps, vi{}, vi{} + 0x02020202, [](vi a, vi x, vi y) {
        return (vi)_mm256_add_epi16((__m256i)a, _mm256_maddubs_epi16((__m256i)unknown(x), (__m256i)y));
      });
#endif
#if defined(__AVX512VNNI__)
    case LS_PEAK_INT8:
    case LS_PEAK_NIBBLES:
      return chains(num_steps, vi{} + 0x01010101, vi{} + 0x02020202, [](vi a, vi x, vi y) {
        return (vi)_mm512_dpbusd_epi32((__m512i)a, (__m512i)x, (__m512i)y);
      });
#endif
#if HAVE_BF16_DOT
    case LS_PEAK_BF16:
      return chains(num_steps, splat(0.0f), splat(0.0f), [](vf a, vf x, vf y) {
        return (vf)_mm512_dpbf16_ps((__m512)a, (__m512bh)(__m512)x, (__m512bh)(__m512)y);
      });
#endif
    case LS_PEAK_FP32:
      return chains(num_steps, splat(0.5f), splat(0.5f), [](vf a, vf x, vf y) { return fma(x, y, a); });
    default:
      return NAN;
  }
}

}  // namespace

double ls_peak_operations(int32_t kind, int64_t num_steps, int64_t num_tasks) {
  if (lane_operations(kind) == 0.0) return 0.0;
  float* sink = (float*)scratch(SCRATCH_PLAN, num_tasks * (i64)sizeof(float));
  parallel_for(num_tasks, [&](i64 task) { sink[task] = run(kind, num_steps); });
  return lane_operations(kind) * VLEN * CHAINS * (double)num_steps * (double)num_tasks;
}

int64_t ls_read_memory(const uint8_t* from, int64_t num_bytes) {
  constexpr i64 CHUNK = 1 << 16;
  const i64 num_tasks = num_bytes / CHUNK;
  int64_t* sums = (int64_t*)scratch(SCRATCH_PLAN, num_tasks * (i64)sizeof(int64_t));
  parallel_for(num_tasks, [&](i64 task) {
    const float* p = (const float*)(from + task * CHUNK);
    vi parts[4] = {};
    for (i64 i = 0; i < CHUNK / 4; i += 4 * VLEN) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        __builtin_prefetch((const char*)(p + i + j * VLEN) + 4096);
        parts[j] ^= as_int(load(p + i + j * VLEN));
      }
    }
    const vi all = parts[0] ^ parts[1] ^ parts[2] ^ parts[3];
    sums[task] = 0;
    for (int l = 0; l < VLEN; l++) sums[task] ^= all[l];
  });
  int64_t sum = 0;
  for (i64 t = 0; t < num_tasks; t++) sum ^= sums[t];
  return sum;
}
