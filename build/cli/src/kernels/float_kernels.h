// The float kernels, written once over sixteen lanes. Included by scalar.cpp, avx2.cpp and avx512.cpp after their
// lanes_*.h, each inside its own namespace and under its own target, so that the order of every operation is the same
// by construction.

// eˣ for x ≤ 0; below −87 the result stays at e⁻⁸⁷ ≈ 1.6e-38. Within 2 ulp. Polynomial: Cephes, expf.c.
inline F32x16 exp_negative(F32x16 x) {
  x = max(x, set1(-87.0f));
  const F32x16 n = rint(mul(x, set1(1.44269504088896341f)));
  F32x16 r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  F32x16 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  return mul(p, exp2_integral(n));
}

void rms_norm(const float* x, const float* weight, float epsilon, size_t n, float* out) {
  F64x16 squares = zero64();
  for (size_t i = 0; i < n; i += kLanes) {
    const F32x16 v = load(x + i);
    squares = add(squares, mul(v, v));
  }
  const float mean = static_cast<float>(sum(squares) / static_cast<double>(n));
  const F32x16 scale = set1(1.0f / __builtin_sqrtf(mean + epsilon));
  for (size_t i = 0; i < n; i += kLanes) store(out + i, mul(mul(load(x + i), scale), load(weight + i)));
}

// max |x|
inline float largest_of(const float* x, size_t n) {
  F32x16 largest = zero();
  for (size_t i = 0; i < n; i += kLanes) largest = max(abs(load(x + i)), largest);
  return maximum(largest);
}

float quantize(const float* x, size_t n, int8_t* out, int32_t* total) {
  const float amplitude = largest_of(x, n);
  const float s = static_cast<float>(127.0 / static_cast<double>(amplitude > 1e-5f ? amplitude : 1e-5f));
  const F32x16 scale = set1(s);
  for (size_t i = 0; i < n; i += kLanes) store_int8(out + i, mul(load(x + i), scale));
  int32_t t = 0;
  for (size_t i = 0; i < n; i++) t += out[i];
  *total = t;
  return s;
}

void dequantize(const int32_t* sums, float activation_scale, float weight_scale, size_t n, float* out) {
  const F32x16 s = set1(activation_scale), w = set1(weight_scale);
  for (size_t i = 0; i < n; i += kLanes) store(out + i, mul(div(load_int32(sums + i), s), w));
}

void add_to(float* x, const float* y, size_t n) {
  for (size_t i = 0; i < n; i += kLanes) store(x + i, add(load(x + i), load(y + i)));
}

void relu2_mul(float* gate, const float* up, size_t n) {
  for (size_t i = 0; i < n; i += kLanes) {
    const F32x16 positive = max(load(gate + i), zero());
    store(gate + i, mul(mul(positive, positive), load(up + i)));
  }
}

void rope(float* head, const float* cosines, const float* sines, size_t head_dim) {
  const size_t half = head_dim / 2;
  for (size_t i = 0; i < half; i++) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cosines[i] - b * sines[i];
    head[i + half] = b * cosines[i] + a * sines[i];
  }
}

// The cache's numbers of each type but int8, as floats.
inline F32x16 load_cached(const float* p) { return load(p); }
inline F32x16 load_cached(const uint16_t* p) { return load_half(p); }

// int8 numbers have a scale for each position, after all numbers of the chunk.
inline float* scales_of(std::byte* chunk, size_t head_dim) {
  return reinterpret_cast<float*>(chunk + kChunkPositions * head_dim);
}
inline const float* scales_of(const std::byte* chunk, size_t head_dim) {
  return reinterpret_cast<const float*>(chunk + kChunkPositions * head_dim);
}

// What makes int8 numbers of x, and back.
struct Int8Scale {
  float forth, back;
};
inline Int8Scale int8_scale(const float* x, size_t n) {
  const float amplitude = largest_of(x, n);
  return amplitude > 0.0f ? Int8Scale{127.0f / amplitude, amplitude / 127.0f} : Int8Scale{0.0f, 0.0f};
}

// What the cache takes: infinity, times a weight of 0, would become part of every sum.
inline F32x16 within(F32x16 a, float largest) { return min(max(a, set1(-largest)), set1(largest)); }
constexpr float kLargestFloat = __FLT_MAX__;

