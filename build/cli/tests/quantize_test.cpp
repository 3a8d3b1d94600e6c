// Quantised rows: Q8_0 as ggml writes it, Q6_K closer than the obvious way.
#include "quantize.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels/kernels.h"

using namespace bitnet;

namespace {

std::vector<float> decoded(RowType type, const std::vector<uint8_t>& bytes, size_t cols) {
  std::vector<float> row(cols);
  decode_row({type, bytes.data(), 1, cols}, 0, row.data());
  return row;
}

std::vector<float> through_q6_k(const std::vector<float>& row) {
  std::vector<uint8_t> bytes(row_bytes(RowType::kQ6_K, row.size()), 0xee);
  REQUIRE(quantize_q6_k(row, bytes.data()));
  return decoded(RowType::kQ6_K, bytes, row.size());
}

double squared_error(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0.0;
  for (size_t i = 0; i < a.size(); i++) error += std::pow(static_cast<double>(a[i]) - b[i], 2);
  return error;
}

// Numbers from −32 to 31, the scale of each sixteen, not rounded itself, made of the largest magnitude.
std::vector<float> naively(const std::vector<float>& row) {
  std::vector<float> out;
  for (size_t i = 0; i < row.size(); i += 16) {
    float largest = 0.0f;
    for (size_t j = i; j < i + 16; j++) largest = std::max(largest, std::fabs(row[j]));
    for (size_t j = i; j < i + 16; j++) out.push_back(std::round(row[j] / largest * 31.0f) * largest / 31.0f);
  }
  return out;
}

}  // namespace

TEST_CASE("Q8_0: scale and numbers are ggml's, halves go away from zero") {
  std::vector<float> row(96, 0.0f);
  const float numbers[] = {127.0f, 0.5f, -0.5f, 1.5f, -1.5f, 0.49999997f, -2.5f, 3.4999998f, -126.5f, 126.49999f};
  std::copy(std::begin(numbers), std::end(numbers), row.begin());
  row[64 + 31] = -0.75f;  // scale 0.75 / 127 = 0.005905512, as f16 0x1e0c; the number is that of the exact scale
  row[64] = 0.3f;         // 50.8
  std::vector<uint8_t> out(3 * 34, 0xee), expected(3 * 34, 0);
  REQUIRE(quantize_q8_0(row, out.data()));
  const int8_t first[] = {127, 1, -1, 2, -2, 0, -3, 3, -127, 126};
  expected[1] = 0x3c;
  for (size_t i = 0; i < std::size(first); i++) expected[2 + i] = static_cast<uint8_t>(first[i]);
  expected[68] = 0x0c;
  expected[69] = 0x1e;
  expected[70] = 51;
  expected[101] = static_cast<uint8_t>(-127);
  CHECK(out == expected);
}

TEST_CASE("Q6_K: closer than scales made of the largest magnitude") {
  std::mt19937 random(6);
  std::normal_distribution<float> normal;
  for (const float deviation : {1e-3f, 1.0f, 1000.0f}) {
    std::vector<float> row(256 * 64);
    for (float& w : row) w = deviation * normal(random);
    const double error = squared_error(through_q6_k(row), row), naive = squared_error(naively(row), row);
    CHECK(error < 0.9 * naive);
    CHECK(std::sqrt(error / static_cast<double>(row.size())) < 0.018 * static_cast<double>(deviation));
  }
}

TEST_CASE("Q6_K: what has an exact form keeps it") {
  std::vector<float> row(512, 0.0f);
  for (size_t i = 0; i < 256; i++)  // each part has the −32 that its scale is made of
    row[i] = (static_cast<float>(i % 16 * 4) - 32.0f) * (i / 16 % 2 == 0 ? -1.0f : 0.25f);
  CHECK(through_q6_k(row) == row);
  std::vector<float> tiny(256, 1e-30f);
  CHECK(through_q6_k(tiny) == std::vector<float>(256, 0.0f));
}

TEST_CASE("rows that no scale can hold") {
  for (const float weight : {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                             std::numeric_limits<float>::quiet_NaN(), 3e38f, -1e12f})
    for (const size_t at : {0, 100, 511}) {
      std::vector<float> row(512, 0.5f);
      row[at] = weight;
      std::vector<uint8_t> out(row_bytes(RowType::kQ8_0, row.size()));
      CHECK_FALSE(quantize_q8_0(row, out.data()));
      CHECK_FALSE(quantize_q6_k(row, out.data()));
    }
}
