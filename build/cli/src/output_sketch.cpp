#include "output_sketch.h"

#include <algorithm>
#include <cmath>

namespace bitnet {

OutputSketch::OutputSketch(const FloatRows& w, uint8_t* memory) : norms(w.rows) {
  for (size_t p = 0; p < planes.size(); p++)
    planes[p] = {{TernaryType::kCodes, memory + p * plane_bytes(w.rows, w.cols), w.rows, w.cols},
                 std::vector<float>(w.rows),
                 std::vector<float>(w.rows),
                 std::vector<float>(w.rows),
                 std::vector<float>(w.rows)};
  constexpr size_t kSample = 1024;  // rows: the mean of a column is known to a thirtieth of its deviation
  constexpr double kLeast = 0.01;   // of the mean deviation: a column that is all but constant may not be so elsewhere
  const size_t n = std::min(w.rows, kSample);
  std::vector<float> row(w.cols);
  std::vector<double> sums(w.cols), squares(w.cols);
  for (size_t i = 0; i < n; i++) {
    decode_row(w, w.rows * i / n, row.data());
    for (size_t c = 0; c < w.cols; c++) {
      sums[c] += static_cast<double>(row[c]);
      squares[c] += static_cast<double>(row[c]) * static_cast<double>(row[c]);
    }
  }
  std::vector<double> variances(w.cols);
  double total = 0.0;
  for (size_t c = 0; c < w.cols; c++) {
    const double mean = sums[c] / static_cast<double>(n);
    means.push_back(static_cast<float>(mean));
    variances[c] = std::max(squares[c] / static_cast<double>(n) - mean * mean, 0.0);
    total += variances[c];
  }
  const double least = kLeast * std::sqrt(total / static_cast<double>(w.cols));
  for (size_t c = 0; c < w.cols; c++) {
    const double scale = std::max(std::sqrt(variances[c]), least);
    scales.push_back(static_cast<float>(scale > 0.0 ? scale : 1.0));
    inverse_scales_.push_back(1.0f / scales.back());
  }
}

void OutputSketch::add(const FloatRows& w, size_t row, const Kernels& kernels, float* work) {
  uint8_t* codes[kSketchPlanes];
  for (size_t p = 0; p < planes.size(); p++) codes[p] = const_cast<uint8_t*>(planes[p].codes.slice(row, 1).data);
  const RowSketch sketch = kernels.sketch_row(w.slice(row, 1), means.data(), inverse_scales_.data(), work, codes);
  for (size_t p = 0; p < planes.size(); p++) {
    planes[p].steps[row] = sketch.steps[p];
    planes[p].gains[row] = sketch.gains[p];
    planes[p].errors[row] = sketch.errors[p];
    planes[p].peaks[row] = sketch.peaks[p];
  }
  norms[row] = sketch.norm;
}

}  // namespace bitnet