void store_key(const float* key, std::byte* keys, CacheType type, size_t position, size_t head_dim) {
  const size_t block = position / kPositionsPerBlock * head_dim * kPositionsPerBlock,
               place = position % kPositionsPerBlock;
  const auto scatter = [&](auto* out, size_t d, const auto* numbers) {
    for (size_t i = 0; i < kLanes; i++) out[block + (d + i) * kPositionsPerBlock + place] = numbers[i];
  };
  const Int8Scale scale = type == CacheType::kI8 ? int8_scale(key, head_dim) : Int8Scale{};
  if (type == CacheType::kI8) scales_of(keys, head_dim)[position] = scale.back;
  for (size_t d = 0; d < head_dim; d += kLanes) {
    if (type == CacheType::kF32) {
      float numbers[kLanes];
      store(numbers, within(load(key + d), kLargestFloat));
      scatter(reinterpret_cast<float*>(keys), d, numbers);
    } else if (type == CacheType::kF16) {
      uint16_t halves[kLanes];
      store_half(halves, within(load(key + d), kLargestHalf));
      scatter(reinterpret_cast<uint16_t*>(keys), d, halves);
    } else {
      int8_t numbers[kLanes];
      store_int8(numbers, mul(load(key + d), set1(scale.forth)));
      for (size_t i = 0; i < kLanes; i++)
        reinterpret_cast<int8_t*>(keys)[block + (d + i) / 2 * 2 * kPositionsPerBlock + 2 * place + i % 2] = numbers[i];
    }
  }
}

void store_value(const float* value, std::byte* values, CacheType type, size_t position, size_t head_dim) {
  const Int8Scale scale = type == CacheType::kI8 ? int8_scale(value, head_dim) : Int8Scale{};
  if (type == CacheType::kI8) scales_of(values, head_dim)[position] = scale.back;
  for (size_t d = 0; d < head_dim; d += kLanes) {
    const size_t at = position * head_dim + d;
    if (type == CacheType::kF32) {
      store(reinterpret_cast<float*>(values) + at, within(load(value + d), kLargestFloat));
    } else if (type == CacheType::kF16) {
      store_half(reinterpret_cast<uint16_t*>(values) + at, within(load(value + d), kLargestHalf));
    } else {
      int8_t numbers[kLanes];
      store_int8(numbers, mul(load(value + d), set1(scale.forth)));
      int8_t* pairs = reinterpret_cast<int8_t*>(values) + position / 2 * 2 * head_dim + 2 * d + position % 2;
      for (size_t i = 0; i < kLanes; i++) pairs[2 * i] = numbers[i];
    }
  }
}

// Not by prefetch_line(), for GCC moves nothing past assembly: a prompt would take 6 % longer.
constexpr size_t kLine = 64;
inline void fetch_line(const void* p) { __builtin_prefetch(p, 0, 3); }

// Attention asks for a line of what is read some time later with each line's worth that it computes with, so that
// memory is never idle; one line after another, in whatever order they are computed with, for memory gives a stream
// faster.
class Upcoming {
 public:
  explicit Upcoming(const std::byte* bytes) : bytes_(bytes) {}
  template <size_t kBytes>  // a divisor or a multiple of a line
  void computed() {
    if (asked_ % kLine == 0)
      for (size_t line = 0; line < kBytes; line += kLine) fetch_line(bytes_ + asked_ + line);
    asked_ += kBytes;
  }

 private:
  const std::byte* bytes_;
  size_t asked_ = 0;
};

// What is read after the chunk; its own keys where that is not known, which costs less than to ask each time.
inline const std::byte* after(const AttentionChunk& chunk) { return chunk.next ? chunk.next : chunk.keys; }

// acc[part][h] += Σ q[h] · k over every second dimension from first + part on, for H queries and a block of positions.
template <class T, int H, int kParts>
inline void add_scores(const float* q, size_t head_dim, const T* keys, size_t first, const std::byte* upcoming,
                       F32x16 (*acc)[H]) {
  Upcoming ahead(upcoming);
  for (size_t d = first; d < head_dim; d += 4)  // two steps, a line of halves, so that no step has to ask whether
    for (size_t step = 0; step < 4; step += 2)
      for (size_t part = 0; part < kParts; part++) {
        const size_t at = d + step + part;
        const F32x16 k = load_cached(keys + at * kPositionsPerBlock);
        ahead.computed<kPositionsPerBlock * sizeof(T)>();
        for (int h = 0; h < H; h++)
          acc[part][h] = fma(set1(q[static_cast<size_t>(h) * head_dim + at]), k, acc[part][h]);
      }
}

