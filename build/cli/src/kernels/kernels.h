// The arithmetic of the engine. One table of functions for each instruction set; every table gives the same bits,
// because integer sums are exact and every float reduction has one fixed order, that of 16 lanes: element i goes to
// lane i mod 16, and lanes are added as a tree (8 + 8, 4 + 4, 2 + 2, 1 + 1). The scalar table is the definition.
//
// Sizes: `cols` of a ternary matrix is a multiple of kTernaryBlock; head_dim, `cols` of the output matrix and every
// other count of floats are multiples of kLanes. Rows and tokens may be any number.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "amx_scratch.h"
#include "lut_scratch.h"

namespace bitnet {

inline constexpr size_t kLanes = 16;              // float lanes of every reduction
inline constexpr size_t kTernaryBlock = 128;      // weights in 32 bytes of I2_S
inline constexpr size_t kPositionsPerBlock = 16;  // positions that lie side by side in the key cache
inline constexpr size_t kChunkPositions = 256;    // that attention takes at a time
inline constexpr size_t kMaxHeadDim = 1024;

// How far ahead a product by few tokens asks for the rows that follow. Rows are read one after another, as one stream.
inline constexpr size_t kPrefetchBytes = 8192;

enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Vbmi, kAmx };
inline constexpr Isa kIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vbmi, Isa::kAmx};
enum class CacheType { kF16, kF32, kI8 };
inline constexpr CacheType kCacheTypes[] = {CacheType::kF16, CacheType::kF32, CacheType::kI8};

// How a row of the output matrix is stored: as in ggml.
enum class RowType { kF32, kF16, kBF16, kQ8_0, kQ6_K };

// Bytes of one row of `cols` weights.
constexpr size_t row_bytes(RowType type, size_t cols) {
  switch (type) {
    case RowType::kF32:
      return cols * 4;
    case RowType::kF16:
    case RowType::kBF16:
      return cols * 2;
    case RowType::kQ8_0:
      return cols / 32 * 34;
    case RowType::kQ6_K:
      break;
  }
  return cols / 256 * 210;
}

std::string_view name_of(Isa isa);
std::string_view name_of(CacheType type);

// How a ternary matrix is stored. Codes: the I2_S layout, 32 bytes hold a block of 128 codes; code c, 0 to 3, is the
// number c − 1, and a ternary weight is one of the first three. Trits: five in a byte; rows are whole numbers of units,
// of which the last may stand for fewer than five blocks.
enum class TernaryType { kCodes, kTrits };
inline constexpr size_t kCodeUnit = 160, kTritUnit = 128;  // bytes of five blocks as codes and as trits
inline constexpr size_t kMaxTritCols = 16384;              // of a row that is computed with as it is
inline constexpr size_t kColumnUnit = 64;                  // bytes of a column, see TernaryColumns
inline constexpr size_t kMaxColumns = 192;                 // of a run
inline constexpr size_t kMaxWideCols = 8192;               // whose capped sums fit in 16 bits

// A run of rows of a ternary matrix.
struct TernaryRows {
  TernaryType type;
  const uint8_t* data;  // (rows, row_bytes())
  size_t rows;
  size_t cols;

  size_t row_bytes() const {
    return type == TernaryType::kCodes ? cols / 4 : (cols / 4 + kCodeUnit - 1) / kCodeUnit * kTritUnit;
  }
  TernaryRows slice(size_t first, size_t count) const { return {type, data + first * row_bytes(), count, cols}; }
};

// A ternary matrix by columns, for activations of which many are 0: the columns of those are not read. A column is
// whole units of 64 bytes, of which byte p holds the weights of rows p, p + 64, p + 128, …: four of them as codes, from
// the highest two bits down, or five as trits, a number of base 3, the first being its highest digit, plus 81 times
// the fifth.
struct TernaryColumns {
  TernaryType type;
  const uint8_t* data;  // (cols, column_bytes())
  size_t rows;
  size_t cols;

  size_t unit_rows() const { return kColumnUnit * (type == TernaryType::kCodes ? 4 : 5); }
  size_t n_units() const { return (rows + unit_rows() - 1) / unit_rows(); }
  size_t column_bytes() const { return n_units() * kColumnUnit; }
};

