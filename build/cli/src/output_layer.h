// From the last vectors of the residual stream to logits: all of them, or the largest.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "candidate.h"
#include "kernels/kernels.h"
#include "model.h"
#include "thread_pool.h"

namespace bitnet {

class OutputLayer {
 public:
  // All must outlive it. `max_outputs`: of a batch.
  OutputLayer(const Model& model, const Kernels& kernels, ThreadPool& pool, size_t max_outputs);

  // A new batch: its vectors, (dim) each, are written where add() says.
  void clear() { n_ = n_estimated_ = 0; }
  float* add() { return &outputs_[n_++ * dim_]; }

  void logits(float* out) const;                // of all vectors, (n, n_vocab)
  void logits(float* out, size_t which) const;  // of one, (n_vocab)

  // The k largest of one, best first, with the bits that logits() gives. Where `allowed` is given, a bit for each token
  // (token t is bit t mod 64 of word t / 64), tokens whose bit is not set do not take part.
  std::vector<Candidate> best(size_t which, size_t k, std::span<const uint64_t> allowed = {});

  uint64_t bytes_refined() const;  // what best() has read of single rows so far

 private:
  static constexpr size_t kEstimatedTogether = 4;  // outputs

  // An output as the sketch is multiplied with it, and how far an estimate may be off.
  struct Query {
    float offset;     // what the columns' means add to every logit
    float unit;       // of a sum of codes times values, for a step of 1
    float centre;     // half the sum of the values: sums are of codes − 1, codes stand for themselves − 1.5
    float per_error;  // how far, for a row's error of 1, …
    float per_peak;   // … for the largest of what the error is made of, …
    float per_norm;   // … and for the row's norm, since the values are quantised
  };

  static constexpr size_t kRowsPerPiece = 128;  // whose estimates are made one after another: 82 kB at 2,560 columns
  static constexpr size_t kEstimatesPerPiece = 2048;  // that are looked through one after another

  // What is known so far of the logits of some rows.
  struct Estimates {
    std::array<uint32_t, kEstimatesPerPiece> rows;
    std::array<float, kEstimatesPerPiece> values;
    size_t n = 0;
  };

  // A row's logit, exact or as all planes give it, and what the planes up to each make of it.
  struct Refined {
    Candidate best;
    std::array<float, kSketchPlanes> by_plane;
  };

  // What a thread needs of its own.
  struct Scratch {
    std::vector<int32_t> sums;  // (kEstimatedTogether, kRowsPerPiece), or (kEstimatesPerPiece)
    Estimates left;
    std::vector<uint8_t> row;  // of the output matrix
    std::vector<Candidate> found;
    uint64_t bytes = 0;
  };

  const float* output(size_t which) const { return &outputs_[which * dim_]; }
  float* estimates(size_t place) { return &estimates_[place * n_vocab_]; }  // (n_vocab)
  Activations values(size_t place, size_t n) const { return {&values_[place * dim_], &sums_[place], n}; }
  void multiply(const float* x, size_t n, size_t first_row, float* out) const;
  std::vector<Candidate> best_without_sketch(size_t which, size_t k, std::span<const uint64_t> allowed);
  void prepare(size_t which, size_t place);
  void estimate(size_t which);
  std::vector<Candidate> best_estimates(size_t place, size_t n, std::span<const uint64_t> allowed);
  float slack(size_t place, size_t p, size_t row) const;
  float widening_for(size_t place, std::span<const Refined> refined) const;
  void refine(size_t place, size_t plane, Estimates& estimates, Scratch& scratch) const;
  float exact(size_t which, size_t row, size_t thread);
  std::vector<Candidate> search(size_t which, size_t k, std::span<const uint64_t> allowed);
  void compute(size_t which, std::vector<Candidate>& candidates);

  const Model& model_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  const size_t dim_, n_vocab_;
  size_t n_ = 0;
  std::vector<float> outputs_;  // (max_outputs, dim)

  size_t first_estimated_ = 0, n_estimated_ = 0;  // outputs whose estimates are at hand, …
  size_t rows_estimated_ = 0;                     // … of so many rows
  std::array<Query, kEstimatedTogether> queries_;
  std::vector<float> scaled_;                     // (dim)
  std::vector<double> squares_;                   // (dim): of it, the largest first
  std::vector<int8_t> values_;                    // (kEstimatedTogether, dim): outputs, scaled and quantised
  std::array<int32_t, kEstimatedTogether> sums_;  // of them
  std::vector<float> estimates_;                  // (kEstimatedTogether, n_vocab)
  std::vector<float> peaks_;                      // (kEstimatedTogether, pieces): the best estimate of each piece
  std::vector<float> logits_;                     // of rows that are not sketched yet
  std::vector<Scratch> scratch_;                  // a thread each
};

}  // namespace bitnet
