// Numbers of the split output matrix (kernels.h, RowType), for AVX2. Included by lanes_avx2.h and lanes_avx512.h.

inline __m128i shifted(const uint8_t* p, unsigned shift, unsigned bits) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm_and_si128(_mm_srl_epi16(bytes, _mm_cvtsi32_si128(static_cast<int>(shift))),
                       _mm_set1_epi8(static_cast<char>((1 << bits) - 1)));
}
inline F32x16 load_split(const uint8_t* high, unsigned high_shift, const uint8_t* low, unsigned low_shift,
                         unsigned low_bits) {
  const __m128i upper = _mm_sll_epi16(shifted(high, high_shift, 4), _mm_cvtsi32_si128(static_cast<int>(low_bits)));
  const __m128i number = _mm_or_si128(upper, shifted(low, low_shift, low_bits));
  return from_int8(_mm_sub_epi8(number, _mm_set1_epi8(static_cast<char>(8 << low_bits))));
}
