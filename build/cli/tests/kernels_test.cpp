// Every table of kernels against the scalar one, bit by bit, and the scalar one against the textbook in double
// precision.
#include "kernels/kernels.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/half.h"

using namespace bitnet;

namespace {

std::vector<const Kernels*> vector_tables() {
  std::vector<const Kernels*> tables;
  for (const Isa isa : {Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vbmi, Isa::kAmx})
    if (supported(isa)) tables.push_back(&kernels_for(isa));
  return tables;
}

// Those that have look-up.
std::vector<const Kernels*> lookup_tables() {
  std::vector<const Kernels*> tables = vector_tables();
  std::erase_if(tables, [](const Kernels* k) { return k->lut_lanes == 0; });
  return tables;
}

// Rows of codes → rows of trits; what is missing in the last unit is code 2, which must not count.
std::vector<uint8_t> trits_of(const TernaryRows& w) {
  const size_t row_bytes = TernaryRows{TernaryType::kTrits, nullptr, w.rows, w.cols}.row_bytes();
  std::vector<uint8_t> trits(w.rows * row_bytes);
  const auto code = [&](size_t r, size_t block, size_t p, size_t i) {
    return block * kTernaryBlock < w.cols ? w.data[r * w.row_bytes() + block * 32 + p] >> (6 - 2 * i) & 3 : 2;
  };
  for (size_t i = 0; i < trits.size(); i++) {
    const size_t r = i / row_bytes, unit = i % row_bytes / kTritUnit, row = i % kTritUnit / 32, p = i % 32;
    int number = code(r, unit * 5 + 4, p, row);
    for (size_t digit = 0; digit < 4; digit++) number = 3 * number + code(r, unit * 5 + row, p, digit);
    trits[i] = static_cast<uint8_t>(number);
  }
  return trits;
}

// Rows of codes → columns.
std::vector<uint8_t> columns_of(const TernaryRows& w, TernaryType type) {
  TernaryColumns columns{type, nullptr, w.rows, w.cols};
  std::vector<uint8_t> out(w.cols * columns.column_bytes());
  for (size_t unit = 0; unit < columns.n_units(); unit++)
    for (size_t c = 0; c < w.cols; c += kTernaryBlock)  // a block at a time
      codes_to_columns(w.data + unit * columns.unit_rows() * w.row_bytes() + c / 4, w.row_bytes(), kTernaryBlock,
                       columns, unit, c, out.data());
  return out;
}

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  std::vector<float> floats(size_t n, float deviation = 1.0f) {
    std::normal_distribution<float> normal(0.0f, deviation);
    std::vector<float> out(n);
    for (float& x : out) x = normal(engine_);
    return out;
  }
  std::vector<uint8_t> bytes(size_t n) {
    std::vector<uint8_t> out(n);
    for (uint8_t& x : out) x = static_cast<uint8_t>(engine_());
    return out;
  }
  std::vector<int8_t> int8s(size_t n) {
    std::vector<int8_t> out(n);
    for (int8_t& x : out) x = static_cast<int8_t>(engine_());
    return out;
  }
  std::vector<uint8_t> codes(size_t n_bytes) {  // 2-bit codes 0, 1, 2
    std::vector<uint8_t> out(n_bytes);
    for (uint8_t& x : out)
      for (int i = 0; i < 4; i++) x = static_cast<uint8_t>(x << 2 | engine_() % 3);
    return out;
  }

 private:
  std::mt19937 engine_;
};

constexpr float kWeightScale = 0.017f;

// x (n, cols) times codes, dequantised: out (n, rows).
struct Multiplied {
  std::vector<float> activation_scales, out;
};

Multiplied multiplied(const Kernels& k, const TernaryRows& w, const std::vector<int8_t>& x) {
  const size_t n = x.size() / w.cols;
  std::vector<int32_t> sums(n, 0), products(n * w.rows);
  for (size_t i = 0; i < x.size(); i++) sums[i / w.cols] += x[i];
  k.ternary_matmul(w, {x.data(), sums.data(), n}, products.data(), w.rows);
  Multiplied m{std::vector<float>(n), std::vector<float>(n * w.rows)};
  for (size_t t = 0; t < n; t++) {
    m.activation_scales[t] = 10.0f + static_cast<float>(t);
    k.dequantize(&products[t * w.rows], m.activation_scales[t], kWeightScale, w.rows, &m.out[t * w.rows]);
  }
  return m;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

}  // namespace

