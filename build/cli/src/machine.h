// What the machine gives this process.
#pragma once

#include <cstddef>

namespace bitnet {

// Processors that this process may keep busy: its affinity mask, cut to the CPU quota of its control group (rounded
// up); at least 1.
size_t usable_processors();

// Bytes that can still be used without swapping or being killed, pages of files included: the least of MemAvailable and
// what the control group leaves.
size_t available_memory();

// Bytes that RLIMIT_AS still lets this process map.
size_t available_address_space();

}  // namespace bitnet
