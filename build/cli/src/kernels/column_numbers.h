// The numbers that look-up uses, of a matrix by columns. Included by ternary_lut.h and avx512_vbmi.cpp, inside their
// namespaces.

// The lower nibbles of each byte, two 2-bit codes each → one number of base 3: both are looked up and added.
inline __m256i base3(__m256i first, __m256i last) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i low = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 0, 0, 0, 0));
  const __m256i high =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 9, 18, 0, 27, 36, 45, 0, 54, 63, 72, 0, 0, 0, 0, 0));
  return _mm256_add_epi8(_mm256_shuffle_epi8(low, _mm256_and_si256(last, nibble)),
                         _mm256_shuffle_epi8(high, _mm256_and_si256(first, nibble)));
}

// Two columns' codes side by side in nibbles: of planes 0 and 2, in the upper and the lower nibble, …
inline __m256i even_planes(__m256i x, __m256i y) {
  const __m256i upper = _mm256_set1_epi8(static_cast<char>(0xcc)), lower = _mm256_set1_epi8(0x33);
  return _mm256_or_si256(_mm256_and_si256(x, upper), _mm256_and_si256(_mm256_srli_epi16(y, 2), lower));
}

// … and of planes 1 and 3.
inline __m256i odd_planes(__m256i x, __m256i y) {
  const __m256i upper = _mm256_set1_epi8(static_cast<char>(0xcc)), lower = _mm256_set1_epi8(0x33);
  return _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi16(x, 2), upper), _mm256_and_si256(y, lower));
}

// Eight registers of a byte for each of 32 rows → eight bytes of each row, row after row.
inline void rows_of_eight(__m256i (&m)[8], uint8_t* out) {
  __m256i a[8], b[8];
  for (int i = 0; i < 4; i++) {
    a[2 * i] = _mm256_unpacklo_epi8(m[2 * i], m[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_epi8(m[2 * i], m[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++) {
      b[4 * i + 2 * j] = _mm256_unpacklo_epi16(a[4 * i + j], a[4 * i + 2 + j]);
      b[4 * i + 2 * j + 1] = _mm256_unpackhi_epi16(a[4 * i + j], a[4 * i + 2 + j]);
    }
  for (int i = 0; i < 4; i++) {  // two rows in each lane of 128 bits, and those 16 rows on
    const __m256i low = _mm256_unpacklo_epi32(b[i], b[i + 4]), high = _mm256_unpackhi_epi32(b[i], b[i + 4]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * 32), _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 128 + i * 32), _mm256_permute2x128_si256(low, high, 0x31));
  }
}

// A unit's codes of a step's columns, those of a group side by side.
struct StepCodes {
  static constexpr size_t kColumns = 4 * kLutGroups;
  alignas(64) uint8_t codes[kColumns][kColumnUnit];
  alignas(64) uint8_t fifths[kColumns][kColumnUnit];
};

// The numbers of the rows of some planes, from `first` on; out: (n_planes · 64, kLutGroups).
inline void put_numbers(const uint8_t (&codes)[StepCodes::kColumns][kColumnUnit], size_t first, size_t n_planes,
                        uint8_t* out) {
  for (size_t half = 0; half < kColumnUnit; half += 32) {
    __m256i numbers[4][kLutGroups];
    for (size_t g = 0; g < kLutGroups; g++) {
      const auto code = [&](size_t i) {
        return _mm256_load_si256(reinterpret_cast<const __m256i*>(codes[4 * g + i] + half));
      };
      const __m256i a = code(0), b = code(1), c = code(2), d = code(3);
      const __m256i ab02 = even_planes(a, b), cd02 = even_planes(c, d), ab13 = odd_planes(a, b),
                    cd13 = odd_planes(c, d);
      numbers[0][g] = base3(_mm256_srli_epi16(ab02, 4), _mm256_srli_epi16(cd02, 4));
      numbers[1][g] = base3(_mm256_srli_epi16(ab13, 4), _mm256_srli_epi16(cd13, 4));
      numbers[2][g] = base3(ab02, cd02);
      numbers[3][g] = base3(ab13, cd13);
    }
    for (size_t p = 0; p < n_planes; p++)
      rows_of_eight(numbers[first + p], out + (p * kColumnUnit + half) * kLutGroups);
  }
}

// decode(line, codes, fifths): a unit of a column → its codes, and, of trits, the fifth ones as codes of plane 3.
template <class Decode>
inline void numbers_by_columns(const TernaryColumns& w, size_t first_row, size_t n_rows, LutScratch& scratch,
                               Decode&& decode) {
  const size_t bytes = w.column_bytes(), unit_rows = w.unit_rows(), first_unit = first_row / unit_rows;
  const size_t n_units = (n_rows + unit_rows - 1) / unit_rows;
  const auto column = [&](size_t step, size_t i) {
    return w.data + (step / 4 * kTernaryBlock + step % 4 * kLutGroups + i % 4 * 32 + i / 4) * bytes +
           first_unit * kColumnUnit;
  };
  StepCodes step_codes;
  const size_t n_steps = w.cols / StepCodes::kColumns;
  for (size_t step = 0; step < n_steps; step++) {
    uint8_t* out = scratch.numbers + step * lut_step_bytes(n_rows);
    for (size_t u = 0; u < n_units; u++) {
      for (size_t i = 0; i < StepCodes::kColumns; i++) {
        if (step + 1 < n_steps) prefetch_line(column(step + 1, i) + u * kColumnUnit);
        decode(column(step, i) + u * kColumnUnit, step_codes.codes[i], step_codes.fifths[i]);
      }
      const size_t rows_left = n_rows - u * unit_rows, rows = rows_left < unit_rows ? rows_left : unit_rows;
      const size_t n_planes = rows / kColumnUnit;
      uint8_t* numbers = out + u * unit_rows * kLutGroups;
      put_numbers(step_codes.codes, 0, n_planes < 4 ? n_planes : 4, numbers);
      if (n_planes == 5) put_numbers(step_codes.fifths, 3, 1, numbers + 4 * kColumnUnit * kLutGroups);
    }
  }
}
