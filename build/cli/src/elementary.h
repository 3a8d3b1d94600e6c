// Elementary functions with the same bits on every processor: a static libc chooses variants of its own by CPUID. Basic
// operations and square roots only, compiled without contraction.
#pragma once

#include <cstddef>

namespace bitnet {

struct SinCos {
  double sine, cosine;
};

// Within 1e-15 of the true values for |x| ≤ 10⁶.
SinCos sin_cos(double x);

// eˣ within 4e-16 relative; 0 below −708, infinity above 709.
double exponential(double x);

// ln x within 4e-16 relative, for normal x > 0; −∞ for 0, NaN below.
double logarithm(double x);

// The positive n-th root of a ≥ 1, within 1e-15 relative.
double nth_root(double a, size_t n);

}  // namespace bitnet
