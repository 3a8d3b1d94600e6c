#include "worker.h"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <csignal>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "request.h"
#include "session.h"
#include "timings.h"
#include "utf8.h"
#include "version.h"

namespace bitnet {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kMaxLineBytes = size_t{16} << 20;

// Lines of standard input, until it closes or the parent dies.
class LineReader {
 public:
  LineReader() : parent_(static_cast<int>(syscall(SYS_pidfd_open, getppid(), 0))) {}
  ~LineReader() {
    if (parent_ >= 0) close(parent_);
  }
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;

  enum class Outcome { kLine, kTooLong, kEnd, kOrphaned };

  Outcome next(std::string& line) {
    bool too_long = false;
    for (;;) {
      if (const size_t end = buffer_.find('\n', searched_); end != std::string::npos) {
        line.assign(buffer_, 0, end);
        buffer_.erase(0, end + 1);
        searched_ = 0;
        return too_long || line.size() > kMaxLineBytes ? Outcome::kTooLong : Outcome::kLine;
      }
      if (buffer_.size() > kMaxLineBytes) {
        too_long = true;
        buffer_.clear();
      }
      searched_ = buffer_.size();
      pollfd waits[2] = {{STDIN_FILENO, POLLIN, 0}, {parent_, POLLIN, 0}};  // a negative descriptor is ignored
      if (poll(waits, 2, -1) < 0) {
        if (errno == EINTR) continue;
        return Outcome::kEnd;
      }
      if (waits[1].revents != 0) return Outcome::kOrphaned;
      char bytes[65536];
      const ssize_t n = read(STDIN_FILENO, bytes, sizeof bytes);
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) {  // a last line without its end is a line all the same
        if (buffer_.empty() || too_long) return Outcome::kEnd;
        buffer_ += '\n';
        continue;
      }
      buffer_.append(bytes, static_cast<size_t>(n));
    }
  }

 private:
  int parent_;  // becomes readable when the parent ends; −1 where the kernel has no such thing
  std::string buffer_;
  size_t searched_ = 0;
};

void end_process(int) { _exit(0); }

class Worker {
 public:
  explicit Worker(Engine& engine) : engine_(engine), session_(engine) {}

  void run(double load_ms) {
    std::signal(SIGPIPE, SIG_IGN);
    std::signal(SIGTERM, end_process);
    std::signal(SIGINT, end_process);
    send(ready(load_ms));
    std::thread reader([this] { read_requests(); });
    while (std::optional<Job> job = next_job()) serve(*job);
    reader.join();
  }

 private:
  struct Job {
    Request request;
    std::shared_ptr<std::atomic<bool>> cancelled;
  };

  // The reader's thread: parses, so that a cancel acts and a timeout counts while something computes.
  void read_requests() {
    LineReader reader;
    std::string line;
    for (;;) {
      const LineReader::Outcome outcome = reader.next(line);
      if (outcome == LineReader::Outcome::kOrphaned) _exit(0);  // nobody is left to answer to
      if (outcome == LineReader::Outcome::kEnd) break;
      if (outcome == LineReader::Outcome::kTooLong) {
        send_error("", "invalid_request", "", "a line has at most " + std::to_string(kMaxLineBytes) + " bytes");
        continue;
      }
      if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
      std::string id;
      try {
        accept(parse_request(line, engine_.tokenizer, Clock::now(), id));
      } catch (const RequestError& e) {
        send_error(id, e.code, e.field, e.what());
      } catch (const std::bad_alloc&) {
        send_error(id, "internal", "", "not enough memory for the request");
      }
    }
    const std::lock_guard lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }

  void accept(Request request) {
    const std::lock_guard lock(mutex_);
    if (std::holds_alternative<CancelRequest>(request.body)) {
      if (const auto it = live_.find(request.id); it != live_.end()) it->second->store(true);
      return;
    }
    const auto [it, is_new] = live_.try_emplace(request.id, std::make_shared<std::atomic<bool>>(false));
    if (!is_new) throw RequestError("invalid_request", "id", "id: a request of this id is still being served");
    jobs_.push_back({std::move(request), it->second});
    changed_.notify_all();
  }

