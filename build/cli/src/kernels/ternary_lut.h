// Ternary matrix times many tokens without a multiplication, by vector look-up tables (after arXiv 2512.06443). Four
// weights have 81 possible sums of ±activations; for a group of four columns all 81 are computed once, each a vector
// over kLutLanes tokens, and every row then takes its four weights' contribution by one vector addition.
//
// A byte of I2_S holds the weights of columns p, p + 32, p + 64, p + 96 of its block of 128: such a byte is a group,
// and its four 2-bit codes, read as digits of base 3, are the number of its sum. Included once by avx2.cpp,
// inside its namespace, after lanes_avx2.h.

static_assert(kLutLanes <= kMaxLutLanes);
constexpr size_t kBlocksPerFlush = 2;  // of 32 groups, each at most 4 · 127: a 16-bit sum holds 64 groups

// 2-bit codes → numbers of base 3, for 32 bytes: both nibbles are looked up and added.
inline __m256i base3(__m256i codes) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i low = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 0, 0, 0, 0));
  const __m256i high =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 9, 18, 0, 27, 36, 45, 0, 54, 63, 72, 0, 0, 0, 0, 0));
  return _mm256_add_epi8(_mm256_shuffle_epi8(low, _mm256_and_si256(codes, nibble)),
                         _mm256_shuffle_epi8(high, _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble)));
}

// The numbers of base 3 of block b of every row, (w.rows, 32).
inline void load_numbers(const TernaryRows& w, size_t b, uint8_t* numbers) {
  const auto put = [&](size_t r, __m256i row) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(numbers + r * 32), row);
  };
  const size_t stride = w.row_bytes(), in_unit = b % 5;
  if (w.type == TernaryType::kCodes)
    for (size_t r = 0; r < w.rows; r++) put(r, base3(load256(w.data + r * stride + b * 32)));
  else if (in_unit < 4)
    for (size_t r = 0; r < w.rows; r++)
      put(r, below81(load256(w.data + r * stride + b / 5 * kTritUnit + in_unit * 32)));
  else
    for (size_t r = 0; r < w.rows; r++) {
      const uint8_t* unit = w.data + r * stride + b / 5 * kTritUnit;
      __m256i number = _mm256_setzero_si256();
      for (size_t i = 0; i < 4; i++)  // 3 · number + what the byte has of 81
        number = _mm256_add_epi8(_mm256_add_epi8(number, _mm256_add_epi8(number, number)),
                                 eighty_ones(load256(unit + i * 32)));
      put(r, number);
    }
}

// All sums of four columns: entry 27 a + 9 b + 3 c + d is (a − 1) x₀ + (b − 1) x₁ + (c − 1) x₂ + (d − 1) x₃. x: (4
// columns, 32 apart; kLutLanes).
inline void fill_table(const int8_t* x, int16_t* table) {
  I16 column[4];
  for (size_t i = 0; i < 4; i++) column[i] = widen_int8(x + i * 32 * kLutLanes);
  I16 one[3] = {negate(column[0]), zero16(), column[0]}, two[9], three[27];
  for (int a = 0; a < 3; a++) {
    two[3 * a] = sub(one[a], column[1]);
    two[3 * a + 1] = one[a];
    two[3 * a + 2] = add(one[a], column[1]);
  }
  for (int a = 0; a < 9; a++) {
    three[3 * a] = sub(two[a], column[2]);
    three[3 * a + 1] = two[a];
    three[3 * a + 2] = add(two[a], column[2]);
  }
  for (size_t a = 0; a < 27; a++) {
    store16(table + (3 * a) * kLutLanes, sub(three[a], column[3]));
    store16(table + (3 * a + 1) * kLutLanes, three[a]);
    store16(table + (3 * a + 2) * kLutLanes, add(three[a], column[3]));
  }
}

// Adds the sums of kLutGroups groups to one row. `numbers`: the row's numbers of base 3, one a group.
inline I16 add_groups(I16 sum, const int16_t* tables, const uint8_t* numbers) {
  static_assert(kLutGroups == 8, "the numbers are read as one 64-bit word");
  uint64_t word;
  __builtin_memcpy(&word, numbers, sizeof word);
  for (size_t g = 0; g < kLutGroups; g++)
    sum = add(sum, load16(tables + (g * kLutEntries + ((word >> (8 * g)) & 255)) * kLutLanes));
  return sum;
}

