// Errors that end a command: one line for the user and an exit code that scripts can rely on (docs/cli.md).
#pragma once

#include <stdexcept>
#include <string>

namespace bitnet {

enum class ExitCode : int {
  kOk = 0,
  kInternal = 1,
  kUsage = 2,
  kUnsupportedProcessor = 3,
  kFileUnreadable = 4,
  kFileTruncated = 5,
  kNotGguf = 6,
  kGgufVersion = 7,
  kUnsupportedModel = 8,  // unknown architecture, tokenizer or tensor type
  kInvalidModel = 9,      // a key or tensor is missing, of the wrong shape or out of range
  kContextExceeded = 10,
  kOutOfMemory = 11,
};

class Error : public std::runtime_error {
 public:
  Error(ExitCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ExitCode code() const { return code_; }

 private:
  ExitCode code_;
};

}  // namespace bitnet
