// Which table this processor may use. CPUID is asked through the compiler's own run-time check, which also asks whether
// the operating system saves the wide registers.
#include <cstring>

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
  }
  return false;
}

Isa best_isa() {
  if (supported(Isa::kAvx512Vbmi)) return Isa::kAvx512Vbmi;
  if (supported(Isa::kAvx512)) return Isa::kAvx512;
  if (supported(Isa::kAvx2)) return Isa::kAvx2;
  return Isa::kScalar;
}

const Kernels& kernels_for(Isa isa) {
  switch (isa) {
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

size_t position_bytes(CacheType type, size_t head_dim) {
  switch (type) {
    case CacheType::kF32:
      return head_dim * 4;
    case CacheType::kF16:
      return head_dim * 2;
    case CacheType::kI8:
      break;
  }
  return head_dim + sizeof(float);
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
