#include "new_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "error.h"

namespace bitnet {

NewFile::NewFile(std::string path, std::string temporary, std::string called, mode_t mode)
    : path_(std::move(path)), temporary_(std::move(temporary)), called_(std::move(called)) {
  struct stat status {};
  if (stat(path_.c_str(), &status) == 0 && !S_ISREG(status.st_mode))  // a rename would replace a device
    fail("not a regular file");
  // One that was left behind is taken over, but not one that another process writes.
  for (bool same = false; !same;) {
    fd_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_NOFOLLOW | O_CLOEXEC, mode);
    if (fd_ < 0) fail_errno();
    struct stat opened {};
    const bool busy = flock(fd_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK;
    same = fstat(fd_, &opened) == 0 && stat(temporary_.c_str(), &status) == 0 && opened.st_ino == status.st_ino &&
           opened.st_dev == status.st_dev;  // or that process has just given it its name
    if (busy || !same) close(std::exchange(fd_, -1));
    if (busy) fail("another process is writing it");
  }
  if (ftruncate(fd_, 0) != 0) {
    close(fd_);
    fail_errno();
  }
}

NewFile::~NewFile() {
  if (!finished_) unlink(temporary_.c_str());  // while it is open, and so locked
  if (fd_ >= 0) close(fd_);
}

void NewFile::write(const void* data, size_t n, uint64_t offset) {
  for (const auto* at = static_cast<const std::byte*>(data); n > 0;) {
    const ssize_t written = pwrite(fd_, at, n, static_cast<off_t>(offset));
    if (written < 0 && errno != EINTR) fail_errno();
    if (written > 0) {
      at += written;
      n -= static_cast<size_t>(written);
      offset += static_cast<uint64_t>(written);
    }
  }
}

void NewFile::append(const void* data, size_t n) {
  write(data, n, size_);
  size_ += n;
}

void NewFile::finish(bool durable) {
  if (durable && fsync(fd_) != 0) fail_errno();
  if (rename(temporary_.c_str(), path_.c_str()) != 0) fail_errno();  // while it is open, and so locked
  finished_ = true;
  if (close(std::exchange(fd_, -1)) == 0) return;
  const int error = errno;
  unlink(path_.c_str());
  errno = error;
  fail_errno();
}

void NewFile::fail(const std::string& why) const {
  throw Error(ExitCode::kFileUnreadable, called_ + " cannot be written: " + why);
}

void NewFile::fail_errno() const { fail(std::generic_category().message(errno)); }

}  // namespace bitnet
