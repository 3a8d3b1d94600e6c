#include "elementary.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace bitnet {

SinCos sin_cos(double x) {
  // Cody and Waite: π/2 in three parts whose products with k < 2²⁰ are exact. Polynomials: fdlibm, k_sin.c and k_cos.c.
  const double k = std::nearbyint(x * 6.36619772367581382433e-01);
  double r = x - k * 1.57079632673412561417e+00;
  r -= k * 6.07710050630396597660e-11;
  r -= k * 2.02226624879595063154e-21;
  const double z = r * r;
  const double s = r + r * z *
                           (-1.66666666666666324348e-01 +
                            z * (8.33333333332248946124e-03 +
                                 z * (-1.98412698298579493134e-04 +
                                      z * (2.75573137070700676789e-06 +
                                           z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)))));
  const double c = 1.0 - 0.5 * z +
                   z * z *
                       (4.16666666666666019037e-02 +
                        z * (-1.38888888888741095749e-03 +
                             z * (2.48015872894767294178e-05 +
                                  z * (-2.75573143513906633035e-07 +
                                       z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11)))));
  switch (static_cast<int64_t>(k) & 3) {
    case 0:
      return {s, c};
    case 1:
      return {c, -s};
    case 2:
      return {-s, -c};
    default:
      return {-c, s};
  }
}

double exponential(double x) {
  if (x < -708.0) return 0.0;
  if (x > 709.0) return std::numeric_limits<double>::infinity();
  const double n = std::nearbyint(x * 1.44269504088896338700e+00);
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double term = 1.0, sum = 1.0;  // Taylor: |r| ≤ ln 2 / 2, so 14 terms reach 1e-17
  for (int i = 1; i <= 14; i++) {
    term *= r / i;
    sum += term;
  }
  return sum * std::bit_cast<double>((static_cast<int64_t>(n) + 1023) << 52);
}

double logarithm(double x) {
  if (x == 0.0) return -std::numeric_limits<double>::infinity();
  if (!(x > 0.0)) return std::numeric_limits<double>::quiet_NaN();
  if (std::isinf(x)) return x;
  int exponent;
  double m = std::frexp(x, &exponent);  // from ½ to below 1
  if (m < 7.07106781186547524401e-01) {
    m *= 2.0;
    exponent--;
  }
  // ln m = 2 artanh((m − 1) / (m + 1)), a series in s² ≤ 0.03
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double sum = 0.0;
  for (int i = 23; i >= 3; i -= 2) sum = (sum + 1.0 / i) * z;
  const double n = exponent;
  return n * 6.93147180369123816490e-01 + (2.0 * s + (2.0 * s * sum + n * 1.90821492927058770002e-10));
}

double nth_root(double a, size_t n) {
  double x = a;  // an upper bound, from square roots; Newton then falls to the root and cannot pass it
  for (size_t power = 2; power <= n; power *= 2) x = std::sqrt(x);
  for (;;) {
    double power = 1.0;
    for (size_t i = 1; i < n; i++) power *= x;
    const double next = x - (x - a / power) / static_cast<double>(n);
    if (!(next < x)) return x;
    x = next;
  }
}

}  // namespace bitnet
