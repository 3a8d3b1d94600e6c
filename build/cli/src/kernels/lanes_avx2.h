// Sixteen float lanes in two 256-bit registers (lanes 0–7 and 8–15). Included once by avx2.cpp, inside its namespace.

struct F32x16 {
  __m256 lo, hi;
};

inline F32x16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F32x16 set1(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
inline F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F32x16 load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline F32x16 set1_half(const uint8_t* p) {
  uint16_t half;
  __builtin_memcpy(&half, p, sizeof half);
  const __m256 all = _mm256_cvtph_ps(_mm_set1_epi16(static_cast<short>(half)));
  return {all, all};
}
inline __m256 bfloat8(const uint16_t* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}
inline F32x16 load_bfloat(const uint16_t* p) { return {bfloat8(p), bfloat8(p + 8)}; }
inline __m256 int8_8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline F32x16 load_int8(const int8_t* p) { return {int8_8(p), int8_8(p + 8)}; }
inline F32x16 load_int32(const int32_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
          _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8)))};
}
inline void store(float* p, F32x16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline void store_half(uint16_t* p, F32x16 a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, kNearest));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, kNearest));
}
inline void store_int8(int8_t* p, F32x16 a) {
  const __m256i lo = _mm256_cvtps_epi32(a.lo), hi = _mm256_cvtps_epi32(a.hi);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline void store_int16(int16_t* p, F32x16 a) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(words, 0xd8));
}
inline void store_uint8(uint8_t* p, F32x16 a) {
  const __m256i lo = _mm256_cvtps_epi32(a.lo), hi = _mm256_cvtps_epi32(a.hi);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8);
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
inline F32x16 add(F32x16 a, F32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F32x16 sub(F32x16 a, F32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F32x16 mul(F32x16 a, F32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F32x16 div(F32x16 a, F32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F32x16 abs(F32x16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline F32x16 rint(F32x16 a) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kNearest), _mm256_round_ps(a.hi, kNearest)};
}
inline __m256 exp2_integral8(__m256 n) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
inline F32x16 exp2_integral(F32x16 n) { return {exp2_integral8(n.lo), exp2_integral8(n.hi)}; }
inline uint32_t not_below(F32x16 a, F32x16 b) {  // a bit for each lane
  const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_NLT_UQ));
  const int hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_NLT_UQ));
  return static_cast<uint32_t>(lo | hi << 8);
}
inline F32x16 keep_first(F32x16 a, size_t count, float fill) {
  const __m256i n = _mm256_set1_epi32(static_cast<int>(count));
  const __m256i lo = _mm256_cmpgt_epi32(n, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  const __m256i hi = _mm256_cmpgt_epi32(n, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
  const __m256 other = _mm256_set1_ps(fill);
  return {_mm256_blendv_ps(other, a.lo, _mm256_castsi256_ps(lo)),
          _mm256_blendv_ps(other, a.hi, _mm256_castsi256_ps(hi))};
}
inline float sum(F32x16 a) {
  const __m256 eight = _mm256_add_ps(a.lo, a.hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float maximum(F32x16 a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

struct F64x16 {
  __m256d a, b, c, d;
};
inline F64x16 zero64() { return {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()}; }
inline F64x16 add(F64x16 s, F32x16 x) {
  return {_mm256_add_pd(s.a, _mm256_cvtps_pd(_mm256_castps256_ps128(x.lo))),
          _mm256_add_pd(s.b, _mm256_cvtps_pd(_mm256_extractf128_ps(x.lo, 1))),
          _mm256_add_pd(s.c, _mm256_cvtps_pd(_mm256_castps256_ps128(x.hi))),
          _mm256_add_pd(s.d, _mm256_cvtps_pd(_mm256_extractf128_ps(x.hi, 1)))};
}
inline double sum(F64x16 s) {
  const __m256d lo = _mm256_add_pd(s.a, s.c), hi = _mm256_add_pd(s.b, s.d);
  const __m256d four = _mm256_add_pd(lo, hi);
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

// Sixteen 32-bit integers, and sixteen pairs of 16-bit ones.
struct I32x16 {
  __m256i lo, hi;
};
using I16Pairs = I32x16;
inline I32x16 zero32() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I16Pairs load_pairs(const int8_t* p) {
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
}
inline I16Pairs set1_pair(const int16_t* p) {
  int pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return {_mm256_set1_epi32(pair), _mm256_set1_epi32(pair)};
}
// To the register where the sum is: GCC would take all products first, and move sums from register to register.
inline void add_in_place(__m256i& sum, __m256i a) { __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(a)); }
inline I32x16 add_products(I32x16 sum, I16Pairs a, I16Pairs b) {
  add_in_place(sum.lo, _mm256_madd_epi16(a.lo, b.lo));
  add_in_place(sum.hi, _mm256_madd_epi16(a.hi, b.hi));
  return sum;
}
inline I32x16 add32(I32x16 a, I32x16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline F32x16 to_float(I32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }

// Sixteen 16-bit integers: the tokens of a look-up table. Or 32 bytes.
constexpr size_t kLutLanes = 16;
using I16 = __m256i;
inline I16 zero16() { return _mm256_setzero_si256(); }
inline I16 load16(const int16_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store16(int16_t* p, I16 a) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), a); }
inline I16 widen_int8(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline I16 add(I16 a, I16 b) { return _mm256_add_epi16(a, b); }
inline I16 sub(I16 a, I16 b) { return _mm256_sub_epi16(a, b); }
inline I16 negate(I16 a) { return sub(zero16(), a); }
inline I16 absolute(I16 a) { return _mm256_abs_epi16(a); }
inline I16 load_bytes(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline I16 set1_bytes(int8_t a) { return _mm256_set1_epi8(a); }
inline I16 add_bytes(I16 a, I16 b) { return _mm256_add_epi8(a, b); }
inline I16 sub_bytes(I16 a, I16 b) { return _mm256_sub_epi8(a, b); }
inline I16 upper_bytes(I16 a) { return _mm256_srli_epi16(a, 8); }  // of pairs, as numbers without sign
inline bool any_negative(I16 a) { return (_mm256_movemask_epi8(a) & static_cast<int>(0xaaaaaaaa)) != 0; }
inline void add_widened(int32_t* p, I16 a) {  // p[i] += a[i]
  __m256i* out = reinterpret_cast<__m256i*>(p);
  _mm256_store_si256(out, _mm256_add_epi32(_mm256_load_si256(out), _mm256_cvtepi16_epi32(_mm256_castsi256_si128(a))));
  _mm256_store_si256(
      out + 1, _mm256_add_epi32(_mm256_load_si256(out + 1), _mm256_cvtepi16_epi32(_mm256_extracti128_si256(a, 1))));
}
// Four numbers of 64 bits, as in lanes_avx512.h.
constexpr size_t kWordsAtOnce = 4;
inline __m256i load_words(const uint8_t* p) {
  __m256i words = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  __asm__("" : "+x"(words));
  return words;
}
inline __m128i first_pair(__m256i words) { return _mm256_castsi256_si128(words); }
template <class F>
inline void for_later_pairs(__m256i words, F&& f) {
  f(_mm256_extracti128_si256(words, 1), 0);
}