TEST_CASE("half floats: every value goes there and back, and rounding is to nearest even") {
  for (uint32_t h = 0; h < 0x10000; h++) {
    const float f = half_to_float(static_cast<uint16_t>(h));
    if (std::isnan(f)) continue;
    CHECK(float_to_half(f) == h);
  }
  CHECK(float_to_half(1.0f + 0x1p-11f) == 0x3c00);      // tie to even: down
  CHECK(float_to_half(1.0f + 3 * 0x1p-11f) == 0x3c02);  // tie to even: up
  CHECK(float_to_half(65519.0f) == 0x7bff);
  CHECK(float_to_half(65520.0f) == 0x7c00);
  CHECK(float_to_half(0x1p-25f) == 0);  // tie to even
  CHECK(float_to_half(0x1.8p-25f) == 1);
}

TEST_CASE("rms_norm and quantize: textbook values, the same bits everywhere") {
  Random random(1);
  for (const size_t n : {128, 640, 2560, 6912}) {
    const std::vector<float> x = random.floats(n, 3.0f), weight = random.floats(n);
    std::vector<float> expected(n), got(n);
    kScalarKernels.rms_norm(x.data(), weight.data(), 1e-5f, n, expected.data());
    double mean = 0.0;
    for (const float v : x) mean += static_cast<double>(v) * v / static_cast<double>(n);
    for (size_t i = 0; i < n; i++)
      CHECK(expected[i] == doctest::Approx(x[i] / std::sqrt(mean + 1e-5) * weight[i]).epsilon(1e-5));

    std::vector<int8_t> q_expected(n), q(n);
    int32_t sum_expected = 0, sum = 0;
    const float s = kScalarKernels.quantize(x.data(), n, q_expected.data(), &sum_expected);
    float largest = 0.0f;
    int32_t total = 0;
    for (const float v : x) largest = std::max(largest, std::fabs(v));
    CHECK(s == static_cast<float>(127.0 / static_cast<double>(largest)));
    for (size_t i = 0; i < n; i++) {
      CHECK(q_expected[i] == static_cast<int>(std::nearbyint(x[i] * s)));
      total += q_expected[i];
    }
    CHECK(sum_expected == total);
    for (const Kernels* k : vector_tables()) {
      k->rms_norm(x.data(), weight.data(), 1e-5f, n, got.data());
      CHECK(same_bits(got, expected));
      CHECK(k->quantize(x.data(), n, q.data(), &sum) == s);
      CHECK(same_bits(q, q_expected));
      CHECK(sum == sum_expected);
    }
  }
}

TEST_CASE("quantize: zeros, tiny and extreme values") {
  std::vector<std::vector<float>> cases(4, std::vector<float>(128, 0.0f));
  cases[1][7] = 1e-9f;  // below the floor of 1e-5
  for (size_t i = 0; i < 128; i++) cases[2][i] = i % 2 ? -3e38f : 3e38f;
  for (size_t i = 0; i < 128; i++) cases[3][i] = static_cast<float>(i) - 63.5f;  // halves: ties to even
  for (const std::vector<float>& x : cases) {
    std::vector<int8_t> expected(128), q(128);
    int32_t sum_expected = 0, sum = 0;
    const float s = kScalarKernels.quantize(x.data(), 128, expected.data(), &sum_expected);
    for (const Kernels* k : vector_tables()) {
      CHECK(k->quantize(x.data(), 128, q.data(), &sum) == s);
      CHECK(same_bits(q, expected));
      CHECK(sum == sum_expected);
    }
  }
}

TEST_CASE("pack_rows: trits that expand to the codes") {
  Random random(11);
  for (const size_t cols : {128, 640, 768, 2560, 6912}) {
    const size_t rows = 3;
    const std::vector<uint8_t> codes = random.codes(rows * cols / 4);
    const TernaryRows trits{TernaryType::kTrits, nullptr, rows, cols};
    std::vector<uint8_t> packed(rows * trits.row_bytes()), expanded(codes.size());
    pack_rows(kScalarKernels.pack_trits, {TernaryType::kCodes, codes.data(), rows, cols}, packed.data());
    expand_rows(kScalarKernels.expand_trits, {TernaryType::kTrits, packed.data(), rows, cols}, expanded.data());
    CHECK(expanded == codes);
    for (const Kernels* k : vector_tables()) {
      std::vector<uint8_t> got(packed.size());
      pack_rows(k->pack_trits, {TernaryType::kCodes, codes.data(), rows, cols}, got.data());
      CHECK(got == packed);
    }
  }
  std::vector<uint8_t> bytes(kTritUnit), expected(kCodeUnit), got(kCodeUnit);  // any, of damaged files too
  for (unsigned first = 0; first < 256; first += kTritUnit) {
    for (unsigned i = 0; i < kTritUnit; i++) bytes[i] = static_cast<uint8_t>(first + i);
    CHECK(are_ternary(TernaryType::kTrits, bytes) == (first + kTritUnit <= 243));
    kScalarKernels.expand_trits(bytes.data(), 1, expected.data());
    for (const Kernels* k : vector_tables()) {
      k->expand_trits(bytes.data(), 1, got.data());
      CHECK(got == expected);
    }
  }
  std::vector<uint8_t> codes(1000, 0xaa);
  CHECK(are_ternary(TernaryType::kCodes, codes));
  for (const int place : {0, 2, 4, 6})
    for (const size_t at : {0, 500, 999}) {
      codes[at] |= static_cast<uint8_t>(1 << place);
      CHECK_FALSE(are_ternary(TernaryType::kCodes, codes));
      codes[at] = 0xaa;
    }
}

