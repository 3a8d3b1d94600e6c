// Look-up for twice as many tokens at a time, where most activations are 0 or small: the sums of a step then fit in
// bytes. Where they would not, activations are capped, and what is cut off, the excess, is multiplied by columns, of
// which there are few. Included by avx2.cpp and avx512.cpp, inside their namespaces, after ternary_lut.h.

constexpr int kByteCap = 127;  // of a step's Σ |x|: its sums plus kByteBias are bytes
constexpr int kByteBias = 128;

// Σ |x| of each of the four steps of a block of 128 columns.
inline __m256i sums_of_steps(const int8_t* x) {
  static_assert(kTernaryBlock == 4 * 32 && kLutGroups == 8);
  __m256i sum = _mm256_setzero_si256();
  for (size_t i = 0; i < 4; i++)
    sum = _mm256_add_epi64(sum, _mm256_sad_epu8(_mm256_abs_epi8(load256(x + i * 32)), _mm256_setzero_si256()));
  return sum;
}

// A bit for each step of the block whose sums may be too large.
inline uint32_t steps_above(__m256i sums) {
  const __m256i above = _mm256_cmpgt_epi64(sums, _mm256_set1_epi64x(kByteCap));
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(above)));
}

size_t steps_above_cap(const int8_t* x, size_t cols) {
  size_t n = 0;
  for (size_t c = 0; c < cols; c += kTernaryBlock)
    n += static_cast<size_t>(std::popcount(steps_above(sums_of_steps(x + c))));
  return n;
}

// The largest of bytes without sign.
inline uint32_t largest_byte(__m256i a) {
  const __m256i inverse = _mm256_xor_si256(a, _mm256_set1_epi8(-1));  // the smallest of which can be asked for
  const __m128i half = _mm_min_epu8(_mm256_castsi256_si128(inverse), _mm256_extracti128_si256(inverse, 1));
  const __m128i smallest = _mm_minpos_epu16(_mm_min_epu8(half, _mm_srli_epi16(half, 8)));
  return 255 - (static_cast<uint32_t>(_mm_cvtsi128_si32(smallest)) & 255);
}

// The largest of a step's activations give way, `above` of Σ |x|: put(i, cut) is called for each that does.
template <class F>
inline size_t cap_step(int8_t* x, int above, F&& put) {
  const auto eight = [&](size_t i) {
    int64_t value;
    __builtin_memcpy(&value, x + i * 32, sizeof value);
    return value;
  };
  const __m256i places = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                          22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
  __m256i sizes = _mm256_abs_epi8(_mm256_setr_epi64x(eight(0), eight(1), eight(2), eight(3)));
  size_t n = 0;
  for (; above > 0; n++) {
    const int largest = static_cast<int>(largest_byte(sizes)), cut = largest < above ? largest : above;
    const __m256i found = _mm256_cmpeq_epi8(sizes, _mm256_set1_epi8(static_cast<char>(largest)));
    const size_t place = static_cast<size_t>(std::countr_zero(static_cast<uint32_t>(_mm256_movemask_epi8(found))));
    const size_t at = place / 8 * 32 + place % 8;
    const int8_t signed_cut = static_cast<int8_t>(x[at] < 0 ? -cut : cut);
    x[at] = static_cast<int8_t>(x[at] - signed_cut);
    put(at, signed_cut);
    above -= cut;
    sizes = _mm256_andnot_si256(_mm256_cmpeq_epi8(places, _mm256_set1_epi8(static_cast<char>(place))), sizes);
  }
  return n;
}

size_t cap(const TernaryColumns& w, int8_t* x, int8_t* excess) {
  size_t n = 0;
  for (size_t c = 0; c < w.cols; c += kTernaryBlock) {
    alignas(32) int64_t sums[4];
    const __m256i all = sums_of_steps(x + c);
    _mm256_store_si256(reinterpret_cast<__m256i*>(sums), all);
    for (uint32_t steps = steps_above(all); steps != 0; steps &= steps - 1) {
      const size_t step = static_cast<size_t>(std::countr_zero(steps)), first = c + step * kLutGroups;
      n += cap_step(x + first, static_cast<int>(sums[step]) - kByteCap, [&](size_t i, int8_t cut) {
        excess[first + i] = cut;
        prefetch(w.data + (first + i) * w.column_bytes(), w.column_bytes());
      });
    }
  }
  return n;
}

// Two sums of 16 bits for each pair of bytes: that of the upper byte, and that of both as one number, from which the
// lower byte's is what is left. Neither has to fit in 16 bits on the way.
template <bool kFirst>
inline void wide_step(const uint8_t* numbers, size_t rows, const int16_t* tables, int16_t* words) {
  for_rows<Bytes>(
      numbers, rows, tables, [&](size_t) { return zero16(); },
      [&](I16 sum, size_t r) {
        int16_t *both = words + r * 2 * kLutLanes, *upper = both + kLutLanes;
        store16(both, kFirst ? sum : add(load16(both), sum));
        store16(upper, kFirst ? upper_bytes(sum) : add(load16(upper), upper_bytes(sum)));
      });
}

void wide_lut(size_t rows, size_t cols, const int8_t* x, size_t n_tokens, const float* activation_scales,
              float weight_scale, const int32_t* excess, LutScratch& scratch, float* out, size_t out_stride) {
  const size_t n_steps = cols / (4 * kLutGroups);
  const I16 bias = set1_bytes(static_cast<int8_t>(kByteBias));
  const uint8_t* numbers = scratch.numbers;
  for (size_t step = 0; step < n_steps; step++, numbers += lut_step_bytes(rows)) {
    fill_tables<Bytes>(x + first_column(step) * Bytes::kTokens, bias, scratch.tables);
    if (step + 2 < n_steps) prefetch_step(x, step + 2, Bytes::kTokens);
    (step == 0 ? wide_step<true> : wide_step<false>)(numbers, rows, scratch.tables, scratch.words);
  }
  const __m128i all_biases = _mm_set1_epi16(static_cast<int16_t>(n_steps * kByteBias));
  put_products(rows, n_tokens, activation_scales, weight_scale, excess, out, out_stride, [&](size_t r, size_t t) {
    const int16_t *both = scratch.words + r * 2 * kLutLanes + t % kLutLanes, *upper = both + kLutLanes;
    __m128i sum = _mm_load_si128(reinterpret_cast<const __m128i*>(upper));
    if (t < kLutLanes)
      sum = _mm_sub_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(both)), _mm_slli_epi16(sum, 8));
    return _mm256_cvtepi16_epi32(_mm_sub_epi16(sum, all_biases));
  });
}

// Token t is the lower byte of pair t, token kLutLanes + t the upper one.
void transpose_wide_tile(const int8_t* values, size_t cols, size_t n_tokens, int8_t* out) {
  transpose_tokens<Bytes::kTokens>(values, cols, n_tokens, out,
                                   [](size_t lane) { return lane / 2 + lane % 2 * kLutLanes; });
}
