// Philox4x32-10 (Salmon et al. 2011). Integers are scalar; Box-Muller goes through the vector functions.
#include "lockstep.h"
#include "philox.h"
#include "pool.h"
#include "simd.h"

namespace {

template <typename Block>
void over_blocks(uint64_t seed, const int64_t* streams, const int64_t* positions, i64 num_rows, i64 num_columns,
                 Block&& body) {
  for (i64 r = 0; r < num_rows; r++)
    for (i64 c = 0; c < num_columns; c += 4) {
      uint32_t bits[4];
      block_bits(seed, (uint64_t)streams[r], (uint64_t)positions[r], (uint32_t)(c / 4), bits);
      body(r * num_columns + c, num_columns - c < 4 ? num_columns - c : (i64)4, bits);
    }
}

}  // namespace

void ls_philox(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
  memcpy(out, counter, 16);
  philox(out, key[0], key[1]);
}

void ls_noise_bits(uint64_t seed, const int64_t* streams, const int64_t* positions, uint32_t* out, int64_t num_rows,
                   int64_t num_columns) {
  over_blocks(seed, streams, positions, num_rows, num_columns, [&](i64 at, i64 num, const uint32_t* bits) {
    for (i64 i = 0; i < num; i++) out[at + i] = bits[i];
  });
}

void ls_uniform(uint64_t seed, const int64_t* streams, const int64_t* positions, float* out, int64_t num_rows,
                int64_t num_columns) {
  over_blocks(seed, streams, positions, num_rows, num_columns, [&](i64 at, i64 num, const uint32_t* bits) {
    for (i64 i = 0; i < num; i++) out[at + i] = to_uniform(bits[i]);
  });
}

void ls_normal(uint64_t seed, const int64_t* streams, const int64_t* positions, float* out, int64_t num_rows,
               int64_t num_columns) {
  // Pairs are gathered until a vector is full: lanes are pairs, (radius, angle) -> (cos, sin).
  float radius[VLEN], angle[VLEN];
  i64 where[VLEN];
  bool second[VLEN];
  i64 filled = 0;
  for (i64 i = 0; i < VLEN; i++) radius[i] = angle[i] = 0.5f;
  auto flush = [&]() {
    vf s, c, rad = vsqrt(splat(-2.0f) * vlog(load(radius)));
    vsincos_turns(load(angle), &s, &c);
    vf first = rad * c, next = rad * s;
    for (i64 i = 0; i < filled; i++) {
      out[where[i]] = first[i];
      if (second[i]) out[where[i] + 1] = next[i];
    }
    filled = 0;
  };
  over_blocks(seed, streams, positions, num_rows, num_columns, [&](i64 at, i64 num, const uint32_t* bits) {
    for (i64 i = 0; i < num; i += 2) {
      radius[filled] = to_uniform(bits[i]);
      angle[filled] = to_uniform(bits[i + 1]);
      where[filled] = at + i;
      second[filled] = i + 1 < num;
      if (++filled == VLEN) flush();
    }
  });
  if (filled) flush();
}

void ls_uniform_index(uint64_t seed, int64_t stream, int64_t position, int64_t size, int64_t* out, int64_t num) {
  float* uniform = (float*)scratch(SCRATCH_PACK_A, 2 * num * (i64)sizeof(float));
  ls_uniform(seed, &stream, &position, uniform, 1, 2 * num);
  for (i64 i = 0; i < num; i++) {
    const double fine = (double)uniform[i] + ((double)uniform[num + i] - 0.5) * 0x1p-23;
    const i64 at = (i64)(fine * (double)size);
    out[i] = at < size ? at : size - 1;
  }
}