// scores[h · kChunkPositions + position] = q[h] · k[position] · factor for H queries and a block of positions: one
// block after another is one stream, which memory gives faster than two. Even and odd dimensions have sums of their
// own: where the registers hold both, none waits for another.
template <class T, int H>
inline void score(const float* q, size_t head_dim, const T* keys, float factor, const std::byte* upcoming,
                  float* scores) {
  F32x16 acc[2][H];
  for (auto& sums : acc)
    for (F32x16& sum : sums) sum = zero();
  if constexpr (H <= kScoreQueries / 2) {
    add_scores<T, H, 2>(q, head_dim, keys, 0, upcoming, acc);
  } else {
    add_scores<T, H, 1>(q, head_dim, keys, 0, upcoming, acc);
    add_scores<T, H, 1>(q, head_dim, keys, 1, upcoming + head_dim / 2 * kPositionsPerBlock * sizeof(T), acc + 1);
  }
  for (int h = 0; h < H; h++)
    store(scores + static_cast<size_t>(h) * kChunkPositions, mul(add(acc[0][h], acc[1][h]), set1(factor)));
}

// Scores → e^(score − largest), in place, 0 from n to `end`, a multiple of kLanes, times `scales` where there are some;
// returns the sum without them. at_each(i) is called before the vector of scores i to i + kLanes − 1.
template <class F>
inline float softmax(float* scores, size_t n, size_t end, const float* scales, float* largest, const F& at_each) {
  const size_t whole = n / kLanes * kLanes;
  const float lowest = -__builtin_inff();
  F32x16 top = set1(lowest);
  for (size_t i = 0; i < whole; i += kLanes) top = max(load(scores + i), top);
  if (whole < n) top = max(keep_first(load(scores + whole), n - whole, lowest), top);
  *largest = maximum(top);
  F32x16 total = zero();
  for (size_t i = 0; i < n; i += kLanes) {
    at_each(i);
    F32x16 e = exp_negative(sub(load(scores + i), set1(*largest)));
    if (i == whole) e = keep_first(e, n - whole, 0.0f);
    total = add(total, e);
    if (scales) {
      e = mul(e, load(scales + i));
      if (i == whole) e = keep_first(e, n - whole, 0.0f);
    }
    store(scores + i, e);
  }
  for (size_t i = round_up(n, kLanes); i < end; i += kLanes) store(scores + i, zero());
  return sum(total);
}

// Adds weight · v of the positions first … last − 1 to out, for H queries and D vectors of dimensions.
template <class T, int H, int D>
inline void weigh(const float* weights, const T* values, size_t first, size_t last, size_t head_dim,
                  const std::byte* upcoming, float* out) {
  F32x16 acc[H][D];
  for (int h = 0; h < H; h++)
    for (int d = 0; d < D; d++)
      acc[h][d] = load(out + static_cast<size_t>(h) * head_dim + static_cast<size_t>(d) * kLanes);
  Upcoming ahead(upcoming);
  for (size_t j = first; j < last; j++) {
    ahead.computed<D * kLanes * sizeof(T)>();
    F32x16 v[D];
    for (int d = 0; d < D; d++) v[d] = load_cached(values + j * head_dim + static_cast<size_t>(d) * kLanes);
    for (int h = 0; h < H; h++) {
      const F32x16 weight = set1(weights[static_cast<size_t>(h) * kChunkPositions + j]);
      for (int d = 0; d < D; d++) acc[h][d] = fma(weight, v[d], acc[h][d]);
    }
  }
  for (int h = 0; h < H; h++)
    for (int d = 0; d < D; d++)
      store(out + static_cast<size_t>(h) * head_dim + static_cast<size_t>(d) * kLanes, acc[h][d]);
}

// f<H>(first) for one run of H numbers below n after another: of kMost of them, and what is left of half as many, …, 1.
template <int kMost, class F>
inline void in_runs(size_t n, const F& f, size_t first = 0) {
  for (; first + kMost <= n; first += kMost) f.template operator()<kMost>(first);
  if constexpr (kMost > 1) in_runs<kMost / 2>(n, f, first);
}

// How many positions of the chunk a query attends to.
inline size_t positions_of(const AttentionChunk& chunk, const AttentionQueries& queries, size_t query) {
  const size_t n = chunk.n_positions + query / queries.n_heads;
  return n < kChunkPositions ? n : kChunkPositions;
}

// How many blocks of positions are asked for ahead: 16 kB at head_dim 128, measured.
template <class T>
constexpr size_t kAheadBlocks = 8 / sizeof(T);

