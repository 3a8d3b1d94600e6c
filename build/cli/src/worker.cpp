#include "worker.h"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <csignal>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "prompt.h"
#include "request.h"
#include "scheduler.h"
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
  enum class Outcome { kLine, kTooLong, kClosed, kGone };

  Outcome next(std::string& line) {
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
      if (poll(waits, std::size(waits), -1) < 0) continue;                                  // a signal
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
  int input_ = STDIN_FILENO;  // −1 once it has closed
  int parent_;                // becomes readable when the parent ends; −1 where the kernel has no such thing
  std::string buffer_;
  size_t searched_ = 0;
  bool too_long_ = false;  // the beginning of the line in the buffer was thrown away
};

void end_process(int) { _exit(0); }

// The `probabilities` of tokens, with llama.cpp's names.
Json probabilities(std::span<const TokenProbability> list, const Tokenizer& tokenizer, bool post_sampling) {
  const char* const value = post_sampling ? "prob" : "logprob";
  const char* const best = post_sampling ? "top_probs" : "top_logprobs";
  const auto entry = [&](const TokenProbability::Entry& e) -> Json {
    Json bytes = Json::array();
    for (const char byte : tokenizer.decode(e.token, false)) bytes.push_back(static_cast<uint8_t>(byte));
    return {{"id", e.token}, {"bytes", std::move(bytes)}, {value, e.value}};
  };
  Json out = Json::array();
  for (const TokenProbability& p : list) {
    out.push_back(entry(p.chosen));
    out.back()[best] = Json::array();
    for (const TokenProbability::Entry& e : p.best) out.back()[best].push_back(entry(e));
  }
  return out;
}

std::string_view name_of(const CacheFileUse& use) {
  if (use.invalid) return "invalid";
  if (use.restored) return use.saved ? "restored+saved" : "restored";
  return use.saved ? "saved" : "none";
}

Json done_event(const std::string& id, size_t index, const CompletionResult& r) {
  return {{"event", "done"},
          {"id", id},
          {"index", index},
          {"content", r.content},
          {"tokens", r.tokens},
          {"stop_type", name_of(r.stop_type)},
          {"stopping_word", r.stopping_word},
          {"tokens_predicted", r.tokens.size()},
          {"tokens_evaluated", r.n_prompt},
          {"tokens_cached", r.n_cached},
          {"cache_file", name_of(r.cache_file)},
          {"truncated", r.truncated},
          {"seed", r.seed},
          {"timings", timings(r)}};
}

Json error_event(const std::string& id, const std::string& code, const std::string& field, const std::string& message) {
  return {{"event", "error"},
          {"id", id.empty() ? Json() : Json(id)},
          {"code", code},
          {"field", field.empty() ? Json() : Json(field)},
          {"message", message}};
}

Json error_event(const std::string& id, const std::exception& error) {
  if (const auto* e = dynamic_cast<const RequestError*>(&error)) return error_event(id, e->code, e->field, e->what());
  if (const auto* e = dynamic_cast<const ContextExceeded*>(&error)) {
    Json event = error_event(id, "context_length_exceeded", "prompt", e->what());
    event["n_prompt"] = e->n_prompt;
    event["n_ctx"] = e->n_ctx;
    return event;
  }
  return error_event(id, "internal", "", error.what());
}

class Worker {
 public:
  Worker(Engine& engine, Input& input) : engine_(engine), scheduler_(engine), input_(input) {}

  // What goes wrong outside a request ends the process: half a protocol helps nobody.
  [[noreturn]] void run(double load_ms) noexcept {
    send(ready(load_ms));
    std::thread([this] { read_requests(); }).detach();
    for (;;) {
      if (scheduler_.step([this] { take_messages(); })) continue;
      std::unique_lock lock(mutex_);
      if (closed_ && messages_.empty()) {
        if (scheduler_.idle()) _exit(0);  // the reader's thread still waits for the parent's end
        lock.unlock();
        scheduler_.fail_waiting(RequestError("invalid_request", "mask", "mask: no answer can come any more"));
        continue;
      }
      const auto changed = [this] { return closed_ || !messages_.empty(); };
      if (const auto deadline = scheduler_.next_deadline())
        changed_.wait_until(lock, *deadline, changed);
      else
        changed_.wait(lock, changed);
    }
  }

 private:
  using Message = std::function<void()>;  // of the reader's thread, carried out in that of the scheduler

  // Turns what becomes of one request into events.
  class Answer : public CompletionObserver {
   public:
    Answer(Worker& worker, const std::string& id, std::shared_ptr<const Completion> request, bool stream)
        : worker_(worker), id_(id), request_(std::move(request)), n_left_(request_->n), stream_(stream) {}

    void on_piece(size_t index, std::string_view text, std::span<const TokenId> tokens,
                  std::span<const TokenProbability> list) override {
      if (!stream_) return;
      Json event = {{"event", "token"}, {"id", id_}, {"index", index}, {"content", text}, {"tokens", tokens}};
      if (request_->wants_probabilities()) event["probabilities"] = told(list);
      worker_.send(event);
    }
    void on_mask(size_t index, std::span<const TokenId> tokens) override {
      worker_.send({{"event", "mask"}, {"id", id_}, {"index", index}, {"tokens", tokens}});
    }
    void on_done(size_t index, const CompletionResult& result) override {
      Json event = done_event(id_, index, result);
      if (request_->wants_probabilities()) event["probabilities"] = told(result.probabilities);
      if (index == 0 && request_->prompt_logprobs) {
        Json list = probabilities(result.prompt_probabilities, worker_.engine_.tokenizer, false);
        list.insert(list.begin(), nullptr);  // nothing foretells the first token
        event["prompt_probabilities"] = std::move(list);
      }
      if (--n_left_ == 0) worker_.forget(id_);
      worker_.send(event);
    }
    void on_error(const std::exception& error) override {
      worker_.forget(id_);
      worker_.send(error_event(id_, error));
    }