  std::optional<Job> next_job() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return closed_ || !jobs_.empty(); });
    if (jobs_.empty()) return std::nullopt;
    Job job = std::move(jobs_.front());
    jobs_.pop_front();
    return job;
  }

  void serve(const Job& job) {
    const std::string& id = job.request.id;
    Json event;
    try {
      event = std::visit([&](const auto& body) { return answer(id, body, *job.cancelled); }, job.request.body);
    } catch (const ContextExceeded& e) {
      event = error_event(id, "context_length_exceeded", "prompt", e.what());
      event["n_prompt"] = e.n_prompt;
      event["n_ctx"] = e.n_ctx;
    } catch (const RequestError& e) {
      event = error_event(id, e.code, e.field, e.what());
    } catch (const std::exception& e) {
      event = error_event(id, "internal", "", e.what());
    }
    {
      const std::lock_guard lock(mutex_);
      live_.erase(id);
    }
    send(event);
  }

  Json answer(const std::string& id, const CompletionRequest& request, const std::atomic<bool>& cancelled) {
    Completion completion = request.completion;
    const Tokenizer& tokenizer = engine_.tokenizer;
    if (request.chat)
      completion.prompt = chat_prompt(tokenizer, *request.text);
    else if (request.text)
      completion.prompt = text_prompt(tokenizer, *request.text, request.add_bos, request.special);
    else if (request.add_bos && tokenizer.bos() &&
             (completion.prompt.empty() || completion.prompt.front() != *tokenizer.bos()))
      completion.prompt.insert(completion.prompt.begin(), *tokenizer.bos());
    if (completion.prompt.empty())
      throw RequestError("invalid_request", "prompt", "prompt: must have at least 1 token, got 0");
    const Session::OnPiece on_piece = [&](std::string_view text, std::span<const TokenId> tokens) {
      send({{"event", "token"}, {"id", id}, {"content", text}, {"tokens", tokens}});
    };
    const CompletionResult r = session_.complete(completion, request.stream ? on_piece : Session::OnPiece(),
                                                 [&] { return cancelled.load(std::memory_order_relaxed); });
    const size_t n_computed = r.n_prompt - r.n_cached;
    return {{"event", "done"},
            {"id", id},
            {"content", r.content},
            {"tokens", r.tokens},
            {"stop_type", name_of(r.stop_type)},
            {"stopping_word", r.stopping_word},
            {"tokens_predicted", r.tokens.size()},
            {"tokens_evaluated", r.n_prompt},
            {"tokens_cached", r.n_cached},
            {"truncated", r.truncated},
            {"seed", completion.sampling.seed},
            {"timings", timings(n_computed, r.prompt_ms, r.tokens.size(), r.predicted_ms)}};
  }

  Json answer(const std::string& id, const TokenizeRequest& request, const std::atomic<bool>&) {
    return {{"event", "done"},
            {"id", id},
            {"tokens", text_prompt(engine_.tokenizer, request.content, request.add_bos, request.special)}};
  }

  Json answer(const std::string& id, const DetokenizeRequest& request, const std::atomic<bool>&) {
    return {{"event", "done"}, {"id", id}, {"content", to_valid_utf8(engine_.tokenizer.decode(request.tokens, true))}};
  }

  Json answer(const std::string&, const CancelRequest&, const std::atomic<bool>&) { return {}; }

  Json ready(double load_ms) const {
    const Config& c = engine_.config();
    const std::optional<TokenId> bos = engine_.tokenizer.bos();
    return {{"event", "ready"},
            {"model",
             {{"name", to_valid_utf8(c.name)},
              {"architecture", c.architecture},
              {"path", to_valid_utf8(engine_.file.path())},
              {"size", engine_.file.size()},
              {"n_ctx_train", c.n_ctx},
              {"n_vocab", c.n_vocab},
              {"n_embd", c.dim},
              {"n_layer", c.n_layers},
              {"n_params", engine_.model.n_params()}}},
            {"n_ctx", engine_.n_ctx},
            {"threads", engine_.pool.size()},
            {"isa", name_of(engine_.isa)},
            {"kv_type", name_of(engine_.kv_type)},
            {"load_ms", load_ms},
            {"bos", bos ? Json(*bos) : Json()},
            {"eos", engine_.tokenizer.end_of_generation()},
            {"version", kVersion}};
  }

  static Json error_event(const std::string& id, const std::string& code, const std::string& field,
                          const std::string& message) {
    return {{"event", "error"},
            {"id", id.empty() ? Json() : Json(id)},
            {"code", code},
            {"field", field.empty() ? Json() : Json(field)},
            {"message", message}};
  }
  void send_error(const std::string& id, const std::string& code, const std::string& field,
                  const std::string& message) {
    send(error_event(id, code, field, message));
  }

  void send(const Json& event) {
    const std::string line = event.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
    const std::lock_guard lock(output_);
    for (size_t done = 0; done < line.size();) {
      const ssize_t n = write(STDOUT_FILENO, line.data() + done, line.size() - done);
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) _exit(0);  // the reader of the events is gone
      done += static_cast<size_t>(n);
    }
  }

  Engine& engine_;
  Session session_;
  std::mutex output_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  std::deque<Job> jobs_;
  std::map<std::string, std::shared_ptr<std::atomic<bool>>> live_;  // requests queued or running
  bool closed_ = false;
};

}  // namespace

void run_worker(Engine& engine, double load_ms) { Worker(engine).run(load_ms); }

}  // namespace bitnet
