// Ternary matrix times many tokens without a multiplication, by vector look-up tables (after arXiv 2512.06443). Four
// weights have 81 possible sums of ±activations; for a group of four columns all 81 are computed once, each a vector
// over kLutLanes tokens, and every row then takes its four weights' contribution by one vector addition.
//
// A byte of I2_S holds the weights of columns p, p + 32, p + 64, p + 96 of its block of 128: such a byte is a group,
// and its four 2-bit codes, read as digits of base 3, are the number of its sum. Included by avx2.cpp and avx512.cpp,
// inside their namespaces, after lanes_*.h and expand_trits.h.

static_assert(kLutLanes <= kMaxLutLanes);

#include "column_numbers.h"
#include "transpose16.h"

// 2-bit codes → numbers of base 3, for 32 bytes.
inline __m256i base3(__m256i codes) { return base3(_mm256_srli_epi16(codes, 4), codes); }

// Four rows of four numbers of 64 bits → four columns.
inline void transpose4(__m256i (&m)[4]) {
  const __m256i a = _mm256_unpacklo_epi64(m[0], m[1]), b = _mm256_unpackhi_epi64(m[0], m[1]);
  const __m256i c = _mm256_unpacklo_epi64(m[2], m[3]), d = _mm256_unpackhi_epi64(m[2], m[3]);
  m[0] = _mm256_permute2x128_si256(a, c, 0x20);
  m[1] = _mm256_permute2x128_si256(b, d, 0x20);
  m[2] = _mm256_permute2x128_si256(a, c, 0x31);
  m[3] = _mm256_permute2x128_si256(b, d, 0x31);
}

// The numbers of base 3 of block b of a row.
inline __m256i numbers_of(TernaryType type, const uint8_t* row, size_t b) {
  if (type == TernaryType::kCodes) return base3(load256(row + b * 32));
  const uint8_t* unit = row + b / 5 * kTritUnit;
  if (b % 5 < 4) return below81(load256(unit + b % 5 * 32));
  __m256i number = _mm256_setzero_si256();
  for (size_t i = 0; i < 4; i++)  // 3 · number + what the byte has of 81
    number =
        _mm256_add_epi8(_mm256_add_epi8(number, _mm256_add_epi8(number, number)), eighty_ones(load256(unit + i * 32)));
  return number;
}

void lut_numbers(const TernaryRows& w, LutScratch& scratch) {
  constexpr size_t kSide = 4, kAhead = 8;  // rows
  const size_t stride = w.row_bytes(), step = lut_step_bytes(w.rows);
  for (size_t r = 0; r < w.rows; r += kSide) {
    const uint8_t* row = w.data + r * stride;
    uint8_t* out = scratch.numbers + r * kLutGroups;
    for (size_t b = 0; b < w.cols / kTernaryBlock; b++, out += 4 * step) {
      if (b % 2 == 0)
        for (size_t i = 0; i < kSide; i++) prefetch_line(row + (kAhead + i) * stride + b * 32);
      __m256i numbers[kSide];
      for (size_t i = 0; i < kSide; i++) numbers[i] = numbers_of(w.type, row + i * stride, b);
      transpose4(numbers);
      for (size_t i = 0; i < 4; i++) _mm256_store_si256(reinterpret_cast<__m256i*>(out + i * step), numbers[i]);
    }
  }
}

// The same of a matrix of codes by columns.
void lut_column_numbers(const TernaryColumns& w, size_t first_row, size_t n_rows, LutScratch& scratch) {
  numbers_by_columns(w, first_row, n_rows, scratch, [](const uint8_t* line, uint8_t* codes, uint8_t*) {
    for (size_t i = 0; i < kColumnUnit; i += 32)
      _mm256_store_si256(reinterpret_cast<__m256i*>(codes + i), load256(line + i));
  });
}