// sums (n_queries, head_dim) = Σ weight · value; all queries go through some values while these are in the L1 cache.
template <class T, int kQueries, int kVectors>
inline void weigh_all(const AttentionQueries& queries, const AttentionChunk& chunk, const float* weights, float* sums) {
  const size_t dim = chunk.head_dim, n_queries = queries.n(), n = positions_of(chunk, queries, n_queries - 1);
  const T* values = reinterpret_cast<const T*>(chunk.values);
  for (size_t i = 0; i < n_queries * dim; i += kLanes) store(sums + i, zero());
  // Runs of the same length, each of which asks for the next.
  constexpr size_t kMostAtOnce = kAheadBlocks<T> * kPositionsPerBlock;
  const size_t at_once = ceil_div(n, ceil_div(n, kMostAtOnce));
  for (size_t first = 0; first < n; first += at_once) {
    const std::byte* upcoming = first + at_once < n ? chunk.values + (first + at_once) * dim * sizeof(T) : after(chunk);
    in_runs<kQueries>(n_queries, [&]<int H>(size_t i) {
      const size_t n_of_run = positions_of(chunk, queries, i + H - 1);
      const size_t last = first + at_once < n_of_run ? first + at_once : n_of_run;
      in_runs<kVectors>(dim / kLanes, [&]<int D>(size_t v) {
        weigh<T, H, D>(weights + i * kChunkPositions, values + v * kLanes, first, last, dim,
                       upcoming + v * kLanes * sizeof(T) * at_once, sums + i * dim + v * kLanes);
      });
    });
  }
}

template <class T>
inline void attend_floats(const AttentionQueries& queries, const AttentionChunk& chunk, float* scores,
                          const Attention& out) {
  const size_t dim = chunk.head_dim, n_queries = queries.n(), n = positions_of(chunk, queries, n_queries - 1);
  const size_t n_blocks = ceil_div(n, kPositionsPerBlock), block = dim * kPositionsPerBlock;
  const float factor = 1.0f / __builtin_sqrtf(static_cast<float>(dim));
  const T* keys = reinterpret_cast<const T*>(chunk.keys);
  for (size_t b = 0; b < n_blocks; b++) {
    const size_t later = b + (n_blocks < kAheadBlocks<T> ? n_blocks : kAheadBlocks<T>);  // of keys, then of values
    const std::byte* upcoming = later < n_blocks ? chunk.keys + later * block * sizeof(T)
                                                 : chunk.values + (later - n_blocks) * block * sizeof(T);
    in_runs<kScoreQueries>(n_queries, [&]<int H>(size_t i) {
      score<T, H>(queries.values + i * dim, dim, keys + b * block, factor, upcoming,
                  scores + i * kChunkPositions + b * kPositionsPerBlock);
    });
  }
  for (size_t i = 0; i < n_queries; i++)
    out.totals[i] = softmax(scores + i * kChunkPositions, positions_of(chunk, queries, i),
                            n_blocks * kPositionsPerBlock, nullptr, &out.largest[i], [](size_t) {});
  if (queries.n_tokens == 1)
    weigh_all<T, kLoneQueries, kLoneVectors>(queries, chunk, scores, out.sums);
  else
    weigh_all<T, kWeighQueries, kWeighVectors>(queries, chunk, scores, out.sums);
}

// int8 keys and values are multiplied as integers, by queries and by weights of 16 bits: no float sum is exact, and
// processors multiply twice as many of these.

// out[i] ≈ x[i] · levels / max |x|; returned is what makes x of out.
inline float quantize_words(const float* x, size_t n, float levels, int16_t* out) {
  const float amplitude = largest_of(x, n);
  const F32x16 forth = set1(amplitude > 0.0f ? levels / amplitude : 0.0f);
  for (size_t i = 0; i < n; i += kLanes) store_int16(out + i, mul(load(x + i), forth));
  return amplitude / levels;
}

