// Philox4x32-10 (Salmon et al. 2011): the counter-based noise behind every draw.
#pragma once
#include "simd.h"

ALWAYS_INLINE void philox(uint32_t c[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; round++) {
    uint64_t a = (uint64_t)0xD2511F53u * c[0], b = (uint64_t)0xCD9E8D57u * c[2];
    uint32_t n0 = (uint32_t)(b >> 32) ^ c[1] ^ k0, n2 = (uint32_t)(a >> 32) ^ c[3] ^ k1;
    c[1] = (uint32_t)b;
    c[3] = (uint32_t)a;
    c[0] = n0;
    c[2] = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Streams and positions count modulo 2^48: 32 low bits each in a word of their own, 16 high bits sharing the last.
ALWAYS_INLINE uint32_t philox_top(uint64_t stream, uint64_t position) {
  return (uint32_t)((stream >> 32) & 0xffff) | (uint32_t)(((position >> 32) & 0xffff) << 16);
}
ALWAYS_INLINE void block_bits(uint64_t seed, uint64_t stream, uint64_t position, uint32_t block, uint32_t out[4]) {
  out[0] = block;
  out[1] = (uint32_t)stream;
  out[2] = (uint32_t)position;
  out[3] = philox_top(stream, position);
  philox(out, (uint32_t)seed, (uint32_t)(seed >> 32));
}

// Sixteen blocks side by side, first .. first + 15: out[word][block]. Loops that the compiler turns into vectors.
enum { PHILOX_BLOCKS = 16 };
ALWAYS_INLINE void many_block_bits(uint64_t seed, uint64_t stream, uint64_t position, uint32_t first,
                                   uint32_t out[4][PHILOX_BLOCKS]) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int i = 0; i < PHILOX_BLOCKS; i++) {
    out[0][i] = first + (uint32_t)i;
    out[1][i] = (uint32_t)stream;
    out[2][i] = (uint32_t)position;
    out[3][i] = philox_top(stream, position);
  }
  for (int round = 0; round < 10; round++) {
    for (int i = 0; i < PHILOX_BLOCKS; i++) {
      uint64_t a = (uint64_t)0xD2511F53u * out[0][i], b = (uint64_t)0xCD9E8D57u * out[2][i];
      uint32_t n0 = (uint32_t)(b >> 32) ^ out[1][i] ^ k0, n2 = (uint32_t)(a >> 32) ^ out[3][i] ^ k1;
      out[1][i] = (uint32_t)b;
      out[3][i] = (uint32_t)a;
      out[0][i] = n0;
      out[2][i] = n2;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// 23 bits and a half: exact in float32 and never 0 or 1.
ALWAYS_INLINE float to_uniform(uint32_t bits) { return ((float)(bits >> 9) + 0.5f) * 1.1920928955078125e-7f; }
