// Drawing tokens: filters in the order of falling logits and rising ids, then Gumbel-max. Nothing sorts the vocabulary: a
// filter keeps either a short list, or everything up to a cut in that order.
#include "logits.h"
#include "philox.h"

namespace {

constexpr i64 LIST = 4096;            // tokens that are worth a list of their own
constexpr i64 HEAP = 1024;            // a larger top_k is cheaper by selection
constexpr float NEAR = 12.0f;         // distance from the largest logit within which a list is tried first
constexpr i64 BUCKETS = 4096;
constexpr float PER_UNIT = 128.0f;    // buckets for one unit of distance
constexpr float MAX_GUMBEL = 16.64f;  // -log(-log(1 - 2^-24)), the largest noise, rounded up
constexpr i64 GROUP = 4 * PHILOX_BLOCKS;

// Tokens above `value`, and those equal to it up to `id`; all of at least `min_p` times the largest probability.
struct Cut {
  float value = -INFINITY;
  i64 id = -1;
  float min_p = 0.0f;
};

struct Row {
  Scaled scaled;
  LogSum sum;
  i64 vocab;
  uint64_t seed, position;

  float logit(i64 i) const { return scaled.one(i); }
  bool stronger(i64 a, i64 b) const {
    const float x = logit(a), y = logit(b);
    return x > y || (x == y && a < b);
  }
};

ALWAYS_INLINE float power(float x) { return vexp(splat(x))[0]; }
ALWAYS_INLINE vi lane_ids() {
  vi lane;
  for (int i = 0; i < VLEN; i++) lane[i] = i;
  return lane;
}
ALWAYS_INLINE vi kept(const Row& row, const Cut& cut, vf x, i64 first) {
  const vf value = splat(cut.value);
  const vi id = lane_ids() + (int32_t)first;
  vi keep = (x > value) | ((x == value) & (id <= (int32_t)cut.id));
  if (cut.min_p > 0.0f) keep = keep & (vexp(x - splat(row.sum.top)) >= splat(cut.min_p));
  return keep & (id < (int32_t)row.vocab);
}

// body(id) for tokens whose logit is above `floor` and that the cut keeps, by rising id.
template <typename F>
void over_kept(const Row& row, const Cut& cut, float floor, F&& body) {
  for (i64 i = 0; i < row.vocab; i += VLEN) {
    vf x = row.scaled.vector(i, part(row.vocab, i, VLEN));
    if (!any(x > splat(floor))) continue;
    vi keep = kept(row, cut, x, i) & (x > splat(floor));
    for (int l = 0; l < VLEN; l++)
      if (keep[l]) body(i + l);
  }
}

// The noise of a token, in double: scores must not tie where noise does not.
double gumbel(uint32_t bits) { return -log(-log((double)to_uniform(bits))); }
double score_of(const Row& row, i64 id) {
  uint32_t bits[4];
  block_bits(row.seed, 0, row.position, (uint32_t)(id / 4), bits);
  return (double)row.logit(id) + gumbel(bits[id % 4]);
}

struct Best {
  double score = -INFINITY;
  i64 id = -1;