// What a table's sums are: numbers of 16 bits for kLutLanes tokens …
struct Words {
  static constexpr size_t kTokens = kLutLanes;
  static I16 load(const int8_t* x) { return widen_int8(x); }
  static I16 sum(I16 a, I16 b) { return add(a, b); }
  static I16 difference(I16 a, I16 b) { return sub(a, b); }
};

// … or bytes for twice as many.
struct Bytes {
  static constexpr size_t kTokens = 2 * kLutLanes;
  static I16 load(const int8_t* x) { return load_bytes(x); }
  static I16 sum(I16 a, I16 b) { return add_bytes(a, b); }
  static I16 difference(I16 a, I16 b) { return sub_bytes(a, b); }
};

// All sums of four columns: entry 27 a + 9 b + 3 c + d is bias + (a − 1) x₀ + (b − 1) x₁ + (c − 1) x₂ + (d − 1) x₃. x:
// (4 columns, 32 apart; Type::kTokens).
template <class Type>
inline void fill_table(const int8_t* x, I16 bias, int16_t* table) {
  I16 column[4];
  for (size_t i = 0; i < 4; i++) column[i] = Type::load(x + i * 32 * Type::kTokens);
  const I16 one[3] = {Type::difference(bias, column[0]), bias, Type::sum(bias, column[0])};
  I16 two[9];
  for (size_t a = 0; a < 3; a++) {
    two[3 * a] = Type::difference(one[a], column[1]);
    two[3 * a + 1] = one[a];
    two[3 * a + 2] = Type::sum(one[a], column[1]);
  }
  const auto put = [&](I16 three) {
    store16(table, Type::difference(three, column[3]));
    store16(table + kLutLanes, three);
    store16(table + 2 * kLutLanes, Type::sum(three, column[3]));
    table += 3 * kLutLanes;
  };
#pragma GCC unroll 9
  for (const I16 sum : two) {
    put(Type::difference(sum, column[2]));
    put(sum);
    put(Type::sum(sum, column[2]));
  }
}

// The tables of a step, of which the first has the bias.
template <class Type>
inline void fill_tables(const int8_t* x, I16 bias, int16_t* tables) {
  for (size_t g = 0; g < kLutGroups; g++)
    fill_table<Type>(x + g * Type::kTokens, g == 0 ? bias : zero16(), tables + g * kLutEntries * kLutLanes);
}

// A step's first column. It has kLutGroups columns from there on, and those 32, 64 and 96 further.
inline size_t first_column(size_t step) {
  constexpr size_t kStepsPerBlock = kTernaryBlock / 4 / kLutGroups;
  return step / kStepsPerBlock * kTernaryBlock + step % kStepsPerBlock * kLutGroups;
}

// Asks for a step's activations: four short runs, which the processor does not foresee.
inline void prefetch_step(const int8_t* x, size_t step, size_t n_tokens) {
  for (size_t i = 0; i < 4; i++)
    for (size_t b = 0; b < kLutGroups * n_tokens; b += 64)
      prefetch_line(x + (first_column(step) + i * 32) * n_tokens + b);
}

// Adds the sums of kLutGroups groups to a row: those of its numbers of base 3, of which `word` has one in each byte. A
// number becomes an offset in its table by one rotation and one mask, kOffsets.
constexpr uint64_t kOffsets = 127 * sizeof(I16);
template <class Type>
inline I16 add_groups(I16 sum, const int16_t* tables, uint64_t word, uint64_t offsets) {
  static_assert(kLutGroups == 8);
  constexpr int kEntryBits = std::countr_zero(sizeof(I16));
  for (size_t g = 0; g < kLutGroups; g++) {
    const uint64_t offset = std::rotr(word, static_cast<int>(8 * g) - kEntryBits) & offsets;
    const char* table = reinterpret_cast<const char*>(tables + g * kLutEntries * kLutLanes);
    sum = Type::sum(sum, load16(reinterpret_cast<const int16_t*>(table + offset)));
  }
  return sum;
}

