#include "model.h"

#include <sys/mman.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string_view>
#include <unordered_set>

#include "elementary.h"
#include "error.h"
#include "rounding.h"
#include "utf8.h"

namespace bitnet {
namespace {

constexpr size_t kMaxDimension = size_t{1}
                                 << 20;  // of anything but the vocabulary: keeps every product far from overflow
constexpr size_t kMaxHeads = 4096;
constexpr size_t kMaxLayers = 1024;
constexpr size_t kMaxVocabulary = size_t{1} << 24;
constexpr size_t kMaxContext = size_t{1} << 20;

std::string shown(double number) {
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "%g", number);
  return text.data();
}

[[noreturn]] void invalid(const GgufFile& file, const std::string& what) {
  throw Error(ExitCode::kInvalidModel, file.path() + ": " + what);
}

std::string shape_string(const std::vector<uint64_t>& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); i++) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

const Tensor* find(const GgufFile& file, const std::string& name, const std::vector<uint64_t>& shape) {
  const Tensor* tensor = file.find_tensor(name);
  if (!tensor) invalid(file, "tensor " + name + " is missing");
  if (tensor->shape != shape)
    invalid(file, "tensor " + name + " has shape " + shape_string(tensor->shape) + ", expected " + shape_string(shape));
  return tensor;
}

[[noreturn]] void wrong_type(const GgufFile& file, const Tensor& tensor, const std::string& expected) {
  throw Error(ExitCode::kUnsupportedModel, file.path() + ": tensor " + std::string(tensor.name) + " has type " +
                                               std::string(name_of(tensor.type)) + ", expected " + expected);
}

const float* vector(const GgufFile& file, const std::string& name, size_t n) {
  const Tensor* tensor = find(file, name, {n});
  if (tensor->type != TensorType::kF32) wrong_type(file, *tensor, "F32");
  return reinterpret_cast<const float*>(tensor->bytes.data());
}

constexpr size_t kMatricesPerLayer = 7;

constexpr size_t kCacheLine = 64;

TernaryMatrix settled(const TernaryMatrix& m, TernaryType type, const uint8_t* data) {
  return {type, data, m.rows, m.cols, m.scale, m.sparse, m.sparse};
}

// Trits where the kernels compute from them and they are fewer bytes: short rows do not fill a unit.
TernaryType settled_type(const TernaryMatrix& m, const Kernels& kernels) {
  const auto bytes_as = [&m](TernaryType type) { return settled(m, type, nullptr).bytes(); };
  const bool from_trits = m.sparse ? kernels.add_trit_columns != nullptr : computes_from_trits(kernels, m.cols);
  const bool fewer = bytes_as(TernaryType::kTrits) < bytes_as(TernaryType::kCodes);
  return from_trits && (fewer || m.type == TernaryType::kTrits) ? TernaryType::kTrits : TernaryType::kCodes;
}

size_t settled_bytes_of(const TernaryMatrix& m, TernaryType type) {
  return round_up(settled(m, type, nullptr).bytes(), kCacheLine);
}

TernaryMatrix ternary(const GgufFile& file, const std::string& name, size_t rows, size_t cols, bool sparse = false) {
  const Tensor* tensor = find(file, name, {cols, rows});
  if (tensor->type != TensorType::kI2_S && tensor->type != TensorType::kTrits)
    wrong_type(file, *tensor, "I2_S or TRITS");
  if (cols % kTernaryBlock != 0)
    invalid(file, "tensor " + name + " has rows of " + std::to_string(cols) + " weights, not a multiple of " +
                      std::to_string(kTernaryBlock));
  const uint8_t* data = reinterpret_cast<const uint8_t*>(tensor->bytes.data());
  const TernaryType type = tensor->type == TensorType::kTrits ? TernaryType::kTrits : TernaryType::kCodes;
  TernaryMatrix matrix{type, data, rows, cols, 0.0f, sparse};
  std::memcpy(&matrix.scale, data + matrix.bytes(), sizeof(float));
  if (!std::isfinite(matrix.scale)) invalid(file, "tensor " + name + " has a scale that is not finite");
  return matrix;
}

