#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/half.h"

namespace bitnet {
namespace {

constexpr size_t kParts = 16, kPartWeights = 16;  // of a block of Q6_K, each with a scale of its own
constexpr float kNoWeight = 1e-15f;               // smaller ones are zeros, as ggml takes them
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A number of each of four parts. Below, T is this or float.
using Four = float __attribute__((vector_size(16)));

// To the nearest integer, |x| < 2²².
template <class T>
T nearest(T x) {
  return x + 0x1.8p23f - 0x1.8p23f;
}

template <class T>
T number(T weight, T inverse) {
  const T n = nearest(weight * inverse), below_32 = n < 31.0f ? n : 31.0f;
  return below_32 > -32.0f ? below_32 : -32.0f;
}

template <class T>
T magnitude(T x) {
  return x > 0.0f ? x : -x;
}

// The scales of four parts. The weight of largest magnitude becomes about −32; of the candidates around it, each with
// the scale that fits its numbers best, Σ w n / Σ n², the one with the least Σ (w − scale · n)² is taken.
Four choose_scales(const float* weights) {
  Four w[kPartWeights], extreme{}, best{}, scales{};
  for (size_t i = 0; i < kPartWeights; i++) {
    w[i] = Four{weights[i], weights[kPartWeights + i], weights[2 * kPartWeights + i], weights[3 * kPartWeights + i]};
    extreme = magnitude(w[i]) > magnitude(extreme) ? w[i] : extreme;
  }
  extreme = magnitude(extreme) < kNoWeight ? kInfinity : extreme;  // all numbers are 0
  for (int step = -9; step <= 9; step++) {
    const Four inverse = -(32.0f + 0.1f * static_cast<float>(step)) / extreme;
    Four products{}, squares{};
    for (const Four& weight : w) {
      const Four n = number(weight, inverse);
      products += weight * n;
      squares += n * n;
    }
    const Four scale = products / (squares > 0.0f ? squares : 1.0f), explained = products * scale;
    scales = explained > best ? scale : scales;
    best = explained > best ? explained : best;
  }
  return scales;
}

bool quantize_q6_block(const float* weights, uint8_t* out) {
  float scales[kParts];
  for (size_t p = 0; p < kParts; p += 4) {
    const Four four = choose_scales(weights + p * kPartWeights);
    std::memcpy(scales + p, &four, sizeof four);
  }
  const float extreme = *std::max_element(std::begin(scales), std::end(scales),
                                          [](float a, float b) { return std::fabs(a) < std::fabs(b); });
  const uint16_t half = float_to_half(extreme / -128.0f);
  const float unit = half_to_float(half);
  if (!std::isfinite(unit)) return false;
  int8_t whole[kParts];
  float inverse[kParts];
  for (size_t p = 0; p < kParts; p++) {
    const float scale = unit != 0.0f ? std::clamp(nearest(scales[p] / unit), -128.0f, 127.0f) : 0.0f;
    whole[p] = static_cast<int8_t>(scale);
    inverse[p] = scale != 0.0f ? 1.0f / (unit * scale) : 0.0f;
  }
  uint8_t numbers[kQ6Block];
  for (size_t k = 0; k < kQ6Block; k++)
    numbers[k] = static_cast<uint8_t>(static_cast<int>(number(weights[k], inverse[k / kPartWeights])) + 32);
  uint8_t *low = out, *high = out + 128;
  for (const uint8_t* q = numbers; q < numbers + kQ6Block; q += 128, low += 64, high += 32)
    for (size_t i = 0; i < 32; i++) {
      low[i] = static_cast<uint8_t>((q[i] & 15) | (q[i + 64] & 15) << 4);
      low[i + 32] = static_cast<uint8_t>((q[i + 32] & 15) | (q[i + 96] & 15) << 4);
      high[i] = static_cast<uint8_t>(q[i] >> 4 | q[i + 32] >> 4 << 2 | q[i + 64] >> 4 << 4 | q[i + 96] >> 4 << 6);
    }
  std::memcpy(out + 192, whole, sizeof whole);
  std::memcpy(out + 208, &half, sizeof half);
  return true;
}

bool quantize_q8_block(const float* weights, uint8_t* out) {
  float largest = 0.0f;
  for (size_t i = 0; i < kQ8Block; i++) largest = std::max(largest, std::fabs(weights[i]));
  const float scale = largest / 127.0f, inverse = std::isfinite(1.0f / scale) ? 1.0f / scale : 0.0f;
  const uint16_t half = float_to_half(scale);
  if (!std::isfinite(half_to_float(half))) return false;
  std::memcpy(out, &half, sizeof half);
  for (size_t i = 0; i < kQ8Block; i++) {  // as std::round does it, without a call
    const float exact = std::fabs(weights[i] * inverse);
    const int whole = static_cast<int>(exact), rounded = whole + (exact - static_cast<float>(whole) >= 0.5f);
    out[2 + i] = static_cast<uint8_t>(weights[i] < 0.0f ? -rounded : rounded);
  }
  return true;
}

bool is_finite(std::span<const float> row) {
  return std::all_of(row.begin(), row.end(), [](float w) { return std::isfinite(w); });
}

}  // namespace

bool quantize_q8_0(std::span<const float> row, uint8_t* out) {
  if (!is_finite(row)) return false;
  for (size_t i = 0; i < row.size(); i += kQ8Block, out += 34)
    if (!quantize_q8_block(&row[i], out)) return false;
  return true;
}

bool quantize_q6_k(std::span<const float> row, uint8_t* out) {
  if (!is_finite(row)) return false;
  for (size_t i = 0; i < row.size(); i += kQ6Block, out += 210)
    if (!quantize_q6_block(&row[i], out)) return false;
  return true;
}

}  // namespace bitnet
