// Included by dispatch.cpp and ternary_lut.h, inside their namespaces: compiled for what each of them may use.

// Sixteen rows of sixteen bytes → sixteen columns: four perfect shuffles of the rows transpose them.
inline void transpose16(__m128i (&m)[16]) {
  __m128i n[16];
  for (int round = 0; round < 4; round++) {
    for (int i = 0; i < 8; i++) {
      n[2 * i] = _mm_unpacklo_epi8(m[i], m[i + 8]);
      n[2 * i + 1] = _mm_unpackhi_epi8(m[i], m[i + 8]);
    }
    for (int i = 0; i < 16; i++) m[i] = n[i];
  }
}