FloatRows matrix(const GgufFile& file, const std::string& name, size_t rows, size_t cols) {
  const Tensor* tensor = find(file, name, {cols, rows});
  FloatRows out{RowType::kF32, reinterpret_cast<const uint8_t*>(tensor->bytes.data()), rows, cols};
  switch (tensor->type) {
    case TensorType::kF32:
      break;
    case TensorType::kF16:
      out.type = RowType::kF16;
      break;
    case TensorType::kBF16:
      out.type = RowType::kBF16;
      break;
    case TensorType::kQ8_0:
      out.type = RowType::kQ8_0;
      break;
    case TensorType::kQ6_K:
      out.type = RowType::kQ6_K;
      break;
    default:
      wrong_type(file, *tensor, "F32, F16, BF16, Q8_0 or Q6_K");
  }
  return out;
}

void settle_rows(const TernaryMatrix& m, TernaryType type, uint8_t* out, ThreadPool& pool, const Kernels& kernels) {
  constexpr size_t kRowsPerPiece = 256;  // some 100 to 400 kB
  const size_t row_bytes = TernaryRows{type, nullptr, m.rows, m.cols}.row_bytes();
  pool.for_each(ceil_div(m.rows, kRowsPerPiece), [&](size_t piece, size_t) {
    const size_t first = piece * kRowsPerPiece;
    const TernaryRows rows = m.all().slice(first, std::min(kRowsPerPiece, m.rows - first));
    uint8_t* to = out + first * row_bytes;
    if (type == m.type)
      std::memcpy(to, rows.data, rows.rows * rows.row_bytes());
    else if (type == TernaryType::kTrits)
      pack_rows(kernels.pack_trits, rows, to);
    else
      expand_rows(kernels.expand_trits, rows, to);
  });
}

void settle_columns(const TernaryMatrix& m, TernaryType type, uint8_t* out, ThreadPool& pool, const Kernels& kernels) {
  constexpr size_t kColsPerPiece = 4 * kCodeUnit;  // what a unit of a row of trits stands for
  const TernaryColumns columns{type, out, m.rows, m.cols};
  const size_t row_bytes = m.all().row_bytes();
  pool.for_each(ceil_div(m.cols, kColsPerPiece), [&](size_t piece, size_t) {
    const size_t first = piece * kColsPerPiece, n = std::min(kColsPerPiece, m.cols - first);
    std::vector<uint8_t> expanded(columns.unit_rows() * kCodeUnit);
    for (size_t unit = 0; unit < columns.n_units(); unit++) {
      const size_t row = unit * columns.unit_rows(), n_rows = std::min(columns.unit_rows(), m.rows - row);
      if (m.type == TernaryType::kCodes) {
        codes_to_columns(m.data + row * row_bytes + piece * kCodeUnit, row_bytes, n, columns, unit, first, out);
        continue;
      }
      for (size_t r = 0; r < n_rows; r++)
        kernels.expand_trits(m.data + (row + r) * row_bytes + piece * kTritUnit, 1, &expanded[r * kCodeUnit]);
      codes_to_columns(expanded.data(), kCodeUnit, n, columns, unit, first, out);
    }
  });
}

