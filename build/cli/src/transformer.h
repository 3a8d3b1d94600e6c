// The forward pass: tokens in, logits out. Knows nothing of text.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "aligned_vector.h"
#include "kernels/kernels.h"
#include "kv_cache.h"
#include "model.h"
#include "output_layer.h"
#include "thread_pool.h"

namespace bitnet {

// One token of a batch. Tokens of the same cache stand in the order of their positions, without gaps.
struct BatchToken {
  int32_t token;
  uint32_t position;  // every earlier position is in the cache or earlier in the batch
  KvCache* cache;
  bool wants_logits;
};

class Transformer {
 public:
  // Model, kernels and pool must outlive the transformer; the model settles from pass to pass. `max_batch` bounds a
  // batch; it sets the size of the buffers and nothing else: a token's logits have the same bits in every batch.
  Transformer(Model& model, const Kernels& kernels, ThreadPool& pool, size_t max_batch);

  // Adds the batch to its caches and keeps the outputs of the tokens that want logits. `abandon`, where given, is asked
  // before every layer: once it says true the rest is not computed, the batch's positions in the caches hold nothing of
  // use, and the answer is false.
  bool forward(std::span<const BatchToken> batch, const std::function<bool()>& abandon = {});

  // Of the last batch: a vector for each token that wanted logits, in their order.
  OutputLayer& output() { return output_; }

  // Bytes of weights that have not been read since zeros made them needless, of those that Model::bytes_per_token()
  // counts, which the tokens of a batch share.
  uint64_t bytes_skipped() const;

  size_t max_batch() const { return max_batch_; }
  static size_t buffer_bytes(const Config& config, size_t max_batch, size_t max_context, size_t n_threads);

 private:
  struct Projection {
    const TernaryMatrix* matrix;
    float* out;  // (n_tokens, matrix->rows)
  };
  // Rows that lie one after another in memory. Those of one loop: at most three matrices.
  struct Region {
    const uint8_t* data = nullptr;
    size_t rows = 0, row_bytes = 0;
  };
  // What is read after a loop: rows by all threads, and before them a norm's weights by the first.
  struct Next {
    const float* weights = nullptr;
    size_t n_weights = 0;
    std::array<Region, 3> regions;
  };

  // Tokens of one sequence, one after another, within a chunk of positions.
  struct TokenGroup {
    const KvCache* cache;
    size_t first_token, n_tokens;
    size_t first_position;

    size_t n_chunks() const { return first_position / kChunkPositions + 1; }  // that they look back on
  };
  // A thread's working memory of attention, for a group of tokens and a kv head.
  struct AttentionScratch {
    std::vector<float> queries, scores, sum, next;
  };

  // What one thread does at a time: some rows of a projection for some tokens.
  struct Piece {
    const Projection* projection;
    size_t first_row, n_rows;
    size_t first_token, n_tokens;
  };

  // Tokens that are looked up together.
  struct Tile {
    bool wide;
    size_t n_tokens;
  };

  // What a thread has added up of a sparse matrix.
  struct alignas(64) ColumnSums {
    std::vector<int32_t> sums;         // (kSparseTokens, rows of whole units)
    AlignedVector<int8_t> excess;      // (ffn_dim): of a token; 0 where none is at work
    bool any = false;                  // in the current loop, …
    std::optional<size_t> asked = {};  // … and the piece that memory has been asked for
    uint64_t bytes_skipped = 0;        // ever
  };