  void offer(double candidate, i64 candidate_id) {
    if (candidate > score || (candidate == score && candidate_id < id)) {
      score = candidate;
      id = candidate_id;
    }
  }
};

// A token further than the largest noise below the best score is never looked at; the others are scored in float and, where
// that comes near the best, in double.
i64 draw(const Row& row, const Cut& cut, i64 strongest) {
  Best best;
  best.offer(score_of(row, strongest), strongest);
  for (i64 first = 0; first < row.vocab; first += GROUP) {
    const i64 size = part(row.vocab, first, GROUP);
    const vf reach = splat((float)best.score - MAX_GUMBEL - 1e-3f - 1e-6f * fabsf((float)best.score));
    vi hope = {};
    over_vectors(size, [&](i64 i, i64 n) { hope = hope | (row.scaled.vector(first + i, n) > reach); });
    if (!any(hope)) continue;
    uint32_t bits[4][PHILOX_BLOCKS];
    float uniform[GROUP];
    many_block_bits(row.seed, 0, row.position, (uint32_t)(first / 4), bits);
    for (i64 i = 0; i < GROUP; i++) uniform[i] = to_uniform(bits[i % 4][i / 4]);
    over_vectors(size, [&](i64 i, i64 n) {
      vf x = row.scaled.vector(first + i, n);
      vf rough = x - vlog(-vlog(load(uniform + i)));
      const vf near = splat((float)best.score - 1e-3f - 1e-6f * fabsf((float)best.score));
      vi candidate = rough > near;
      if (!any(candidate)) return;
      candidate = candidate & kept(row, cut, x, first + i);
      for (i64 l = 0; l < n; l++)
        if (candidate[l]) best.offer((double)row.logit(first + i + l) + gumbel(bits[(i + l) % 4][(i + l) / 4]), first + i + l);
    });
  }
  return best.id;
}

i64 strongest_token(const Row& row) {
  i64 found = 0;
  for (i64 i = 0; i < row.vocab; i += VLEN) {
    if (!any(row.scaled.vector(i, part(row.vocab, i, VLEN)) == splat(row.sum.top))) continue;
    for (found = i; row.logit(found) != row.sum.top; found++) {
    }
    break;
  }
  return found;
}

// Length of the smallest prefix of ids [num] whose mass reaches `target`.
template <typename Mass>
i64 prefix(const int64_t* ids, i64 num, double before, double target, Mass&& mass) {
  double sum = before;
  for (i64 i = 0; i < num; i++)
    if ((sum += mass(ids[i])) >= target) return i + 1;
  return num;
}

// Where top_p falls when the kept tokens are many: masses by bucket of distance, then the order inside one bucket.
Cut cut_by_mass(const Row& row, double target, int64_t* ids) {
  double mass[BUCKETS] = {};
  float power_of[VLEN], distance[VLEN];
  auto bucket_of = [&](float far) { return far * PER_UNIT < (float)(BUCKETS - 1) ? (i64)(far * PER_UNIT) : BUCKETS - 1; };
  for (i64 i = 0; i < row.vocab; i += VLEN) {
    const i64 n = part(row.vocab, i, VLEN);
    vf far = splat(row.sum.top) - row.scaled.vector(i, n);
    store(power_of, vexp(-far));
    store(distance, far);
    for (i64 l = 0; l < n; l++) mass[bucket_of(distance[l])] += (double)power_of[l];
  }
  double before = 0.0;
  i64 crossing = 0;
  while (crossing < BUCKETS - 1 && before + mass[crossing] < target) before += mass[crossing++];
  i64 num = 0;
  const vf near = splat((float)crossing), beyond = splat(crossing < BUCKETS - 1 ? (float)(crossing + 1) : INFINITY);
  for (i64 i = 0; i < row.vocab; i += VLEN) {
    const i64 n = part(row.vocab, i, VLEN);
    vf at = (splat(row.sum.top) - row.scaled.vector(i, n)) * splat(PER_UNIT);
    vi inside = (at >= near) & (at < beyond);
    if (!any(inside)) continue;
    for (i64 l = 0; l < n; l++)
      if (inside[l]) ids[num++] = i + l;
  }
  if (num == 0) return Cut();
  std::sort(ids, ids + num, [&](int64_t a, int64_t b) { return row.stronger(a, b); });
  const i64 keep = prefix(ids, num, before, target, [&](i64 id) { return (double)power(row.logit(id) - row.sum.top); });
  Cut cut;
  cut.value = row.logit(ids[keep - 1]);
  cut.id = ids[keep - 1];
  return cut;
}

// A list of ids, or (num < 0) what a cut keeps.
struct Kept {
  int64_t* ids;
  i64 num;
  Cut cut;
};

void keep_top_k(const Row& row, i64 top_k, Kept& k) {
  auto stronger = [&](int64_t a, int64_t b) { return row.stronger(a, b); };
  k.num = 0;
  if (top_k <= HEAP) {
    largest(row.scaled, row.vocab, top_k, k.ids);
    k.num = top_k;
  } else {
    over_kept(row, Cut(), -INFINITY, [&](i64 id) { k.ids[k.num++] = id; });
    if (top_k < k.num) {
      std::nth_element(k.ids, k.ids + top_k - 1, k.ids + k.num, stronger);
      k.num = top_k;
    }
    std::sort(k.ids, k.ids + k.num, stronger);
  }
  while (k.num > 1 && row.logit(k.ids[k.num - 1]) == -INFINITY) k.num--;
}

void keep_top_p(const Row& row, double top_p, Kept& k) {
  auto mass = [&](i64 id) { return (double)power(row.logit(id) - row.sum.top); };
  if (k.num >= 0) {
    double total = 0.0;
    for (i64 i = 0; i < k.num; i++) total += mass(k.ids[i]);
    k.num = prefix(k.ids, k.num, 0.0, top_p * total, mass);
    return;
  }
  const double target = top_p * row.sum.total;
  double near = 0.0;
  i64 num = 0;
  const float floor = row.sum.top - NEAR;
  for (i64 i = 0; i < row.vocab && num <= LIST; i += VLEN) {
    vf x = row.scaled.vector(i, part(row.vocab, i, VLEN));
    if (!any(x > splat(floor))) continue;
    for (i64 j = i; j < i + part(row.vocab, i, VLEN); j++)
      if (row.logit(j) > floor) {
        k.ids[num++] = j;
        near += mass(j);
      }
  }
  if (num > LIST || near < target * (1.0 + 1e-9)) {
    k.cut = cut_by_mass(row, target, k.ids);
    return;
  }
  std::sort(k.ids, k.ids + num, [&](int64_t a, int64_t b) { return row.stronger(a, b); });
  k.num = prefix(k.ids, num, 0.0, target, mass);
}

void keep_min_p(const Row& row, float min_p, Kept& k) {
  if (k.num < 0) {
    k.cut.min_p = min_p;
    return;
  }
  i64 num = 0;
  for (i64 i = 0; i < k.num; i++)
    if (power(row.logit(k.ids[i]) - row.sum.top) >= min_p) k.ids[num++] = k.ids[i];
  k.num = num;
}

// As `prefix` of the ids in the order `before`, without sorting them all: halves are weighed and one of them searched.
template <typename Before, typename Mass>
i64 selected_prefix(int64_t* ids, i64 num, double target, Before&& before, Mass&& mass) {
  i64 low = 0, high = num;
  double sum = 0.0;
  while (high - low > 64) {
    const i64 middle = (low + high) / 2;
    std::nth_element(ids + low, ids + middle, ids + high, before);
    double half = 0.0;
    for (i64 i = low; i < middle; i++) half += mass(ids[i]);
    if (sum + half >= target) {
      high = middle;
    } else {
      sum += half;
      low = middle;
    }
  }
  std::sort(ids + low, ids + high, before);
  return low + prefix(ids + low, high - low, sum, target, mass);
}

void keep_typical(const Row& row, double typical_p, Kept& k, float* key) {
  if (k.num < 0) {
    k.num = 0;
    over_kept(row, k.cut, -INFINITY, [&](i64 id) { k.ids[k.num++] = id; });
  }
  auto shift = [&](i64 id) { return row.logit(id) - row.sum.top; };
  auto mass = [&](i64 id) { return (double)power(shift(id)); };
  double total = 0.0, mean = 0.0;
  for (i64 i = 0; i < k.num; i++) {
    const double here = mass(k.ids[i]);
    total += here;
    if (here > 0.0) mean += here * (double)shift(k.ids[i]);
  }
  mean /= total;
  for (i64 i = 0; i < k.num; i++) key[k.ids[i]] = (float)fabs((double)shift(k.ids[i]) - mean);
  auto before = [&](int64_t a, int64_t b) { return key[a] < key[b] || (key[a] == key[b] && a < b); };
  k.num = selected_prefix(k.ids, k.num, typical_p * total, before, mass);
}

double kept_mass(const Row& row, const Kept& k) {
  double total = 0.0;
  if (k.num >= 0) {
    for (i64 i = 0; i < k.num; i++) total += (double)power(row.logit(k.ids[i]) - row.sum.top);
    return total;
  }
  for (i64 from = 0; from < row.vocab; from += LS_LOGPROB_BLOCK) {
    vf sum = splat(0.0f);
    const i64 end = from + part(row.vocab, from, LS_LOGPROB_BLOCK);
    for (i64 i = from; i < end; i += VLEN) {
      vf x = row.scaled.vector(i, part(row.vocab, i, VLEN));
      sum = sum + select(kept(row, k.cut, x, i), vexp(x - splat(row.sum.top)), splat(0.0f));
    }
    total += (double)fold(sum);
  }
  return total;
}

i64 first_largest(const float* logits, i64 vocab, float* top) {
  const Scaled row = {logits, 1.0f};
  i64 where = 0;
  *top = -INFINITY;
  for (i64 from = 0; from < vocab; from += LS_LOGPROB_BLOCK) {
    const float here = row_max(row, from, part(vocab, from, LS_LOGPROB_BLOCK));
    if (here != here) {
      *top = NAN;
      return 0;
    }
    if (here > *top) {
      *top = here;
      where = from;
    }
  }
  while (where < vocab - 1 && logits[where] != *top) where++;
  return where;
}

// The row as it is drawn from at a temperature above 0; its `sum.top` is NaN where nothing can be drawn.
Row row_of(const LsSampling& a, i64 r) {
  const Scaled scaled = {a.logits + r * a.vocab, a.temperature[r]};
  return {scaled, log_sum_of(scaled, a.vocab), a.vocab, (uint64_t)a.seeds[r], (uint64_t)a.positions[r]};
}
bool keeps_all(const LsSampling& a, i64 r) {
  return a.top_k[r] <= 0 && a.top_p[r] >= 1.0f && a.min_p[r] <= 0.0f && a.typical_p[r] >= 1.0f;
}
Kept kept_of(const LsSampling& a, i64 r, const Row& row) {
  int64_t* ids = (int64_t*)scratch(SCRATCH_ATTENTION, a.vocab * (i64)(sizeof(int64_t) + sizeof(float)));
  Kept k = {ids, -1, Cut()};
  const i64 top_k = a.top_k[r];
  if (top_k > 0 && top_k < a.vocab) keep_top_k(row, top_k, k);
  if (a.top_p[r] < 1.0f) keep_top_p(row, (double)a.top_p[r], k);
  if (a.min_p[r] > 0.0f) keep_min_p(row, a.min_p[r], k);
  if (a.typical_p[r] < 1.0f) keep_typical(row, (double)a.typical_p[r], k, (float*)(ids + a.vocab));
  return k;
}

// False for a row that cannot be drawn from.
bool sample_row(const LsSampling& a, i64 r) {
  if (a.temperature[r] == 0.0f) {
    float top;
    a.tokens[r] = first_largest(a.logits + r * a.vocab, a.vocab, &top);
    a.logprobs[r] = 0.0f;
    return top - top == 0.0f;
  }
  const Row row = row_of(a, r);
  if (row.sum.top != row.sum.top) return false;
  if (keeps_all(a, r)) {
    a.tokens[r] = draw(row, Cut(), strongest_token(row));
    a.logprobs[r] = logprob_of(row.logit(a.tokens[r]), row.sum);
    return true;
  }
  const Kept k = kept_of(a, r, row);
  const double total = kept_mass(row, k);
  if (k.num < 0) {
    a.tokens[r] = draw(row, k.cut, strongest_token(row));
  } else {
    Best best;
    for (i64 i = 0; i < k.num; i++) best.offer(score_of(row, k.ids[i]), k.ids[i]);
    a.tokens[r] = best.id;
  }
  a.logprobs[r] = logprob_of(row.logit(a.tokens[r]), {row.sum.top, total});
  return true;
}

// What `sample_row` would report had it drawn a.tokens[r], and in `marks` [V] which tokens it chose from. A token that the
// filters would have left out counts as kept, so that its number is finite.
bool score_row(const LsSampling& a, i64 r, uint8_t* marks) {
  const Row row = row_of(a, r);
  if (row.sum.top != row.sum.top) return false;
  const i64 token = a.tokens[r];
  if (keeps_all(a, r)) {
    memset(marks, 1, (size_t)a.vocab);
    a.logprobs[r] = logprob_of(row.logit(token), row.sum);
    return true;
  }
  const Kept k = kept_of(a, r, row);
  double total = kept_mass(row, k);
  memset(marks, 0, (size_t)a.vocab);
  if (k.num >= 0) {
    for (i64 i = 0; i < k.num; i++) marks[k.ids[i]] = 1;
  } else {
    over_kept(row, k.cut, -INFINITY, [&](i64 id) { marks[id] = 1; });
  }
  if (!marks[token]) {
    marks[token] = 1;
    total += (double)power(row.logit(token) - row.sum.top);
  }
  a.logprobs[r] = logprob_of(row.logit(token), {row.sum.top, total});
  return true;
}

}  // namespace

