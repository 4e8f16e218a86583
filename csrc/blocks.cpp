// Quantised blocks as files hold them (ggml's structures) straight into the packed layout of
// lockstep/kernels/packed_linear/weight.py, and rows of a packed matrix back into floats.
//
// A format is a type with: WEIGHTS and BYTES of a block, GROUP, NIBBLES (codes stay 4 bits), MINIMUMS, `numbers` (scales and
// minima as the format defines them, each operation rounded to float32) and `codes` (as they are stored, offset added).
#include "lockstep.h"
#include "packed.h"

namespace {

float widen_half(const uint8_t* p) {
  uint16_t half;
  memcpy(&half, p, 2);
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
  // 2^112 moves the exponent's bias and makes subnormal halves normal; 31 is the exponent of infinities and NaNs.
  uint32_t bits = rest << 13;
  float value;
  memcpy(&value, &bits, 4);
  value = value * 0x1p112f;
  memcpy(&bits, &value, 4);
  if (rest >= 0x7c00) bits = 0x7f800000 | (rest & 0x3ff) << 13;
  bits |= sign;
  memcpy(&value, &bits, 4);
  return value;
}

// Of a number that is a half, see is_half.
uint16_t narrow_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
  const float size = fabsf(x) * 0x1p-112f;
  memcpy(&bits, &size, 4);
  return sign | (uint16_t)(bits >> 13);
}

bool is_half(float x) {
  const float size = fabsf(x);
  if (!(size <= 65504.0f)) return false;
  uint16_t half = narrow_half(x);
  return widen_half((const uint8_t*)&half) == x;
}

// Low nibbles of `run` bytes, then their high ones; four bytes at a time, as the codes are read again.
ALWAYS_INLINE void nibbles(const uint8_t* from, int run, uint8_t* codes) {
  for (int i = 0; i < run; i += 4) {
    uint32_t four;
    memcpy(&four, from + i, 4);
    const uint32_t low = four & 0x0f0f0f0f, high = four >> 4 & 0x0f0f0f0f;
    memcpy(codes + i, &low, 4);
    memcpy(codes + run + i, &high, 4);
  }
}

struct Simple {  // one scale, 32 weights
  static constexpr i64 WEIGHTS = 32, GROUP = 32;
  static constexpr bool NIBBLES = true, MINIMUMS = false;
  static void numbers(const uint8_t* b, float* scales, float*) { scales[0] = widen_half(b); }
};
struct WithMinimum : Simple {
  static constexpr bool MINIMUMS = true;
  static void numbers(const uint8_t* b, float* scales, float* minimums) {
    scales[0] = widen_half(b);
    minimums[0] = widen_half(b + 2);
  }
};

struct Q4_0 : Simple {
  static constexpr i64 BYTES = 18;
  static void codes(const uint8_t* b, uint8_t* to) { nibbles(b + 2, 16, to); }
};
using IQ4_NL = Q4_0;  // its codes are places in a table

struct Q4_1 : WithMinimum {
  static constexpr i64 BYTES = 20;
  static void codes(const uint8_t* b, uint8_t* to) { nibbles(b + 4, 16, to); }
};

// 4 bits from `low`, the fifth from the 32 bits at `high`; plus `offset`.
ALWAYS_INLINE void five_bits(const uint8_t* high, const uint8_t* low, uint8_t offset, uint8_t* to) {
  nibbles(low, 16, to);
  for (int i = 0; i < 32; i++) to[i] = (uint8_t)(to[i] + ((high[i / 8] >> (i % 8) & 1) << 4) + offset);
}
struct Q5_0 : Simple {
  static constexpr i64 BYTES = 22;
  static constexpr bool NIBBLES = false;
  static void codes(const uint8_t* b, uint8_t* to) { five_bits(b + 2, b + 6, 128 - 16, to); }
};
struct Q5_1 : WithMinimum {
  static constexpr i64 BYTES = 24;
  static constexpr bool NIBBLES = false;
  static void codes(const uint8_t* b, uint8_t* to) { five_bits(b + 4, b + 8, 128, to); }
};

struct Q8_0 : Simple {
  static constexpr i64 BYTES = 34;
  static constexpr bool NIBBLES = false;
  static void codes(const uint8_t* b, uint8_t* to) {
    for (int i = 0; i < 32; i++) to[i] = b[2 + i] ^ 0x80;
  }
};

