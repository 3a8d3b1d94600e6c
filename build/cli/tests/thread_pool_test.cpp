#include "thread_pool.h"

#include <doctest/doctest.h>
#include <sched.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <ctime>
#include <optional>
#include <stop_token>
#include <thread>
#include <vector>

using namespace bitnet;

TEST_CASE("every piece is done once, for any number of threads and pieces") {
  for (const size_t n_threads : {1, 2, 3, 8}) {
    ThreadPool pool(n_threads);
    CHECK(pool.size() == n_threads);
    for (int round = 0; round < 2000; round++) {
      const size_t n = static_cast<size_t>(round % 37);
      std::vector<std::atomic<int>> done(n);
      pool.for_each(n, [&](size_t i, size_t thread) {
        if (thread < n_threads) done[i].fetch_add(1);
      });
      for (const auto& count : done) REQUIRE(count.load() == 1);
    }
  }
}

TEST_CASE("a thread that is held up delays only the piece in its hands") {
  ThreadPool pool(3);
  constexpr size_t kPieces = 90;
  for (const size_t slow : {size_t{0}, size_t{30}, size_t{60}, kPieces - 1}) {
    std::atomic<size_t> n_done{0};
    bool others_done = false;
    pool.for_each(kPieces, [&](size_t i, size_t) {
      if (i != slow) {
        n_done.fetch_add(1);
        return;
      }
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
      while (n_done.load() < kPieces - 1 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
      others_done = n_done.load() == kPieces - 1;
    });
    CHECK(others_done);
  }
}

TEST_CASE("what comes next is known") {
  for (const size_t n_threads : {1, 2, 5}) {
    ThreadPool pool(n_threads);
    for (const size_t n : {1, 2, 7, 200}) {
      std::atomic<size_t> n_known{0};
      pool.for_each(n, [&](size_t i, size_t thread) {
        const std::optional<size_t> next = pool.upcoming(thread);
        if (next && *next == i + 1 && *next < n) n_known.fetch_add(1);
        if (next && *next != i + 1) n_known.fetch_add(n);
      });
      if (n_threads == 1)
        CHECK(n_known.load() == n - 1);
      else
        CHECK(n_known.load() < n);
    }
  }
}

TEST_CASE("beside a busy process all is done once, and every thread may use the processors that it might before") {
  cpu_set_t allowed;
  REQUIRE(sched_getaffinity(0, sizeof allowed, &allowed) == 0);
  std::jthread busy([&](const std::stop_token& over) {
    cpu_set_t first;
    CPU_ZERO(&first);
    for (int i = 0; i < CPU_SETSIZE && CPU_COUNT(&first) == 0; i++)
      if (CPU_ISSET(i, &allowed)) CPU_SET(i, &first);
    sched_setaffinity(0, sizeof first, &first);
    while (!over.stop_requested()) {
    }
  });
  std::array<ThreadPool, 2> pools{ThreadPool(2), ThreadPool(4)};  // that have the caller's thread in common
  std::array<std::array<std::atomic<pid_t>, 4>, 2> threads{};
  for (size_t round = 0; round < 1500; round++) {
    const size_t p = round / 5 % 2;
    std::array<std::atomic<int>, 64> done{};
    pools[p].for_each(done.size(), [&](size_t i, size_t thread) {
      threads[p][thread] = gettid();
      const auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(5);
      while (std::chrono::steady_clock::now() < until) {
      }
      done[i].fetch_add(1);
    });
    for (const auto& count : done) REQUIRE(count.load() == 1);
  }
  busy.request_stop();
  // A thread that sleeps until the next loop may have lent its processor, which that loop ends.
  for (ThreadPool& pool : pools) pool.for_each(64, [](size_t, size_t) {});
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  for (const auto& of_pool : threads)
    for (const auto& thread : of_pool) {
      if (thread == 0) continue;
      cpu_set_t now;
      REQUIRE(sched_getaffinity(thread, sizeof now, &now) == 0);
      CHECK(CPU_EQUAL(&now, &allowed) != 0);
    }
}

TEST_CASE("an idle pool takes no processor time") {
  ThreadPool pool(4);
  std::atomic<int> sum{0};
  pool.for_each(64, [&](size_t, size_t) { sum.fetch_add(1); });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // spinning ends long before
  timespec before{}, after{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &before);
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &after);
  const double used =
      static_cast<double>(after.tv_sec - before.tv_sec) + static_cast<double>(after.tv_nsec - before.tv_nsec) * 1e-9;
  CHECK(sum.load() == 64);
  CHECK(used < 0.02);  // of processor time, not of the clock: another process's load does not count
}
