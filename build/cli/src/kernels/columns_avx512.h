// What the products by columns need of AVX-512. Included by avx512.cpp and avx512_vbmi.cpp, inside their namespaces.

// The bits of the code c of a byte.
inline __m512i code_mask(int c) { return _mm512_set1_epi8(static_cast<char>(0xc0 >> (2 * c))); }

inline NonZero find_nonzero(const int8_t* x, ColumnRun run) {
  NonZero out;
  const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto add = [&](size_t i) {
    const __m512i v = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i)));
    const __m512i columns = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(i)), steps);
    const __mmask16 mask = _mm512_test_epi32_mask(v, v);
    _mm512_storeu_si512(out.columns + out.n, _mm512_maskz_compress_epi32(mask, columns));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out.values + out.n),
                     _mm512_cvtepi32_epi8(_mm512_maskz_compress_epi32(mask, v)));
    out.n += static_cast<size_t>(std::popcount(static_cast<uint32_t>(mask)));
  };
  for (size_t i = run.first; i < run.first + run.n; i += 32) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    if (_mm256_testz_si256(v, v)) continue;
    add(i);
    add(i + 16);
  }
  return out;
}

// Four registers of four lanes of 128 bits, the other way round.
inline void transpose_lanes(__m512i (&m)[4]) {
  const __m512i a = _mm512_shuffle_i32x4(m[0], m[1], 0x44), b = _mm512_shuffle_i32x4(m[0], m[1], 0xee);
  const __m512i c = _mm512_shuffle_i32x4(m[2], m[3], 0x44), d = _mm512_shuffle_i32x4(m[2], m[3], 0xee);
  m[0] = _mm512_shuffle_i32x4(a, c, 0x88);
  m[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
  m[2] = _mm512_shuffle_i32x4(b, d, 0x88);
  m[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

// A plane's 64 sums of codes, as four columns side by side leave them, are added to those of the rows. Codes are
// weights + 1.
inline void add_plane(__m512i (&acc)[4], int32_t total, int32_t* sums) {
  transpose_lanes(acc);
  for (int i = 0; i < 4; i++, sums += 16)
    _mm512_storeu_si512(sums,
                        _mm512_add_epi32(_mm512_loadu_si512(sums), _mm512_sub_epi32(acc[i], _mm512_set1_epi32(total))));
}