template <int kPart>
inline uint64_t word_of(__m128i pair) {
  uint64_t word = static_cast<uint64_t>(kPart == 0 ? _mm_cvtsi128_si64(pair) : _mm_extract_epi64(pair, 1));
  __asm__("" : "+r"(word));  // or GCC would take it later
  return word;
}

// f(number, i) for n numbers of 64 bits, a multiple of kWordsAtOnce, of which a line more can be read. They reach the
// integer registers a pair ahead of their use, since a processor does not look ahead far enough to hide the way (Zen 5:
// a quarter of the time of look-up).
template <class F>
inline void for_words(const uint8_t* p, size_t n, F&& f) {
  auto words = load_words(p);
  uint64_t even = word_of<0>(first_pair(words)), odd = word_of<1>(first_pair(words));
  const auto step = [&](__m128i next, size_t i) {
    const uint64_t next_even = word_of<0>(next);
    f(even, i);
    even = next_even;
    const uint64_t next_odd = word_of<1>(next);
    f(odd, i + 1);
    odd = next_odd;
  };
  for (size_t i = 0; i < n; i += kWordsAtOnce) {
    const auto next = load_words(p + (i + kWordsAtOnce) * sizeof(uint64_t));
    for_later_pairs(words, [&](__m128i pair, size_t at) { step(pair, i + at); });
    step(first_pair(next), i + kWordsAtOnce - 2);
    words = next;
  }
}

// f(sum, r) for every row: the sums of kLutGroups groups, added to those that first(r) has.
template <class Type, class First, class F>
inline void for_rows(const uint8_t* numbers, size_t rows, const int16_t* tables, First&& first, F&& f) {
  uint64_t offsets = kOffsets;
  __asm__("" : "+r"(offsets));  // in a register, not in every instruction that uses it
  for_words(numbers, rows, [&](uint64_t word, size_t r) { f(add_groups<Type>(first(r), tables, word, offsets), r); });
}

// How large the sums of a step can be: Σ |x| of its columns.
inline I16 largest_sums(const int8_t* x) {
  I16 sum = zero16();
  for (size_t g = 0; g < kLutGroups; g++)
    for (size_t i = 0; i < 4; i++) sum = add(sum, absolute(widen_int8(x + (i * 32 + g) * kLutLanes)));
  return sum;
}

// One step. The 16-bit sums in `words` begin at zero where kFirst and end in `sums`, where there may be some already,
// where kLast.
template <bool kFirst, bool kLast>
inline void lut_step(const uint8_t* numbers, size_t rows, const int16_t* tables, int16_t* words, int32_t* sums) {
  for_rows<Words>(
      numbers, rows, tables, [&](size_t r) { return kFirst ? zero16() : load16(words + r * kLutLanes); },
      [&](I16 sum, size_t r) {
        if (kLast)
          add_widened(sums + r * kLutLanes, sum);
        else
          store16(words + r * kLutLanes, sum);
      });
}

// sums[r · kLutLanes + t] = Σₖ x[k · kLutLanes + t] · weight[r][k] for rows ≤ kLutRows, a multiple of 16. Sixteen bits
// hold the sums of as many steps as the activations' absolute values allow: eight at least, some dozens as a rule.
inline void lut_sums(size_t rows, size_t cols, const int8_t* x, LutScratch& scratch) {
  const size_t n_steps = cols / (4 * kLutGroups);
  for (size_t i = 0; i < rows * kLutLanes; i++) scratch.sums[i] = 0;
  const uint8_t* numbers = scratch.numbers;
  I16 largest = zero16(), next = largest_sums(x);  // of the steps since the last flush, and of the next one
  bool first = true;
  for (size_t step = 0; step < n_steps; step++, numbers += lut_step_bytes(rows)) {
    fill_tables<Words>(x + first_column(step) * kLutLanes, zero16(), scratch.tables);
    largest = add(largest, next);
    if (step + 1 < n_steps) next = largest_sums(x + first_column(step + 1) * kLutLanes);
    if (step + 2 < n_steps) prefetch_step(x, step + 2, kLutLanes);
    const bool last = step + 1 == n_steps || any_negative(add(largest, next));
    const auto run = first ? (last ? lut_step<true, true> : lut_step<true, false>)
                           : (last ? lut_step<false, true> : lut_step<false, false>);
    run(numbers, rows, scratch.tables, scratch.words, scratch.sums);
    first = last;
    if (last) largest = zero16();
  }
}

