// What is read of the output matrix for every token in its stead: planes of two bits a weight, made once in memory from
// a matrix of any type. The first plane tells which rows have a chance to be among the largest logits, each further one
// which of them still have.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/kernels.h"

namespace bitnet {

// w[r][i] ≈ means[i] + scales[i] · u[i], where u = 0 becomes planes[p].gains[r] · u[i] + planes[p].steps[r] · (code of
// r, i in plane p − 1.5) with each plane p. Rows are standardised by column first, so that a column of large weights
// does not spoil what is known of the others.
struct OutputSketch {
  struct Plane {
    TernaryRows codes;                // 0 … 3
    std::vector<float> steps, gains;  // (rows)
    std::vector<float> errors;        // (rows): root mean square of what this plane and those before it leave, …
    std::vector<float> peaks;         // … and the largest of it
  };

  // `memory` must have bytes(w) and outlive the sketch. Looks at some rows of w; fills in nothing yet.
  OutputSketch(const FloatRows& w, uint8_t* memory);
  static size_t bytes(const FloatRows& w) { return kSketchPlanes * plane_bytes(w.rows, w.cols); }
  static size_t plane_bytes(size_t rows, size_t cols) { return rows * (cols / 4); }

  // Each row once, by any thread. work: (2, cols)
  void add(const FloatRows& w, size_t row, const Kernels& kernels, float* work);

  std::vector<float> means, scales;  // (cols)
  std::array<Plane, kSketchPlanes> planes;
  std::vector<float> norms;  // (rows): of the longest u

 private:
  std::vector<float> inverse_scales_;  // (cols)
};

}  // namespace bitnet