int64_t ls_sample_tokens(const LsSampling* sampling) {
  for (i64 r = 0; r < sampling->num_rows; r++)
    if (!(sampling->temperature[r] >= 0.0f && sampling->temperature[r] < INFINITY)) return -2 - r;
  int8_t* marks = clean_marks(sampling->num_rows);
  over_row_blocks(sampling->num_rows, 1, sampling->vocab, [&](i64 first, i64 rows) {
    for (i64 r = first; r < first + rows; r++) marks[r] = !sample_row(*sampling, r);
  });
  return first_mark(marks, sampling->num_rows);
}

int64_t ls_score_tokens(const LsSampling* sampling, uint8_t* kept) {
  const i64 vocab = sampling->vocab;
  for (i64 r = 0; r < sampling->num_rows; r++) {
    if (!(sampling->temperature[r] > 0.0f && sampling->temperature[r] < INFINITY)) return -2 - r;
    if (!(sampling->tokens[r] >= 0 && sampling->tokens[r] < vocab)) return -2 - sampling->num_rows - r;
  }
  int8_t* marks = clean_marks(sampling->num_rows);
  over_row_blocks(sampling->num_rows, 1, vocab, [&](i64 first, i64 rows) {
    for (i64 r = first; r < first + rows; r++) marks[r] = !score_row(*sampling, r, kept + r * vocab);
  });
  return first_mark(marks, sampling->num_rows);
}