// The scores of H queries and a block of positions: Σ q · k, times the query's factor and the position's scale. Sums
// take turns, where the registers hold several.
template <int H>
inline void score_int8(const int16_t* q, size_t head_dim, const int8_t* keys, const float* factors, const float* scales,
                       const std::byte* next, float* scores) {
  I32x16 acc[kInt8Sums][H];
  for (auto& sums : acc)
    for (I32x16& sum : sums) sum = zero32();
  Upcoming ahead(next);
  for (size_t d = 0; d < head_dim; d += 4)  // two steps, a line, so that no step has to ask whether
    for (size_t step = 0; step < 2; step++) {
      const size_t at = d + 2 * step;
      const I16Pairs k = load_pairs(keys + at * kPositionsPerBlock);
      ahead.computed<2 * kPositionsPerBlock>();
      for (int h = 0; h < H; h++) {
        I32x16& sum = acc[step % kInt8Sums][h];
        sum = add_products(sum, k, set1_pair(q + static_cast<size_t>(h) * head_dim + at));
      }
    }
  for (int h = 0; h < H; h++) {
    I32x16 sum = acc[0][h];
    for (int turn = 1; turn < kInt8Sums; turn++) sum = add32(sum, acc[turn][h]);
    store(scores + static_cast<size_t>(h) * kChunkPositions, mul(mul(to_float(sum), set1(factors[h])), load(scales)));
  }
}

// out = Σ weight · v, times the query's factor, of n_pairs of positions, an even number, for H queries and D vectors of
// dimensions.
template <int H, int D>
inline void weigh_int8(const int16_t* weights, const int8_t* values, size_t n_pairs, size_t head_dim,
                       const float* factors, const std::byte* next, float* out) {
  I32x16 acc[H][D];
  for (int h = 0; h < H; h++)
    for (int d = 0; d < D; d++) acc[h][d] = zero32();
  Upcoming ahead(next);
  for (size_t first = 0; first < n_pairs; first += 2)
    for (size_t j = first; j < first + 2; j++) {
      ahead.computed<D * 2 * kLanes>();
      I16Pairs v[D];
      for (int d = 0; d < D; d++) v[d] = load_pairs(values + j * 2 * head_dim + static_cast<size_t>(d) * 2 * kLanes);
      for (int h = 0; h < H; h++) {
        const I16Pairs weight = set1_pair(weights + static_cast<size_t>(h) * kChunkPositions + 2 * j);
        for (int d = 0; d < D; d++) acc[h][d] = add_products(acc[h][d], weight, v[d]);
      }
    }
  for (int h = 0; h < H; h++)
    for (int d = 0; d < D; d++)
      store(out + static_cast<size_t>(h) * head_dim + static_cast<size_t>(d) * kLanes,
            mul(to_float(acc[h][d]), set1(factors[h])));
}

// Of the H queries from `first` on.
template <int H>
inline void attend_int8(const AttentionQueries& all, size_t first, const AttentionChunk& chunk, float* scores,
                        const Attention& out) {
  constexpr float kWordLevels = 32767.0f, kByteLevels = 127.0f, kSumLevels = 2147483520.0f;  // below 2³¹
  static_assert(kWordLevels * kByteLevels * static_cast<float>(kChunkPositions) < kSumLevels);
  const size_t dim = chunk.head_dim, n = positions_of(chunk, all, first + H - 1);
  const size_t n_blocks = ceil_div(n, kPositionsPerBlock), block = dim * kPositionsPerBlock;
  const float factor = 1.0f / __builtin_sqrtf(static_cast<float>(dim));
  const float most = __builtin_floorf(kSumLevels / (kByteLevels * static_cast<float>(dim)));
  const float* key_scales = scales_of(chunk.keys, dim);
  const int8_t* keys = reinterpret_cast<const int8_t*>(chunk.keys);
  const int8_t* values = reinterpret_cast<const int8_t*>(chunk.values);
  alignas(64) int16_t queries[H * kMaxHeadDim], weights[H * kChunkPositions];
  float factors[H];
  for (size_t h = 0; h < H; h++)
    factors[h] = factor * quantize_words(all.values + (first + h) * dim, dim, most < kWordLevels ? most : kWordLevels,
                                         queries + h * dim);
  scores += first * kChunkPositions;
  const std::byte* next = first == 0 ? after(chunk) : chunk.keys;
  for (size_t b = 0; b < n_blocks; b++)
    score_int8<H>(queries, dim, keys + b * block, factors, key_scales + b * kPositionsPerBlock, next + b * block,
                  scores + b * kPositionsPerBlock);
  const std::byte* left = next + n_blocks * block;
  constexpr size_t kLines = 2;  // for a vector of scores
  for (size_t h = 0; h < H; h++) {
    float* of_query = scores + h * kChunkPositions;
    const size_t end = n_blocks * kPositionsPerBlock;
    out.totals[first + h] = softmax(of_query, positions_of(chunk, all, first + h), end, scales_of(chunk.values, dim),
                                    &out.largest[first + h], [&](size_t) {
                                      for (size_t line = 0; line < kLines; line++) fetch_line(left + line * kLine);
                                      left += kLines * kLine;
                                    });
    factors[h] = quantize_words(of_query, end, kWordLevels, weights + h * kChunkPositions);
  }
  const size_t n_pairs = round_up(n, 4) / 2;  // an even number; the weights past n are 0
  in_runs<kInt8Vectors>(dim / kLanes, [&]<int D>(size_t v) {
    weigh_int8<H, D>(weights, values + 2 * v * kLanes, n_pairs, dim, factors, left + 2 * v * kLanes * n_pairs,
                     out.sums + first * dim + v * kLanes);
  });
}