   private:
    Json told(std::span<const TokenProbability> list) const {
      return probabilities(list, worker_.engine_.tokenizer, request_->post_sampling_probs);
    }

    Worker& worker_;
    std::string id_;
    std::shared_ptr<const Completion> request_;
    size_t n_left_;
    bool stream_;
  };

  // The reader's thread: parses and tokenizes, so that nothing that computes waits for it.
  void read_requests() {
    std::string line;
    for (;;) {
      switch (input_.next(line)) {
        case Input::Outcome::kLine:
          if (line.find_first_not_of(" \t\r") != std::string::npos) read_request(line);
          break;
        case Input::Outcome::kTooLong:
          send(
              error_event("", "invalid_request", "", "a line has at most " + std::to_string(kMaxLineBytes) + " bytes"));
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
      Request request = parse_request(line, engine_.tokenizer, Clock::now(), id);
      std::visit([&](auto& body) { accept(id, std::move(body)); }, request.body);
    } catch (const std::bad_alloc&) {
      send(error_event(id, "internal", "", "not enough memory for the request"));
    } catch (const std::exception& e) {
      send(error_event(id, e));
    }
  }

  void accept(const std::string& id, CompletionRequest request) {
    require_free(id);
    Completion completion = std::move(request.completion);
    completion.prompt = prompt_of(request);
    if (completion.prompt.empty())
      throw RequestError("invalid_request", "prompt", "prompt: must have at least 1 token, got 0");
    {
      const std::lock_guard lock(mutex_);
      live_.insert(id);
    }
    post([this, id, completion = std::make_shared<const Completion>(std::move(completion)), stream = request.stream] {
      const auto answer = std::make_shared<Answer>(*this, id, completion, stream);
      try {
        tickets_[id] = scheduler_.submit(completion, answer);
      } catch (const std::exception& e) {
        answer->on_error(e);
      }
    });
  }

  void accept(const std::string& id, TokenizeRequest request) {
    require_free(id);
    send({{"event", "done"},
          {"id", id},
          {"tokens", text_prompt(engine_.tokenizer, request.content, request.add_bos, request.special)}});
  }

  void accept(const std::string& id, DetokenizeRequest request) {
    require_free(id);
    send({{"event", "done"}, {"id", id}, {"content", to_valid_utf8(engine_.tokenizer.decode(request.tokens, true))}});
  }

  // Hexadecimal digits, because the bytes of one token need not be UTF-8.
  void accept(const std::string& id, VocabularyRequest) {
    require_free(id);
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
    send({{"event", "done"}, {"id", id}, {"tokens", std::move(tokens)}, {"control", std::move(control)}});
  }

  void accept(const std::string& id, CancelRequest) {
    post([this, id] {
      if (const auto it = tickets_.find(id); it != tickets_.end()) scheduler_.cancel(it->second);
    });
  }

  void accept(const std::string& id, MaskRequest request) {
    post([this, id, request = std::move(request)] {
      const auto it = tickets_.find(id);
      if (it == tickets_.end()) return;
      if (request.error) {
        scheduler_.fail(it->second, *request.error);
      } else {
        scheduler_.answer(it->second, request.index, request.answer);
      }
    });
  }

  void require_free(const std::string& id) {
    const std::lock_guard lock(mutex_);
    if (live_.contains(id))
      throw RequestError("invalid_request", "id", "id: a request of this id is still being served");
  }

  void post(Message message) {
    const std::lock_guard lock(mutex_);
    messages_.push_back(std::move(message));
    changed_.notify_all();
  }

  void take_messages() {
    for (;;) {
      std::unique_lock lock(mutex_);
      if (messages_.empty()) return;
      const Message message = std::move(messages_.front());
      messages_.pop_front();
      lock.unlock();
      message();
    }
  }

  // The request is over: its id may be used again.
  void forget(const std::string& id) {
    tickets_.erase(id);
    const std::lock_guard lock(mutex_);
    live_.erase(id);
  }

  std::vector<TokenId> prompt_of(const CompletionRequest& request) const {
    const Tokenizer& tokenizer = engine_.tokenizer;
    if (request.chat) return chat_prompt(tokenizer, *request.text);
    if (request.text) return text_prompt(tokenizer, *request.text, request.add_bos, request.special);
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
            {"n_parallel", engine_.n_parallel},
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
  Scheduler scheduler_;
  std::map<std::string, Scheduler::Ticket> tickets_;
  Input& input_;  // the reader's thread has it
  std::mutex output_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  std::deque<Message> messages_;
  std::set<std::string> live_;  // ids of completions queued or running
  bool closed_ = false;
};

}  // namespace

void run_worker(const EngineOptions& options) {
  const Clock::time_point start = Clock::now();
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGTERM, end_process);
  std::signal(SIGINT, end_process);
  Input input;  // from here on the parent's end is seen
  Engine engine(options);
  Worker(engine, input).run(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
}

}  // namespace bitnet
