// Rounds rows to int8, one scale for ROW_BLOCK inputs. A block with a NaN or an infinity gets the scale NaN and zeros.
#include "packed.h"

namespace {

constexpr float SMALLEST = 1e-36f;  // a block whose largest magnitude is below counts as zeros: 127 / it may overflow
constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer held in the low mantissa bits

#if VLEN == 8
// Largest lane, or sum of lanes.
template <bool MAX>
ALWAYS_INLINE int32_t fold(__m256i v) {
  auto both = [](__m128i a, __m128i b) __attribute__((always_inline)) {
    return MAX ? _mm_max_epi32(a, b) : _mm_add_epi32(a, b);
  };
  __m128i half = both(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = both(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(both(half, _mm_shuffle_epi32(half, 0xb1)));
}

// 32 integers that fit a byte as bytes, or as 16-bit integers with four neighbours in the order 0 2 1 3.
ALWAYS_INLINE void store_codes(const __m256i v[4], bool wide, int8_t* codes) {
  const __m256i low = _mm256_packs_epi32(v[0], v[1]), high = _mm256_packs_epi32(v[2], v[3]);
  if (!wide) {
    const __m256i bytes = _mm256_packs_epi16(low, high), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return _mm256_storeu_si256((__m256i*)codes, _mm256_permutevar8x32_epi32(bytes, order));
  }
  const __m256i pair[2] = {low, high};
  for (int i = 0; i < 2; i++) {
    const __m256i rising = _mm256_permute4x64_epi64(pair[i], 0xd8);
    const __m256i turned = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(rising, 0xd8), 0xd8);
    _mm256_storeu_si256((__m256i*)(codes + 32 * i), turned);
  }
}
#endif

// One block of ROW_BLOCK inputs: integers, scale, and the sums of its two halves. The largest magnitude is found on the
// bits, where a NaN is above infinity and infinity above every number.
ALWAYS_INLINE float quantise_block(const float* x, bool wide, int8_t* codes, int32_t sums[2]) {
  constexpr int PARTS = (int)ROW_BLOCK / VLEN;
  vf part[PARTS];
  vi largest = {};
  for (int j = 0; j < PARTS; j++) {
    part[j] = load(x + j * VLEN);
    const vi size = as_int(part[j]) & 0x7fffffff;
    largest = as_int(select(size > largest, as_float(size), as_float(largest)));
  }
  int32_t bits = 0;
#if VLEN == 16
  bits = _mm512_reduce_max_epi32((__m512i)largest);
#elif VLEN == 8
  bits = fold<true>((__m256i)largest);
#else
  for (int l = 0; l < VLEN; l++) bits = largest[l] > bits ? largest[l] : bits;
#endif
  float size;
  memcpy(&size, &bits, 4);
  sums[0] = sums[1] = 0;
  if (bits >= 0x7f800000 || size < SMALLEST) {
    memset(codes, 0, ROW_BLOCK * (wide ? 2 : 1));
    return bits >= 0x7f800000 ? NAN : 0.0f;
  }
  const float inverse = 127.0f / size;
  const vf magic = splat(MAGIC);
#if VLEN == 8
  __m256i rounded[PARTS];
  for (int j = 0; j < PARTS; j++) rounded[j] = (__m256i)(as_int(part[j] * splat(inverse) + magic) - as_int(magic));
  store_codes(rounded, wide, codes);
  for (int h = 0; h < 2; h++) sums[h] = fold<false>(_mm256_add_epi32(rounded[2 * h], rounded[2 * h + 1]));
  return size / 127.0f;
#endif
  for (int j = 0; j < PARTS; j++) {
    const vi rounded = as_int(part[j] * splat(inverse) + magic) - as_int(magic);
    int32_t& sum = sums[j * VLEN * 2 / (int)ROW_BLOCK];
#if VLEN == 16
    _mm_storeu_si128((__m128i*)(codes + j * VLEN), _mm512_cvtepi32_epi8((__m512i)rounded));
    sum += _mm512_reduce_add_epi32((__m512i)rounded);
#else
    for (int l = 0; l < VLEN; l++) {
      codes[j * VLEN + l] = (int8_t)rounded[l];
      sum += rounded[l];
    }
#endif
  }
  return size / 127.0f;
}

#if VLEN == 16
// Lane b: the sum, or with MAX the maximum, of v[b].
template <bool MAX>
ALWAYS_INLINE __m512i across(const __m512i v[16]) {
  auto both = [](__m512i a, __m512i b) __attribute__((always_inline)) {
    return MAX ? _mm512_max_epi32(a, b) : _mm512_add_epi32(a, b);
  };
  __m512i pairs[8], quads[4], halves[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
    pairs[i] = both(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 8
  for (int i = 0; i < 4; i++)
    quads[i] = both(_mm512_unpacklo_epi64(pairs[2 * i], pairs[2 * i + 1]),
                    _mm512_unpackhi_epi64(pairs[2 * i], pairs[2 * i + 1]));
#pragma GCC unroll 8
  for (int i = 0; i < 2; i++)
    halves[i] = both(_mm512_shuffle_i32x4(quads[2 * i], quads[2 * i + 1], 0x88),
                     _mm512_shuffle_i32x4(quads[2 * i], quads[2 * i + 1], 0xdd));
  return both(_mm512_shuffle_i32x4(halves[0], halves[1], 0x88), _mm512_shuffle_i32x4(halves[0], halves[1], 0xdd));
}

// The same as sixteen calls of quantise_block, with the divisions and reductions of sixteen blocks in one vector.
void quantise_16_blocks(const float* x, const IntRows& rows, i64 first, i64 halves, int32_t offset) {
  __m512i low[16], high[16];
  const __m512i no_sign = _mm512_set1_epi32(0x7fffffff);
#pragma GCC unroll 16
  for (int b = 0; b < 16; b++)
    low[b] = _mm512_max_epi32(_mm512_and_si512(_mm512_loadu_si512(x + b * ROW_BLOCK), no_sign),
                              _mm512_and_si512(_mm512_loadu_si512(x + b * ROW_BLOCK + 16), no_sign));
  const __m512i bits = across<true>(low);
  const vf size = (vf)bits;
  const vi broken = (vi)bits >= 0x7f800000, used = ~broken & (size >= splat(SMALLEST));
  const vf inverse = select(used, splat(127.0f) / select(used, size, splat(1.0f)), splat(0.0f));
  const vf scale = select(broken, splat(NAN), select(used, size / splat(127.0f), splat(0.0f)));
  store(rows.scale + first, scale);
  float inverses[16];
  store(inverses, inverse);
  const vf magic = splat(MAGIC);
  const vi zero = as_int(magic);
  for (int b = 0; b < 16; b++) {
    const vf by = splat(inverses[b]);
    low[b] = (__m512i)(as_int(load(x + b * ROW_BLOCK) * by + magic) - zero);
    high[b] = (__m512i)(as_int(load(x + b * ROW_BLOCK + 16) * by + magic) - zero);
    if (broken[b]) low[b] = high[b] = _mm512_setzero_si512();
    int8_t* codes = rows.codes + (first + b) * ROW_BLOCK;
    _mm_storeu_si128((__m128i*)codes, _mm512_cvtepi32_epi8(low[b]));
    _mm_storeu_si128((__m128i*)(codes + 16), _mm512_cvtepi32_epi8(high[b]));
    if (halves == 1) low[b] = _mm512_add_epi32(low[b], high[b]);
  }
  vi sums[2] = {(vi)across<false>(low)};
  if (halves == 2) sums[1] = (vi)across<false>(high);
  for (i64 h = 0; h < halves; h++) {
    const vi start = sums[h] * -offset;
    const vf moment = scale * __builtin_convertvector(sums[h], vf);
    if (halves == 1) {
      store((float*)rows.start + first, as_float(start));
      store(rows.moment + first, moment);
      continue;
    }
    for (i64 b = 0; b < 16; b++) {
      rows.start[(first + b) * 2 + h] = start[b];
      rows.moment[(first + b) * 2 + h] = moment[b];
    }
  }
}
#endif

}  // namespace

IntRows prepare_int_rows(const LsPackedSpec& spec, const float* x, i64 num_rows) {
  const i64 num_inputs = spec.num_inputs, num_blocks = num_inputs / ROW_BLOCK, halves = spec.group == 16 ? 2 : 1;
  const i64 num = num_rows * num_blocks;
  const bool wide = VLEN == 8 && spec.kind != LS_PACKED_NIBBLES;
  const i64 block_bytes = ROW_BLOCK * (wide ? 2 : 1);
  uint8_t* memory = (uint8_t*)scratch(SCRATCH_PACKED_ROWS, num * (block_bytes + 4 + 8 * halves));
  IntRows rows;
  rows.codes = (int8_t*)memory;
  rows.code_bytes = wide ? 2 : 1;
  rows.scale = (float*)(memory + num * block_bytes);
  rows.start = (int32_t*)(rows.scale + num);
  rows.moment = (float*)(rows.start + num * halves);
  const i64 blocks_per_task = 2048;
  parallel_for((num + blocks_per_task - 1) / blocks_per_task, [&](i64 task) {
    const i64 end = (task + 1) * blocks_per_task < num ? (task + 1) * blocks_per_task : num;
    i64 b = task * blocks_per_task;
#if VLEN == 16
    for (; b + 16 <= end; b += 16) quantise_16_blocks(x + b * ROW_BLOCK, rows, b, halves, (int32_t)spec.offset);
#endif
    for (; b < end; b++) {
      int32_t sums[2];
      rows.scale[b] = quantise_block(x + b * ROW_BLOCK, wide, rows.codes + b * block_bytes, sums);
      if (halves == 1) sums[0] += sums[1];
      for (i64 h = 0; h < halves; h++) {
        rows.start[b * halves + h] = -(int32_t)spec.offset * sums[h];
        rows.moment[b * halves + h] = rows.scale[b] * (float)sums[h];
      }
    }
  });
  return rows;
}