TEST_CASE("ternary_matmul: exact for every shape, batch size and extreme activations") {
  Random random(2);
  for (const size_t cols : {128, 384, 2560, 6912})
    for (const size_t rows : {1, 3, 4, 7, 8, 13, 64})
      for (const size_t n : {1, 2, 3, 4, 5, 9}) {
        const std::vector<uint8_t> codes = random.codes(rows * cols / 4);
        std::vector<int8_t> x = random.int8s(n * cols);
        if (rows == 13)  // the largest sums there are
          for (size_t i = 0; i < cols; i++) x[i] = n % 2 ? int8_t{-128} : int8_t{127};
        std::vector<int32_t> sums(n, 0), expected(n * rows), got(n * rows);
        for (size_t i = 0; i < x.size(); i++) sums[i / cols] += x[i];
        for (size_t t = 0; t < n; t++)
          for (size_t r = 0; r < rows; r++) {
            int32_t total = 0;
            for (size_t k = 0; k < cols; k++) {
              const uint8_t byte = codes[r * cols / 4 + k / 128 * 32 + k % 32];
              total += ((byte >> (6 - 2 * (k % 128 / 32)) & 3) - 1) * x[t * cols + k];
            }
            expected[t * rows + r] = total;
          }
        const TernaryRows w{TernaryType::kCodes, codes.data(), rows, cols};
        const Activations a{x.data(), sums.data(), n};
        kScalarKernels.ternary_matmul(w, a, got.data(), rows);
        CHECK(got == expected);
        for (const Kernels* k : vector_tables()) {
          std::fill(got.begin(), got.end(), -1);
          k->ternary_matmul(w, a, got.data(), rows);
          CHECK(got == expected);
          if (!k->trit_matmul) continue;
          std::fill(got.begin(), got.end(), -1);
          const std::vector<uint8_t> trits = trits_of(w);
          k->trit_matmul({TernaryType::kTrits, trits.data(), rows, cols}, a, got.data(), rows);
          CHECK(got == expected);
        }
      }
}

TEST_CASE("ternary_matmul: codes of 0 to 3, as -1 to 2, with the largest activations") {
  Random random(7);
  for (const size_t cols : {128, 640, 1408, 6912})
    for (const size_t n : {1, 2, 3, 4, 5, 6, 7, 8, 9}) {
      const size_t rows = 14;
      std::vector<uint8_t> codes = random.bytes(rows * cols / 4);
      std::fill(codes.begin(), codes.begin() + static_cast<ptrdiff_t>(cols / 2), uint8_t{0xff});  // two rows of 3
      std::vector<int8_t> x = random.int8s(n * cols);
      for (size_t i = 0; i < x.size(); i++)  // all 127, all -127, then either
        if (i < cols || i / cols == n - 1)
          x[i] = n % 2 ? int8_t{127} : int8_t{-127};
        else
          x[i] = x[i] < 0 ? int8_t{-127} : int8_t{127};
      std::vector<int32_t> sums(n, 0), expected(n * rows), got(n * rows);
      for (size_t i = 0; i < x.size(); i++) sums[i / cols] += x[i];
      const TernaryRows w{TernaryType::kCodes, codes.data(), rows, cols};
      const Activations a{x.data(), sums.data(), n};
      kScalarKernels.ternary_matmul(w, a, expected.data(), rows);
      CHECK(expected[0] == 2 * sums[0]);
      for (const Kernels* k : vector_tables()) {
        std::fill(got.begin(), got.end(), -1);
        k->ternary_matmul(w, a, got.data(), rows);
        CHECK(got == expected);
        std::vector<uint32_t> chosen{13, 0, 1, 1, 7, 12, 3, 9, 13, 2, 5};
        for (; !chosen.empty(); chosen.pop_back()) {
          std::vector<int32_t> found(chosen.size() + 1, -1);
          k->ternary_select(w, chosen.data(), chosen.size(), a, found.data());
          for (size_t i = 0; i < chosen.size(); i++) CHECK(found[i] == expected[chosen[i]]);
          CHECK(found.back() == -1);
        }
        for (size_t r = 0; r < rows; r++) {  // a row alone, out of a matrix
          k->ternary_matmul(w.slice(r, 1), a, got.data(), 1);
          for (size_t t = 0; t < n; t++) CHECK(got[t] == expected[t * rows + r]);
        }
      }
    }
}