inline void transpose8(__m256i (&m)[8]) {
  __m256i t[8], u[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_epi32(m[2 * i], m[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(m[2 * i], m[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    const int a = i / 2 * 4 + i % 2;
    u[2 * i] = _mm256_unpacklo_epi64(t[a], t[a + 2]);
    u[2 * i + 1] = _mm256_unpackhi_epi64(t[a], t[a + 2]);
  }
  for (int i = 0; i < 4; i++) {
    m[i] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
    m[i + 4] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
  }
}

// out[t · out_stride + r] = float(Σ) / activation_scales[t] · weight_scale; sums_of(r, t) has the sums of a row for the
// tokens from t to t + 7, to which those of `more`, as `out` is laid out, are added where there are any.
template <class SumsOf>
inline void put_products(size_t rows, size_t n_tokens, const float* activation_scales, float weight_scale,
                         const int32_t* more, float* out, size_t out_stride, SumsOf&& sums_of) {
  constexpr size_t kRowsAtOnce = 64;  // whose sums stay in the L1 cache
  const __m256 weight = _mm256_set1_ps(weight_scale);
  for (size_t begin = 0; begin < rows; begin += kRowsAtOnce) {
    const size_t end = begin + kRowsAtOnce < rows ? begin + kRowsAtOnce : rows;
    for (size_t t = 0; t < n_tokens; t += 8) {
      const size_t n = n_tokens - t < 8 ? n_tokens - t : 8;
      for (size_t r = begin; r < end; r += 8) {
        __m256i m[8];
        for (size_t i = 0; i < 8; i++) m[i] = sums_of(r + i, t);
        transpose8(m);
#pragma GCC unroll 8
        for (size_t i = 0; i < 8; i++) {
          if (i >= n) break;
          const size_t at = (t + i) * out_stride + r;
          const __m256i sum = more == nullptr ? m[i] : _mm256_add_epi32(m[i], load256(more + at));
          const __m256 activation = _mm256_set1_ps(activation_scales[t + i]);
          _mm256_storeu_ps(out + at, _mm256_mul_ps(_mm256_div_ps(_mm256_cvtepi32_ps(sum), activation), weight));
        }
      }
    }
  }
}

void ternary_lut(size_t rows, size_t cols, const int8_t* x, size_t n_tokens, const float* activation_scales,
                 float weight_scale, LutScratch& scratch, float* out, size_t out_stride) {
  lut_sums(rows, cols, x, scratch);
  put_products(rows, n_tokens, activation_scales, weight_scale, nullptr, out, out_stride,
               [&](size_t r, size_t t) { return load256(scratch.sums + r * kLutLanes + t); });
}

// out[k · n_lanes + lane] = values[token_of(lane) · cols + k]; lanes of tokens past n_tokens become 0.
template <size_t kTokens, class TokenOf>
inline void transpose_tokens(const int8_t* values, size_t cols, size_t n_tokens, int8_t* out, TokenOf&& token_of) {
  for (size_t first = 0; first < kTokens; first += 16)
    for (size_t k = 0; k < cols; k += 16) {
      __m128i m[16];
      for (size_t i = 0; i < 16; i++) {
        const size_t t = token_of(first + i);
        m[i] = t < n_tokens ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + t * cols + k))
                            : _mm_setzero_si128();
      }
      transpose16(m);
      for (size_t i = 0; i < 16; i++)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + (k + i) * kTokens + first), m[i]);
    }
}

void transpose_tile(const int8_t* values, size_t cols, size_t n_tokens, int8_t* out) {
  transpose_tokens<kLutLanes>(values, cols, n_tokens, out, [](size_t lane) { return lane; });
}
