// Whole numbers of units.
#pragma once

#include <cstddef>

namespace bitnet {

constexpr size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
constexpr size_t round_up(size_t a, size_t unit) { return ceil_div(a, unit) * unit; }

}  // namespace bitnet
