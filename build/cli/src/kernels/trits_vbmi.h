// What a byte of five trits stands for, with VBMI. Included by avx512_vbmi.cpp and amx.cpp, inside their namespaces.

// Byte of trits → byte of I2_S that its first four stand for, and code of the fifth.
struct alignas(64) Tables {
  constexpr Tables() {
    for (unsigned v = 0; v < 256; v++) {
      codes[v] = static_cast<uint8_t>(v % 81 / 27 << 6 | v % 27 / 9 << 4 | v % 9 / 3 << 2 | v % 3);
      fifths[v] = static_cast<uint8_t>(v < 162 ? v / 81 : 2);
    }
  }
  uint8_t codes[256] = {}, fifths[256] = {};
};
constexpr Tables kTables;

inline __m512i load512(const void* p) { return _mm512_loadu_si512(p); }

// Below 81, the difference that does not wrap around is the smallest. (Of a damaged byte, above 242, up to 93.)
inline __m512i below81(__m512i v) {
  const __m512i once = _mm512_set1_epi8(81), twice = _mm512_set1_epi8(static_cast<char>(162));
  return _mm512_min_epu8(_mm512_min_epu8(v, _mm512_sub_epi8(v, once)), _mm512_sub_epi8(v, twice));
}
// Numbers of base 3 below 81 → four 2-bit codes.
inline __m512i codes_of(__m512i q) {
  return _mm512_permutex2var_epi8(load512(kTables.codes), q, load512(kTables.codes + 64));
}

// Bytes of trits → those of I2_S that the first four stand for, and codes of the fifth.
struct Trits {
  __m512i codes, fifths;
};
inline Trits split(__m512i v) {
  const __m512i q = below81(v);
  // 81 and 162 have the fifth code in their highest two bits.
  const __m512i highest = _mm512_srli_epi16(_mm512_sub_epi8(v, q), 6);
  return {codes_of(q), _mm512_and_si512(highest, _mm512_set1_epi8(3))};
}