TEST_CASE("add_columns: exact for every shape, whatever is 0") {
  Random random(9);
  for (const size_t rows : {128, 256, 384, 2560})
    for (const int percent : {0, 1, 33, 100}) {  // that are not 0
      const size_t cols = 512;
      std::vector<uint8_t> codes = random.codes(rows * cols / 4);
      std::fill_n(codes.begin(), cols / 4, uint8_t{0xaa});  // a row of 1 and one of −1
      std::fill_n(codes.begin() + cols / 4, cols / 4, uint8_t{0});
      std::vector<int8_t> x = random.int8s(cols);
      const std::vector<uint8_t> chance = random.bytes(cols);
      for (size_t i = 0; i < cols; i++) {
        if (percent == 100) x[i] = i < cols / 2 ? int8_t{-128} : int8_t{127};  // the largest sums there are
        if (chance[i] * 100 >= percent * 256) x[i] = 0;
      }
      for (const TernaryType type : {TernaryType::kCodes, TernaryType::kTrits}) {
        const TernaryRows w{TernaryType::kCodes, codes.data(), rows, cols};
        const std::vector<uint8_t> data = columns_of(w, type);
        const TernaryColumns columns{type, data.data(), rows, cols};
        const auto check = [&](decltype(Kernels::add_columns) add) {
          std::vector<int32_t> sums(columns.n_units() * columns.unit_rows() + 1, 5), expected(rows);
          add(columns, x.data(), {}, {0, 32}, sums.data());
          add(columns, x.data(), {0, 192}, {192, 192}, sums.data());
          add(columns, x.data(), {192, 32}, {0, 160}, sums.data());
          add(columns, x.data(), {416, 96}, {}, sums.data());
          std::vector<int8_t> seen = x;
          std::fill(seen.begin() + 224, seen.begin() + 416, int8_t{0});
          int32_t total = 0;
          for (const int8_t v : seen) total += v;
          kScalarKernels.ternary_matmul(w, {seen.data(), &total, 1}, expected.data(), rows);
          for (size_t r = 0; r < rows; r++) CHECK(sums[r] == 5 + expected[r]);
          CHECK(sums.back() == 5);
        };
        if (type == TernaryType::kCodes) check(kScalarKernels.add_columns);
        for (const Kernels* k : vector_tables()) {
          const auto add = type == TernaryType::kCodes ? k->add_columns : k->add_trit_columns;
          if (add) check(add);
        }
      }
    }
}

TEST_CASE("elementwise kernels: the same bits everywhere") {
  Random random(3);
  const size_t n = 768;
  const std::vector<float> a = random.floats(n, 5.0f), b = random.floats(n);
  std::vector<int32_t> sums(n);
  for (size_t i = 0; i < n; i++) sums[i] = static_cast<int32_t>(a[i] * 100000.0f);
  std::vector<float> deq(n), added = a, gated = a, rotated = a;
  kScalarKernels.dequantize(sums.data(), 41.7f, 0.0123f, n, deq.data());
  kScalarKernels.add(added.data(), b.data(), n);
  kScalarKernels.relu2_mul(gated.data(), b.data(), n);
  kScalarKernels.rope(rotated.data(), b.data(), b.data() + 64, 128);
  for (size_t i = 0; i < n; i++) {
    CHECK(deq[i] == static_cast<float>(sums[i]) / 41.7f * 0.0123f);
    CHECK(added[i] == a[i] + b[i]);
    CHECK(gated[i] == doctest::Approx(a[i] > 0.0f ? a[i] * a[i] * b[i] : 0.0f));
  }
  for (size_t i = 0; i < 64; i++) {
    CHECK(rotated[i] == doctest::Approx(a[i] * b[i] - a[i + 64] * b[i + 64]).epsilon(1e-4));
    CHECK(rotated[i + 64] == doctest::Approx(a[i + 64] * b[i] + a[i] * b[i + 64]).epsilon(1e-4));
  }
  for (const Kernels* k : vector_tables()) {
    std::vector<float> d(n), x = a, g = a, r = a;
    k->dequantize(sums.data(), 41.7f, 0.0123f, n, d.data());
    k->add(x.data(), b.data(), n);
    k->relu2_mul(g.data(), b.data(), n);
    k->rope(r.data(), b.data(), b.data() + 64, 128);
    CHECK(same_bits(d, deq));
    CHECK(same_bits(x, added));
    CHECK(same_bits(g, gated));
    CHECK(same_bits(r, rotated));
  }
}