  void embed(std::span<const BatchToken> batch);
  template <class F>
  void norm_and_quantize(const float* in, const float* weight, size_t dim, F&& first);  // → quantised_
  template <class F>
  void project(std::initializer_list<Projection> projections, F&& then);  // from quantised_
  Tile tile_at(size_t token) const;
  void make_tiles(size_t cols);  // quantised_ → tiles_
  void add_bulk_pieces(std::initializer_list<Projection> projections);
  void add_amx_pieces(std::initializer_list<Projection> projections);
  template <class F>
  void project_sparse(const Projection& projection, F&& then);  // from quantised_
  size_t wide_tokens(const TernaryMatrix& w) const;
  void cap(const TernaryMatrix& w);  // quantised_ → quantised_, excess_
  template <class F>
  void add_columns(const Projection& projection, size_t first_token, size_t n_tokens, F&& then);
  void fetch_ahead(const Next& next, size_t thread) const;
  void fetch_cache(const BatchToken& token, size_t layer, size_t thread) const;
  static Region region(const TernaryMatrix& m);
  Region output_region() const;
  void in_bulk(const Piece& piece, size_t thread);
  void by_lookup(const Piece& piece, size_t thread);
  void by_amx(const Piece& piece, size_t thread);
  void by_multiplication(const Piece& piece, size_t thread);
  void by_expansion(const TernaryRows& trits, const Activations& x, int32_t* sums, std::vector<uint8_t>& codes);
  void rotate_and_store(std::span<const BatchToken> batch, size_t layer);
  template <class F>
  void attend(std::span<const BatchToken> batch, size_t layer, F&& then);
  void group_tokens(std::span<const BatchToken> batch);
  AttentionQueries queries_of(const TokenGroup& group, size_t kv_head, std::vector<float>& memory) const;
  void attend_chunk(const TokenGroup& group, size_t layer, size_t kv_head, size_t chunk,
                    const AttentionQueries& queries, const std::byte* next, std::vector<float>& scores,
                    const Attention& out) const;
  void add_to_residual(size_t token);
  void norm_outputs(std::span<const BatchToken> batch);
  template <class F>
  void for_each_token(F&& f);

  Model& model_;  // settles from pass to pass
  const Config& config_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  size_t max_batch_;
  size_t n_passes_ = 0;
  size_t n_ = 0;       // tokens in the current batch
  size_t n_bulk_ = 0;  // of them, the first, whose projections are computed by look-up or tiles of AMX, …
  size_t n_wide_ = 0;  // … and of those the first, of the projection at work, in wide tiles

  std::vector<float> residual_;          // (max_batch, dim)
  std::vector<float> normed_;            // (max_batch, max(dim, q_dim, ffn_dim))
  AlignedVector<int8_t> quantised_;      // (max_batch, max(dim, q_dim, ffn_dim))
  std::vector<int8_t> tiles_;            // the same for look-up: (tiles, widest, lut_lanes)
  std::vector<int32_t> quantised_sums_;  // (max_batch)
  std::vector<float> quantised_scales_;  // (max_batch)
  std::vector<float> q_, k_, v_;         // (max_batch, q_dim), (max_batch, kv_dim) twice
  std::vector<float> attention_;         // (max_batch, q_dim)
  std::vector<float> gate_, up_;         // (max_batch, ffn_dim)
  std::vector<float> branch_;            // (max_batch, dim): what a block adds to the residual stream
  std::vector<int32_t> excess_;          // (max_batch, dim): what capped activations lack in those sums
  OutputLayer output_;
  std::vector<float> cosines_, sines_;  // (max_batch, head_dim / 2)
  std::vector<Piece> pieces_;
  std::vector<LutScratch> lut_scratch_;              // a thread each, where there is look-up, …
  std::vector<AmxScratch> amx_scratch_;              // … or AMX
  std::vector<std::vector<uint8_t>> codes_;          // a thread each: (kExpandedRows, widest / 4)
  std::vector<std::vector<int32_t>> sums_;           // a thread each: (max_batch, kRowsPerPiece)
  std::vector<ColumnSums> column_sums_;              // a thread each
  std::vector<TokenGroup> groups_;                   // of the current batch
  std::vector<AttentionScratch> attention_scratch_;  // a thread each
  std::vector<float> partial_attention_;             // (n_kv_heads, chunks) attentions of all tokens
};

}  // namespace bitnet
