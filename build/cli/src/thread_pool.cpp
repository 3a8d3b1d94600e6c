#include "thread_pool.h"

#include <immintrin.h>

#include <chrono>

namespace bitnet {
namespace {

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

ThreadPool::ThreadPool(size_t n_threads) {
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

void ThreadPool::take_pieces(uint32_t loop, size_t thread) {
  uint64_t ticket = ticket_.load(std::memory_order_acquire);
  for (;;) {
    const uint32_t left = static_cast<uint32_t>(ticket);
    if (static_cast<uint32_t>(ticket >> 32) != loop || left == 0) return;
    if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) continue;
    body_(context_, n_pieces_ - left, thread);
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
    ticket = ticket_.load(std::memory_order_acquire);
  }
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

void ThreadPool::run(size_t n, Body body, void* context) {
  if (n == 0) return;
  if (n == 1 || workers_.empty()) {
    for (size_t i = 0; i < n; i++) body(context, i, 0);
    return;
  }
  body_ = body;
  context_ = context;
  const uint32_t loop = loop_.load(std::memory_order_relaxed) + 1;
  n_pieces_ = n;
  unfinished_.store(static_cast<uint32_t>(n), std::memory_order_relaxed);
  ticket_.store(static_cast<uint64_t>(loop) << 32 | n, std::memory_order_release);
  loop_.store(loop, std::memory_order_release);
  loop_.notify_all();
  take_pieces(loop, 0);
  for (uint32_t left; (left = unfinished_.load(std::memory_order_acquire)) != 0;) wait_for_change(unfinished_, left);
}

}  // namespace bitnet