TEST_CASE("attention: textbook values, the same bits everywhere, whatever heads go together") {
  Random random(4);
  for (const CacheType type : kCacheTypes)
    for (const size_t head_dim : {16, 64, 80, 128})
      for (const size_t n : {1, 2, 15, 16, 17, 100, 256, 257, 600}) {
        const size_t n_heads = 7, n_chunks = (n + kChunkPositions - 1) / kChunkPositions;  // 7: groups of 4, 2 and 1
        const std::vector<float> q = random.floats(n_heads * head_dim), kv = random.floats(2 * n * head_dim);
        std::vector<float> expected(n_heads * head_dim);
        const auto run = [&](const Kernels& k, size_t heads, std::vector<float>& out) {
          // What lies past the last position must not matter: fill it with NaN.
          const size_t part = chunk_bytes(type, head_dim);
          std::vector<std::byte> cache(2 * n_chunks * part + 4096);
          for (size_t i = 0; i + 3 < cache.size(); i += 4) std::memcpy(&cache[i], "\xff\x7f\xff\x7f", 4);
          for (size_t j = 0; j < n; j++) {
            std::byte* keys = &cache[j / kChunkPositions * 2 * part];
            k.store_key(&kv[j * head_dim], keys, type, j % kChunkPositions, head_dim);
            k.store_value(&kv[(n + j) * head_dim], keys + part, type, j % kChunkPositions, head_dim);
          }
          std::vector<float> scores(n_heads * kChunkPositions), a(n_heads * (head_dim + 2)), b(a.size());
          for (size_t h = 0; h < n_heads; h += heads) {
            const auto attention = [&](std::vector<float>& v) {
              return Attention{v.data(), v.data() + n_heads, v.data() + 2 * n_heads};
            };
            for (size_t c = 0; c < n_chunks; c++) {
              const std::byte* keys = &cache[c * 2 * part];
              const AttentionChunk chunk{keys, keys + part, type, std::min(kChunkPositions, n - c * kChunkPositions),
                                         head_dim};
              k.attend({&q[h * head_dim], 1, heads}, chunk, scores.data(), attention(c == 0 ? a : b));
              if (c > 0) k.add_attention(attention(a), attention(b), heads, head_dim);
            }
            k.divide_attention(attention(a), heads, head_dim, &out[h * head_dim]);
          }
        };
        run(kScalarKernels, n_heads, expected);
        for (size_t h = 0; h < n_heads; h++) {
          std::vector<double> p(n), out(head_dim, 0.0);
          double total = 0.0;
          for (size_t j = 0; j < n; j++) {
            double dot = 0.0;
            for (size_t d = 0; d < head_dim; d++)
              dot += static_cast<double>(q[h * head_dim + d]) * kv[j * head_dim + d];
            total += p[j] = std::exp(dot / std::sqrt(static_cast<double>(head_dim)));
          }
          for (size_t j = 0; j < n; j++)
            for (size_t d = 0; d < head_dim; d++) out[d] += p[j] / total * kv[(n + j) * head_dim + d];
          const double tolerance = type == CacheType::kF32 ? 1e-5 : type == CacheType::kF16 ? 5e-3 : 6e-2;
          for (size_t d = 0; d < head_dim; d++) CHECK(std::fabs(expected[h * head_dim + d] - out[d]) < tolerance);
        }
        std::vector<float> got(n_heads * head_dim);
        run(kScalarKernels, 1, got);
        CHECK(same_bits(got, expected));
        for (const Kernels* k : vector_tables())
          for (const size_t heads : {size_t{1}, n_heads}) {
            run(*k, heads, got);
            CHECK(same_bits(got, expected));
          }
      }
}

TEST_CASE("attention: tokens together take the same as each alone") {
  Random random(7);
  for (const CacheType type : kCacheTypes)
    for (const size_t n_heads : {1, 3, 4})
      for (const size_t first : {1, 13, 16, 249, 256}) {  // positions that the first token attends to
        const size_t n_tokens = 7, n = n_tokens * n_heads, head_dim = 32, part = chunk_bytes(type, head_dim);
        const std::vector<float> q = random.floats(n * head_dim);
        std::vector<std::byte> cache(2 * part + 4096);
        for (size_t i = 0; i + 3 < cache.size(); i += 4) std::memcpy(&cache[i], "\xff\x7f\xff\x7f", 4);  // NaN
        for (size_t j = 0; j < std::min(kChunkPositions, first + n_tokens - 1); j++) {
          kScalarKernels.store_key(random.floats(head_dim).data(), cache.data(), type, j, head_dim);
          kScalarKernels.store_value(random.floats(head_dim).data(), cache.data() + part, type, j, head_dim);
        }
        std::vector<float> scores(n * kChunkPositions), expected(n * (head_dim + 2)), got(expected.size());
        const auto attention = [&](std::vector<float>& v) {
          return Attention{v.data(), v.data() + n, v.data() + 2 * n};
        };
        for (size_t t = 0; t < n_tokens; t++) {
          const size_t n_positions = std::min(kChunkPositions, first + t);
          kScalarKernels.attend({&q[t * n_heads * head_dim], 1, n_heads},
                                {cache.data(), cache.data() + part, type, n_positions, head_dim}, scores.data(),
                                attention(expected).from(t * n_heads, head_dim));
        }
        for (const Isa isa : kIsas) {
          if (!supported(isa)) continue;
          kernels_for(isa).attend({q.data(), n_tokens, n_heads},
                                  {cache.data(), cache.data() + part, type, first, head_dim}, scores.data(),
                                  attention(got));
          CHECK(same_bits(got, expected));
        }
      }
}

