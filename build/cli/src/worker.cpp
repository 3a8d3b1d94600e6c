#include "worker.h"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <deque>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "request.h"
#include "session.h"
#include "timings.h"
#include "utf8.h"
#include "version.h"

namespace bitnet {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kMaxLineBytes = size_t{16} << 20;

// What comes from the other side: lines on standard input, and its end.
class Input {
 public:
  Input() : parent_(static_cast<int>(syscall(SYS_pidfd_open, getppid(), 0))) {}
  ~Input() {
    if (parent_ >= 0) close(parent_);
  }
  Input(const Input&) = delete;
  Input& operator=(const Input&) = delete;

  // kClosed: standard input has ended, this once. kGone: the parent, or the reader of standard output, is no more.
  enum class Outcome { kLine, kTooLong, kTimeout, kClosed, kGone };

  // Waits for a line, until `deadline` where there is one.
  Outcome next(std::string& line, std::optional<Clock::time_point> deadline) {
    for (;;) {
      if (const size_t end = buffer_.find('\n', searched_); end != std::string::npos) {
        line.assign(buffer_, 0, end);
        buffer_.erase(0, end + 1);
        searched_ = 0;
        return std::exchange(too_long_, false) || line.size() > kMaxLineBytes ? Outcome::kTooLong : Outcome::kLine;
      }
      if (buffer_.size() > kMaxLineBytes) {
        too_long_ = true;
        buffer_.clear();
      }
      searched_ = buffer_.size();
      pollfd waits[] = {{input_, POLLIN, 0}, {parent_, POLLIN, 0}, {STDOUT_FILENO, 0, 0}};  // those below 0 are ignored
      const int n_ready = poll(waits, std::size(waits), poll_timeout(deadline));
      if (n_ready < 0) continue;  // a signal
      if (n_ready == 0) return Outcome::kTimeout;
      if (waits[1].revents != 0 || waits[2].revents != 0) return Outcome::kGone;
      char bytes[65536];
      const ssize_t n = read(input_, bytes, sizeof bytes);
      if (n > 0) {
        buffer_.append(bytes, static_cast<size_t>(n));
      } else if (n == 0 || (errno != EINTR && errno != EAGAIN)) {
        if (buffer_.empty() && !too_long_) {
          input_ = -1;
          return Outcome::kClosed;
        }
        buffer_ += '\n';  // a last line without its end is a line all the same
      }
    }
  }

 private:
  static int poll_timeout(std::optional<Clock::time_point> deadline) {
    if (!deadline) return -1;
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(*deadline - Clock::now()).count();
    return static_cast<int>(std::clamp<int64_t>(left, 0, std::numeric_limits<int>::max()));
  }

  int input_ = STDIN_FILENO;  // −1 once it has closed
  int parent_;                // becomes readable when the parent ends; −1 where the kernel has no such thing
  std::string buffer_;
  size_t searched_ = 0;
  bool too_long_ = false;  // the beginning of the line in the buffer was thrown away
};

void end_process(int) { _exit(0); }

class Worker {
 public:
  Worker(Engine& engine, Input& input) : engine_(engine), session_(engine), input_(input) {}

  // What goes wrong outside a request ends the process: half a protocol helps nobody.
  [[noreturn]] void run(double load_ms) noexcept {
    send(ready(load_ms));
    std::thread([this] { read_requests(); }).detach();
    while (std::optional<Job> job = next_job()) serve(*job);
    _exit(0);  // the reader's thread still waits for the parent's end
  }

 private:
  struct Job {
    Request request;
    std::shared_ptr<std::atomic<bool>> cancelled;
  };

  // The reader's thread: parses, so that a cancel acts and a timeout counts while something computes.
  void read_requests() {
    std::string line;
    for (;;) {
      switch (input_.next(line, end_queued())) {
        case Input::Outcome::kLine:
          if (line.find_first_not_of(" \t\r") != std::string::npos) read_request(line);
          break;
        case Input::Outcome::kTooLong:
          send(
              error_event("", "invalid_request", "", "a line has at most " + std::to_string(kMaxLineBytes) + " bytes"));
          break;
        case Input::Outcome::kTimeout:
          break;
        case Input::Outcome::kClosed: {
          const std::lock_guard lock(mutex_);
          closed_ = true;
          changed_.notify_all();
          break;
        }
        case Input::Outcome::kGone:
          _exit(0);  // nobody is left to answer to
      }
    }
  }

  void read_request(const std::string& line) {
    std::string id;
    try {
      accept(parse_request(line, engine_.tokenizer, Clock::now(), id));
    } catch (const RequestError& e) {
      send(error_event(id, e.code, e.field, e.what()));
    } catch (const std::bad_alloc&) {
      send(error_event(id, "internal", "", "not enough memory for the request"));
    }
  }

  void accept(Request request) {
    std::unique_lock lock(mutex_);
    if (std::holds_alternative<CancelRequest>(request.body)) {
      if (const auto it = live_.find(request.id); it != live_.end()) it->second->store(true);
      return;
    }
    const auto [it, is_new] = live_.try_emplace(request.id, std::make_shared<std::atomic<bool>>(false));
    if (!is_new) throw RequestError("invalid_request", "id", "id: a request of this id is still being served");
    Job job{std::move(request), it->second};
    if (std::holds_alternative<CompletionRequest>(job.request.body)) {
      jobs_.push_back(std::move(job));
      changed_.notify_all();
    } else {  // takes no computing: need not wait for what runs
      lock.unlock();
      serve(job);
    }
  }

