// The long-lived child of the Python function: JSON lines in, JSON lines out (docs/worker-protocol.md).
#pragma once

#include "engine.h"

namespace bitnet {

// Serves until standard input closes (after the requests already read) or the parent process dies. `load_ms` goes into
// the ready event.
void run_worker(Engine& engine, double load_ms);

}  // namespace bitnet
