// Working memory of the look-up kernel, one for each thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace bitnet {

inline constexpr size_t kLutRows = 2048;    // most rows of a call: their sums then stay within a 1 MB L2 cache
inline constexpr size_t kLutGroups = 8;     // tables at a time: 21 or 41 kB, of an L1 cache's 32 or 48
inline constexpr size_t kLutEntries = 81;   // sums in a table
inline constexpr size_t kMaxLutLanes = 32;  // of any instruction set

// From one step's numbers to the next's: a line more than needed, or all steps would compete for the same sets of L1;
// for_words() reads it, too.
constexpr size_t lut_step_bytes(size_t rows) { return rows * kLutGroups + 64; }

class LutScratch {
 public:
  // For matrices of at most `cols` columns.
  LutScratch(size_t lanes, size_t cols)
      : memory_(static_cast<std::byte*>(::operator new(bytes(lanes, cols), kAlignment))) {
    std::byte* p = memory_.get();
    const auto take = [&p](size_t n) {
      std::byte* taken = p;
      p += n;
      return taken;
    };
    sums = reinterpret_cast<int32_t*>(take(kLutRows * lanes * sizeof(int32_t)));
    words = reinterpret_cast<int16_t*>(take(2 * kLutRows * lanes * sizeof(int16_t)));
    tables = reinterpret_cast<int16_t*>(take(kLutGroups * kLutEntries * lanes * sizeof(int16_t)));
    numbers = reinterpret_cast<uint8_t*>(p);
  }
  static size_t bytes(size_t lanes, size_t cols) {
    if (lanes == 0) return 0;
    return kLutRows * lanes * (sizeof(int32_t) + 2 * sizeof(int16_t)) +
           kLutGroups * kLutEntries * lanes * sizeof(int16_t) + cols / (4 * kLutGroups) * lut_step_bytes(kLutRows);
  }

  int32_t* sums;     // (kLutRows, lanes)
  int16_t* words;    // (kLutRows, lanes): 16-bit parts of the sums; (kLutRows, 2, lanes) of wide tiles
  int16_t* tables;   // (kLutGroups, kLutEntries, lanes)
  uint8_t* numbers;  // (cols / 32, rows, kLutGroups), steps lut_step_bytes(rows) apart: weights as numbers of base 3

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<std::byte, Free> memory_;
};

}  // namespace bitnet