// The whole pages of a part of the map that is not needed again.
void give_back(const uint8_t* data, size_t size) {
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (start + page - 1) / page * page, end = (start + size) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

Config read_config(const GgufFile& file) {
  Config c{};
  c.architecture = file.get_string("general.architecture");
  if (c.architecture != "bitnet-b1.58" && c.architecture != "bitnet-25" && c.architecture != "bitnet")
    throw Error(ExitCode::kUnsupportedModel, file.path() + ": general.architecture is \"" + c.architecture +
                                                 "\"; this program runs bitnet-b1.58, bitnet-25 and bitnet");
  c.name = file.find_string("general.name").value_or("");
  const std::string prefix = c.architecture + ".";
  const auto in_range = [&](const std::string& key, uint64_t value, size_t largest) {
    if (value < 1 || value > largest)
      invalid(file, prefix + key + " is " + std::to_string(value) + ", expected 1 to " + std::to_string(largest));
    return static_cast<size_t>(value);
  };
  const auto size = [&](const std::string& key, size_t largest) {
    return in_range(key, file.get_uint(prefix + key), largest);
  };
  c.dim = size("embedding_length", kMaxDimension);
  c.n_layers = size("block_count", kMaxLayers);
  c.ffn_dim = size("feed_forward_length", kMaxDimension);
  c.n_ctx = size("context_length", kMaxContext);
  c.n_heads = size("attention.head_count", kMaxHeads);
  c.n_kv_heads = in_range("attention.head_count_kv",
                          file.find_uint(prefix + "attention.head_count_kv").value_or(c.n_heads), c.n_heads);
  if (c.n_heads % c.n_kv_heads != 0)
    invalid(file, prefix + "attention.head_count " + std::to_string(c.n_heads) +
                      " is not a multiple of head_count_kv " + std::to_string(c.n_kv_heads));
  const size_t rope_dim = file.find_uint(prefix + "rope.dimension_count").value_or(c.dim / c.n_heads);
  const auto key_dim = file.find_uint(prefix + "attention.key_length");
  c.head_dim =
      in_range(key_dim ? "attention.key_length" : "rope.dimension_count", key_dim.value_or(rope_dim), kMaxHeadDim);
  const size_t value_dim = file.find_uint(prefix + "attention.value_length").value_or(c.head_dim);
  if (rope_dim != c.head_dim || value_dim != c.head_dim || c.head_dim % kLanes != 0)
    throw Error(ExitCode::kUnsupportedModel,
                file.path() + ": heads of " + std::to_string(c.head_dim) + " (keys), " + std::to_string(value_dim) +
                    " (values), " + std::to_string(rope_dim) +
                    " (rotated) dimensions; this program wants them equal and a multiple of " + std::to_string(kLanes));
  const std::string scaling(file.find_string(prefix + "rope.scaling.type").value_or("linear"));  // as in llama.cpp
  if (scaling != "none" && scaling != "linear")
    throw Error(ExitCode::kUnsupportedModel,
                file.path() + ": " + prefix + "rope.scaling.type \"" + scaling + "\" is not supported");
  c.norm_epsilon = static_cast<float>(file.get_float(prefix + "attention.layer_norm_rms_epsilon"));
  c.rope_base = file.find_float(prefix + "rope.freq_base").value_or(10000.0);
  const auto factor = file.find_float(prefix + "rope.scaling.factor");
  const auto older = file.find_float(prefix + "rope.scale_linear");  // its name before
  c.rope_scale = scaling == "none" ? 1.0 : factor.value_or(older.value_or(1.0));
  if (!(c.norm_epsilon >= 0.0f && c.norm_epsilon < 1.0f))
    invalid(file, prefix + "attention.layer_norm_rms_epsilon is " + shown(c.norm_epsilon) + ", expected 0 to below 1");
  if (!(c.rope_base >= 1.0 && c.rope_base <= 1e12))
    invalid(file, prefix + "rope.freq_base is " + shown(c.rope_base) + ", expected 1 to 1e12");
  if (!(c.rope_scale >= 1.0 && c.rope_scale <= 1e6))
    invalid(file, prefix + "rope.scaling.factor is " + shown(c.rope_scale) + ", expected 1 to 1e6");
  const Tensor* embedding = file.find_tensor("token_embd.weight");
  if (!embedding) invalid(file, "tensor token_embd.weight is missing");
  const uint64_t vocabulary =
      file.find_uint(prefix + "vocab_size").value_or(embedding->shape.size() == 2 ? embedding->shape[1] : 0);
  c.n_vocab = in_range("vocab_size", vocabulary, kMaxVocabulary);
  return c;
}

// Nobody shall get a text that is not the model's because a part of it is one that this program does not know.
void refuse_unknown_tensors(const GgufFile& file, size_t n_layers) {
  constexpr std::array<std::string_view, 4> kNames = {"token_embd.weight", "output.weight", "output_norm.weight",
                                                      "rope_freqs.weight"};
  constexpr std::array<std::string_view, 11> kOfLayers = {
      "attn_norm.weight",     "attn_q.weight",       "attn_k.weight",   "attn_v.weight",
      "attn_sub_norm.weight", "attn_output.weight",  "ffn_norm.weight", "ffn_gate.weight",
      "ffn_up.weight",        "ffn_sub_norm.weight", "ffn_down.weight"};
  std::unordered_set<std::string> known;
  for (const std::string_view name : kNames) known.emplace(name);
  for (size_t i = 0; i < n_layers; i++)
    for (const std::string_view name : kOfLayers) known.insert("blk." + std::to_string(i) + "." + std::string(name));
  for (const Tensor& tensor : file.tensors())
    if (!known.contains(std::string(tensor.name)))
      throw Error(ExitCode::kUnsupportedModel, file.path() + ": there is a tensor " + quoted(tensor.name) +
                                                   ", which models of the architecture do not have");
}

}  // namespace

