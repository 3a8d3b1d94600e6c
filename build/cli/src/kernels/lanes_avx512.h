// Sixteen float lanes in one 512-bit register. Included once by avx512.cpp, inside its namespace.

using F32x16 = __m512;

// Zeros that GCC takes for numbers like others: sums that begin with the constant it moves to another register and back
// at every step.
inline F32x16 zero() {
  F32x16 a = _mm512_setzero_ps();
  __asm__("" : "+v"(a));
  return a;
}
inline F32x16 set1(float a) { return _mm512_set1_ps(a); }
inline F32x16 load(const float* p) { return _mm512_loadu_ps(p); }
inline F32x16 load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline F32x16 set1_half(const uint8_t* p) {
  uint16_t half;
  __builtin_memcpy(&half, p, sizeof half);
  return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(half)));
}
inline F32x16 load_bfloat(const uint16_t* p) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
inline F32x16 load_int8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline F32x16 load_int32(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
inline void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a); }
inline void store_half(uint16_t* p, F32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_int8(int8_t* p, F32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a)));
}
inline void store_int16(int16_t* p, F32x16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a)));
}
inline void store_uint8(uint8_t* p, F32x16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(a)));
}
inline F32x16 add(F32x16 a, F32x16 b) { return _mm512_add_ps(a, b); }
inline F32x16 sub(F32x16 a, F32x16 b) { return _mm512_sub_ps(a, b); }
inline F32x16 mul(F32x16 a, F32x16 b) { return _mm512_mul_ps(a, b); }
inline F32x16 div(F32x16 a, F32x16 b) { return _mm512_div_ps(a, b); }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return _mm512_fmadd_ps(a, b, c); }
inline F32x16 max(F32x16 a, F32x16 b) { return _mm512_max_ps(a, b); }
inline F32x16 min(F32x16 a, F32x16 b) { return _mm512_min_ps(a, b); }
inline F32x16 abs(F32x16 a) { return _mm512_abs_ps(a); }
inline F32x16 rint(F32x16 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F32x16 exp2_integral(F32x16 n) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}
inline uint32_t not_below(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }  // a bit for each lane
inline F32x16 keep_first(F32x16 a, size_t count, float fill) {
  const __mmask16 mask = static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1u);
  return _mm512_mask_blend_ps(mask, _mm512_set1_ps(fill), a);
}
inline __m256 upper(__m512 a) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)); }
inline float sum(F32x16 a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), upper(a));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float maximum(F32x16 a) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a), upper(a));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

struct F64x16 {
  __m512d lo, hi;
};
inline F64x16 zero64() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
inline F64x16 add(F64x16 s, F32x16 x) {
  return {_mm512_add_pd(s.lo, _mm512_cvtps_pd(_mm512_castps512_ps256(x))),
          _mm512_add_pd(s.hi, _mm512_cvtps_pd(upper(x)))};
}
inline double sum(F64x16 s) {
  const __m512d eight = _mm512_add_pd(s.lo, s.hi);
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

// Sixteen 32-bit integers, and sixteen pairs of 16-bit ones.
using I32x16 = __m512i;
using I16Pairs = __m512i;
inline I32x16 zero32() {
  I32x16 a = _mm512_setzero_si512();
  __asm__("" : "+v"(a));
  return a;
}
inline I16Pairs load_pairs(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline I16Pairs set1_pair(const int16_t* p) {
  int pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return _mm512_set1_epi32(pair);
}
inline I32x16 add_products(I32x16 sum, I16Pairs a, I16Pairs b) { return _mm512_dpwssd_epi32(sum, a, b); }
inline I32x16 add32(I32x16 a, I32x16 b) { return _mm512_add_epi32(a, b); }
inline F32x16 to_float(I32x16 a) { return _mm512_cvtepi32_ps(a); }

// Thirty-two 16-bit integers: the tokens of a look-up table. Or 64 bytes.
constexpr size_t kLutLanes = 32;
using I16 = __m512i;
inline I16 zero16() { return _mm512_setzero_si512(); }
inline I16 load16(const int16_t* p) { return _mm512_load_si512(p); }
inline void store16(int16_t* p, I16 a) { _mm512_store_si512(p, a); }
inline I16 widen_int8(const int8_t* p) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline I16 add(I16 a, I16 b) { return _mm512_add_epi16(a, b); }
inline I16 sub(I16 a, I16 b) { return _mm512_sub_epi16(a, b); }
inline I16 negate(I16 a) { return sub(zero16(), a); }
inline I16 absolute(I16 a) { return _mm512_abs_epi16(a); }
inline I16 load_bytes(const int8_t* p) { return _mm512_loadu_si512(p); }
inline I16 set1_bytes(int8_t a) { return _mm512_set1_epi8(a); }
inline I16 add_bytes(I16 a, I16 b) { return _mm512_add_epi8(a, b); }
inline I16 sub_bytes(I16 a, I16 b) { return _mm512_sub_epi8(a, b); }
inline I16 upper_bytes(I16 a) { return _mm512_srli_epi16(a, 8); }  // of pairs, as numbers without sign
inline bool any_negative(I16 a) { return _mm512_movepi16_mask(a) != 0; }
inline void add_widened(int32_t* p, I16 a) {  // p[i] += a[i]
  const __m512i lo = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(a));
  const __m512i hi = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(a, 1));
  _mm512_store_si512(p, _mm512_add_epi32(_mm512_load_si512(p), lo));
  _mm512_store_si512(p + 16, _mm512_add_epi32(_mm512_load_si512(p + 16), hi));
}
// Eight numbers of 64 bits, loaded together, since loads of 64 bits hold up those of 512 beside them.
constexpr size_t kWordsAtOnce = 8;
inline __m512i load_words(const uint8_t* p) {
  __m512i words = _mm512_load_si512(p);
  __asm__("" : "+v"(words));  // or GCC would load its parts
  return words;
}
inline __m128i first_pair(__m512i words) { return _mm512_castsi512_si128(words); }
template <class F>
inline void for_later_pairs(__m512i words, F&& f) {  // f(pair, i), i being where the pair before it is
  f(_mm512_extracti64x2_epi64(words, 1), 0);
  f(_mm512_extracti64x2_epi64(words, 2), 2);
  f(_mm512_extracti64x2_epi64(words, 3), 4);
}
