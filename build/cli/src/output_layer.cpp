#include "output_layer.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>

#include "rounding.h"

namespace bitnet {
namespace {

constexpr size_t kMatrixRowsPerPiece = 64;  // for one thread at a time
constexpr size_t kCandidatesPerPiece = 16, kExactPerPiece = 4;
constexpr size_t kFewTokens = 1024;  // whose logits are computed at once rather than looked for
// Of so many rows for each of the k that are wanted the estimates are refined before anything is computed exactly: the
// better the first k, the fewer rows have a chance beside them.
constexpr size_t kRefinedFirst = 4, kLeastRefined = 12;
// How far from its estimate a logit is looked for, in standard deviations: a normal error stays within 5 but for one in
// 3.5 million. It is the more like a normal one the more columns share in it; where few do, it is looked for farther
// away. docs/performance.md says what it was tried on.
constexpr double kDeviations = 5.0, kFewColumns = 20.0;
// A row whose error lies in few columns may meet a vector with large values in the very same ones, as trained models
// have them: that is no chance. Columns whose values are so many times the root mean square of the others are taken to
// have the row's largest error each, and have no part in what is left to chance.
constexpr double kOutlying = 5.0;
constexpr size_t kMostOutlying = 64;  // columns: more of them are no exception
// Errors are not of chance where rows and vector have something in common that codes miss. The best rows show it: where
// one lies more than that part of its bound above its estimate, all bounds are widened by so many times the excess.
constexpr float kSuspicious = 0.65f, kWidening = 4.0f;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

bool is_allowed(std::span<const uint64_t> allowed, size_t token) {
  return allowed.empty() || (allowed[token / 64] >> token % 64 & 1) != 0;
}

// The largest, in lanes that the compiler makes vectors of. NaN, of wrong weights, is passed over.
float peak_of(std::span<const float> values) {
  constexpr size_t kPeakLanes = 16;
  std::array<float, kPeakLanes> peaks;
  peaks.fill(-kInfinity);
  size_t i = 0;
  for (; i + kPeakLanes <= values.size(); i += kPeakLanes)
    for (size_t j = 0; j < kPeakLanes; j++) peaks[j] = values[i + j] > peaks[j] ? values[i + j] : peaks[j];
  for (; i < values.size(); i++) peaks[0] = std::max(peaks[0], values[i]);
  return *std::max_element(peaks.begin(), peaks.end());
}

void sort_best(std::vector<Candidate>& candidates, size_t k) {
  std::sort(candidates.begin(), candidates.end(), better);
  if (candidates.size() > k) candidates.resize(k);
}

}  // namespace

OutputLayer::OutputLayer(const Model& model, const Kernels& kernels, ThreadPool& pool, size_t max_outputs)
    : model_(model),
      kernels_(kernels),
      pool_(pool),
      dim_(model.config().dim),
      n_vocab_(model.config().n_vocab),
      outputs_(max_outputs * dim_),
      scaled_(dim_),
      squares_(dim_),
      values_(kEstimatedTogether * dim_),
      scratch_(pool.size()) {
  for (Scratch& s : scratch_) {
    s.sums.resize(std::max(kEstimatedTogether * kRowsPerPiece, kEstimatesPerPiece));
    s.row.resize(row_bytes(model.output().type, dim_));
  }
}

void OutputLayer::logits(float* out) const { multiply(outputs_.data(), n_, 0, out); }

void OutputLayer::logits(float* out, size_t which) const { multiply(output(which), 1, 0, out); }

// out (n, rows from first_row on) = x (n, dim) times these rows of the output matrix.
void OutputLayer::multiply(const float* x, size_t n, size_t first_row, float* out) const {
  const size_t rows = n_vocab_ - first_row;
  if (n == 0) return;
  pool_.for_each(ceil_div(rows, kMatrixRowsPerPiece), [&](size_t piece, size_t) {
    const size_t first = piece * kMatrixRowsPerPiece, count = std::min(kMatrixRowsPerPiece, rows - first);
    kernels_.dot_rows(model_.output().slice(first_row + first, count), x, n, out + first, rows);
  });
}

// w · x = Σ means · x + Σ standardised w · scales · x, of which the second factor is quantised.
void OutputLayer::prepare(size_t which, size_t place) {
  const OutputSketch& sketch = model_.output_sketch();
  const float* x = output(which);
  double offset = 0.0, squares = 0.0, fourths = 0.0;
  for (size_t i = 0; i < dim_; i++) {
    scaled_[i] = sketch.scales[i] * x[i];
    offset += static_cast<double>(sketch.means[i]) * static_cast<double>(x[i]);
    squares_[i] = static_cast<double>(scaled_[i]) * static_cast<double>(scaled_[i]);
    squares += squares_[i];
    fourths += squares_[i] * squares_[i];
  }
  const auto end = squares_.begin() + static_cast<std::ptrdiff_t>(std::min(kMostOutlying, dim_));
  std::partial_sort(squares_.begin(), end, squares_.end(), std::greater<>());
  double met = 0.0;  // Σ |values| that meet a row's largest error: one at least
  for (auto square = squares_.begin(); square != end; square++) {
    const double others = squares - *square;
    if (*square * static_cast<double>(dim_) <= kOutlying * kOutlying * others) break;
    met += std::sqrt(*square);
    squares = others;
    fourths -= *square * *square;
  }
  met = std::max(met, std::sqrt(squares_.front()));
  const double n_columns = squares > 0.0 && fourths > 0.0 ? squares * squares / fourths : 1.0;  // that share in it
  const double deviations = kDeviations * (1.0 + kFewColumns / n_columns);
  const float s = kernels_.quantize(scaled_.data(), dim_, &values_[place * dim_], &sums_[place]);
  queries_[place] = {static_cast<float>(offset),
                     1.0f / s,
                     static_cast<float>(sums_[place]) / 2.0f,
                     static_cast<float>(deviations * std::sqrt(std::max(squares, 0.0))),
                     static_cast<float>(met),
                     static_cast<float>(deviations / (std::sqrt(12.0) * static_cast<double>(s)))};
}

// Estimates of output `which` and, since the sketch is read for one anyway, of those after it.
void OutputLayer::estimate(size_t which) {
  const size_t rows = model_.n_sketched();
  if (which >= first_estimated_ && which < first_estimated_ + n_estimated_ && rows == rows_estimated_) return;
  const OutputSketch::Plane& plane = model_.output_sketch().planes[0];
  first_estimated_ = which;
  rows_estimated_ = rows;
  n_estimated_ = std::min(kEstimatedTogether, n_ - which);
  for (size_t i = 0; i < n_estimated_; i++) prepare(which + i, i);
  estimates_.resize(kEstimatedTogether * n_vocab_);
  const size_t n_pieces = ceil_div(rows, kRowsPerPiece);
  peaks_.resize(kEstimatedTogether * n_pieces);
  pool_.for_each(n_pieces, [&](size_t piece, size_t thread) {
    const size_t first = piece * kRowsPerPiece, n = std::min(kRowsPerPiece, rows - first);
    int32_t* sums = scratch_[thread].sums.data();
    kernels_.ternary_matmul(plane.codes.slice(first, n), values(0, n_estimated_), sums, kRowsPerPiece);
    for (size_t place = 0; place < n_estimated_; place++, sums += kRowsPerPiece) {
      const Query& q = queries_[place];
      float* estimated = estimates(place) + first;
      for (size_t i = 0; i < n; i++)
        estimated[i] = q.offset + q.unit * plane.steps[first + i] * (static_cast<float>(sums[i]) - q.centre);
      peaks_[place * n_pieces + piece] = peak_of({estimated, n});
    }
  });
}

// The n allowed rows of the best estimates. None of them is below the n-th best of the pieces' best ones, which spares
// most pieces; where some rows are not allowed, a piece's best one may be one of them.
std::vector<Candidate> OutputLayer::best_estimates(size_t place, size_t n, std::span<const uint64_t> allowed) {
  const size_t rows = model_.n_sketched(), n_pieces = ceil_div(rows, kRowsPerPiece);
  const std::span<const float> peaks(&peaks_[place * n_pieces], n_pieces);
  const float* estimated = estimates(place);
  float least = -kInfinity;
  if (allowed.empty() && n < n_pieces) {
    std::vector<float> sorted(peaks.begin(), peaks.end());
    std::nth_element(sorted.begin(), sorted.begin() + static_cast<std::ptrdiff_t>(n - 1), sorted.end(),
                     std::greater<>());
    least = sorted[n - 1];
  }
  Best best(n);
  std::array<uint32_t, kRowsPerPiece> found;
  for (size_t piece = 0; piece < n_pieces; piece++) {
    const float bound = std::max(best.least(), least);
    if (peaks[piece] < bound) continue;
    const size_t first = piece * kRowsPerPiece;
    const size_t n_found =
        kernels_.find_not_below(estimated + first, std::min(kRowsPerPiece, rows - first), bound, found.data());
    for (size_t i = 0; i < n_found; i++)
      if (const size_t row = first + found[i]; is_allowed(allowed, row))
        best.offer({estimated[row], static_cast<int32_t>(row)});
  }
  return best.take();
}

// How far at most a row may lie above what the planes up to p make of it.
float OutputLayer::slack(size_t place, size_t p, size_t row) const {
  const OutputSketch& sketch = model_.output_sketch();
  const Query& q = queries_[place];
  return q.per_error * sketch.planes[p].errors[row] + q.per_peak * sketch.planes[p].peaks[row] +
         q.per_norm * sketch.norms[row];
}

// What the bounds are to be multiplied with, by what is known of some rows.
float OutputLayer::widening_for(size_t place, std::span<const Refined> refined) const {
  float widening = 1.0f;
  for (const Refined& r : refined)
    for (size_t p = 0; p < kSketchPlanes; p++) {
      const float allowed = slack(place, p, static_cast<size_t>(r.best.token));
      const float above = r.best.logit - r.by_plane[p];
      if (allowed > 0.0f && above > kSuspicious * allowed)
        widening = std::max(widening, 1.0f + kWidening * (above / allowed - kSuspicious));
    }
  return widening;
}

// Adds to the estimates what a further plane does.
void OutputLayer::refine(size_t place, size_t p, Estimates& estimates, Scratch& scratch) const {
  const OutputSketch::Plane& plane = model_.output_sketch().planes[p];
  const Query& q = queries_[place];
  kernels_.ternary_select(plane.codes, estimates.rows.data(), estimates.n, values(place, 1), scratch.sums.data());
  for (size_t i = 0; i < estimates.n; i++) {
    const size_t row = estimates.rows[i];
    const float sum = static_cast<float>(scratch.sums[i]) - q.centre;
    estimates.values[i] =
        q.offset + plane.gains[row] * (estimates.values[i] - q.offset) + q.unit * plane.steps[row] * sum;
  }
  scratch.bytes += estimates.n * plane.codes.row_bytes();
}

float OutputLayer::exact(size_t which, size_t row, size_t thread) {
  Scratch& scratch = scratch_[thread];
  const FloatRows w = model_.read_row(model_.output(), row, scratch.row);
  float logit;
  kernels_.dot_rows(w, output(which), 1, &logit, 1);
  scratch.bytes += scratch.row.size();
  return std::isnan(logit) ? -kInfinity : logit;
}

// The candidates' logits.
void OutputLayer::compute(size_t which, std::vector<Candidate>& candidates) {
  pool_.for_each(ceil_div(candidates.size(), kExactPerPiece), [&](size_t piece, size_t thread) {
    const size_t end = std::min((piece + 1) * kExactPerPiece, candidates.size());
    for (size_t i = piece * kExactPerPiece; i < end; i++)
      candidates[i].logit = exact(which, static_cast<size_t>(candidates[i].token), thread);
  });
}

// Of the rows that are not sketched yet.
std::vector<Candidate> OutputLayer::best_without_sketch(size_t which, size_t k, std::span<const uint64_t> allowed) {
  const size_t first = model_.n_sketched();
  logits_.resize(n_vocab_ - first);
  multiply(output(which), 1, first, logits_.data());
  Best best(k);
  for (size_t r = first; r < n_vocab_; r++)
    if (is_allowed(allowed, r)) best.offer({logits_[r - first], static_cast<int32_t>(r)});
  return best.take();
}

// The best k by their estimates are computed; a row that cannot reach the least of them is not among the best k.
std::vector<Candidate> OutputLayer::search(size_t which, size_t k, std::span<const uint64_t> allowed) {
  const size_t rows = model_.n_sketched();
  std::vector<Candidate> out;
  if (rows < n_vocab_) out = best_without_sketch(which, k, allowed);
  if (rows == 0) return out;
  estimate(which);
  const size_t place = which - first_estimated_;
  const float* estimated = estimates(place);

  std::vector<Candidate> first = best_estimates(place, kRefinedFirst * k + kLeastRefined, allowed);
  std::vector<Refined> refined(first.size());
  pool_.for_each(ceil_div(first.size(), kCandidatesPerPiece), [&](size_t piece, size_t thread) {
    const size_t begin = piece * kCandidatesPerPiece;
    Estimates& left = scratch_[thread].left;
    left.n = std::min(kCandidatesPerPiece, first.size() - begin);
    for (size_t i = 0; i < left.n; i++) {
      left.rows[i] = static_cast<uint32_t>(first[begin + i].token);
      left.values[i] = first[begin + i].logit;
    }
    for (size_t p = 0; p < kSketchPlanes; p++) {
      if (p > 0) refine(place, p, left, scratch_[thread]);
      for (size_t i = 0; i < left.n; i++) refined[begin + i].by_plane[p] = left.values[i];
    }
    for (size_t i = 0; i < left.n; i++) refined[begin + i].best = {left.values[i], first[begin + i].token};
  });
  std::sort(refined.begin(), refined.end(), [](const Refined& a, const Refined& b) { return better(a.best, b.best); });
  first.resize(std::min(k, first.size()));
  for (size_t i = 0; i < first.size(); i++) first[i] = refined[i].best;
  compute(which, first);
  for (size_t i = 0; i < first.size(); i++) refined[i].best = first[i];
  const float widening = widening_for(place, refined);
  std::vector<size_t> done;
  for (const Candidate& candidate : first) done.push_back(static_cast<size_t>(candidate.token));
  std::sort(done.begin(), done.end());
  out.insert(out.end(), first.begin(), first.end());
  sort_best(out, k);
  const float least = out.size() < k ? -kInfinity : out.back().logit;

  pool_.for_each(ceil_div(rows, kEstimatesPerPiece), [&](size_t piece, size_t thread) {
    // Those that are left, plane after plane. NaN, of wrong weights, stays: it is not known to be small.
    Scratch& scratch = scratch_[thread];
    Estimates& left = scratch.left;
    const size_t begin = piece * kEstimatesPerPiece, n_rows = std::min(kEstimatesPerPiece, rows - begin);
    for (size_t i = 0; i < n_rows; i++)  // how large they may be
      left.values[i] = estimated[begin + i] + widening * slack(place, 0, begin + i);
    const size_t n = kernels_.find_not_below(left.values.data(), n_rows, least, left.rows.data());
    left.n = 0;
    for (size_t i = 0; i < n; i++) {
      const size_t row = begin + left.rows[i];
      if (!is_allowed(allowed, row)) continue;
      left.rows[left.n] = static_cast<uint32_t>(row);
      left.values[left.n++] = estimated[row];
    }
    for (size_t p = 1; p < kSketchPlanes; p++) {
      refine(place, p, left, scratch);
      size_t n_kept = 0;
      for (size_t i = 0; i < left.n; i++) {
        if (left.values[i] + widening * slack(place, p, left.rows[i]) < least) continue;
        left.rows[n_kept] = left.rows[i];
        left.values[n_kept++] = left.values[i];
      }
      left.n = n_kept;
    }
    for (size_t i = 0; i < left.n; i++)
      if (const size_t row = left.rows[i]; !std::binary_search(done.begin(), done.end(), row))
        scratch.found.push_back({exact(which, row, thread), static_cast<int32_t>(row)});
  });
  for (Scratch& s : scratch_) {
    out.insert(out.end(), s.found.begin(), s.found.end());
    s.found.clear();
  }
  return out;
}

std::vector<Candidate> OutputLayer::best(size_t which, size_t k, std::span<const uint64_t> allowed) {
  std::vector<Candidate> candidates;
  k = std::min(k, n_vocab_);
  size_t n_allowed = 0;
  for (const uint64_t word : allowed) n_allowed += static_cast<size_t>(std::popcount(word));
  if (!allowed.empty() && n_allowed <= std::max(k, kFewTokens)) {
    for (size_t t = 0; t < n_vocab_; t++)
      if (is_allowed(allowed, t)) candidates.push_back({0.0f, static_cast<int32_t>(t)});
    compute(which, candidates);
  } else {
    candidates = search(which, k, allowed);
  }
  sort_best(candidates, k);
  return candidates;
}

uint64_t OutputLayer::bytes_refined() const {
  uint64_t bytes = 0;
  for (const Scratch& s : scratch_) bytes += s.bytes;
  return bytes;
}

}  // namespace bitnet