// sums[r · kLutLanes + t] = Σₖ x[k · kLutLanes + t] · weight[r][k] for w.rows ≤ kLutRows, an even number.
inline void lut_sums(const TernaryRows& w, const int8_t* x, LutScratch& scratch) {
  const size_t n_blocks = w.cols / kTernaryBlock;
  int16_t* words = scratch.words;
  for (size_t i = 0; i < w.rows * kLutLanes; i++) words[i] = 0;
  for (size_t i = 0; i < w.rows * kLutLanes; i++) scratch.sums[i] = 0;
  for (size_t b = 0; b < n_blocks; b++) {
    load_numbers(w, b, scratch.numbers);
    for (size_t first = 0; first < 32; first += kLutGroups) {
      for (size_t g = 0; g < kLutGroups; g++)
        fill_table(x + (b * kTernaryBlock + first + g) * kLutLanes, scratch.tables + g * kLutEntries * kLutLanes);
      const uint8_t* numbers = scratch.numbers + first;
      for (size_t r = 0; r < w.rows; r += 2) {  // two chains of additions at once
        const I16 even = add_groups(load16(words + r * kLutLanes), scratch.tables, numbers + r * 32);
        const I16 odd = add_groups(load16(words + (r + 1) * kLutLanes), scratch.tables, numbers + (r + 1) * 32);
        store16(words + r * kLutLanes, even);
        store16(words + (r + 1) * kLutLanes, odd);
      }
    }
    if (b % kBlocksPerFlush == kBlocksPerFlush - 1 || b + 1 == n_blocks)
      for (size_t i = 0; i < w.rows * kLutLanes; i += kLutLanes) {
        add_widened(scratch.sums + i, load16(words + i));
        store16(words + i, zero16());
      }
  }
}

inline void transpose8(__m256 (&m)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_ps(m[2 * i], m[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(m[2 * i], m[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    m[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    m[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

void ternary_lut(const TernaryRows& w, const int8_t* x, size_t n_tokens, const float* activation_scales,
                 float weight_scale, LutScratch& scratch, float* out, size_t out_stride) {
  lut_sums(w, x, scratch);
  const __m256 weight = _mm256_set1_ps(weight_scale);
  for (size_t t = 0; t < n_tokens; t += 8) {
    float scales[8];
    for (size_t i = 0; i < 8; i++) scales[i] = t + i < n_tokens ? activation_scales[t + i] : 1.0f;
    const __m256 activation = _mm256_loadu_ps(scales);
    for (size_t r = 0; r < w.rows; r += 8) {
      __m256 m[8];
      for (size_t i = 0; i < 8; i++) {
        const __m256 sums = _mm256_cvtepi32_ps(load256(scratch.sums + (r + i) * kLutLanes + t));
        m[i] = _mm256_mul_ps(_mm256_div_ps(sums, activation), weight);
      }
      transpose8(m);
      for (size_t i = 0; i < 8 && t + i < n_tokens; i++) _mm256_storeu_ps(out + (t + i) * out_stride + r, m[i]);
    }
  }
}

// out[k · kLutLanes + t] = values[t · cols + k]; lanes past n_tokens become 0.
void transpose_tile(const int8_t* values, size_t cols, size_t n_tokens, int8_t* out) {
  for (size_t first = 0; first < kLutLanes; first += 16)
    for (size_t k = 0; k < cols; k += 16) {
      __m128i m[16], n[16];
      for (size_t t = 0; t < 16; t++)
        m[t] = first + t < n_tokens ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + (first + t) * cols + k))
                                    : _mm_setzero_si128();
      for (int round = 0; round < 4; round++) {  // four perfect shuffles of sixteen rows transpose them
        for (int i = 0; i < 8; i++) {
          n[2 * i] = _mm_unpacklo_epi8(m[i], m[i + 8]);
          n[2 * i + 1] = _mm_unpackhi_epi8(m[i], m[i + 8]);
        }
        for (int i = 0; i < 16; i++) m[i] = n[i];
      }
      for (size_t i = 0; i < 16; i++)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + (k + i) * kLutLanes + first), m[i]);
    }
}
