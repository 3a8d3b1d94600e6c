// Five trits in a byte → the 2-bit codes of I2_S, for AVX2. Included once by avx2.cpp and avx512.cpp, inside their
// namespaces.

inline __m256i at_least(__m256i a, uint8_t least) {  // unsigned; −1 where true
  return _mm256_cmpeq_epi8(_mm256_max_epu8(a, _mm256_set1_epi8(static_cast<char>(least))), a);
}

// Numbers of base 3 below 81 → four 2-bit codes: split by 9, then each half is looked up.
inline __m256i codes_of(__m256i w) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i ninths =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 3, 5, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));  // 16a / 9
  const __m256i rests =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 7, 5, 3, 1, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));  // 16a mod 9
  const __m256i pair =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 0, 0, 0, 0, 0, 0, 0));  // 3a + b → 4a + b
  const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble);
  const __m256i sum = _mm256_add_epi8(_mm256_shuffle_epi8(rests, upper), _mm256_and_si256(w, nibble));  // below 24
  const __m256i once = at_least(sum, 9), again = at_least(sum, 18), nine = _mm256_set1_epi8(9);
  const __m256i high = _mm256_sub_epi8(_mm256_shuffle_epi8(ninths, upper), _mm256_add_epi8(once, again));
  const __m256i low =
      _mm256_sub_epi8(sum, _mm256_add_epi8(_mm256_and_si256(once, nine), _mm256_and_si256(again, nine)));
  return _mm256_or_si256(_mm256_slli_epi16(_mm256_shuffle_epi8(pair, high), 4), _mm256_shuffle_epi8(pair, low));
}

// What a byte has of 81, from 0 to 2.
inline __m256i eighty_ones(__m256i v) {
  return _mm256_sub_epi8(_mm256_setzero_si256(), _mm256_add_epi8(at_least(v, 81), at_least(v, 162)));
}
// And what is left of it then, or once more where it is damaged: below 81.
inline __m256i below81(__m256i v) {
  for (const uint8_t least : {243, 162, 81})  // less than the next ones, once 81 is taken from what is not
    v = _mm256_sub_epi8(v, _mm256_and_si256(at_least(v, least), _mm256_set1_epi8(81)));
  return v;
}

void expand_trits(const uint8_t* packed, size_t units, uint8_t* codes) {
  for (size_t u = 0; u < units; u++, packed += kTritUnit, codes += kCodeUnit) {
    __m256i fifth = _mm256_setzero_si256();
    for (size_t i = 0; i < 4; i++) {
      const __m256i p = load256(packed + i * 32);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i * 32), codes_of(below81(p)));
      fifth = _mm256_add_epi8(_mm256_slli_epi16(fifth, 2), eighty_ones(p));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + 128), fifth);
  }
}
