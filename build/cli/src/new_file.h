// A file that appears under its name only when it is whole.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace bitnet {

class NewFile {
 public:
  // `temporary`: its name until finish(), in the same folder; `called`: what errors call it, "… cannot be written:
  // why". Error(kFileUnreadable) from all that it does; nothing is left then.
  NewFile(std::string path, std::string temporary, std::string called, mode_t mode);
  ~NewFile();
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  void write(const void* data, size_t n, uint64_t offset);
  void append(const void* data, size_t n);  // after what was appended before

  // `durable`: what was written is on the disk before the name is.
  void finish(bool durable);

 private:
  [[noreturn]] void fail(const std::string& why) const;
  [[noreturn]] void fail_errno() const;

  std::string path_, temporary_, called_;
  int fd_ = -1;
  uint64_t size_ = 0;  // of what was appended
  bool finished_ = false;
};

}  // namespace bitnet
