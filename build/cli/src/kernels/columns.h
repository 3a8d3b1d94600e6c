// What the products by columns know of activations.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace bitnet {

// Those of a run of activations that are not 0, in their order.
struct NonZero {
  static constexpr size_t kSlack = 16;  // that may be written beyond the last
  size_t n = 0;
  uint32_t columns[kMaxColumns + kSlack];
  int8_t values[kMaxColumns + kSlack];
};

}  // namespace bitnet