TEST_CASE("find_not_below: in order, NaN among them") {
  Random random(8);
  for (const size_t n : {0, 1, 16, 33, 100}) {
    std::vector<float> x = random.floats(n);
    for (size_t i = 0; i < n; i += 7) x[i] = i % 2 == 0 ? 0.25f : std::nanf("");
    std::vector<uint32_t> expected, got(n);
    for (size_t i = 0; i < n; i++)
      if (!(x[i] < 0.25f)) expected.push_back(static_cast<uint32_t>(i));
    for (const Isa isa : kIsas) {
      if (!supported(isa)) continue;
      got.resize(n);
      got.resize(kernels_for(isa).find_not_below(x.data(), n, 0.25f, got.data()));
      CHECK(got == expected);
    }
  }
}

TEST_CASE("dot_rows: every type of row, the same bits everywhere, for any number of tokens") {
  Random random(5);
  for (const RowType type : {RowType::kF32, RowType::kF16, RowType::kBF16, RowType::kQ8_0, RowType::kQ6_K}) {
    const size_t cols = 512, rows = 11;
    std::vector<uint8_t> data = random.bytes(rows * row_bytes(type, cols));
    const auto put = [&](size_t at, auto value) { std::memcpy(&data[at], &value, sizeof value); };
    const std::vector<float> w = random.floats(rows * cols);
    for (size_t i = 0; i < rows * cols;
         i++) {  // random bytes are no floats to count with: write the float parts properly
      if (type == RowType::kF32) put(i * 4, w[i]);
      if (type == RowType::kF16) put(i * 2, float_to_half(w[i]));
      if (type == RowType::kBF16) put(i * 2, static_cast<uint16_t>(std::bit_cast<uint32_t>(w[i]) >> 16));
      if (type == RowType::kQ8_0 && i % 32 == 0) put(i / 32 * 34, float_to_half(w[i] / 64));
      if (type == RowType::kQ6_K && i % 256 == 0) put(i / 256 * 210 + 208, float_to_half(w[i] / 512));
    }
    for (const size_t n : {1, 3, 6}) {
      const std::vector<float> x = random.floats(n * cols);
      std::vector<float> expected(n * rows), got(n * rows), row(cols);
      const FloatRows matrix{type, data.data(), rows, cols};
      kScalarKernels.dot_rows(matrix, x.data(), n, expected.data(), rows);
      for (size_t r = 0; r < rows; r++) {
        decode_row(matrix, r, row.data());
        for (size_t t = 0; t < n; t++) {
          double dot = 0.0, magnitude = 0.0;
          for (size_t i = 0; i < cols; i++) {
            dot += static_cast<double>(row[i]) * x[t * cols + i];
            magnitude += std::fabs(static_cast<double>(row[i]) * x[t * cols + i]);
          }
          CHECK(std::fabs(expected[t * rows + r] - dot) <= 1e-6 * magnitude);
        }
      }
      for (const Kernels* k : vector_tables()) {
        k->dot_rows(matrix, x.data(), n, got.data(), rows);
        CHECK(same_bits(got, expected));
      }
    }
  }
}

TEST_CASE("ternary_lut: the bits of ternary_matmul and dequantize, for full and partial tiles") {
  Random random(6);
  for (const Kernels* k : lookup_tables()) {
    for (const size_t cols : {128, 384, 2560, 6912})
      for (const size_t rows : {16, 48, 80, 2048})
        for (const size_t n : {size_t{1}, k->lut_lanes - 1, k->lut_lanes}) {
          if (cols * rows > 1000000 && n != k->lut_lanes) continue;  // slow, and the same code
          const std::vector<uint8_t> codes = random.codes(rows * cols / 4);
          std::vector<int8_t> x = random.int8s(n * cols), tile(cols * k->lut_lanes);
          for (int8_t& v : x)
            v = rows == 48 ? int8_t{127} : std::max<int8_t>(v, -127);  // 48: the largest sums there are
          const TernaryRows w{TernaryType::kCodes, codes.data(), rows, cols};
          const auto [scales, expected] = multiplied(*k, w, x);
          std::vector<float> got(n * (rows + 3), -1.0f);
          LutScratch scratch(k->lut_lanes, cols);
          k->transpose_tile(x.data(), cols, n, tile.data());
          const auto check = [&](const TernaryRows& given) {
            std::fill(got.begin(), got.end(), -1.0f);
            k->lut_numbers(given, scratch);
            k->ternary_lut(rows, cols, tile.data(), n, scales.data(), kWeightScale, scratch, got.data(), rows + 3);
            for (size_t t = 0; t < n; t++)
              CHECK(std::memcmp(&got[t * (rows + 3)], &expected[t * rows], rows * sizeof(float)) == 0);
          };
          check(w);
          const std::vector<uint8_t> trits = trits_of(w);
          check({TernaryType::kTrits, trits.data(), rows, cols});
        }
  }
}

