#include "thread_pool.h"

#include <immintrin.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include <cassert>
#include <chrono>
#include <optional>

namespace bitnet {
namespace {

constexpr unsigned kPieceBits = 20;
constexpr uint64_t kPieceMask = (uint64_t{1} << kPieceBits) - 1, kLoopMask = 0xffffff;

// What Run::word holds.
uint64_t word_of(uint32_t loop, size_t first, size_t end) {
  return (loop & kLoopMask) << (2 * kPieceBits) | uint64_t{first} << kPieceBits | uint64_t{end};
}
size_t first_of(uint64_t word) { return static_cast<size_t>(word >> kPieceBits & kPieceMask); }
size_t end_of(uint64_t word) { return static_cast<size_t>(word & kPieceMask); }

// Long enough to bridge the short serial steps between two loops, far shorter than a scheduler's time slice.
constexpr auto kSpin = std::chrono::microseconds(30);
// In which a thread that has its processor is seen to compute.
constexpr auto kLook = std::chrono::microseconds(10);

bool changes_within(std::chrono::microseconds time, const std::atomic<uint32_t>& value, uint32_t old) {
  const auto deadline = std::chrono::steady_clock::now() + time;
  do {
    for (int i = 0; i < 32; i++) {
      if (value.load(std::memory_order_acquire) != old) return true;
      _mm_pause();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

pid_t this_thread() {
  static thread_local const pid_t id = gettid();
  return id;
}

// For how many nanoseconds a thread has computed. The clock is pthread_getcpuclockid()'s, made from the thread's number
// as glibc makes it, since that of a thread that is gone is an error here and not undefined.
int64_t computed(pid_t thread) {
  timespec t{};
  clock_gettime(static_cast<clockid_t>(~static_cast<unsigned>(thread) << 3 | 6), &t);
  return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

void move(pid_t thread, int processor) {
  cpu_set_t only;
  CPU_ZERO(&only);
  CPU_SET(processor, &only);
  sched_setaffinity(thread, sizeof only, &only);
}

// A processor that a thread may use and nobody takes: the one that it likes, if that is one.
std::optional<int> free_processor(const cpu_set_t& allowed, const cpu_set_t& taken, int liked) {
  const auto is_free = [&](int i) { return CPU_ISSET(i, &allowed) && !CPU_ISSET(i, &taken); };
  if (is_free(liked)) return liked;
  for (int i = 0; i < CPU_SETSIZE; i++)
    if (is_free(i)) return i;
  return {};
}

// To a processor, which it may leave again.
void send(pid_t thread, int processor, const cpu_set_t& allowed) {
  move(thread, processor);
  sched_setaffinity(thread, sizeof allowed, &allowed);
}

// The processors that a thread may use; none where it has only one, be it the user's wish or another pool's loan: such
// a thread stays where it is.
std::optional<cpu_set_t> processors_of(pid_t thread) {
  cpu_set_t allowed;
  if (sched_getaffinity(thread, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < 2) return {};
  return allowed;
}

// Sleeps until value != old, and lends the own processor to a thread meanwhile, which goes back to its own after that.
void sleep_and_lend(const std::atomic<uint32_t>& value, uint32_t old, pid_t thread, int home) {
  const int here = sched_getcpu();
  const std::optional<cpu_set_t> allowed = processors_of(thread);
  const bool lends = allowed && here >= 0 && here != home;
  if (lends) move(thread, here);
  value.wait(old, std::memory_order_acquire);
  if (lends) send(thread, home, *allowed);
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

// Waits until value != old: first spinning, then asleep. A thread in the loop that has lost its processor to another
// process would keep all others waiting for some milliseconds, until it has its turn there again, while their
// processors are idle: it gets one of those for what it has in its hands.
void ThreadPool::wait_for_change(const std::atomic<uint32_t>& value, uint32_t old, size_t thread) {
  if (changes_within(kSpin, value, old)) return;
  for (size_t i = 1; i < runs_.size(); i++) {
    Run& other = runs_[(thread + i) % runs_.size()];
    const pid_t id = other.thread.load(std::memory_order_acquire);
    if (id == 0 || other.helped.exchange(true, std::memory_order_acq_rel)) continue;
    const int64_t before = computed(id);
    const bool changed = changes_within(kLook, value, old);
    if (!changed && other.thread.load(std::memory_order_acquire) == id && computed(id) == before)
      sleep_and_lend(value, old, id, other.processor.load(std::memory_order_relaxed));
    other.helped.store(false, std::memory_order_release);
    if (changed) return;
  }
  value.wait(old, std::memory_order_acquire);
}

// The first piece of a thread's own run; false when there is none.
bool ThreadPool::take(uint32_t loop, size_t thread, size_t& piece) {
  std::atomic<uint64_t>& run = runs_[thread].word;
  uint64_t word = run.load(std::memory_order_acquire);
  do {
    if (word >> (2 * kPieceBits) != (loop & kLoopMask) || first_of(word) == end_of(word)) return false;
    piece = first_of(word);
  } while (!run.compare_exchange_weak(word, word + (uint64_t{1} << kPieceBits), std::memory_order_acq_rel,
                                      std::memory_order_acquire));
  return true;
}

// Makes the latter half of what is left of another's run the thread's own, which is empty: it goes through them in
// their order, as through its own, and they are read as one stream.
bool ThreadPool::take_over(uint32_t loop, size_t thread, size_t other) {
  std::atomic<uint64_t>& run = runs_[other].word;
  uint64_t word = run.load(std::memory_order_acquire);
  size_t n;
  do {
    n = (end_of(word) - first_of(word) + 1) / 2;
    if (word >> (2 * kPieceBits) != (loop & kLoopMask) || n == 0) return false;
  } while (!run.compare_exchange_weak(word, word - n, std::memory_order_acq_rel, std::memory_order_acquire));
  runs_[thread].word.store(word_of(loop, end_of(word) - n, end_of(word)), std::memory_order_release);
  return true;
}

void ThreadPool::take_pieces(uint32_t loop, size_t thread) {
  Run& own = runs_[thread];
  own.processor.store(sched_getcpu(), std::memory_order_relaxed);
  own.loop.store(loop, std::memory_order_relaxed);
  own.thread.store(this_thread(), std::memory_order_release);
  uint32_t n_done = 0;
  bool more = true;
  while (more) {
    for (size_t piece; take(loop, thread, piece); n_done++) body_(context_, piece, thread);
    more = false;
    for (size_t i = 1; i < runs_.size() && !more; i++) more = take_over(loop, thread, (thread + i) % runs_.size());
  }
  if (n_done > 0 && then_) then_(then_context_, thread);
  own.thread.store(0, std::memory_order_release);
  if (n_done == 0) return;  // the loop may be over, and what belongs to it gone
  if (unfinished_.fetch_sub(n_done, std::memory_order_acq_rel) == n_done) unfinished_.notify_one();
}

std::optional<size_t> ThreadPool::upcoming(size_t thread) const {
  const uint64_t word = runs_[thread].word.load(std::memory_order_relaxed);
  if (first_of(word) == end_of(word)) return {};
  return first_of(word);
}

// A thread that is woken while every processor has something to do may be put behind the caller, on the caller's
// processor, where its turn comes when all is done: it is sent to one where none of the others is.
void ThreadPool::spread_out(uint32_t loop) {
  constexpr uint32_t kMostMissed = 4;  // loops: where they are short, a thread that wakes misses some
  for (size_t t = 1; t < runs_.size(); t++) {
    Run& late = runs_[t];
    late.n_missed = late.loop.load(std::memory_order_relaxed) == loop ? 0 : late.n_missed + 1;
    const pid_t id = late.worker.load(std::memory_order_relaxed);
    if (late.n_missed < kMostMissed || id == 0 || late.helped.exchange(true, std::memory_order_acq_rel)) continue;
    late.n_missed = 0;
    cpu_set_t taken;
    CPU_ZERO(&taken);
    for (const Run& run : runs_)
      if (run.loop.load(std::memory_order_relaxed) == loop)
        CPU_SET(run.processor.load(std::memory_order_relaxed), &taken);
    if (const std::optional<cpu_set_t> allowed = processors_of(id))
      if (const auto to = free_processor(*allowed, taken, late.processor.load(std::memory_order_relaxed)))
        send(id, *to, *allowed);
    late.helped.store(false, std::memory_order_release);
  }
}

void ThreadPool::work(size_t thread) {
  runs_[thread].worker.store(this_thread(), std::memory_order_relaxed);
  uint32_t seen = 0;
  for (;;) {
    wait_for_change(loop_, seen, thread);
    seen = loop_.load(std::memory_order_acquire);
    if (stopping_.load(std::memory_order_relaxed)) return;
    take_pieces(seen, thread);
  }
}

void ThreadPool::run(size_t n, Body body, void* context, Then then, void* then_context) {
  assert(n <= kMaxPieces);
  if (n == 0) return;
  if (n == 1 || workers_.empty()) {
    for (size_t i = 0; i < n; i++) {
      runs_[0].word.store(word_of(0, i + 1, n), std::memory_order_relaxed);
      body(context, i, 0);
    }
    if (then) then(then_context, 0);
    return;
  }
  body_ = body;
  context_ = context;
  then_ = then;
  then_context_ = then_context;
  const uint32_t loop = loop_.load(std::memory_order_relaxed) + 1;
  unfinished_.store(static_cast<uint32_t>(n), std::memory_order_relaxed);
  for (size_t t = 0; t < runs_.size(); t++)
    runs_[t].word.store(word_of(loop, first_piece(n, t), first_piece(n, t + 1)), std::memory_order_release);
  loop_.store(loop, std::memory_order_release);
  loop_.notify_all();
  take_pieces(loop, 0);
  for (uint32_t left; (left = unfinished_.load(std::memory_order_acquire)) != 0;) wait_for_change(unfinished_, left, 0);
  spread_out(loop);
}

}  // namespace bitnet
