// Tokens that may come next, and the best of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

namespace bitnet {

// A token and its logit.
struct Candidate {
  float logit;
  int32_t token;
  bool operator==(const Candidate&) const = default;
};

// Larger logits first, the lower id first of equals.
inline bool better(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

// The k best of the candidates that are offered.
class Best {
 public:
  explicit Best(size_t k) : k_(k) { heap_.reserve(k); }

  // What a logit must at least be to be taken.
  const float& least() const { return least_; }

  void offer(Candidate candidate) {
    // A model with wrong weights may give NaN, which nothing could be ordered by.
    if (std::isnan(candidate.logit)) candidate.logit = kLowest;
    if (heap_.size() == k_) {
      if (!better(candidate, heap_.front())) return;
      std::pop_heap(heap_.begin(), heap_.end(), better);
      heap_.pop_back();
    }
    heap_.push_back(candidate);
    std::push_heap(heap_.begin(), heap_.end(), better);
    if (heap_.size() == k_) least_ = heap_.front().logit;
  }

  const std::vector<Candidate>& all() const { return heap_; }
  std::vector<Candidate> take() { return std::move(heap_); }

 private:
  static constexpr float kLowest = -std::numeric_limits<float>::infinity();

  size_t k_;
  std::vector<Candidate> heap_;  // the worst of them on top
  float least_ = kLowest;
};

// The k largest of all logits (n_vocab), in no order.
inline std::vector<Candidate> best_of(std::span<const float> logits, size_t k) {
  Best best(k);
  for (size_t i = 0; i < logits.size(); i++) best.offer({logits[i], static_cast<int32_t>(i)});
  return best.take();
}

}  // namespace bitnet