// Columns from the first on: multiples of 32, of whose activations at most kMaxColumns are not 0.
struct ColumnRun {
  size_t first = 0, n = 0;
};

// Quantised activations of several tokens.
struct Activations {
  const int8_t* values;  // (n_tokens, cols)
  const int32_t* sums;   // (n_tokens): Σ values of a token
  size_t n_tokens;
};

// A run of rows of the output matrix.
struct FloatRows {
  RowType type;
  const uint8_t* data;  // (rows, row_bytes(type, cols))
  size_t rows;
  size_t cols;

  FloatRows slice(size_t first, size_t count) const;
};

inline constexpr size_t kSketchPlanes = 3;

// What sketch_row says of a row: what a plane and those before it make of it is gains[p] · what those before it do,
// plus steps[p] · (codes[p] − 1.5).
struct RowSketch {
  float steps[kSketchPlanes];
  float gains[kSketchPlanes];
  float errors[kSketchPlanes];  // root mean square of what is left then, which is orthogonal to the row
  float peaks[kSketchPlanes];   // the largest of it
  float norm;                   // of the longest of what planes make of the row
};

// Keys and values of one layer and one kv head, of up to kChunkPositions positions. Keys lie in blocks of 16 positions,
// (kChunkPositions / 16, head_dim, 16), so that one vector holds the same dimension of 16 positions; values as
// (kChunkPositions, head_dim). Both are of the cache's type. int8 numbers lie in pairs, as they are multiplied, two
// dimensions of a key, (kChunkPositions / 16, head_dim / 2, 16, 2), and two positions' values, (kChunkPositions / 2,
// head_dim, 2), and are followed by a scale for each position, f32.
struct AttentionChunk {
  const std::byte* keys;    // chunk_bytes(type, head_dim)
  const std::byte* values;  // chunk_bytes(type, head_dim)
  CacheType type;
  size_t n_positions;  // of the first token; each after it attends to one more, as far as the chunk goes
  size_t head_dim;
  const std::byte* next = nullptr;  // what is read afterwards, keys and then values, or nullptr
};

// The queries that share a kv head, of tokens one after another.
struct AttentionQueries {
  const float* values;  // (n_tokens, n_heads, head_dim)
  size_t n_tokens;
  size_t n_heads;  // of a token

  size_t n() const { return n_tokens * n_heads; }
};

// What queries take from some positions, before the division by the total.
struct Attention {
  float* largest;  // (n_queries): the largest score
  float* totals;   // (n_queries): Σ e^(score − largest)
  float* sums;     // (n_queries, head_dim): Σ e^(score − largest) · value

  Attention from(size_t query, size_t head_dim) const {
    return {largest + query, totals + query, sums + query * head_dim};
  }
};

struct Kernels {
  Isa isa;

  // out[i] = x[i] / √(mean(x²) + epsilon) · weight[i]; squares in f32, their mean in f64.
  void (*rms_norm)(const float* x, const float* weight, float epsilon, size_t n, float* out);

  // out[i] = clip(rint(x[i] · s), −128, 127) with s = 127 / max(|x|, 1e-5), which is returned; *sum = Σ out[i].
  float (*quantize)(const float* x, size_t n, int8_t* out, int32_t* sum);

  // out[t · out_stride + r] = Σₖ activations[t][k] · weight[r][k], exactly. Of codes, of which any may be 3.
  // Activations that begin at a multiple of 64 bytes are read fastest.
  void (*ternary_matmul)(const TernaryRows& w, const Activations& x, int32_t* out, size_t out_stride);

  // The same of one token and n rows that lie apart: out[i] is that of rows[i].
  void (*ternary_select)(const TernaryRows& w, const uint32_t* rows, size_t n, const Activations& x, int32_t* out);

  // The same, of trits in rows of at most kMaxTritCols; nullptr where expanding them to codes, once for all tokens, is
  // better.
  void (*trit_matmul)(const TernaryRows& w, const Activations& x, int32_t* out, size_t out_stride);

