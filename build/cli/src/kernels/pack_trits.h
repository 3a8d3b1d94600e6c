// The 2-bit codes of I2_S → five trits in a byte, for AVX2. Included once by avx2.cpp and avx512.cpp, inside their
// namespaces, after ternary_lut.h.

void pack_trits(const uint8_t* codes, size_t units, uint8_t* packed) {
  const __m256i times81 =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 81, static_cast<char>(162), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0));
  for (size_t u = 0; u < units; u++, codes += kCodeUnit, packed += kTritUnit) {
    const __m256i fifth = load256(codes + 128);
    for (int i = 0; i < 4; i++) {
      const __m256i code = _mm256_and_si256(_mm256_srli_epi16(fifth, 6 - 2 * i), _mm256_set1_epi8(3));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed + i * 32),
                          _mm256_add_epi8(base3(load256(codes + i * 32)), _mm256_shuffle_epi8(times81, code)));
    }
  }
}
