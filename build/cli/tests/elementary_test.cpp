#include "elementary.h"

#include <doctest/doctest.h>

#include <cmath>
#include <initializer_list>

using namespace bitnet;

TEST_CASE("sin_cos agrees with the C library up to the longest contexts") {
  for (double x = -10.0; x < 1.1e6; x = x * 1.0001 + 0.01) {
    const SinCos got = sin_cos(x);
    CHECK(std::fabs(got.sine - std::sin(x)) < 2e-15);
    CHECK(std::fabs(got.cosine - std::cos(x)) < 2e-15);
    if (x > 100.0) x *= 1.01;
  }
}

TEST_CASE("exponential agrees with the C library") {
  for (double x = -700.0; x < 700.0; x += 0.37) CHECK(exponential(x) == doctest::Approx(std::exp(x)).epsilon(1e-15));
  CHECK(exponential(0.0) == 1.0);
  CHECK(exponential(-1e300) == 0.0);
  CHECK(std::isinf(exponential(1e300)));
}

TEST_CASE("logarithm agrees with the C library") {
  for (double x = 1e-300; x < 1e300; x *= 1.37) CHECK(logarithm(x) == doctest::Approx(std::log(x)).epsilon(1e-15));
  for (double x = 0.5; x < 2.0; x += 0.0137) CHECK(std::fabs(logarithm(x) - std::log(x)) < 3e-16);
  CHECK(logarithm(1.0) == 0.0);
  CHECK(logarithm(0.0) == -std::numeric_limits<double>::infinity());
  CHECK(std::isnan(logarithm(-1.0)));
}

TEST_CASE("nth_root, raised again, gives the number back") {
  for (const double a : {1.0, 1.5, 10000.0, 500000.0, 1e12})
    for (const size_t n : {1, 2, 3, 32, 48, 64, 128}) {
      CHECK(nth_root(a, n) == doctest::Approx(std::pow(a, 1.0 / static_cast<double>(n))).epsilon(1e-14));
    }
}