  // sums[r] += Σ x[c] · weight[r][c] for the columns `here`, exactly, for whole units of rows; a column whose
  // activation is 0 is not read. Asks for what `next` will need meanwhile. Of codes of 0 to 2.
  void (*add_columns)(const TernaryColumns& w, const int8_t* x, ColumnRun here, ColumnRun next, int32_t* sums);
  void (*add_trit_columns)(const TernaryColumns& w, const int8_t* x, ColumnRun here, ColumnRun next,
                           int32_t* sums);  // of trits, or nullptr like trit_matmul

  // Five trits in a byte → 2-bit codes of I2_S: each unit of 128 bytes gives 160. The bytes of a unit are four rows of
  // 32, and so are the first four of its five blocks of codes: byte p of row i is the block's byte p as a number of
  // base 3, plus 81 times code i of the fifth block's byte p. (Of a byte that is damaged, above 242, that code is 2.)
  void (*expand_trits)(const uint8_t* packed, size_t units, uint8_t* codes);

  // And back: codes of 0 to 2 → trits.
  void (*pack_trits)(const uint8_t* codes, size_t units, uint8_t* packed);

  // The same product for many tokens by vector look-up, of codes of 0 to 2 or trits, in two steps. First the rows, at
  // most kLutRows and a multiple of 16, are brought into the scratch, for as many tiles of tokens as there are.
  size_t lut_lanes;       // tokens of a tile; 0: this table has no look-up kernel
  size_t lut_min_tokens;  // a batch of fewer is faster by multiplication, …
  size_t lut_min_rest;    // … and so is a last tile of fewer
  void (*lut_numbers)(const TernaryRows& w, LutScratch& scratch);
  // Of codes by columns, and of trits where there is add_trit_columns; first_row begins a unit, n_rows is a multiple of
  // 64.
  void (*lut_column_numbers)(const TernaryColumns& w, size_t first_row, size_t n_rows, LutScratch& scratch);
  // Then those rows times a tile, dequantised: out[t · out_stride + r] = float(Σ) / activation_scales[t] ·
  // weight_scale. x is as transpose_tile writes it, values within ±127; n_tokens ≤ lut_lanes.
  void (*ternary_lut)(size_t rows, size_t cols, const int8_t* x, size_t n_tokens, const float* activation_scales,
                      float weight_scale, LutScratch& scratch, float* out, size_t out_stride);
  // values (n_tokens, cols) → out (cols, lut_lanes), zeros past n_tokens.
  void (*transpose_tile)(const int8_t* values, size_t cols, size_t n_tokens, int8_t* out);

  // The same for tiles twice as wide, where nearly all activations are small: those of a token are capped, so that Σ
  // |x| of no step of 32 columns is above 127, and what is cut off is multiplied by columns.
  size_t (*steps_above_cap)(const int8_t* x, size_t cols);  // how many steps there are that would be capped
  // x += −excess, for few columns; excess (cols) is 0 before. Returns how many columns it has then, which memory has
  // been asked for.
  size_t (*cap)(const TernaryColumns& w, int8_t* x, int8_t* excess);
  // out[t · out_stride + r] = float(Σ + excess[t · out_stride + r]) / activation_scales[t] · weight_scale for rows and
  // numbers as before and at most kMaxWideCols; n_tokens ≤ 2 · lut_lanes.
  void (*wide_lut)(size_t rows, size_t cols, const int8_t* x, size_t n_tokens, const float* activation_scales,
                   float weight_scale, const int32_t* excess, LutScratch& scratch, float* out, size_t out_stride);
  void (*transpose_wide_tile)(const int8_t* values, size_t cols, size_t n_tokens, int8_t* out);

  // The same by tiles of AMX, in one step, of codes, of which any may be 3, or trits; nullptr where there are none. At
  // most kAmxRows rows, a multiple of 16, and kAmxTokens tokens. Of a matrix by columns, as lut_column_numbers takes
  // it, a unit of rows or a part of it.
  size_t amx_min_tokens;  // fewer are faster by multiplication
  void (*amx_matmul)(const TernaryRows& w, const Activations& x, const float* activation_scales, float weight_scale,
                     AmxScratch& scratch, float* out, size_t out_stride);
  void (*amx_column_matmul)(const TernaryColumns& w, size_t first_row, size_t n_rows, const Activations& x,
                            const float* activation_scales, float weight_scale, AmxScratch& scratch, float* out,
                            size_t out_stride);

