// What the products by columns have in common.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "prefetch.h"

namespace bitnet {

// Those of a run of activations that are not 0, in their order.
struct NonZero {
  static constexpr size_t kSlack = 16;  // that may be written beyond the last
  size_t n = 0;
  uint32_t columns[kMaxColumns + kSlack];
  int8_t values[kMaxColumns + kSlack];
};

// Their columns in fours that are multiplied together; the last is filled up with zeros.
class ColumnGroups {
 public:
  ColumnGroups(const TernaryColumns& w, const NonZero& x) : n((x.n + kSide - 1) / kSide) {
    for (size_t i = 0; i < n * kSide; i++) {
      data_[i] = w.data + x.columns[i < x.n ? i : 0] * w.column_bytes();
      values_[i] = i < x.n ? x.values[i] : int8_t{0};
      total += values_[i];
    }
  }

  const size_t n;
  int32_t total = 0;  // of the activations

  const uint8_t* data(size_t group, size_t i) const { return data_[group * kSide + i]; }
  int32_t values(size_t group) const {  // the group's activations side by side
    int32_t all;
    __builtin_memcpy(&all, values_ + group * kSide, sizeof all);
    return all;
  }

 private:
  static constexpr size_t kSide = 4;
  const uint8_t* data_[kMaxColumns + kSide];
  int8_t values_[kMaxColumns + kSide];
};

// Asks for columns while others are computed, evenly over so many steps of computing. Of each four lines the first two
// are asked for some columns earlier than the others: a core waits for some twenty lines that it has named and no more,
// but two neighbours make the second-level cache fetch on its own what follows them (Zen 5: two fifths more bytes a
// second).
class ColumnsAhead {
 public:
  ColumnsAhead(const TernaryColumns& w, const NonZero& x, size_t n_steps)
      : w_(w),
        x_(x),
        bytes_(w.column_bytes()),
        due_each_step_(((x.n + kLag) * bytes_ / (2 * kColumnUnit) << kDueBits) / (n_steps + 1)) {}

  void step() {
    for (due_ += due_each_step_; due_ >> kDueBits > 0; due_ -= size_t{1} << kDueBits) fetch();
  }
  void finish() {
    while (column_ < x_.n + kLag) fetch();
  }

 private:
  static constexpr size_t kLag = 4;
  static constexpr int kDueBits = 16;

  // Two lines.
  void fetch() {
    const size_t column = at_ % (4 * kColumnUnit) == 0 ? column_ : column_ - kLag;
    if (column < x_.n) {
      const uint8_t* line = w_.data + x_.columns[column] * bytes_ + at_;
      prefetch_line(line);
      prefetch_line(line + kColumnUnit);
    }
    at_ += 2 * kColumnUnit;
    if (at_ < bytes_) return;
    at_ = 0;
    column_++;
  }

  const TernaryColumns& w_;
  const NonZero& x_;
  const size_t bytes_, due_each_step_;
  size_t due_ = 0;
  size_t column_ = 0, at_ = 0;
};

}  // namespace bitnet