TEST_CASE("cap: no step is left above the cap, and nothing is lost") {
  Random random(12);
  const size_t cols = 1280, steps = cols / 32;
  const std::vector<uint8_t> codes = random.codes(64 * cols);
  const TernaryColumns w{TernaryType::kCodes, codes.data(), 256, cols};
  std::vector<std::vector<int8_t>> cases(5, std::vector<int8_t>(cols, 0));
  cases[1] = random.int8s(cols);  // −128 among them
  std::fill(cases[2].begin(), cases[2].end(), int8_t{-127});
  for (size_t i = 0; i < cols; i++) cases[3][i] = static_cast<int8_t>(i % 11 == 0 ? 100 : i % 3 == 0 ? -2 : 0);
  for (size_t i = 0; i < cols; i += 128) cases[4][i] = 127;  // as much as there may be
  for (const std::vector<int8_t>& x : cases) {
    const auto sums = [&](const std::vector<int8_t>& v) {
      std::vector<int> out(steps, 0);
      for (size_t i = 0; i < cols; i++) out[i / 128 * 4 + i % 32 / 8] += std::abs(int{v[i]});
      return out;
    };
    const std::vector<int> before = sums(x);
    const auto above = static_cast<size_t>(std::count_if(before.begin(), before.end(), [](int n) { return n > 127; }));
    for (const Kernels* k : vector_tables()) {
      std::vector<int8_t> capped = x, excess(cols, 0);
      CHECK(k->steps_above_cap(x.data(), cols) == above);
      const size_t n = k->cap(w, capped.data(), excess.data());
      CHECK(n == cols - static_cast<size_t>(std::count(excess.begin(), excess.end(), int8_t{0})));
      CHECK((n == 0) == (above == 0));
      for (size_t i = 0; i < cols; i++) CHECK(capped[i] + excess[i] == x[i]);
      const std::vector<int> after = sums(capped);
      for (size_t i = 0; i < steps; i++) CHECK(after[i] == std::min(before[i], 127));
    }
  }
}

TEST_CASE("wide_lut: the bits of ternary_matmul and dequantize, for full and partial tiles") {
  Random random(13);
  for (const Kernels* k : lookup_tables())
    for (const size_t cols : {size_t{128}, size_t{640}, size_t{6912}, kMaxWideCols})
      for (const size_t rows : {16, 64, 80, 2048})
        for (const size_t n : {size_t{1}, k->lut_lanes, k->lut_lanes + 3, 2 * k->lut_lanes}) {
          if (cols * rows > 1000000 && n != 2 * k->lut_lanes) continue;  // slow, and the same code
          const std::vector<uint8_t> codes =
              rows == 64 ? std::vector<uint8_t>(rows * cols / 4, 0xaa) : random.codes(rows * cols / 4);
          std::vector<int8_t> x = random.int8s(n * cols), tile(cols * 2 * k->lut_lanes);
          for (int8_t& v : x)  // 64: the largest sums there are
            v = rows == 64 ? int8_t{127} : static_cast<int8_t>(v % 5 == 0 ? std::max<int8_t>(v, -127) : 0);
          const TernaryRows w{TernaryType::kCodes, codes.data(), rows, cols};
          const auto [scales, expected] = multiplied(*k, w, x);
          std::vector<int32_t> rest(n * (rows + 3));
          std::vector<float> got(n * (rows + 3), -1.0f);

          const std::vector<uint8_t> by_columns = columns_of(w, TernaryType::kCodes);
          const TernaryColumns columns{TernaryType::kCodes, by_columns.data(), rows, cols};
          for (size_t t = 0; t < n; t++) {
            std::vector<int8_t> excess(cols, 0);
            k->cap(columns, &x[t * cols], excess.data());
            int32_t sum = 0;
            for (const int8_t v : excess) sum += v;
            k->ternary_matmul(w, {excess.data(), &sum, 1}, &rest[t * (rows + 3)], rows);
          }
          LutScratch scratch(k->lut_lanes, cols);
          k->transpose_wide_tile(x.data(), cols, n, tile.data());
          k->lut_numbers(w, scratch);
          k->wide_lut(rows, cols, tile.data(), n, scales.data(), kWeightScale, rest.data(), scratch, got.data(),
                      rows + 3);
          for (size_t t = 0; t < n; t++)
            CHECK(std::memcmp(&got[t * (rows + 3)], &expected[t * rows], rows * sizeof(float)) == 0);
        }
}

