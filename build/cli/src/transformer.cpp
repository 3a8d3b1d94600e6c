#include "transformer.h"

#include <algorithm>
#include <cassert>
#include <chrono>
#include <cmath>

#include "elementary.h"
#include "prefetch.h"
#include "rounding.h"

namespace bitnet {
namespace {

constexpr size_t kRowsPerPiece = 128;             // for one thread at a time: 82 kB of codes at 2,560 columns
constexpr size_t kAheadBytes = size_t{32} << 10;  // that a thread asks for before it waits for the others
constexpr size_t kMostTiles = 16;                 // of tokens that look-up does with the same rows: 512 or 256 tokens
constexpr size_t kLeastLutRows = 512;             // fewer would be slow, since tables are made for all of them
constexpr size_t kPiecesPerThread = 4;            // of look-up, so that no thread waits long for another
constexpr size_t kWidePiecesPerThread = 2;        // of wide tiles
constexpr size_t kAmxSide = 32;                   // rows or tokens that AMX multiplies at a time
constexpr size_t kLeastAmxRows = 64, kMostAmxRows = 256;  // of a piece
constexpr size_t kSampledTokens = 8;                      // of which one says whether wide tiles pay, …
constexpr size_t kCappedShare = 4;                        // … which they do if at most one of so many steps is capped
constexpr size_t kExpandedRows = 16;                      // of trits, at a time: 28 kB of codes at 6,912 columns
constexpr size_t kSparseTokens = 32;                      // that share a read of columns
constexpr size_t kTokensPerGroup = 8;                     // that go through a sequence's cache together
constexpr size_t kFewAttending = 16;                      // tokens whose attention is divided among threads by chunks

// What is spent on settling after a pass, if it is more than the least: that part of what the pass took.
constexpr int kSettlingShare = 8;

size_t widest(const Config& c) { return std::max({c.dim, c.q_dim(), c.ffn_dim}); }

// How many of n tokens go by AMX: all or none. Or by look-up: whole tiles, and a rest that is large enough; none where
// the smallest matrices would not give every thread a piece.
size_t bulk_tokens(const Kernels& kernels, size_t n, size_t dim, size_t n_threads) {
  if (kernels.amx_matmul) return n < kernels.amx_min_tokens ? 0 : n;
  if (kernels.lut_lanes == 0 || n < kernels.lut_min_tokens) return 0;
  if (ceil_div(n, kernels.lut_lanes) * ceil_div(dim, kLeastLutRows) < n_threads) return 0;
  const size_t rest = n % kernels.lut_lanes;
  return rest >= kernels.lut_min_rest ? n : n - rest;
}

// Sums of some tokens' products by columns, for the rows of whole units of either type.
size_t column_sums(const Config& c) { return kSparseTokens * (c.dim + 5 * kColumnUnit); }

// How many of n columns are 0 for all tokens, whose values are `stride` apart.
size_t common_zeros(const int8_t* x, size_t n, size_t n_tokens, size_t stride) {
  std::array<int8_t, kMaxColumns> any{};
  for (size_t t = 0; t < n_tokens; t++)
    for (size_t i = 0; i < n; i++) any[i] |= x[t * stride + i];
  return static_cast<size_t>(std::count(any.begin(), any.begin() + static_cast<std::ptrdiff_t>(n), int8_t{0}));
}

size_t tile_lanes(const Kernels& kernels, size_t max_batch) {
  return kernels.lut_lanes == 0 ? 0 : round_up(max_batch, 2 * kernels.lut_lanes);
}

// Floats of an attention: as attention_at() divides them.
size_t attention_floats(size_t n_queries, size_t head_dim) { return n_queries * (head_dim + 2); }

Attention attention_at(float* p, size_t n_queries) { return {p, p + n_queries, p + 2 * n_queries}; }

}  // namespace

Transformer::Transformer(Model& model, const Kernels& kernels, ThreadPool& pool, size_t max_batch)
    : model_(model),
      config_(model.config()),
      kernels_(kernels),
      pool_(pool),
      max_batch_(max_batch),
      residual_(max_batch * config_.dim),
      normed_(max_batch * widest(config_)),
      quantised_(max_batch * widest(config_)),
      tiles_(tile_lanes(kernels, max_batch) * widest(config_)),
      quantised_sums_(max_batch),
      quantised_scales_(max_batch),
      q_(max_batch * config_.q_dim()),
      k_(max_batch * config_.kv_dim()),
      v_(max_batch * config_.kv_dim()),
      attention_(max_batch * config_.q_dim()),
      gate_(max_batch * config_.ffn_dim),
      up_(max_batch * config_.ffn_dim),
      branch_(max_batch * config_.dim),
      excess_(kernels.lut_lanes == 0 ? 0 : max_batch * config_.dim),
      output_(model, kernels, pool, max_batch),
      cosines_(max_batch * config_.head_dim / 2),
      sines_(max_batch * config_.head_dim / 2),
      codes_(pool.size(), std::vector<uint8_t>(kExpandedRows * widest(config_) / 4)),
      sums_(pool.size(), std::vector<int32_t>(max_batch * kRowsPerPiece)),
      column_sums_(pool.size(),
                   ColumnSums{std::vector<int32_t>(column_sums(config_)), AlignedVector<int8_t>(config_.ffn_dim)}),
      attention_scratch_(pool.size()) {
  const size_t n_queries = kTokensPerGroup * config_.group(), floats = attention_floats(n_queries, config_.head_dim);
  for (AttentionScratch& s : attention_scratch_)
    s = {std::vector<float>(n_queries * config_.head_dim), std::vector<float>(n_queries * kChunkPositions),
         std::vector<float>(floats), std::vector<float>(floats)};
  for (size_t i = 0; i < pool.size() && kernels.lut_lanes > 0; i++)
    lut_scratch_.emplace_back(kernels.lut_lanes, widest(config_));
  if (kernels.amx_matmul) amx_scratch_.resize(pool.size());
}

size_t Transformer::buffer_bytes(const Config& c, size_t max_batch, size_t max_context, size_t n_threads) {
  const size_t per_token =
      6 * widest(c) + 4 * (3 * c.dim + widest(c) + 2 * c.q_dim() + 2 * c.kv_dim() + 2 * c.ffn_dim + c.head_dim + 2);
  const size_t partial =
      ceil_div(max_context, kChunkPositions) * attention_floats(kFewAttending * c.n_heads, c.head_dim);
  const size_t n_queries = kTokensPerGroup * c.group();
  const size_t scratch = n_queries * (c.head_dim + kChunkPositions) + 2 * attention_floats(n_queries, c.head_dim);
  return max_batch * per_token + 4 * partial +
         n_threads * (4 * (max_batch * kRowsPerPiece + column_sums(c) + scratch) + c.ffn_dim +
                      LutScratch::bytes(kMaxLutLanes, widest(c)));
}

uint64_t Transformer::bytes_skipped() const {
  uint64_t n = 0;
  for (const ColumnSums& s : column_sums_) n += s.bytes_skipped;
  return n;
}

// Block after block: norm, q, k and v, rotation, attention, its own norm, output; norm, gate and up, relu² (gate) · up,
// its own norm, down (arXiv 2504.12285).
bool Transformer::forward(std::span<const BatchToken> batch, const std::function<bool()>& abandon) {
  assert(!batch.empty() && batch.size() <= max_batch_);
  const auto start = std::chrono::steady_clock::now();
  n_ = batch.size();
  n_bulk_ = bulk_tokens(kernels_, n_, config_.dim, pool_.size());
  group_tokens(batch);
  embed(batch);
  for (size_t i = 0; i < config_.n_layers; i++) {
    if (abandon && abandon()) return false;
    const Layer& layer = model_.layers()[i];

    const auto ahead = [this](const Next& next) { return [this, next](size_t thread) { fetch_ahead(next, thread); }; };
    norm_and_quantize(residual_.data(), layer.attn_norm, config_.dim, [&](size_t t) {
      if (i > 0) add_to_residual(t);
    });
    project({{&layer.q, q_.data()}, {&layer.k, k_.data()}, {&layer.v, v_.data()}},
            [&](size_t thread) { fetch_cache(batch.back(), i, thread); });
    rotate_and_store(batch, i);
    attend(batch, i, ahead({layer.attn_sub_norm, config_.q_dim(), {region(layer.attn_output)}}));
    norm_and_quantize(attention_.data(), layer.attn_sub_norm, config_.q_dim(), [](size_t) {});
    project({{&layer.attn_output, branch_.data()}},
            ahead({layer.ffn_norm, config_.dim, {region(layer.gate), region(layer.up)}}));

    norm_and_quantize(residual_.data(), layer.ffn_norm, config_.dim, [&](size_t t) { add_to_residual(t); });
    project({{&layer.gate, gate_.data()}, {&layer.up, up_.data()}},
            ahead({layer.ffn_sub_norm, config_.ffn_dim, {region(layer.down)}}));
    norm_and_quantize(gate_.data(), layer.ffn_sub_norm, config_.ffn_dim, [&](size_t t) {
      kernels_.relu2_mul(&gate_[t * config_.ffn_dim], &up_[t * config_.ffn_dim], config_.ffn_dim);
    });
    const Projection down{&layer.down, branch_.data()};
    if (i + 1 < config_.n_layers) {
      const Layer& after = model_.layers()[i + 1];
      project_sparse(down, ahead({after.attn_norm, config_.dim, {region(after.q), region(after.k), region(after.v)}}));
    } else {
      project_sparse(down, ahead({model_.output_norm(), config_.dim, {output_region()}}));
    }
  }
  norm_outputs(batch);
  // The first token is not kept waiting; a long prompt is, by a small part, so that less of the file is in memory.
  if (n_passes_++ > 0)
    model_.settle(pool_, kernels_,
                  std::max(Model::kLeastSettling, (std::chrono::steady_clock::now() - start) / kSettlingShare));
  return true;
}

// f(t, thread) for every token of the batch.
template <class F>
void Transformer::for_each_token(F&& f) {
  if (n_ == 1)
    f(size_t{0}, size_t{0});
  else
    pool_.for_each(n_, f);
}

void Transformer::embed(std::span<const BatchToken> batch) {
  const size_t half = config_.head_dim / 2;
  const FloatRows& embedding = model_.token_embedding();
  for_each_token([&](size_t t, size_t) {
    std::vector<uint8_t> copy(row_bytes(embedding.type, embedding.cols));
    decode_row(model_.read_row(embedding, static_cast<size_t>(batch[t].token), copy), 0, &residual_[t * config_.dim]);
    for (size_t i = 0; i < half; i++) {
      const float angle = static_cast<float>(batch[t].position) * model_.rope_frequencies()[i];
      const SinCos value = sin_cos(static_cast<double>(angle));
      cosines_[t * half + i] = static_cast<float>(value.cosine);
      sines_[t * half + i] = static_cast<float>(value.sine);
    }
  });
}

// first(t) brings a token's vector about, so that it is still in the cache when it is read.
template <class F>
void Transformer::norm_and_quantize(const float* in, const float* weight, size_t dim, F&& first) {
  for_each_token([&](size_t t, size_t) {
    first(t);
    kernels_.rms_norm(in + t * dim, weight, config_.norm_epsilon, dim, &normed_[t * dim]);
    quantised_scales_[t] = kernels_.quantize(&normed_[t * dim], dim, &quantised_[t * dim], &quantised_sums_[t]);
  });
}

// The tile of tokens from t on that go by look-up.
Transformer::Tile Transformer::tile_at(size_t t) const {
  if (t < n_wide_) return {true, std::min(2 * kernels_.lut_lanes, n_wide_ - t)};
  return {false, std::min(kernels_.lut_lanes, n_bulk_ - t)};
}

void Transformer::make_tiles(size_t cols) {
  if (n_bulk_ == 0 || kernels_.lut_lanes == 0) return;
  const size_t lanes = kernels_.lut_lanes, n_wide_tiles = ceil_div(n_wide_, 2 * lanes);
  pool_.for_each(n_wide_tiles + ceil_div(n_bulk_ - n_wide_, lanes), [&](size_t i, size_t) {
    const size_t t = i < n_wide_tiles ? i * 2 * lanes : n_wide_ + (i - n_wide_tiles) * lanes;
    const Tile tile = tile_at(t);
    (tile.wide ? kernels_.transpose_wide_tile : kernels_.transpose_tile)(&quantised_[t * cols], cols, tile.n_tokens,
                                                                         &tiles_[t * cols]);
  });
}

// then(thread) is called by every thread that is done.
template <class F>
void Transformer::project(std::initializer_list<Projection> projections, F&& then) {
  const size_t n_lookup = n_bulk_;
  for (const Projection& p : projections)
    if (n_bulk_ > 0 && !kernels_.amx_matmul && !is_ternary(*p.matrix, pool_)) n_bulk_ = 0;  // for these
  make_tiles(projections.begin()->matrix->cols);
  pieces_.clear();
  add_bulk_pieces(projections);
  if (n_bulk_ < n_)
    for (const Projection& p : projections)
      for (size_t r = 0; r < p.matrix->rows; r += kRowsPerPiece)
        pieces_.push_back({&p, r, std::min(kRowsPerPiece, p.matrix->rows - r), n_bulk_, n_ - n_bulk_});
  pool_.for_each(
      pieces_.size(),
      [&](size_t i, size_t thread) {
        if (pieces_[i].first_token < n_bulk_)
          in_bulk(pieces_[i], thread);
        else
          by_multiplication(pieces_[i], thread);
      },
      then);
  n_bulk_ = n_lookup;
}

// Pieces as large as pays, but enough of them for all threads: first the tiles are divided, then the rows.
void Transformer::add_bulk_pieces(std::initializer_list<Projection> projections) {
  if (n_bulk_ == 0) return;
  if (kernels_.amx_matmul) return add_amx_pieces(projections);
  const bool wide = n_wide_ > 0;
  const size_t lanes = (wide ? 2 : 1) * kernels_.lut_lanes, n_tiles = ceil_div(n_bulk_, lanes);
  const size_t n_pieces = (wide ? kWidePiecesPerThread : kPiecesPerThread) * pool_.size();
  size_t n_rows = 0, n_chunks = 0;
  for (const Projection& p : projections) n_rows += p.matrix->rows;
  const size_t most = std::clamp(round_up(ceil_div(n_rows * n_tiles, n_pieces), kLanes), kLeastLutRows, kLutRows);
  const auto chunk = [&](const TernaryMatrix& m) {
    const size_t unit = m.by_columns ? m.columns().unit_rows() : kLanes;
    return round_up(ceil_div(m.rows, ceil_div(m.rows, most / unit * unit)), unit);
  };
  for (const Projection& p : projections) n_chunks += ceil_div(p.matrix->rows, chunk(*p.matrix));
  const size_t tokens = lanes * std::clamp(n_tiles * n_chunks / n_pieces, size_t{1}, kMostTiles);
  for (const Projection& p : projections) {
    const size_t rows = p.matrix->rows, step = chunk(*p.matrix);
    for (size_t r = 0; r < rows; r += step)
      for (size_t t = 0; t < n_bulk_; t += tokens)
        pieces_.push_back({&p, r, std::min(step, rows - r), t, std::min(tokens, n_bulk_ - t)});
  }
}

// First the rows are divided, then the tokens: weights are laid out in tiles anew for each piece of them.
void Transformer::add_amx_pieces(std::initializer_list<Projection> projections) {
  const size_t n_pieces = kPiecesPerThread * pool_.size();
  size_t n_rows = 0, n_chunks = 0;
  for (const Projection& p : projections) n_rows += p.matrix->rows;
  const size_t rows = std::clamp(round_up(ceil_div(n_rows, n_pieces), kAmxSide), kLeastAmxRows, kMostAmxRows);
  const auto chunk = [&](const TernaryMatrix& m) { return m.by_columns ? m.columns().unit_rows() : rows; };
  for (const Projection& p : projections) n_chunks += ceil_div(p.matrix->rows, chunk(*p.matrix));
  const size_t tokens = std::clamp(round_up(ceil_div(n_bulk_ * n_chunks, n_pieces), kAmxSide), kAmxSide, kAmxTokens);
  for (const Projection& p : projections)
    for (size_t r = 0; r < p.matrix->rows; r += chunk(*p.matrix))
      for (size_t t = 0; t < n_bulk_; t += tokens)
        pieces_.push_back({&p, r, std::min(chunk(*p.matrix), p.matrix->rows - r), t, std::min(tokens, n_bulk_ - t)});
}

// A sparse matrix: the columns that a token's zeros would multiply are not read, unless so many tokens share the read
// that look-up takes it whole.
template <class F>
void Transformer::project_sparse(const Projection& projection, F&& then) {
  if (!projection.matrix->by_columns) return project({projection}, then);
  if (n_bulk_ > 0) {
    const std::initializer_list<Projection> one{projection};  // pieces point into it
    n_wide_ = wide_tokens(*projection.matrix);
    if (n_wide_ > 0) cap(*projection.matrix);
    make_tiles(projection.matrix->cols);
    pieces_.clear();
    add_bulk_pieces(one);
    pool_.for_each(pieces_.size(), [&](size_t i, size_t thread) { in_bulk(pieces_[i], thread); });
    n_wide_ = 0;
  }
  for (size_t t = n_bulk_; t < n_; t += kSparseTokens)
    add_columns(projection, t, std::min(kSparseTokens, n_ - t), then);
}

// How many of the tokens that go by look-up do so in wide tiles, if their activations are small enough.
size_t Transformer::wide_tokens(const TernaryMatrix& w) const {
  const size_t lanes = kernels_.lut_lanes;
  if (lanes == 0 || w.cols > kMaxWideCols || n_bulk_ <= lanes) return 0;
  size_t n_steps = 0, n_capped = 0;
  for (size_t t = 0; t < n_bulk_; t += kSampledTokens) {
    n_steps += w.cols / (4 * kLutGroups);
    n_capped += kernels_.steps_above_cap(&quantised_[t * w.cols], w.cols);
  }
  if (n_capped * kCappedShare > n_steps) return 0;
  const size_t rest = n_bulk_ % (2 * lanes);
  return rest > lanes ? n_bulk_ : n_bulk_ - rest;
}

// Caps the tokens that go by look-up in wide tiles; what their excess comes to → excess_.
void Transformer::cap(const TernaryMatrix& w) {
  const TernaryColumns columns = w.columns();
  const auto add = w.type == TernaryType::kCodes ? kernels_.add_columns : kernels_.add_trit_columns;
  pool_.for_each(n_wide_, [&](size_t t, size_t thread) {
    ColumnSums& s = column_sums_[thread];
    const size_t n = kernels_.cap(columns, &quantised_[t * w.cols], s.excess.data());
    std::fill_n(s.sums.begin(), columns.n_units() * columns.unit_rows(), 0);
    const size_t step = n <= kMaxColumns ? w.cols : kMaxColumns;  // one run of all columns, as a rule
    if (n > 0)
      for (size_t c = 0; c < w.cols; c += step)
        add(columns, s.excess.data(), {c, std::min(step, w.cols - c)}, {}, s.sums.data());
    std::fill_n(s.excess.begin(), w.cols, int8_t{0});
    std::copy_n(s.sums.begin(), w.rows, &excess_[t * w.rows]);
  });
}

// Every thread adds up some of the columns, for all rows; then the threads' sums are added.
template <class F>
void Transformer::add_columns(const Projection& projection, size_t first_token, size_t n_tokens, F&& then) {
  const TernaryMatrix& w = *projection.matrix;
  const TernaryColumns columns = w.columns();
  const size_t n_rows = columns.n_units() * columns.unit_rows(), n_pieces = ceil_div(w.cols, kMaxColumns);
  const auto add = w.type == TernaryType::kCodes ? kernels_.add_columns : kernels_.add_trit_columns;
  const auto run = [&](size_t piece) {
    return ColumnRun{piece * kMaxColumns, std::min(kMaxColumns, w.cols - piece * kMaxColumns)};
  };
  const int8_t* x = &quantised_[first_token * w.cols];
  for (ColumnSums& s : column_sums_) s.any = false;
  const auto add_piece = [&](size_t piece, size_t thread) {
    ColumnSums& s = column_sums_[thread];
    const ColumnRun here = run(piece);
    const std::optional<size_t> next = pool_.upcoming(thread);
    if (!s.any) std::fill_n(s.sums.begin(), n_tokens * n_rows, 0);
    if (!s.any || s.asked != piece) add(columns, x, {}, here, s.sums.data());
    for (size_t i = 0; i < n_tokens; i++)
      add(columns, x + i * w.cols, here, next ? run(*next) : ColumnRun{}, &s.sums[i * n_rows]);
    s.any = true;
    s.asked = next;
    s.bytes_skipped += common_zeros(x + here.first, here.n, n_tokens, w.cols) * columns.column_bytes();
  };
  pool_.for_each(n_pieces, add_piece, then);
  const auto finish = [&](size_t i, size_t) {
    int32_t* total = nullptr;
    for (ColumnSums& s : column_sums_) {
      if (!s.any) continue;
      int32_t* sums = &s.sums[i * n_rows];
      if (total == nullptr) {
        total = sums;
        continue;
      }
      prefetch(sums, w.rows * sizeof(int32_t));  // from another processor's cache, line after line
      for (size_t r = 0; r < w.rows; r++) total[r] += sums[r];
    }
    const size_t t = first_token + i;
    kernels_.dequantize(total, quantised_scales_[t], w.scale, w.rows, projection.out + t * w.rows);
  };
  if (n_tokens == 1)
    finish(0, 0);
  else
    pool_.for_each(n_tokens, finish);
}

Transformer::Region Transformer::region(const TernaryMatrix& m) {
  if (m.by_columns) return {};  // which of them is not known yet
  return {m.data, m.rows, m.all().row_bytes()};
}

Transformer::Region Transformer::output_region() const {
  if (model_.n_sketched() == 0) return {};
  const TernaryRows& codes = model_.output_sketch().planes[0].codes;
  return {codes.data, model_.n_sketched(), codes.row_bytes()};
}

// Asks for what the thread will read first after this loop, so that memory is not idle between two loops. Many tokens
// compute for long: there it would only displace what they need.
void Transformer::fetch_ahead(const Next& next, size_t thread) const {
  if (n_bulk_ > 0) return;
  if (thread == 0) prefetch(next.weights, next.n_weights * sizeof(float));
  size_t n_pieces = 0;
  for (const Region& r : next.regions) n_pieces += ceil_div(r.rows, kRowsPerPiece);
  size_t piece = pool_.first_piece(n_pieces, thread);
  for (const Region& r : next.regions) {
    if (const size_t pieces = ceil_div(r.rows, kRowsPerPiece); piece >= pieces) {
      piece -= pieces;
      continue;
    }
    prefetch(r.data + piece * kRowsPerPiece * r.row_bytes, kAheadBytes);
    return;
  }
}

// The same of the keys that a token alone attends to, and of the blocks that its own keys are written to.
void Transformer::fetch_cache(const BatchToken& token, size_t layer, size_t thread) const {
  if (n_ > 1) return;
  const size_t n_chunks = token.position / kChunkPositions + 1;
  const size_t piece = pool_.first_piece(n_chunks * config_.n_kv_heads, thread);
  const size_t chunk = piece / config_.n_kv_heads, kv_head = piece % config_.n_kv_heads;
  const size_t n_positions = std::min(kChunkPositions, token.position + 1 - chunk * kChunkPositions);
  const size_t block_bytes = kPositionsPerBlock * number_bytes(token.cache->type(), config_.head_dim);
  const size_t n_blocks = ceil_div(n_positions, kPositionsPerBlock);
  prefetch(token.cache->keys(chunk, layer, kv_head), std::min(n_blocks * block_bytes, kAheadBytes));
  if (thread > 0) return;
  const size_t block = token.position % kChunkPositions / kPositionsPerBlock;
  for (size_t h = 0; h < config_.n_kv_heads; h++)
    prefetch(token.cache->keys(token.position / kChunkPositions, layer, h) + block * block_bytes, block_bytes);
}

void Transformer::in_bulk(const Piece& piece, size_t thread) {
  if (kernels_.amx_matmul)
    by_amx(piece, thread);
  else
    by_lookup(piece, thread);
}

void Transformer::by_amx(const Piece& piece, size_t thread) {
  const TernaryMatrix& w = *piece.projection->matrix;
  const size_t t = piece.first_token;
  const Activations x{&quantised_[t * w.cols], &quantised_sums_[t], piece.n_tokens};
  float* out = piece.projection->out + t * w.rows + piece.first_row;
  if (w.by_columns)
    kernels_.amx_column_matmul(w.columns(), piece.first_row, piece.n_rows, x, &quantised_scales_[t], w.scale,
                               amx_scratch_[thread], out, w.rows);
  else
    kernels_.amx_matmul(w.all().slice(piece.first_row, piece.n_rows), x, &quantised_scales_[t], w.scale,
                        amx_scratch_[thread], out, w.rows);
}

void Transformer::by_lookup(const Piece& piece, size_t thread) {
  const TernaryMatrix& w = *piece.projection->matrix;
  LutScratch& scratch = lut_scratch_[thread];
  if (w.by_columns)
    kernels_.lut_column_numbers(w.columns(), piece.first_row, piece.n_rows, scratch);
  else
    kernels_.lut_numbers(w.all().slice(piece.first_row, piece.n_rows), scratch);
  Tile tile;
  for (size_t t = piece.first_token; t < piece.first_token + piece.n_tokens; t += tile.n_tokens) {
    tile = tile_at(t);
    const size_t at = t * w.rows + piece.first_row;
    if (tile.wide)
      kernels_.wide_lut(piece.n_rows, w.cols, &tiles_[t * w.cols], tile.n_tokens, &quantised_scales_[t], w.scale,
                        &excess_[at], scratch, piece.projection->out + at, w.rows);
    else
      kernels_.ternary_lut(piece.n_rows, w.cols, &tiles_[t * w.cols], tile.n_tokens, &quantised_scales_[t], w.scale,
                           scratch, piece.projection->out + at, w.rows);
  }
}

void Transformer::by_multiplication(const Piece& piece, size_t thread) {
  const TernaryMatrix& w = *piece.projection->matrix;
  int32_t* sums = sums_[thread].data();
  const Activations activations{&quantised_[piece.first_token * w.cols], &quantised_sums_[piece.first_token],
                                piece.n_tokens};
  const TernaryRows rows = w.all().slice(piece.first_row, piece.n_rows);
  if (rows.type == TernaryType::kCodes)
    kernels_.ternary_matmul(rows, activations, sums, kRowsPerPiece);
  else if (computes_from_trits(kernels_, rows.cols))
    kernels_.trit_matmul(rows, activations, sums, kRowsPerPiece);
  else
    by_expansion(rows, activations, sums, codes_[thread]);
  for (size_t i = 0; i < piece.n_tokens; i++) {
    const size_t t = piece.first_token + i;
    kernels_.dequantize(sums + i * kRowsPerPiece, quantised_scales_[t], w.scale, piece.n_rows,
                        piece.projection->out + t * w.rows + piece.first_row);
  }
}

// Expands some rows into the processor's cache and multiplies those.
void Transformer::by_expansion(const TernaryRows& trits, const Activations& x, int32_t* sums,
                               std::vector<uint8_t>& codes) {
  for (size_t r = 0; r < trits.rows; r += kExpandedRows) {
    const size_t n = std::min(kExpandedRows, trits.rows - r);
    expand_rows(kernels_.expand_trits, trits.slice(r, n), codes.data());
    kernels_.ternary_matmul({TernaryType::kCodes, codes.data(), n, trits.cols}, x, sums + r, kRowsPerPiece);
  }
}

void Transformer::rotate_and_store(std::span<const BatchToken> batch, size_t layer) {
  const size_t head_dim = config_.head_dim, half = head_dim / 2;
  for_each_token([&](size_t t, size_t) {
    const KvCache& cache = *batch[t].cache;
    for (size_t h = 0; h < config_.n_heads; h++)
      kernels_.rope(&q_[t * config_.q_dim() + h * head_dim], &cosines_[t * half], &sines_[t * half], head_dim);
    for (size_t h = 0; h < config_.n_kv_heads; h++) {
      float* key = &k_[t * config_.kv_dim() + h * head_dim];
      const float* value = &v_[t * config_.kv_dim() + h * head_dim];
      kernels_.rope(key, &cosines_[t * half], &sines_[t * half], head_dim);
      const size_t chunk = batch[t].position / kChunkPositions, place = batch[t].position % kChunkPositions;
      kernels_.store_key(key, cache.keys(chunk, layer, h), cache.type(), place, head_dim);
      kernels_.store_value(value, cache.values(chunk, layer, h), cache.type(), place, head_dim);
    }
  });
}

// Neighbours of one sequence read its cache together.
void Transformer::group_tokens(std::span<const BatchToken> batch) {
  groups_.clear();
  for (size_t t = 0; t < n_; t++) {
    const BatchToken& token = batch[t];
    if (groups_.empty() || groups_.back().n_tokens == kTokensPerGroup || groups_.back().cache != token.cache ||
        groups_.back().first_position + groups_.back().n_tokens != token.position ||
        token.position % kChunkPositions == 0)
      groups_.push_back({token.cache, t, 0, token.position});
    groups_.back().n_tokens++;
  }
}

// A group's queries of a kv head, one after another.
AttentionQueries Transformer::queries_of(const TokenGroup& group, size_t kv_head, std::vector<float>& memory) const {
  const size_t n = config_.group() * config_.head_dim;
  const float* of_first = &q_[group.first_token * config_.q_dim() + kv_head * n];
  if (group.n_tokens == 1) return {of_first, 1, config_.group()};
  for (size_t i = 0; i < group.n_tokens; i++) std::copy_n(of_first + i * config_.q_dim(), n, &memory[i * n]);
  return {memory.data(), group.n_tokens, config_.group()};
}

void Transformer::attend_chunk(const TokenGroup& group, size_t layer, size_t kv_head, size_t chunk,
                               const AttentionQueries& queries, const std::byte* next, std::vector<float>& scores,
                               const Attention& out) const {
  const size_t n_positions = std::min(kChunkPositions, group.first_position + 1 - chunk * kChunkPositions);
  kernels_.attend(queries, group.cache->chunk(chunk, layer, kv_head, n_positions, next), scores.data(), out);
}

template <class F>
void Transformer::attend(std::span<const BatchToken> batch, size_t layer, F&& then) {
  const size_t n_heads = config_.group(), head_dim = config_.head_dim, n_kv_heads = config_.n_kv_heads;
  // sum: of the query heads of a kv head, of one token
  const auto divide = [&](const Attention& sum, size_t t, size_t kv_head) {
    kernels_.divide_attention(sum, n_heads, head_dim, &attention_[t * config_.q_dim() + kv_head * n_heads * head_dim]);
  };
  size_t n_chunks = 0, most = 0;  // of all groups, of one
  for (const TokenGroup& g : groups_) {
    n_chunks += g.n_chunks();
    most = std::max(most, g.n_chunks());
  }
  if (n_ > kFewAttending || most == 1) {
    // Enough work for all threads: each takes a group and a head through all chunks.
    const auto attend_group = [&](size_t piece, size_t thread) {
      const TokenGroup& g = groups_[piece % groups_.size()];
      const size_t kv_head = piece / groups_.size();
      AttentionScratch& scratch = attention_scratch_[thread];
      const AttentionQueries queries = queries_of(g, kv_head, scratch.queries);
      const Attention sum = attention_at(scratch.sum.data(), queries.n());
      const Attention next = attention_at(scratch.next.data(), queries.n());
      for (size_t chunk = 0; chunk < g.n_chunks(); chunk++) {
        const std::byte* after = nullptr;
        if (chunk + 1 < g.n_chunks())
          after = g.cache->keys(chunk + 1, layer, kv_head);
        else if (const std::optional<size_t> upcoming = pool_.upcoming(thread); upcoming && n_ == 1)
          after = g.cache->keys(0, layer, *upcoming);
        attend_chunk(g, layer, kv_head, chunk, queries, after, scratch.scores, chunk == 0 ? sum : next);
        if (chunk > 0) kernels_.add_attention(sum, next, queries.n(), head_dim);
      }
      for (size_t i = 0; i < g.n_tokens; i++) divide(sum.from(i * n_heads, head_dim), g.first_token + i, kv_head);
    };
    pool_.for_each(groups_.size() * n_kv_heads, attend_group, then);
    return;
  }
  // A few tokens that look back far: chunks are divided among the threads, in the order in which they lie in memory,
  // and put together afterwards.
  const size_t n_queries = n_ * n_heads, floats = attention_floats(n_queries, head_dim);
  partial_attention_.resize(n_kv_heads * most * floats);
  const auto partial = [&](size_t t, size_t kv_head, size_t chunk) {
    return attention_at(&partial_attention_[(kv_head * most + chunk) * floats], n_queries).from(t * n_heads, head_dim);
  };
  struct Place {
    const TokenGroup* group;
    size_t kv_head, chunk;
  };
  const auto place_of = [&](size_t piece) {
    size_t chunk = piece / n_kv_heads;
    const TokenGroup* g = groups_.data();
    for (; chunk >= g->n_chunks(); g++) chunk -= g->n_chunks();
    return Place{g, piece % n_kv_heads, chunk};
  };
  const auto attend_piece = [&](size_t piece, size_t thread) {
    const Place here = place_of(piece);
    const std::byte* next = nullptr;
    if (const std::optional<size_t> upcoming = pool_.upcoming(thread)) {
      const Place there = place_of(*upcoming);
      next = there.group->cache->keys(there.chunk, layer, there.kv_head);
    }
    AttentionScratch& scratch = attention_scratch_[thread];
    attend_chunk(*here.group, layer, here.kv_head, here.chunk, queries_of(*here.group, here.kv_head, scratch.queries),
                 next, scratch.scores, partial(here.group->first_token, here.kv_head, here.chunk));
  };
  pool_.for_each(n_chunks * n_kv_heads, attend_piece, then);
  pool_.for_each(n_ * n_kv_heads, [&](size_t piece, size_t) {
    const size_t t = piece / n_kv_heads, kv_head = piece % n_kv_heads;
    const Attention sum = partial(t, kv_head, 0);
    for (size_t chunk = 1; chunk * kChunkPositions <= batch[t].position; chunk++)
      kernels_.add_attention(sum, partial(t, kv_head, chunk), n_heads, head_dim);
    divide(sum, t, kv_head);
  });
}

void Transformer::add_to_residual(size_t t) {
  kernels_.add(&residual_[t * config_.dim], &branch_[t * config_.dim], config_.dim);
}

void Transformer::norm_outputs(std::span<const BatchToken> batch) {
  output_.clear();
  for (size_t t = 0; t < n_; t++)
    if (batch[t].wants_logits) {
      add_to_residual(t);
      kernels_.rms_norm(&residual_[t * config_.dim], model_.output_norm(), config_.norm_epsilon, config_.dim,
                        output_.add());
    }
}

}  // namespace bitnet
