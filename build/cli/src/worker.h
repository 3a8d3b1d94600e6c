// The long-lived child of the Python function: JSON lines in, JSON lines out (docs/worker-protocol.md).
#pragma once

#include "engine.h"

namespace bitnet {

// Loads the model and serves until standard input closes (after the requests already read), or until the parent process
// or the reader of standard output is gone; then the process ends. Throws what Engine does.
[[noreturn]] void run_worker(const EngineOptions& options);

}  // namespace bitnet
