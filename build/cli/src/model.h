// The model as it lies in the file: configuration and weights. Everything points into the GGUF map; nothing is copied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "gguf.h"
#include "kernels/kernels.h"
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

  TernaryRows all() const { return {type, data, rows, cols}; }
  size_t bytes() const { return rows * all().row_bytes(); }
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
  TernaryMatrix down;          // (dim, ffn_dim)
};

class Model {
 public:
  // `file` must outlive the model. Error(kUnsupportedModel, kInvalidModel) for what the engine cannot compute.
  explicit Model(const GgufFile& file);
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  // Writes the trits that the kernels do not compute with as they are into memory as 2-bit codes, and gives the file's
  // pages back to the system. Must be done before anything is computed. Error(kOutOfMemory).
  void expand(ThreadPool& pool, const Kernels& kernels);

  const Config& config() const { return config_; }
  const FloatRows& token_embedding() const { return token_embedding_; }  // (n_vocab, dim)
  const FloatRows& output() const { return output_; }        // (n_vocab, dim); the embedding where they are tied
  const float* output_norm() const { return output_norm_; }  // (dim)
  const std::vector<Layer>& layers() const { return layers_; }
  // Radians per position of each rotated pair, (head_dim / 2); float, as the training code computes them.
  const std::vector<float>& rope_frequencies() const { return rope_frequencies_; }

  size_t n_params() const;
  // Weights read to compute one token (embedding row not counted): ternary codes, norms and the output matrix, of a
  // split one the upper plane.
  size_t bytes_per_token() const;
  size_t memory_bytes(const Kernels& kernels) const;    // all weights, expanded where they must be, or in the map
  size_t expanded_bytes(const Kernels& kernels) const;  // what expand() allocates

 private:
  Config config_;
  template <class F>
  void for_each_matrix(F&& f) const;

  FloatRows token_embedding_, output_;
  const float* output_norm_;
  std::vector<Layer> layers_;
  std::vector<float> rope_frequencies_;
  void* expanded_ = nullptr;
  size_t expanded_bytes_ = 0;
};

}  // namespace bitnet
