// What the machine gives this process.
#pragma once

#include <cstddef>

namespace bitnet {

// Processors that this process may keep busy: its affinity mask, cut to the CPU quota of its control group (rounded
// up); at least 1.
size_t usable_processors();

// Bytes that can still be allocated without swapping or being killed: the least of MemAvailable, what the control group
// leaves and what RLIMIT_AS leaves.
size_t available_memory();

}  // namespace bitnet