  // Answers the queued completions that are over before they began, cancelled or past their deadline: they need not
  // wait for the one that runs. Gives back the next deadline in the queue.
  std::optional<Clock::time_point> end_queued() {
    std::optional<Clock::time_point> next;
    const std::lock_guard lock(mutex_);
    std::erase_if(jobs_, [&](const Job& job) {
      const auto& request = std::get<CompletionRequest>(job.request.body);
      const std::optional<Clock::time_point>& deadline = request.completion.deadline;
      const bool late = deadline && Clock::now() >= *deadline;
      if (!late && !*job.cancelled) {
        if (deadline) next = next ? std::min(*next, *deadline) : *deadline;
        return false;
      }
      CompletionResult nothing;
      nothing.stop_type = *job.cancelled ? StopType::kCancelled : StopType::kDeadline;
      send(done_event(job.request.id, request, nothing));
      live_.erase(job.request.id);
      return true;
    });
    return next;
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
    else
      completion.prompt = parts_prompt(request);
    if (completion.prompt.empty())
      throw RequestError("invalid_request", "prompt", "prompt: must have at least 1 token, got 0");
    const Session::OnPiece on_piece = [&](std::string_view text, std::span<const TokenId> tokens) {
      send({{"event", "token"}, {"id", id}, {"content", text}, {"tokens", tokens}});
    };
    const CompletionResult r = session_.complete(completion, request.stream ? on_piece : Session::OnPiece(),
                                                 [&] { return cancelled.load(std::memory_order_relaxed); });
    return done_event(id, request, r);
  }

  std::vector<TokenId> parts_prompt(const CompletionRequest& request) const {
    const Tokenizer& tokenizer = engine_.tokenizer;
    std::vector<TokenId> ids;
    for (const PromptPart& part : request.parts) {
      const std::vector<TokenId> text = tokenizer.encode(part.text, request.special);
      ids.insert(ids.end(), text.begin(), text.end());
      ids.insert(ids.end(), part.tokens.begin(), part.tokens.end());
    }
    if (request.add_bos && tokenizer.bos() && (ids.empty() || ids.front() != *tokenizer.bos()))
      ids.insert(ids.begin(), *tokenizer.bos());
    return ids;
  }

  Json answer(const std::string& id, const TokenizeRequest& request, const std::atomic<bool>&) {
    return {{"event", "done"},
            {"id", id},
            {"tokens", text_prompt(engine_.tokenizer, request.content, request.add_bos, request.special)}};
  }

  Json answer(const std::string& id, const DetokenizeRequest& request, const std::atomic<bool>&) {
    return {{"event", "done"}, {"id", id}, {"content", to_valid_utf8(engine_.tokenizer.decode(request.tokens, true))}};
  }

  // Hexadecimal digits, because the bytes of one token need not be UTF-8.
  Json answer(const std::string& id, const VocabularyRequest&, const std::atomic<bool>&) {
    constexpr std::string_view kDigits = "0123456789abcdef";
    const Tokenizer& tokenizer = engine_.tokenizer;
    Json tokens = Json::array();
    Json control = Json::array();
    for (TokenId token = 0; token < static_cast<TokenId>(tokenizer.vocab_size()); ++token) {
      std::string digits;
      for (const char byte : tokenizer.decode(token, true)) {
        digits += kDigits[static_cast<uint8_t>(byte) >> 4];
        digits += kDigits[static_cast<uint8_t>(byte) & 15];
      }
      tokens.push_back(std::move(digits));
      if (tokenizer.is_control(token)) control.push_back(token);
    }
    return {{"event", "done"}, {"id", id}, {"tokens", std::move(tokens)}, {"control", std::move(control)}};
  }

  Json answer(const std::string&, const CancelRequest&, const std::atomic<bool>&) { return {}; }

  Json ready(double load_ms) const {
    const Config& c = engine_.config();
    const std::optional<TokenId> bos = engine_.tokenizer.bos();
    const std::optional<TokenId> eot = engine_.tokenizer.find("<|eot_id|>");
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
            {"eot", eot ? Json(*eot) : Json()},
            {"eos", engine_.tokenizer.end_of_generation()},
            {"add_bos", engine_.tokenizer.add_bos()},
            {"version", kVersion}};
  }

  static Json done_event(const std::string& id, const CompletionRequest& request, const CompletionResult& r) {
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
            {"seed", request.completion.sampling.seed},
            {"timings", timings(r)}};
  }

  static Json error_event(const std::string& id, const std::string& code, const std::string& field,
                          const std::string& message) {
    return {{"event", "error"},
            {"id", id.empty() ? Json() : Json(id)},
            {"code", code},
            {"field", field.empty() ? Json() : Json(field)},
            {"message", message}};
  }
  void send(const Json& event) {
    const std::string line = event.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
    const std::lock_guard lock(output_);
    for (size_t done = 0; done < line.size();) {
      const ssize_t n = write(STDOUT_FILENO, line.data() + done, line.size() - done);
      if (n >= 0) {
        done += static_cast<size_t>(n);
      } else if (errno == EAGAIN) {  // the pipe is full and somebody made it non-blocking
        pollfd wait = {STDOUT_FILENO, POLLOUT, 0};
        poll(&wait, 1, -1);
      } else if (errno != EINTR) {
        _exit(0);  // the reader of the events is gone
      }
    }
  }

  Engine& engine_;
  Session session_;
  Input& input_;  // the reader's thread has it
  std::mutex output_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  std::deque<Job> jobs_;                                            // completions
  std::map<std::string, std::shared_ptr<std::atomic<bool>>> live_;  // requests queued or running
  bool closed_ = false;
};

}  // namespace

void run_worker(const EngineOptions& options) {
  const Clock::time_point start = Clock::now();
  Input input;  // from here on the parent's end is seen
  Engine engine(options);
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGTERM, end_process);
  std::signal(SIGINT, end_process);
  Worker(engine, input).run(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
}

}  // namespace bitnet
