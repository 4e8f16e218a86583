// Prioritised replay (Schaul et al. 2016): a sum tree with minima beside it, and row gathering.
#include "lockstep.h"
#include "simd.h"

void ls_sumtree_update(double* sums, double* minima, int64_t capacity, const int64_t* index, const double* value,
                       int64_t num) {
  for (i64 i = 0; i < num; i++) {
    i64 node = capacity + index[i];
    sums[node] = value[i];
    minima[node] = value[i];
    for (node >>= 1; node >= 1; node >>= 1) {
      // Sums are rebuilt from the children, not adjusted, so that rounding never accumulates.
      sums[node] = sums[2 * node] + sums[2 * node + 1];
      minima[node] = minima[2 * node] < minima[2 * node + 1] ? minima[2 * node] : minima[2 * node + 1];
    }
  }
}

void ls_sumtree_find(const double* sums, int64_t capacity, const double* prefix, int64_t* index, int64_t num) {
  for (i64 i = 0; i < num; i++) {
    double left = prefix[i];
    i64 node = 1;
    while (node < capacity) {
      node *= 2;
      // Rounding in `left` must not lead into a branch without weight.
      if (left >= sums[node] && sums[node + 1] > 0.0) {
        left -= sums[node];
        node++;
      }
    }
    index[i] = node - capacity;
  }
}

void ls_gather_rows(const void* const* sources, void* const* outs, const int64_t* row_bytes, int64_t num_sources,
                    const int64_t* index, int64_t num) {
  for (i64 s = 0; s < num_sources; s++) {
    const char* source = (const char*)sources[s];
    char* out = (char*)outs[s];
    const i64 bytes = row_bytes[s];
    if (bytes == 4) {
      for (i64 b = 0; b < num; b++) memcpy(out + b * 4, source + index[b] * 4, 4);
    } else if (bytes == 8) {
      for (i64 b = 0; b < num; b++) memcpy(out + b * 8, source + index[b] * 8, 8);
    } else {
      for (i64 b = 0; b < num; b++) {
        if (b + 4 < num) __builtin_prefetch(source + index[b + 4] * bytes);
        memcpy(out + b * bytes, source + index[b] * bytes, (size_t)bytes);
      }
    }
  }
}
