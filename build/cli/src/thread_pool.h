// A fixed set of threads that share loops. Work is handed out in small pieces, so a thread that the scheduler has taken
// off its processor delays only the piece in its hands; whoever has nothing to do spins for microseconds at most, then
// sleeps in the kernel. Between loops nothing runs.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

namespace bitnet {

class ThreadPool {
 public:
  explicit ThreadPool(size_t n_threads);  // ≥ 1, the caller's thread included; std::system_error where one cannot start
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  size_t size() const { return workers_.size() + 1; }

  // Calls f(i, thread) for every i < n, each once, with thread < size(); returns when all are done. f must not throw.
  template <class F>
  void for_each(size_t n, F&& f) {
    using Function = std::remove_reference_t<F>;
    run(
        n, [](void* context, size_t i, size_t thread) { (*static_cast<Function*>(context))(i, thread); },
        const_cast<std::remove_const_t<Function>*>(&f));
  }

 private:
  using Body = void (*)(void*, size_t, size_t);
  void run(size_t n, Body body, void* context);
  void work(size_t thread);
  void stop();
  void take_pieces(uint32_t loop, size_t thread);

  // One loop at a time. `ticket_` holds the loop's number (upper half) and how many pieces are still to be taken (lower
  // half), so that a thread that wakes late can never take a piece of a loop that it did not see.
  Body body_ = nullptr;
  void* context_ = nullptr;
  size_t n_pieces_ = 0;
  std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint32_t> loop_{0};        // number of the current loop; sleepers wait on it
  alignas(64) std::atomic<uint32_t> unfinished_{0};  // pieces not yet done; the caller waits on it
  std::atomic<bool> stopping_{false};
  std::vector<std::jthread> workers_;
};

}  // namespace bitnet