  // out[i] = float(sums[i]) / activation_scale · weight_scale, in this order.
  void (*dequantize)(const int32_t* sums, float activation_scale, float weight_scale, size_t n, float* out);

  // x[i] += y[i]
  void (*add)(float* x, const float* y, size_t n);

  // gate[i] = relu(gate[i])² · up[i]
  void (*relu2_mul)(float* gate, const float* up, size_t n);

  // NEOX rotation of one head: pairs (i, i + head_dim / 2) by the angles whose cosines and sines are given, (head_dim /
  // 2).
  void (*rope)(float* head, const float* cosines, const float* sines, size_t head_dim);

  // Puts a key and a value (head_dim) at a position of a chunk, laid out as AttentionChunk says.
  void (*store_key)(const float* key, std::byte* keys, CacheType type, size_t position, size_t head_dim);
  void (*store_value)(const float* value, std::byte* values, CacheType type, size_t position, size_t head_dim);

  // softmax(q kᵀ / √head_dim) v, chunk by chunk: what the queries take from one; scores (n_queries, kChunkPositions) is
  // working memory.
  void (*attend)(const AttentionQueries& queries, const AttentionChunk& chunk, float* scores, const Attention& out);
  // Adds what they take from the next chunk. Chunks are added in their order, wherever they were computed.
  void (*add_attention)(const Attention& sum, const Attention& next, size_t n_queries, size_t head_dim);
  // out (n_queries, head_dim) = sums / totals
  void (*divide_attention)(const Attention& sum, size_t n_queries, size_t head_dim, float* out);

  // The row of w, standardised to u[i] = (weight[i] − means[i]) · inverse_scales[i], in planes of 2-bit codes, each
  // laid out as I2_S, (cols / 4). work: (2, cols)
  RowSketch (*sketch_row)(const FloatRows& w, const float* means, const float* inverse_scales, float* work,
                          uint8_t* const codes[kSketchPlanes]);

  // The indices of those x that are not below `least`, NaN among them, in their order → out (n); returned is how many.
  size_t (*find_not_below)(const float* x, size_t n, float least, uint32_t* out);

  // out[t · out_stride + r] = Σᵢ w.rows[r][i] · x[t · cols + i], with the weights as decode_row gives them.
  void (*dot_rows)(const FloatRows& w, const float* x, size_t n_tokens, float* out, size_t out_stride);
};

// The table for an instruction set that this processor has (asked or not: see supported()).
const Kernels& kernels_for(Isa isa);
bool supported(Isa isa);
Isa best_isa();  // the fastest supported one; kScalar where AVX2, FMA, F16C or BMI2 is missing

// Rows of trits → rows of codes, (rows, cols / 4).
void expand_rows(void (*expand_trits)(const uint8_t*, size_t, uint8_t*), const TernaryRows& trits, uint8_t* codes);

// Whether all codes or trits in these bytes are weights: none is 3, or no byte more than five trits make.
bool are_ternary(TernaryType type, std::span<const uint8_t> bytes);

// Rows of codes that are weights → rows of trits.
void pack_rows(void (*pack_trits)(const uint8_t*, size_t, uint8_t*), const TernaryRows& codes, uint8_t* trits);

// Rows of codes, code_stride bytes apart, those of a unit of w, n_cols columns of each, a multiple of kTernaryBlock →
// that unit of as many columns of w from the first on, at `out`. Of 0 to 2. Rows that the last unit does not have are
// filled with something.
void codes_to_columns(const uint8_t* codes, size_t code_stride, size_t n_cols, const TernaryColumns& w, size_t unit,
                      size_t first_col, uint8_t* out);

// Bytes of one position's key or value: of its numbers, and with its scale; and of a chunk's keys or values.
size_t number_bytes(CacheType type, size_t head_dim);
size_t position_bytes(CacheType type, size_t head_dim);
size_t chunk_bytes(CacheType type, size_t head_dim);

void decode_row(const FloatRows& w, size_t row, float* out);  // (cols)

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VbmiKernels;
extern const Kernels kAmxKernels;

}  // namespace bitnet
