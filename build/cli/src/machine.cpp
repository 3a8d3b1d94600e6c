#include "machine.h"

#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace bitnet {
namespace {

constexpr size_t kUnlimited = std::numeric_limits<size_t>::max();

// The first number in a file; empty when there is none ("max" included).
std::optional<double> number_in(const std::string& path) {
  std::ifstream file(path);
  double value;
  if (file >> value) return value;
  return std::nullopt;
}

// Folders of this process's control group, version 2 or the version 1 hierarchy of `controller`, from the innermost to
// the root.
std::vector<std::string> control_groups(const std::string& controller) {
  std::vector<std::string> folders;
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string root;
    if (controllers.empty())
      root = "/sys/fs/cgroup";
    else if (("," + controllers + ",").find("," + controller + ",") != std::string::npos)
      root = "/sys/fs/cgroup/" + controller;
    else
      continue;
    for (std::string path = line.substr(second + 1);; path.resize(path.rfind('/'))) {
      while (!path.empty() && path.back() == '/') path.pop_back();
      folders.push_back(root + path);
      if (path.empty()) break;
    }
  }
  return folders;
}

double cpu_quota() {
  double quota = std::numeric_limits<double>::infinity();
  for (const std::string& folder : control_groups("cpu")) {
    std::ifstream file(folder + "/cpu.max");
    double allowed, period;
    if (file >> allowed >> period && period > 0) quota = std::min(quota, allowed / period);
    const auto v1_quota = number_in(folder + "/cpu.cfs_quota_us"), v1_period = number_in(folder + "/cpu.cfs_period_us");
    if (v1_quota && v1_period && *v1_quota > 0 && *v1_period > 0) quota = std::min(quota, *v1_quota / *v1_period);
  }
  return quota;
}

// The value of "key   123 kB" or "key 123" lines, in the file's unit.
std::optional<size_t> field_in(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string name;
    size_t value;
    if (words >> name >> value && name == key) return value;
  }
  return std::nullopt;
}

size_t group_memory_left() {
  size_t left = kUnlimited;
  for (const std::string& folder : control_groups("memory")) {
    for (const auto& [limit_file, usage_file] :
         {std::pair{"/memory.max", "/memory.current"}, std::pair{"/memory.limit_in_bytes", "/memory.usage_in_bytes"}}) {
      const auto limit = number_in(folder + limit_file), usage = number_in(folder + usage_file);
      if (!limit || !usage || *limit > 1e15) continue;
      size_t reclaimable = 0;  // pages of files, which the group gives up under pressure
      for (const char* key : {"inactive_file", "active_file"})
        reclaimable += field_in(folder + "/memory.stat", key).value_or(0);
      const double free = *limit - *usage + static_cast<double>(reclaimable);
      left = std::min(left, free > 0 ? static_cast<size_t>(free) : 0);
    }
  }
  return left;
}

}  // namespace

size_t usable_processors() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  size_t n = 1;
  if (sched_getaffinity(0, sizeof mask, &mask) == 0) n = static_cast<size_t>(std::max(1, CPU_COUNT(&mask)));
  const double quota = cpu_quota();
  return quota < static_cast<double>(n) ? std::max<size_t>(1, static_cast<size_t>(std::ceil(quota))) : n;
}

size_t available_memory() {
  const auto system = field_in("/proc/meminfo", "MemAvailable:");
  return std::min(system ? *system * 1024 : kUnlimited, group_memory_left());
}

size_t available_address_space() {
  rlimit limit{};
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return kUnlimited;
  const size_t used =
      static_cast<size_t>(number_in("/proc/self/statm").value_or(0)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return limit.rlim_cur > used ? limit.rlim_cur - used : 0;
}

}  // namespace bitnet
