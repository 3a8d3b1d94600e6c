// Which table this processor may use. CPUID is asked through the compiler's own run-time check, which also asks whether
// the operating system saves the wide registers.
#include <emmintrin.h>

#include <algorithm>
#include <cstring>

#include "amx.h"
#include "kernels.h"

namespace bitnet {

bool supported(Isa isa) {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2");
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vnni");
    case Isa::kAvx512Vbmi:
      return supported(Isa::kAvx512) && __builtin_cpu_supports("avx512vbmi");
    case Isa::kAmx:
      return supported(Isa::kAvx512Vbmi) && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
             amx::permitted();
  }
  return false;
}

Isa best_isa() {
  if (supported(Isa::kAmx)) return Isa::kAmx;
  if (supported(Isa::kAvx512Vbmi)) return Isa::kAvx512Vbmi;
  if (supported(Isa::kAvx512)) return Isa::kAvx512;
  if (supported(Isa::kAvx2)) return Isa::kAvx2;
  return Isa::kScalar;
}

const Kernels& kernels_for(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return kAmxKernels;
    case Isa::kAvx512Vbmi:
      return kAvx512VbmiKernels;
    case Isa::kAvx512:
      return kAvx512Kernels;
    case Isa::kAvx2:
      return kAvx2Kernels;
    case Isa::kScalar:
      break;
  }
  return kScalarKernels;
}

std::string_view name_of(Isa isa) {
  switch (isa) {
    case Isa::kAmx:
      return "amx";
    case Isa::kAvx512Vbmi:
      return "avx512-vbmi";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kScalar:
      break;
  }
  return "scalar";
}

void expand_rows(void (*expand_trits)(const uint8_t*, size_t, uint8_t*), const TernaryRows& trits, uint8_t* codes) {
  const size_t row_bytes = trits.cols / 4, whole_units = row_bytes / kCodeUnit, rest = row_bytes % kCodeUnit;
  for (size_t r = 0; r < trits.rows; r++, codes += row_bytes) {
    const uint8_t* row = trits.data + r * trits.row_bytes();
    expand_trits(row, whole_units, codes);
    if (rest == 0) continue;
    uint8_t last[kCodeUnit];
    expand_trits(row + whole_units * kTritUnit, 1, last);
    std::memcpy(codes + whole_units * kCodeUnit, last, rest);
  }
}

bool are_ternary(TernaryType type, std::span<const uint8_t> bytes) {
  if (type == TernaryType::kTrits) {
    constexpr uint8_t kMostOfTrits = 3 * 3 * 3 * 3 * 3 - 1;
    uint8_t most = 0;
    for (const uint8_t byte : bytes) most = std::max(most, byte);
    return most <= kMostOfTrits;
  }
  uint8_t threes = 0;
  for (const uint8_t byte : bytes) threes |= byte & byte >> 1 & 0x55;
  return threes == 0;
}

void pack_rows(void (*pack_trits)(const uint8_t*, size_t, uint8_t*), const TernaryRows& codes, uint8_t* trits) {
  const size_t row_bytes = codes.row_bytes(), whole_units = row_bytes / kCodeUnit, rest = row_bytes % kCodeUnit;
  for (size_t r = 0; r < codes.rows; r++) {
    const uint8_t* row = codes.data + r * row_bytes;
    pack_trits(row, whole_units, trits);
    trits += whole_units * kTritUnit;
    if (rest == 0) continue;
    uint8_t last[kCodeUnit] = {};
    std::memcpy(last, row + whole_units * kCodeUnit, rest);
    pack_trits(last, 1, trits);
    trits += kTritUnit;
  }
}

namespace {

#include "transpose16.h"

}  // namespace

void codes_to_columns(const uint8_t* codes, size_t code_stride, size_t n_cols, const TernaryColumns& w, size_t unit,
                      size_t first_col, uint8_t* out) {
  constexpr size_t kMaxPlanes = 5, kSide = 16;
  const size_t first_row = unit * w.unit_rows(), n_rows = std::min(w.unit_rows(), w.rows - first_row);
  for (size_t begin = 0; begin < n_cols / 4; begin += kSide) {
    alignas(16) uint8_t planes[kSide][kMaxPlanes][kColumnUnit] = {};
    for (size_t r = 0; r < n_rows; r += kSide) {
      __m128i m[kSide];
      for (size_t i = 0; i < kSide; i++)
        m[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + (r + i) * code_stride + begin));
      transpose16(m);
      for (size_t i = 0; i < kSide; i++)
        _mm_store_si128(reinterpret_cast<__m128i*>(&planes[i][r / kColumnUnit][r % kColumnUnit]), m[i]);
    }
    for (size_t byte = begin; byte < begin + kSide; byte++)
      for (size_t i = 0; i < 4; i++) {
        const size_t column = first_col + byte / 32 * kTernaryBlock + i * 32 + byte % 32;
        uint8_t* to = out + column * w.column_bytes() + unit * kColumnUnit;
        const auto code = [&](size_t plane, size_t p) { return planes[byte - begin][plane][p] >> (6 - 2 * i) & 3; };
        for (size_t p = 0; p < kColumnUnit; p++) {
          if (w.type == TernaryType::kCodes)
            to[p] = static_cast<uint8_t>(code(0, p) << 6 | code(1, p) << 4 | code(2, p) << 2 | code(3, p));
          else
            to[p] =
                static_cast<uint8_t>(81 * code(4, p) + 27 * code(0, p) + 9 * code(1, p) + 3 * code(2, p) + code(3, p));
        }
      }
  }
}

size_t number_bytes(CacheType type, size_t head_dim) {
  switch (type) {
    case CacheType::kF32:
      return head_dim * 4;
    case CacheType::kF16:
      return head_dim * 2;
    case CacheType::kI8:
      break;
  }
  return head_dim;
}

size_t position_bytes(CacheType type, size_t head_dim) {
  return number_bytes(type, head_dim) + (type == CacheType::kI8 ? sizeof(float) : 0);
}

size_t chunk_bytes(CacheType type, size_t head_dim) { return kChunkPositions * position_bytes(type, head_dim); }

std::string_view name_of(CacheType type) {
  switch (type) {
    case CacheType::kF32:
      return "f32";
    case CacheType::kF16:
      return "f16";
    case CacheType::kI8:
      break;
  }
  return "i8";
}

}  // namespace bitnet
