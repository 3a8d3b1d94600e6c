// Working memory of the look-up kernel, one for each thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace bitnet {

inline constexpr size_t kLutRows = 2048;    // most rows of a call: the scratch then stays within a 1 MB L2 cache
inline constexpr size_t kLutGroups = 8;     // tables at a time: 21 kB, beside L1's other guests
inline constexpr size_t kLutEntries = 81;   // sums in a table
inline constexpr size_t kMaxLutLanes = 16;  // of any instruction set

struct LutScratch {
  explicit LutScratch(size_t lanes) : memory(static_cast<std::byte*>(::operator new(bytes(lanes), kAlignment))) {
    std::byte* p = memory.get();
    const auto take = [&p](size_t n) {
      std::byte* taken = p;
      p += n;
      return taken;
    };
    sums = reinterpret_cast<int32_t*>(take(kLutRows * lanes * sizeof(int32_t)));
    words = reinterpret_cast<int16_t*>(take(kLutRows * lanes * sizeof(int16_t)));
    tables = reinterpret_cast<int16_t*>(take(kLutGroups * kLutEntries * lanes * sizeof(int16_t)));
    numbers = reinterpret_cast<uint8_t*>(take(kLutRows * 32));
  }
  static size_t bytes(size_t lanes) {
    return kLutRows * (lanes * (sizeof(int32_t) + sizeof(int16_t)) + 32) +
           kLutGroups * kLutEntries * lanes * sizeof(int16_t);
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<std::byte, Free> memory;

 public:
  int32_t* sums;     // (kLutRows, lanes)
  int16_t* words;    // (kLutRows, lanes): 16-bit parts of the sums
  int16_t* tables;   // (kLutGroups, kLutEntries, lanes)
  uint8_t* numbers;  // (kLutRows, 32): a block's weights as numbers of base 3
};

}  // namespace bitnet
