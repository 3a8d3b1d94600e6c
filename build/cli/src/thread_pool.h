// A fixed set of threads that share loops. Every thread has its own run of consecutive pieces, so that what lies side
// by side in memory is read by one of them in one go, and takes over half of what is left of another's run when its own
// is done: a thread that the scheduler has taken off its processor delays only the piece in its hands. Whoever has
// nothing to do spins for microseconds at most, then sleeps in the kernel. Between loops nothing runs.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
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
    run(n, call<F>, address(f), nullptr, nullptr);
  }

  // The same, and then_each(thread) for every thread that has come to the end of its work, before the loop is over for
  // it: a thread that has slept through the loop does not call it.
  template <class F, class G>
  void for_each(size_t n, F&& f, G&& then_each) {
    run(n, call<F>, address(f), call_then<G>, address(then_each));
  }

  // Within a loop's f: the piece that the thread takes next, unless another takes it over; none at the end of its run.
  std::optional<size_t> upcoming(size_t thread) const;

  // The first piece of a thread's run in a loop of n.
  size_t first_piece(size_t n, size_t thread) const { return n * thread / size(); }

 private:
  using Body = void (*)(void*, size_t, size_t);
  using Then = void (*)(void*, size_t);
  template <class F>
  static void call(void* f, size_t i, size_t thread) {
    (*static_cast<std::remove_reference_t<F>*>(f))(i, thread);
  }
  template <class G>
  static void call_then(void* g, size_t thread) {
    (*static_cast<std::remove_reference_t<G>*>(g))(thread);
  }
  template <class F>
  static void* address(F&& f) {
    return const_cast<std::remove_cv_t<std::remove_reference_t<F>>*>(&f);
  }

  // What is left of a thread's run: the loop's number (24 bits), the first piece and the end (20 bits each) in one
  // word, so that a thread that wakes late can never take a piece of a loop that it did not see.
  // Beside it, for others to look at: the thread's number while it works in a loop, 0 otherwise, …
  struct alignas(64) Run {
    std::atomic<uint64_t> word{0};
    std::atomic<pid_t> thread{0};
    std::atomic<uint32_t> loop{0};    // … the last one that it had a part in, …
    std::atomic<int> processor{0};    // … where it began that, …
    std::atomic<bool> helped{false};  // … whether another sees to it, …
    std::atomic<pid_t> worker{0};     // … and its number at all times; 0: the caller's
    uint32_t n_missed = 0;            // loops since then, as the caller counts them
  };
  static constexpr size_t kMaxPieces = (size_t{1} << 20) - 1;

  void run(size_t n, Body body, void* context, Then then, void* then_context);
  void work(size_t thread);
  void stop();
  void take_pieces(uint32_t loop, size_t thread);
  bool take(uint32_t loop, size_t thread, size_t& piece);
  bool take_over(uint32_t loop, size_t thread, size_t other);
  void wait_for_change(const std::atomic<uint32_t>& value, uint32_t old, size_t thread);
  void spread_out(uint32_t loop);

  // One loop at a time.
  Body body_ = nullptr;
  void* context_ = nullptr;
  Then then_ = nullptr;
  void* then_context_ = nullptr;
  std::vector<Run> runs_;                            // a thread each
  alignas(64) std::atomic<uint32_t> loop_{0};        // number of the current loop; sleepers wait on it
  alignas(64) std::atomic<uint32_t> unfinished_{0};  // pieces not yet done; the caller waits on it
  std::atomic<bool> stopping_{false};
  std::vector<std::jthread> workers_;
};

}  // namespace bitnet
