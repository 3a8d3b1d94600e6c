// The products of one token, of rows that follow each other or lie apart. Included by avx2.cpp and avx512.cpp, inside
// their namespaces, after one_row(), product() and products().

// One row after another, so that a run of rows is one stream.
void by_one_token(const TernaryRows& w, const int8_t* x, int32_t sum, int32_t* out) {
  const size_t stride = w.cols / 4, n_blocks = w.cols / kTernaryBlock;
  const uint8_t* row = w.data;
  size_t r = 0;
  for (; r + 4 <= w.rows; r += 4) {
    RowSums acc[4];
    for (RowSums& a : acc) {
      a = one_row<false>(row, n_blocks, x);
      row += stride;
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + r), products(acc, sum));
  }
  for (; r < w.rows; r++, row += stride) out[r] = product(one_row<true>(row, n_blocks, x), sum);
}

void ternary_select(const TernaryRows& w, const uint32_t* rows, size_t n, const Activations& x, int32_t* out) {
  constexpr size_t kAhead = 16;  // rows
  const size_t stride = w.cols / 4;
  const auto row = [&](size_t i) { return w.data + rows[i] * stride; };
  const auto fetch = [&](size_t i) {
    if (i < n) bitnet::prefetch(row(i), stride);
  };
  for (size_t i = 0; i < kAhead; i++) fetch(i);
  for (size_t i = 0; i < n; i += 4) {
    const size_t count = n - i < 4 ? n - i : 4;
    RowSums acc[4];
    for (size_t j = 0; j < 4; j++) {
      fetch(i + j + kAhead);
      acc[j] = one_row<true>(row(i + (j < count ? j : 0)), w.cols / kTernaryBlock, x.values);
    }
    alignas(16) int32_t found[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(found), products(acc, x.sums[0]));
    for (size_t j = 0; j < count; j++) out[i + j] = found[j];
  }
}