struct MXFP4 : Simple {
  static constexpr i64 BYTES = 17;
  // 2^(e - 128), half of what the exponent stands for; subnormal below e = 2.
  static void numbers(const uint8_t* b, float* scales, float*) {
    const uint32_t bits = b[0] < 2 ? 0x00200000u << b[0] : (uint32_t)(b[0] - 1) << 23;
    memcpy(scales, &bits, 4);
  }
  static void codes(const uint8_t* b, uint8_t* to) { nibbles(b + 1, 16, to); }
};

struct Super {  // 256 weights, scales of scales
  static constexpr i64 WEIGHTS = 256;
  static constexpr bool NIBBLES = false, MINIMUMS = false;
};

// Weight i of two bits: of every 32 bytes the lowest pairs first.
ALWAYS_INLINE uint8_t bit_pair(const uint8_t* from, int i) { return from[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3; }
ALWAYS_INLINE uint8_t bit_plane(const uint8_t* from, int i) { return from[i % 32] >> (i / 32) & 1; }

struct Q2_K : Super {
  static constexpr i64 BYTES = 84, GROUP = 16;
  static constexpr bool NIBBLES = true, MINIMUMS = true;
  static void numbers(const uint8_t* b, float* scales, float* minimums) {
    const float d = widen_half(b + 80), dmin = widen_half(b + 82);
    for (int s = 0; s < 16; s++) {
      scales[s] = d * (float)(b[s] & 15);
      minimums[s] = -(dmin * (float)(b[s] >> 4));
    }
  }
  static void codes(const uint8_t* b, uint8_t* to) {
    for (int i = 0; i < 256; i++) to[i] = bit_pair(b + 16, i) + 8;
  }
};

struct Q3_K : Super {
  static constexpr i64 BYTES = 110, GROUP = 16;
  static constexpr bool NIBBLES = true;
  static void numbers(const uint8_t* b, float* scales, float*) {
    const float d = widen_half(b + 108);
    for (int s = 0; s < 16; s++) {
      const int low = s < 8 ? b[96 + s] & 15 : b[96 + s - 8] >> 4, top = b[104 + s % 4] >> (s / 4 * 2) & 3;
      scales[s] = d * (float)((low | top << 4) - 32);
    }
  }
  static void codes(const uint8_t* b, uint8_t* to) {
    for (int i = 0; i < 256; i++) to[i] = (uint8_t)((bit_pair(b + 32, i) | bit_plane(b, i) << 2) + 4);
  }
};

struct SixBitPairs : Super {  // eight 6-bit scales and minima in 12 bytes from byte 4 on
  static constexpr i64 GROUP = 32;
  static constexpr bool MINIMUMS = true;
  static void numbers(const uint8_t* b, float* scales, float* minimums) {
    const float d = widen_half(b), dmin = widen_half(b + 2);
    const uint8_t *first = b + 4, *second = b + 8, *third = b + 12;
    for (int s = 0; s < 8; s++) {
      const int j = s % 4;
      const int scale = s < 4 ? first[j] & 63 : (third[j] & 15) | (first[j] >> 6) << 4;
      const int minimum = s < 4 ? second[j] & 63 : third[j] >> 4 | (second[j] >> 6) << 4;
      scales[s] = d * (float)scale;
      minimums[s] = -(dmin * (float)minimum);
    }
  }
};
struct Q4_K : SixBitPairs {
  static constexpr i64 BYTES = 144;
  static constexpr bool NIBBLES = true;
  static void codes(const uint8_t* b, uint8_t* to) {
    for (int part = 0; part < 4; part++) nibbles(b + 16 + 32 * part, 32, to + 64 * part);
  }
};
struct Q5_K : SixBitPairs {
  static constexpr i64 BYTES = 176;
  static void codes(const uint8_t* b, uint8_t* to) {
    for (int part = 0; part < 4; part++) nibbles(b + 48 + 32 * part, 32, to + 64 * part);
    for (int i = 0; i < 256; i++) to[i] = (uint8_t)((to[i] | bit_plane(b + 16, i) << 4) + 128);
  }
};

struct Q6_K : Super {
  static constexpr i64 BYTES = 210, GROUP = 16;
  static void numbers(const uint8_t* b, float* scales, float*) {
    const float d = widen_half(b + 208);
    for (int s = 0; s < 16; s++) scales[s] = d * (float)(int8_t)b[192 + s];
  }
  static void codes(const uint8_t* b, uint8_t* to) {
    for (int part = 0; part < 2; part++) nibbles(b + 64 * part, 64, to + 128 * part);
    for (int i = 0; i < 256; i++) to[i] = (uint8_t)((to[i] | bit_pair(b + 128, i) << 4) + 128 - 32);
  }
};

struct IQ4_XS : Super {
  static constexpr i64 BYTES = 136, GROUP = 32;
  static constexpr bool NIBBLES = true;
  static void numbers(const uint8_t* b, float* scales, float*) {
    const float d = widen_half(b);
    for (int s = 0; s < 8; s++) {
      const int low = b[4 + s / 2] >> (s % 2 * 4) & 15, high = (b[2 + s / 4] >> (s % 4 * 2)) & 3;
      scales[s] = d * (float)((low | high << 4) - 32);
    }
  }
  static void codes(const uint8_t* b, uint8_t* to) {
    for (int part = 0; part < 8; part++) nibbles(b + 8 + 16 * part, 16, to + 32 * part);
  }
};

struct Packing {
  const LsPackedSpec& spec;
  const uint8_t* const* rows;
  uint8_t* out;
};

template <typename F>
int32_t scan_row(const uint8_t* row, i64 num_inputs) {
  int32_t found = 0;
  for (i64 k = 0; k < num_inputs; k += F::WEIGHTS, row += F::BYTES) {
    float scales[F::WEIGHTS / F::GROUP], minimums[F::WEIGHTS / F::GROUP];
    F::numbers(row, scales, minimums);
    for (i64 s = 0; s < F::WEIGHTS / F::GROUP; s++) {
      if (!(fabsf(scales[s]) < INFINITY)) found |= LS_BLOCKS_BAD_SCALE;
      if (!is_half(scales[s])) found |= LS_BLOCKS_WIDE_SCALE;
      if (F::MINIMUMS && !(fabsf(minimums[s]) < INFINITY)) found |= LS_BLOCKS_BAD_MINIMUM;
      if (F::MINIMUMS && !is_half(minimums[s])) found |= LS_BLOCKS_WIDE_MINIMUM;
    }
  }
  return found;
}

ALWAYS_INLINE void put_number(uint8_t* to, i64 width, int lane, float x) {
  const uint16_t half = narrow_half(x);
  if (width == 2) memcpy(to + lane * 2, &half, 2);
  if (width == 4) memcpy(to + lane * 4, &x, 4);
}

template <typename F>
void pack_panel(const Packing& p, i64 panel) {
  constexpr i64 GROUPS = F::WEIGHTS / F::GROUP, CODE_BYTES = F::GROUP * INT_PANEL / (F::NIBBLES ? 2 : 1);
  const LsPackedSpec& spec = p.spec;
  const i64 scale_end = CODE_BYTES + INT_PANEL * spec.scale_bytes;
  const i64 unit = scale_end + INT_PANEL * spec.minimum_bytes;
  uint8_t* to = p.out + panel * panel_bytes(spec);
  for (i64 block = 0; block < spec.num_inputs / F::WEIGHTS; block++, to += GROUPS * unit) {
    for (int lane = 0; lane < (int)INT_PANEL; lane++) {
      const i64 row = panel * INT_PANEL + lane;
      uint8_t codes[F::WEIGHTS] = {};
      float scales[GROUPS] = {}, minimums[GROUPS] = {};
      if (row < spec.num_outputs) {
        F::codes(p.rows[row] + block * F::BYTES, codes);
        F::numbers(p.rows[row] + block * F::BYTES, scales, minimums);
      }
      for (i64 g = 0; g < GROUPS; g++) {
        uint8_t* here = to + g * unit;
        const uint8_t* mine = codes + g * F::GROUP;
        for (i64 k = 0; k < F::GROUP; k += F::NIBBLES ? 8 : 4, here += 4 * INT_PANEL) {
          uint32_t low, high = 0;
          memcpy(&low, mine + k, 4);
          if (F::NIBBLES) memcpy(&high, mine + k + 4, 4);
          low |= high << 4;
          memcpy(here + 4 * lane, &low, 4);
        }
        put_number(to + g * unit + CODE_BYTES, spec.scale_bytes, lane, scales[g]);
        put_number(to + g * unit + scale_end, spec.minimum_bytes, lane, minimums[g]);
      }
    }
  }
}

struct Format {
  int32_t (*scan)(const uint8_t*, i64);
  void (*pack)(const Packing&, i64);
};
template <typename F>
constexpr Format format = {scan_row<F>, pack_panel<F>};

const Format formats[LS_NUM_BLOCKS] = {format<Q4_0>, format<Q4_1>, format<Q5_0>, format<Q5_1>,   format<Q8_0>,
                                       format<Q2_K>, format<Q3_K>, format<Q4_K>, format<Q5_K>,   format<Q6_K>,
                                       format<IQ4_NL>, format<IQ4_XS>, format<MXFP4>};

// Element k of output n, as `unpack` of packing.py has it: code * scale, then + minimum.
void unpack_int_row(const LsPackedSpec& spec, const uint8_t* data, i64 n, float* y) {
  const uint8_t* unit = data + n / INT_PANEL * panel_bytes(spec);
  const i64 lane = n % INT_PANEL, group = spec.group, pieces = spec.kind == LS_PACKED_BYTES ? 4 : 8;
  const i64 code_bytes = group / pieces * 4 * INT_PANEL;
  auto number = [&](const uint8_t* from, i64 width) {
    float x;
    if (width == 2) return widen_half(from + lane * 2);
    memcpy(&x, from + lane * 4, 4);
    return x;
  };
  for (i64 k0 = 0; k0 < spec.num_inputs; k0 += group) {
    const uint8_t* end = unit + code_bytes;
    const float scale = number(end, spec.scale_bytes);
    const float minimum = spec.minimum_bytes ? number(end + INT_PANEL * spec.scale_bytes, spec.minimum_bytes) : 0.0f;
    for (i64 k = 0; k < group; k++) {
      const uint8_t byte = unit[k / pieces * 4 * INT_PANEL + lane * 4 + k % 4];
      uint8_t stored = byte;
      if (pieces == 8) stored = k % 8 < 4 ? byte & 15 : byte >> 4;
      if (spec.kind == LS_PACKED_TABLE) stored = spec.table[stored];
      const float value = (float)((int)stored - (int)spec.offset) * scale;
      y[k0 + k] = spec.minimum_bytes ? value + minimum : value;
    }
    unit = end + INT_PANEL * (spec.scale_bytes + spec.minimum_bytes);
  }
}

void unpack_float_row(const LsPackedSpec& spec, const uint8_t* data, i64 n, float* y) {
  const uint8_t* panel = data + n / FLOAT_PANEL * panel_bytes(spec);
  const i64 lane = n % FLOAT_PANEL;
  for (i64 k = 0; k < spec.num_inputs; k++) {
    if (spec.kind == LS_PACKED_FP32) {
      memcpy(y + k, panel + (k * FLOAT_PANEL + lane) * 4, 4);
      continue;
    }
    uint16_t half;
    memcpy(&half, panel + (k / 2 * FLOAT_PANEL + lane) * 4 + k % 2 * 2, 2);
    const uint32_t bits = (uint32_t)half << 16;
    memcpy(y + k, &bits, 4);
  }
}

}  // namespace