TEST_CASE("lut_column_numbers: the numbers of rows, from columns") {
  Random random(10);
  const size_t rows = 2560, cols = 384;
  const std::vector<uint8_t> codes = random.codes(rows * cols / 4);
  const TernaryRows w{TernaryType::kCodes, codes.data(), rows, cols};
  for (const Kernels* k : lookup_tables())
    for (const TernaryType type : {TernaryType::kCodes, TernaryType::kTrits}) {
      if (type == TernaryType::kTrits && !k->add_trit_columns) continue;
      const std::vector<uint8_t> data = columns_of(w, type);
      const TernaryColumns columns{type, data.data(), rows, cols};
      LutScratch expected(k->lut_lanes, cols), got(k->lut_lanes, cols);
      const size_t unit = columns.unit_rows();
      for (const auto& [first, n] : {std::pair{size_t{0}, 3 * unit}, {2 * unit, 2 * unit}, {2 * unit, unit + 64}}) {
        k->lut_numbers(w.slice(first, n), expected);
        k->lut_column_numbers(columns, first, n, got);
        for (size_t step = 0; step < cols / 32; step++)
          CHECK(std::memcmp(got.numbers + step * lut_step_bytes(n), expected.numbers + step * lut_step_bytes(n),
                            n * kLutGroups) == 0);
      }
    }
}

TEST_CASE("amx_matmul, amx_column_matmul: the bits of ternary_matmul and dequantize, for full and partial tiles") {
  if (!supported(Isa::kAmx)) return;
  const Kernels& k = kernels_for(Isa::kAmx);
  Random random(14);
  AmxScratch scratch;
  for (const size_t cols : {128, 1280, 1408, 6912})
    for (const size_t rows : {16, 64, 80, 128, 256, 320})
      for (const size_t n : {1, 15, 16, 17, 32, 100, 256}) {
        if (cols * rows > 1000000 && n != 100) continue;  // slow, and the same code
        const std::vector<uint8_t> codes = random.codes(rows * cols / 4);
        std::vector<int8_t> x = random.int8s(n * cols);
        if (rows == 80) std::fill(x.begin(), x.end(), int8_t{-128});
        const TernaryRows w{TernaryType::kCodes, codes.data(), rows, cols};
        const auto [scales, expected] = multiplied(k, w, x);
        std::vector<int32_t> sums(n, 0);
        for (size_t i = 0; i < x.size(); i++) sums[i / cols] += x[i];
        const Activations a{x.data(), sums.data(), n};
        std::vector<float> got(n * (rows + 3));
        const auto check = [&](auto&& multiply, const std::vector<float>& products) {
          std::fill(got.begin(), got.end(), -1.0f);
          multiply();
          for (size_t t = 0; t < n; t++) {
            CHECK(std::memcmp(&got[t * (rows + 3)], &products[t * rows], rows * sizeof(float)) == 0);
            for (size_t i = 0; i < 3; i++) CHECK(got[t * (rows + 3) + rows + i] == -1.0f);
          }
        };
        const auto by_rows = [&](TernaryType type, const std::vector<uint8_t>& data) {
          return [&, type] {
            k.amx_matmul({type, data.data(), rows, cols}, a, scales.data(), kWeightScale, scratch, got.data(),
                         rows + 3);
          };
        };
        check(by_rows(TernaryType::kCodes, codes), expected);
        check(by_rows(TernaryType::kTrits, trits_of(w)), expected);
        const std::vector<uint8_t> any = random.bytes(codes.size());  // codes of 3 among them
        const auto [_, any_expected] = multiplied(k, {TernaryType::kCodes, any.data(), rows, cols}, x);
        check(by_rows(TernaryType::kCodes, any), any_expected);
        for (const TernaryType type : {TernaryType::kCodes, TernaryType::kTrits}) {
          const TernaryColumns columns{type, nullptr, rows, cols};
          if (rows % kColumnUnit != 0 || rows > columns.unit_rows()) continue;
          const std::vector<uint8_t> data = columns_of(w, type);
          check(
              [&] {
                k.amx_column_matmul({type, data.data(), rows, cols}, 0, rows, a, scales.data(), kWeightScale, scratch,
                                    got.data(), rows + 3);
              },
              expected);
        }
      }
}
