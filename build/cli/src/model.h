// The model: configuration and weights. Everything points into the GGUF map until it settles.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "gguf.h"
#include "kernels/kernels.h"
#include "output_sketch.h"
#include "thread_pool.h"

namespace bitnet {

struct Config {
  std::string architecture;  // bitnet-b1.58, bitnet-25 or bitnet
  std::string name;
  size_t n_vocab;
  size_t n_ctx;  // longest context the model was trained for
  size_t dim;    // of the residual stream
  size_t n_layers;
  size_t ffn_dim;
  size_t n_heads;
  size_t n_kv_heads;
  size_t head_dim;
  float norm_epsilon;
  double rope_base;
  double rope_scale;  // that positions are divided by

  size_t q_dim() const { return n_heads * head_dim; }
  size_t kv_dim() const { return n_kv_heads * head_dim; }
  size_t group() const { return n_heads / n_kv_heads; }  // query heads that share a kv head
};

struct TernaryMatrix {
  TernaryType type;
  const uint8_t* data;
  size_t rows;
  size_t cols;
  float scale;
  bool sparse = false;                       // whether most of what it multiplies is 0: then it settles by columns
  bool by_columns = false;                   // how it lies
  mutable std::optional<bool> ternary = {};  // is_ternary(), once that is known

  TernaryRows all() const { return {type, data, rows, cols}; }         // where it is by rows
  TernaryColumns columns() const { return {type, data, rows, cols}; }  // where it is by columns
  size_t bytes() const { return by_columns ? cols * columns().column_bytes() : rows * all().row_bytes(); }
};

struct Layer {
  const float* attn_norm;      // (dim)
  TernaryMatrix q;             // (q_dim, dim)
  TernaryMatrix k, v;          // (kv_dim, dim)
  const float* attn_sub_norm;  // (q_dim)
  TernaryMatrix attn_output;   // (dim, q_dim)
  const float* ffn_norm;       // (dim)
  TernaryMatrix gate, up;      // (ffn_dim, dim)
  const float* ffn_sub_norm;   // (ffn_dim)
  TernaryMatrix down;          // (dim, ffn_dim); sparse, since relu lets half of its input through at most
};

// Whether all its codes stand for weights, as look-up and sums by columns take for granted. In a damaged file they may
// not, and then all kernels multiply by code − 1.
bool is_ternary(const TernaryMatrix& m, ThreadPool& pool);

// Whether the kernels multiply rows of `cols` trits as they are.
inline bool computes_from_trits(const Kernels& kernels, size_t cols) {
  return kernels.trit_matmul != nullptr && cols <= kMaxTritCols;
}

class Model {
 public:
  // `file` must outlive the model. Error(kUnsupportedModel, kInvalidModel) for what the engine cannot compute.
  explicit Model(const GgufFile& file);
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  static constexpr std::chrono::nanoseconds kLeastSettling = std::chrono::milliseconds(20);

  // The weights begin in the file's small pages, through which memory is read a fifth slower, and the output matrix is
  // more than a token needs of it. Each call spends this time or a little more on sketching it and on moving the
  // ternary weights into large pages, as trits where the kernels compute from them, else as codes, sparse ones by
  // columns, and gives the file's pages back; false when all is done. What a prompt and a token gain most from comes
  // first: the sparse ones, then the sketch, then the rest. To be called between passes, so that the first token need
  // not wait for it. Where there is no memory, everything stays as it is.
  bool settle(ThreadPool& pool, const Kernels& kernels, std::chrono::nanoseconds time = kLeastSettling);

  const Config& config() const { return config_; }
  const FloatRows& token_embedding() const { return token_embedding_; }  // (n_vocab, dim)
  const FloatRows& output() const { return output_; }  // (n_vocab, dim); the embedding where they are tied
  // The sketch of the output matrix's first rows, as many as n_sketched() says.
  const OutputSketch& output_sketch() const { return *sketch_; }
  size_t n_sketched() const { return n_sketched_; }
  // A row of the embedding or of the output matrix, copied from the file: were it read through the map, sixteen pages
  // of the file would become part of the process's memory. copy: its row_bytes(), which what is returned points to.
  FloatRows read_row(const FloatRows& of, size_t row, std::span<uint8_t> copy) const {
    file_.read(of.slice(row, 1).data, copy);
    return {of.type, copy.data(), 1, of.cols};
  }
  const float* output_norm() const { return output_norm_; }  // (dim)
  const std::vector<Layer>& layers() const { return layers_; }
  // Radians per position of each rotated pair, (head_dim / 2); float, as the training code computes them.
  const std::vector<float>& rope_frequencies() const { return rope_frequencies_; }

  // Of pieces of every ternary tensor, read from the file: another one for another model, and for the same one packed.
  uint32_t weights_checksum() const;

  size_t n_params() const;
  // Weights that a token may need (embedding row not counted), once they have settled: ternary weights, norms and the
  // sketch's first plane. What is refined from it comes on top, OutputLayer::bytes_refined(), and what a zero makes
  // needless is not read, Transformer::bytes_skipped().
  size_t bytes_per_token(const Kernels& kernels) const;
  size_t memory_bytes(const Kernels& kernels) const;   // all weights, once they have settled
  size_t settled_bytes(const Kernels& kernels) const;  // of them, what settle() writes

 private:
  Config config_;
  size_t n_matrices() const;                // ternary
  TernaryMatrix& ternary_matrix(size_t i);  // the sparse ones, then the others in the order of use
  template <class F>
  void for_each_matrix(F&& f) const;
  void settle_ternary(TernaryMatrix& m, ThreadPool& pool, const Kernels& kernels);
  void settle_output(ThreadPool& pool, const Kernels& kernels);

  const GgufFile& file_;
  FloatRows token_embedding_, output_;
  const float* output_norm_;
  std::vector<Layer> layers_;
  std::vector<float> rope_frequencies_;
  bool settling_ = false;
  uint8_t* settled_ = nullptr;               // settled_size_ bytes; nullptr: there is no memory for it
  size_t settled_size_ = 0, n_settled_ = 0;  // of them, n_settled_ are filled
  std::optional<OutputSketch> sketch_;
  size_t n_sketched_ = 0, next_matrix_ = 0;
};

}  // namespace bitnet