int32_t ls_scan_blocks(int32_t block, const uint8_t* const* rows, int64_t num_rows, int64_t num_inputs) {
  constexpr i64 ROWS_PER_TASK = 64;
  const i64 num_tasks = (num_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
  int32_t* found = (int32_t*)scratch(SCRATCH_PACKED_TASKS, num_tasks * (i64)sizeof(int32_t));
  parallel_for(num_tasks, [&](i64 task) {
    const i64 end = (task + 1) * ROWS_PER_TASK < num_rows ? (task + 1) * ROWS_PER_TASK : num_rows;
    found[task] = 0;
    for (i64 n = task * ROWS_PER_TASK; n < end; n++) found[task] |= formats[block].scan(rows[n], num_inputs);
  });
  int32_t all = 0;
  for (i64 t = 0; t < num_tasks; t++) all |= found[t];
  return all;
}

void ls_pack_blocks(int32_t block, const LsPackedSpec* spec, const uint8_t* const* rows, uint8_t* out) {
  const Packing packing = {*spec, rows, out};
  parallel_for((spec->num_outputs + INT_PANEL - 1) / INT_PANEL,
               [&](i64 panel) { formats[block].pack(packing, panel); });
}

void ls_unpack_rows(const LsPackedSpec* spec, const uint8_t* data, const int64_t* rows, int64_t num_rows, float* y) {
  constexpr i64 ROWS_PER_TASK = 16;
  parallel_for((num_rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK, [&](i64 task) {
    const i64 end = (task + 1) * ROWS_PER_TASK < num_rows ? (task + 1) * ROWS_PER_TASK : num_rows;
    for (i64 i = task * ROWS_PER_TASK; i < end; i++)
      (spec->group ? unpack_int_row : unpack_float_row)(*spec, data, rows[i], y + i * spec->num_inputs);
  });
}
