#include "thread_pool.h"

#include <doctest/doctest.h>

#include <atomic>
#include <ctime>
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
