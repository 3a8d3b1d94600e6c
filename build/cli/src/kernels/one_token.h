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

// Of each four lines the first two are asked for some rows earlier than the others: see ColumnsAhead in
// columns_avx512.h.
void ternary_select(const TernaryRows& w, const uint32_t* rows, size_t n, const Activations& x, int32_t* out) {
  constexpr size_t kAhead = 12, kLag = 6, kLine = 64;  // rows, rows, bytes
  const size_t stride = w.cols / 4;
  const auto row = [&](size_t i) { return w.data + rows[i] * stride; };
  const auto fetch = [&](size_t i, size_t first) {
    if (i >= n) return;
    for (size_t at = first; at < stride; at += 4 * kLine) {
      prefetch_line(row(i) + at);
      prefetch_line(row(i) + at + kLine);
    }
  };
  const auto step = [&](size_t i) {
    fetch(i, 0);
    if (i >= kLag) fetch(i - kLag, 2 * kLine);
  };
  for (size_t i = 0; i < kAhead; i++) step(i);
  for (size_t i = 0; i < n; i += 4) {
    const size_t count = n - i < 4 ? n - i : 4;
    RowSums acc[4];
    for (size_t j = 0; j < 4; j++) {
      step(i + j + kAhead);
      acc[j] = one_row<true>(row(i + (j < count ? j : 0)), w.cols / kTernaryBlock, x.values);
    }
    alignas(16) int32_t found[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(found), products(acc, x.sums[0]));
    for (size_t j = 0; j < count; j++) out[i + j] = found[j];
  }
}
