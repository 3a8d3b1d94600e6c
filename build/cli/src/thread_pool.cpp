#include "thread_pool.h"

#include <immintrin.h>

#include <cassert>
#include <chrono>

namespace bitnet {
namespace {

constexpr unsigned kPieceBits = 20;
constexpr uint64_t kPieceMask = (uint64_t{1} << kPieceBits) - 1, kLoopMask = 0xffffff;

// Long enough to bridge the short serial steps between two loops, far shorter than a scheduler's time slice.
constexpr auto kSpin = std::chrono::microseconds(30);

// Waits until value != old: first spinning, then asleep.
void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; i++) {
      if (value.load(std::memory_order_acquire) != old) return;
      _mm_pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

ThreadPool::ThreadPool(size_t n_threads) : runs_(n_threads) {
  try {
    for (size_t i = 1; i < n_threads; i++) workers_.emplace_back([this, i] { work(i); });
  } catch (...) {  // those that were started would be waited for, and wait for work
    stop();
    throw;
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stopping_.store(true, std::memory_order_relaxed);
  loop_.fetch_add(1, std::memory_order_release);
  loop_.notify_all();
}

bool ThreadPool::take(Run& run, uint32_t loop, bool from_end, size_t& piece) {
  uint64_t word = run.word.load(std::memory_order_acquire);
  for (;;) {
    const uint64_t first = word >> kPieceBits & kPieceMask, end = word & kPieceMask;
    if (word >> (2 * kPieceBits) != (loop & kLoopMask) || first == end) return false;
    piece = static_cast<size_t>(from_end ? end - 1 : first);
    const uint64_t rest = from_end ? word - 1 : word + (uint64_t{1} << kPieceBits);
    if (run.word.compare_exchange_weak(word, rest, std::memory_order_acq_rel, std::memory_order_acquire)) return true;
  }
}

void ThreadPool::take_pieces(uint32_t loop, size_t thread) {
  uint32_t n_done = 0;
  size_t piece;
  for (size_t i = 0; i < runs_.size(); i++)
    for (Run& run = runs_[(thread + i) % runs_.size()]; take(run, loop, i > 0, piece); n_done++)
      body_(context_, piece, thread);
  if (n_done == 0) return;  // the loop may be over, and what belongs to it gone
  if (then_) then_(then_context_, thread);
  if (unfinished_.fetch_sub(n_done, std::memory_order_acq_rel) == n_done) unfinished_.notify_one();
}

void ThreadPool::work(size_t thread) {
  uint32_t seen = 0;
  for (;;) {
    wait_for_change(loop_, seen);
    seen = loop_.load(std::memory_order_acquire);
    if (stopping_.load(std::memory_order_relaxed)) return;
    take_pieces(seen, thread);
  }
}

void ThreadPool::run(size_t n, Body body, void* context, Then then, void* then_context) {
  assert(n <= kMaxPieces);
  if (n == 0) return;
  if (n == 1 || workers_.empty()) {
    for (size_t i = 0; i < n; i++) body(context, i, 0);
    if (then) then(then_context, 0);
    return;
  }
  body_ = body;
  context_ = context;
  then_ = then;
  then_context_ = then_context;
  const uint32_t loop = loop_.load(std::memory_order_relaxed) + 1;
  unfinished_.store(static_cast<uint32_t>(n), std::memory_order_relaxed);
  for (size_t t = 0; t < runs_.size(); t++) {
    const uint64_t first = first_piece(n, t), end = first_piece(n, t + 1);
    runs_[t].word.store((loop & kLoopMask) << (2 * kPieceBits) | first << kPieceBits | end, std::memory_order_release);
  }
  loop_.store(loop, std::memory_order_release);
  loop_.notify_all();
  take_pieces(loop, 0);
  for (uint32_t left; (left = unfinished_.load(std::memory_order_acquire)) != 0;) wait_for_change(unfinished_, left);
}

}  // namespace bitnet