void attend(const AttentionQueries& queries, const AttentionChunk& chunk, float* scores, const Attention& out) {
  switch (chunk.type) {
    case CacheType::kF32:
      return attend_floats<float>(queries, chunk, scores, out);
    case CacheType::kF16:
      return attend_floats<uint16_t>(queries, chunk, scores, out);
    case CacheType::kI8:
      return in_runs<kInt8Queries>(queries.n(),
                                   [&]<int H>(size_t first) { attend_int8<H>(queries, first, chunk, scores, out); });
  }
}

void add_attention(const Attention& a, const Attention& b, size_t n_queries, size_t head_dim) {
  for (size_t h = 0; h < n_queries; h++) {
    const float largest = a.largest[h] > b.largest[h] ? a.largest[h] : b.largest[h];
    const F32x16 of_a = exp_negative(set1(a.largest[h] - largest)), of_b = exp_negative(set1(b.largest[h] - largest));
    float total[kLanes];
    store(total, fma(set1(b.totals[h]), of_b, mul(set1(a.totals[h]), of_a)));
    a.totals[h] = total[0];
    a.largest[h] = largest;
    for (size_t d = h * head_dim; d < (h + 1) * head_dim; d += kLanes)
      store(a.sums + d, fma(load(b.sums + d), of_b, mul(load(a.sums + d), of_a)));
  }
}

void divide_attention(const Attention& sum, size_t n_queries, size_t head_dim, float* out) {
  for (size_t h = 0; h < n_queries; h++)
    for (size_t d = h * head_dim; d < (h + 1) * head_dim; d += kLanes)
      store(out + d, div(load(sum.sums + d), set1(sum.totals[h])));
}

// Q6_K: 256 weights in 210 bytes: 128 low nibbles' bytes, 64 bytes of high bit pairs, 16 int8 scales, an f16 scale
// (ggml-quants.c).
inline void load_q6_k(const uint8_t* __restrict block, F32x16 (&out)[16]) {
  const uint8_t *low = block, *high = block + 128;
  alignas(64) int8_t numbers[256];
  for (int part = 0; part < 2; part++, low += 64, high += 32)
    for (int i = 0; i < 32; i++) {
      int8_t* p = numbers + part * 128 + i;
      p[0] = static_cast<int8_t>(((low[i] & 15) | (high[i] & 3) << 4) - 32);
      p[32] = static_cast<int8_t>(((low[i + 32] & 15) | (high[i] >> 2 & 3) << 4) - 32);
      p[64] = static_cast<int8_t>((low[i] >> 4 | (high[i] >> 4 & 3) << 4) - 32);
      p[96] = static_cast<int8_t>((low[i + 32] >> 4 | (high[i] >> 6) << 4) - 32);
    }
  float scales[16];
  store(scales, mul(set1_half(block + 208), load_int8(reinterpret_cast<const int8_t*>(block + 192))));
  for (int v = 0; v < 16; v++) out[v] = mul(set1(scales[v]), load_int8(numbers + v * 16));
}

// Vectors of weights that are loaded together: what shares a scale.
template <RowType type>
constexpr size_t kLoaded = type == RowType::kQ8_0   ? 2
                           : type == RowType::kQ6_K ? 16
                                                    : 1;

// Weights of a row from element i on.
template <RowType type>
inline void load_weights(const uint8_t* row, size_t i, F32x16 (&out)[kLoaded<type>]) {
  if constexpr (type == RowType::kF32) out[0] = load(reinterpret_cast<const float*>(row) + i);
  if constexpr (type == RowType::kF16) out[0] = load_half(reinterpret_cast<const uint16_t*>(row) + i);
  if constexpr (type == RowType::kBF16) out[0] = load_bfloat(reinterpret_cast<const uint16_t*>(row) + i);
  if constexpr (type == RowType::kQ8_0) {  // an f16 scale, then 32 int8
    const uint8_t* block = row + i / 32 * 34;
    const F32x16 scale = set1_half(block);
    const int8_t* numbers = reinterpret_cast<const int8_t*>(block + 2);
    for (size_t v = 0; v < 2; v++) out[v] = mul(scale, load_int8(numbers + v * kLanes));
  }
  if constexpr (type == RowType::kQ6_K) load_q6_k(row + i / 256 * 210, out);
}

