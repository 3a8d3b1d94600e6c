// What the products by columns need of AVX-512. Included by avx512.cpp and avx512_vbmi.cpp, inside their namespaces.

// Columns in fours that are multiplied together; the last is filled up with zeros.
class ColumnGroups {
 public:
  ColumnGroups(const TernaryColumns& w, const NonZero& x) : n((x.n + kSide - 1) / kSide) {
    for (size_t i = 0; i < n * kSide; i++) {
      data_[i] = w.data + x.columns[i < x.n ? i : 0] * w.column_bytes();
      values_[i] = i < x.n ? x.values[i] : int8_t{0};
      total += values_[i];
    }
  }

  const size_t n;
  int32_t total = 0;  // of the activations

  const uint8_t* data(size_t group, size_t i) const { return data_[group * kSide + i]; }
  int32_t values(size_t group) const {  // the group's activations side by side
    int32_t all;
    __builtin_memcpy(&all, values_ + group * kSide, sizeof all);
    return all;
  }

 private:
  static constexpr size_t kSide = 4;
  const uint8_t* data_[kMaxColumns + kSide];
  int8_t values_[kMaxColumns + kSide];
};

// Asks for columns while others are computed, evenly over so many steps of computing. Of each four lines the first two
// are asked for some columns earlier than the others: a core waits for some twenty lines that it has named and no more,
// but two neighbours make the second-level cache fetch on its own what follows them (Zen 5: two fifths more bytes a
// second).
class ColumnsAhead {
 public:
  ColumnsAhead(const TernaryColumns& w, const NonZero& x, size_t n_steps)
      : w_(w),
        x_(x),
        bytes_(w.column_bytes()),
        due_each_step_(((x.n + kLag) * bytes_ / (2 * kColumnUnit) << kDueBits) / (n_steps + 1)) {}

  void step() {
    for (due_ += due_each_step_; due_ >> kDueBits > 0; due_ -= size_t{1} << kDueBits) fetch();
  }
  void finish() {
    while (column_ < x_.n + kLag) fetch();
  }

 private:
  static constexpr size_t kLag = 4;
  static constexpr int kDueBits = 16;

  // Two lines.
  void fetch() {
    const size_t column = at_ % (4 * kColumnUnit) == 0 ? column_ : column_ - kLag;
    if (column < x_.n) {
      const uint8_t* line = w_.data + x_.columns[column] * bytes_ + at_;
      prefetch_line(line);
      prefetch_line(line + kColumnUnit);
    }
    at_ += 2 * kColumnUnit;
    if (at_ < bytes_) return;
    at_ = 0;
    column_++;
  }

  const TernaryColumns& w_;
  const NonZero& x_;
  const size_t bytes_, due_each_step_;
  size_t due_ = 0;
  size_t column_ = 0, at_ = 0;
};

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