Model::Model(const GgufFile& file) : config_(read_config(file)), file_(file) {
  const Config& c = config_;
  token_embedding_ = matrix(file, "token_embd.weight", c.n_vocab, c.dim);
  output_ = file.find_tensor("output.weight") ? matrix(file, "output.weight", c.n_vocab, c.dim) : token_embedding_;
  output_norm_ = vector(file, "output_norm.weight", c.dim);
  layers_.reserve(c.n_layers);
  for (size_t i = 0; i < c.n_layers; i++) {
    const std::string block = "blk." + std::to_string(i) + ".";
    layers_.push_back({
        .attn_norm = vector(file, block + "attn_norm.weight", c.dim),
        .q = ternary(file, block + "attn_q.weight", c.q_dim(), c.dim),
        .k = ternary(file, block + "attn_k.weight", c.kv_dim(), c.dim),
        .v = ternary(file, block + "attn_v.weight", c.kv_dim(), c.dim),
        .attn_sub_norm = vector(file, block + "attn_sub_norm.weight", c.q_dim()),
        .attn_output = ternary(file, block + "attn_output.weight", c.dim, c.q_dim()),
        .ffn_norm = vector(file, block + "ffn_norm.weight", c.dim),
        .gate = ternary(file, block + "ffn_gate.weight", c.ffn_dim, c.dim),
        .up = ternary(file, block + "ffn_up.weight", c.ffn_dim, c.dim),
        .ffn_sub_norm = vector(file, block + "ffn_sub_norm.weight", c.ffn_dim),
        .down = ternary(file, block + "ffn_down.weight", c.dim, c.ffn_dim, true),
    });
  }
  refuse_unknown_tensors(file, c.n_layers);
  // 1 / base^(2i / head_dim), each step rounded to float as in the training code; divided by rope_freqs where the file
  // has them, and by the factor of linear scaling.
  const size_t half = c.head_dim / 2;
  const float* factors = file.find_tensor("rope_freqs.weight") ? vector(file, "rope_freqs.weight", half) : nullptr;
  const double root = nth_root(c.rope_base, half);
  double power = 1.0;
  for (size_t i = 0; i < half; i++, power *= root) {
    const float frequency = 1.0f / static_cast<float>(power) / static_cast<float>(c.rope_scale);
    rope_frequencies_.push_back(factors ? frequency / factors[i] : frequency);
    if (!(rope_frequencies_.back() >= 0.0f && rope_frequencies_.back() <= 1.0f))
      invalid(file, "tensor rope_freqs.weight gives a frequency out of 0 to 1");
  }
}

uint32_t Model::weights_checksum() const {
  constexpr size_t kPieces = 4, kPieceBytes = 256;
  std::array<uint8_t, kPieceBytes> piece;
  uLong sum = 0;
  for (const Tensor& tensor : file_.tensors()) {
    if (tensor.type != TensorType::kI2_S && tensor.type != TensorType::kTrits) continue;
    const size_t n = std::min(kPieceBytes, tensor.bytes.size());
    for (size_t i = 0; i < kPieces; i++) {
      file_.read(tensor.bytes.data() + (tensor.bytes.size() - n) * i / (kPieces - 1), std::span(piece).first(n));
      sum = crc32_z(sum, piece.data(), n);
    }
  }
  return static_cast<uint32_t>(sum);
}

size_t Model::n_params() const {
  const Config& c = config_;
  const size_t attention = c.dim * (2 * c.q_dim() + 2 * c.kv_dim()), ffn = 3 * c.dim * c.ffn_dim;
  const size_t norms = 2 * c.dim + c.q_dim() + c.ffn_dim;
  const size_t embeddings = c.n_vocab * c.dim * (output_.data == token_embedding_.data ? 1 : 2);
  return c.n_layers * (attention + ffn + norms) + c.dim + embeddings;
}

size_t Model::n_matrices() const { return layers_.size() * kMatricesPerLayer; }

TernaryMatrix& Model::ternary_matrix(size_t i) {
  if (i < layers_.size()) return layers_[i].down;
  i -= layers_.size();
  Layer& l = layers_[i / (kMatricesPerLayer - 1)];
  TernaryMatrix* const others[kMatricesPerLayer - 1] = {&l.q, &l.k, &l.v, &l.attn_output, &l.gate, &l.up};
  return *others[i % (kMatricesPerLayer - 1)];
}

template <class F>
void Model::for_each_matrix(F&& f) const {
  for (const Layer& l : layers_)
    for (const TernaryMatrix* m : {&l.q, &l.k, &l.v, &l.attn_output, &l.gate, &l.up, &l.down}) f(*m);
}

Model::~Model() {
  if (settled_) munmap(settled_, settled_size_);
}