size_t find_not_below(const float* x, size_t n, float least, uint32_t* out) {
  size_t n_found = 0, i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (uint32_t mask = not_below(load(x + i), set1(least)); mask != 0; mask &= mask - 1)
      out[n_found++] = static_cast<uint32_t>(i) + static_cast<uint32_t>(std::countr_zero(mask));
  for (; i < n; i++)
    if (!(x[i] < least)) out[n_found++] = static_cast<uint32_t>(i);
  return n_found;
}

template <RowType type, int R>
inline void dot_group(const FloatRows& w, size_t first, const float* x, float* out) {
  constexpr size_t kStep = kLoaded<type> * kLanes, kStepBytes = row_bytes(type, kStep);
  const size_t stride = row_bytes(type, w.cols);
  const uint8_t* data = w.data + first * stride;
  const uint8_t* next = data + R * stride;
  // Several streams, each short, or a single row from anywhere: the processor foresees neither.
  if (R == 1)
    for (size_t b = 0; b < stride; b += kLine) fetch_line(data + b);
  F32x16 acc[R];
  for (int r = 0; r < R; r++) acc[r] = zero();
  for (size_t i = 0; i < w.cols; i += kStep, next += kStepBytes) {
    if (R > 1)
      for (size_t r = 0; r < R; r++)
        for (size_t b = 0; b < kStepBytes; b += kLine) fetch_line(next + r * stride + b);
    for (size_t r = 0; r < R; r++) {
      F32x16 weights[kLoaded<type>];
      load_weights<type>(data + r * stride, i, weights);
      for (size_t v = 0; v < kLoaded<type>; v++) acc[r] = fma(weights[v], load(x + i + v * kLanes), acc[r]);
    }
  }
  for (int r = 0; r < R; r++) out[r] = sum(acc[r]);
}

template <RowType type>
inline void dot_all(const FloatRows& w, const float* x, size_t n_tokens, float* out, size_t out_stride) {
  constexpr int kGroup = 4;
  size_t r = 0;
  for (; r + kGroup <= w.rows; r += kGroup)
    for (size_t t = 0; t < n_tokens; t++) dot_group<type, kGroup>(w, r, x + t * w.cols, out + t * out_stride + r);
  for (; r < w.rows; r++)
    for (size_t t = 0; t < n_tokens; t++) dot_group<type, 1>(w, r, x + t * w.cols, out + t * out_stride + r);
}

// One plane of a row's sketch: codes of u in steps around `spread` times its root mean square, which is what is left of
// the row. u becomes what this plane leaves; its step is the best one for the codes, its error the new root mean
// square.
inline float sketch_plane(float* u, size_t n, float spread, float& rms, uint8_t* codes) {
  const float step = spread * rms, inverse = step > 0.0f ? 1.0f / step : 0.0f;
  const F32x16 three = set1(3.0f);
  const auto code_of = [&](const float* p) {
    const F32x16 c = max(rint(fma(load(p), set1(inverse), set1(1.5f))), zero());
    return sub(three, max(sub(three, c), zero()));
  };
  F32x16 products = zero(), squares = zero();
  for (size_t block = 0; block < n; block += kTernaryBlock)
    for (size_t half = 0; half < 32; half += kLanes) {
      F32x16 byte = zero();
      for (size_t place = 0; place < 4; place++) {
        const float* p = u + block + place * 32 + half;
        const F32x16 code = code_of(p), level = sub(code, set1(1.5f));
        byte = fma(byte, set1(4.0f), code);
        products = fma(load(p), level, products);
        squares = fma(level, level, squares);
      }
      store_uint8(codes + block / 4 + half, byte);
    }
  const float best = sum(products) / sum(squares);
  F32x16 left = zero();
  for (size_t i = 0; i < n; i += kLanes) {
    const F32x16 rest = sub(load(u + i), mul(sub(code_of(u + i), set1(1.5f)), set1(best)));
    left = fma(rest, rest, left);
    store(u + i, rest);
  }
  rms = __builtin_sqrtf(sum(left) / static_cast<float>(n));
  return best;
}