bool is_ternary(const TernaryMatrix& m, ThreadPool& pool) {
  constexpr size_t kBytesPerPiece = size_t{1} << 18;
  if (m.ternary) return *m.ternary;
  std::atomic<bool> all = true;
  pool.for_each(ceil_div(m.bytes(), kBytesPerPiece), [&](size_t piece, size_t) {
    const size_t first = piece * kBytesPerPiece;
    if (!are_ternary(m.type, {m.data + first, std::min(kBytesPerPiece, m.bytes() - first)})) all = false;
  });
  m.ternary = all;
  return all;
}

bool Model::settle(ThreadPool& pool, const Kernels& kernels, std::chrono::nanoseconds time) {
  if (!settling_) {
    settling_ = true;
    n_settled_ = settled_size_ = round_up(OutputSketch::bytes(output_), kCacheLine);
    for_each_matrix([&](const TernaryMatrix& m) {  // either type, since codes may be no weights
      settled_size_ += std::max(settled_bytes_of(m, TernaryType::kCodes), settled_bytes_of(m, TernaryType::kTrits));
    });
    void* memory =
        mmap(nullptr, settled_size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory != MAP_FAILED) {
      settled_ = static_cast<uint8_t*>(memory);
      madvise(settled_, settled_size_, MADV_HUGEPAGE);
      sketch_.emplace(output_, settled_);
    }
  }
  if (!settled_) return false;
  const auto start = std::chrono::steady_clock::now();
  do {
    if (next_matrix_ >= layers_.size() && n_sketched_ < output_.rows)
      settle_output(pool, kernels);
    else if (next_matrix_ < n_matrices())
      settle_ternary(ternary_matrix(next_matrix_++), pool, kernels);
    else
      return false;
  } while (std::chrono::steady_clock::now() - start < time);
  return true;
}

void Model::settle_ternary(TernaryMatrix& m, ThreadPool& pool, const Kernels& kernels) {
  uint8_t* data = settled_ + n_settled_;
  TernaryType type = settled_type(m, kernels);
  if ((type != m.type || m.sparse) && !is_ternary(m, pool)) {
    type = m.type;
    m.sparse = false;
  }
  TernaryMatrix there = settled(m, type, data);
  there.ternary = m.ternary;
  if (there.by_columns)
    settle_columns(m, there.type, data, pool, kernels);
  else
    settle_rows(m, there.type, data, pool, kernels);
  give_back(m.data, m.bytes());
  n_settled_ += round_up(there.bytes(), kCacheLine);
  m = there;
}

void Model::settle_output(ThreadPool& pool, const Kernels& kernels) {
  constexpr size_t kRowsPerCall = 1024, kRowsPerPiece = 16;
  const size_t end = std::min(n_sketched_ + kRowsPerCall, output_.rows);
  pool.for_each(ceil_div(end - n_sketched_, kRowsPerPiece), [&](size_t piece, size_t) {
    std::vector<float> work(2 * output_.cols);
    const size_t first = n_sketched_ + piece * kRowsPerPiece, n = std::min(kRowsPerPiece, end - first);
    for (size_t r = first; r < first + n; r++) sketch_->add(output_, r, kernels, work.data());
    give_back(output_.slice(first, n).data, n * row_bytes(output_.type, output_.cols));
  });
  n_sketched_ = end;
}

size_t Model::settled_bytes(const Kernels& kernels) const {
  size_t bytes = round_up(OutputSketch::bytes(output_), kCacheLine);
  for_each_matrix([&](const TernaryMatrix& m) { bytes += settled_bytes_of(m, settled_type(m, kernels)); });
  return bytes;
}

size_t Model::bytes_per_token(const Kernels& kernels) const {
  const size_t norms = config_.dim + config_.n_layers * (2 * config_.dim + config_.q_dim() + config_.ffn_dim);
  const size_t of_sketch_rows = 4 * output_.rows;  // steps, errors, peaks, norms
  size_t bytes = OutputSketch::plane_bytes(output_.rows, output_.cols) + (norms + of_sketch_rows) * sizeof(float);
  for_each_matrix([&](const TernaryMatrix& m) { bytes += settled(m, settled_type(m, kernels), nullptr).bytes(); });
  return bytes;
}

size_t Model::memory_bytes(const Kernels& kernels) const {
  const auto bytes_of = [](const FloatRows& w) { return w.rows * row_bytes(w.type, w.cols); };
  size_t bytes = settled_bytes(kernels) + bytes_of(output_);
  if (output_.data != token_embedding_.data) bytes += bytes_of(token_embedding_);
  return bytes;
}

}  // namespace bitnet