// The first is a little above the best for a normal distribution (0.996: Max, Quantizing for minimum distortion, 1960),
// the second reaches for what the first leaves at the tails: where neither did, most of the last error was there.
constexpr float kSpreads[kSketchPlanes] = {1.1f, 1.9f, 0.9f};

template <RowType type>
inline RowSketch sketch(const FloatRows& w, const float* means, const float* inverse_scales, float* work,
                        uint8_t* const codes[kSketchPlanes]) {
  F32x16 squares = zero();
  float* row = work + w.cols;
  for (size_t i = 0; i < w.cols; i += kLoaded<type> * kLanes) {
    F32x16 weights[kLoaded<type>];
    load_weights<type>(w.data, i, weights);
    for (size_t v = 0; v < kLoaded<type>; v++) {
      const size_t at = i + v * kLanes;
      const F32x16 u = mul(sub(weights[v], load(means + at)), load(inverse_scales + at));
      squares = fma(u, u, squares);
      store(work + at, u);
      store(row + at, u);
    }
  }
  // The best steps leave an error that has a part along the row: a vector that is like the row, as it is like those of
  // the largest products, would have its product underestimated by more than errors of chance explain. So what planes
  // make of the row is stretched until its error is orthogonal to the row.
  RowSketch out;
  const double n = static_cast<double>(w.cols), of_row = static_cast<double>(sum(squares));
  float rms = __builtin_sqrtf(static_cast<float>(of_row / n));
  double stretch = 1.0, longest = 0.0;
  for (size_t p = 0; p < kSketchPlanes; p++) {
    const float step = sketch_plane(work, w.cols, kSpreads[p], rms, codes[p]);
    F32x16 products = zero();
    for (size_t i = 0; i < w.cols; i += kLanes) products = fma(load(work + i), load(row + i), products);
    const double along = static_cast<double>(sum(products)), before = stretch;
    stretch = along < of_row ? of_row / (of_row - along) : 1.0;
    const double more = stretch - 1.0, left = static_cast<double>(rms) * static_cast<double>(rms) * n;
    const double error = more * more * of_row - 2.0 * stretch * more * along + stretch * stretch * left;
    out.steps[p] = static_cast<float>(stretch) * step;
    out.gains[p] = static_cast<float>(stretch / before);
    out.errors[p] = static_cast<float>(__builtin_sqrt((error > 0.0 ? error : 0.0) / n));
    const F32x16 of_rest = set1(static_cast<float>(stretch)), of_whole = set1(static_cast<float>(-more));
    F32x16 peak = zero();
    for (size_t i = 0; i < w.cols; i += kLanes)
      peak = max(abs(fma(load(work + i), of_rest, mul(load(row + i), of_whole))), peak);
    out.peaks[p] = maximum(peak);
    longest = of_row + error > longest ? of_row + error : longest;
  }
  out.norm = static_cast<float>(__builtin_sqrt(longest));
  return out;
}

RowSketch sketch_row(const FloatRows& w, const float* means, const float* inverse_scales, float* work,
                     uint8_t* const codes[kSketchPlanes]) {
  switch (w.type) {
    case RowType::kF32:
      return sketch<RowType::kF32>(w, means, inverse_scales, work, codes);
    case RowType::kF16:
      return sketch<RowType::kF16>(w, means, inverse_scales, work, codes);
    case RowType::kBF16:
      return sketch<RowType::kBF16>(w, means, inverse_scales, work, codes);
    case RowType::kQ8_0:
      return sketch<RowType::kQ8_0>(w, means, inverse_scales, work, codes);
    case RowType::kQ6_K:
      break;
  }
  return sketch<RowType::kQ6_K>(w, means, inverse_scales, work, codes);
}

void dot_rows(const FloatRows& w, const float* x, size_t n_tokens, float* out, size_t out_stride) {
  switch (w.type) {
    case RowType::kF32:
      return dot_all<RowType::kF32>(w, x, n_tokens, out, out_stride);
    case RowType::kF16:
      return dot_all<RowType::kF16>(w, x, n_tokens, out, out_stride);
    case RowType::kBF16:
      return dot_all<RowType::kBF16>(w, x, n_tokens, out, out_stride);
    case RowType::kQ8_0:
      return dot_all<RowType::kQ8_0>(w, x, n_tokens, out, out_stride);
    case RowType::kQ6_K:
      return dot_all<RowType::kQ6_K>(w, x, n_tokens, out, out_stride);
  }
}
