// Packed models: the same weights in fewer bytes, laid out once, ahead of the upload.
//
// A packed file is a GGUF container with types of its own:
// - TRITS: ternary weights, five in a byte (kernels.h, expand_trits); the tensor's scale (f32) and 28 zero bytes
// follow.
// - HIGH4 with LOW4 or LOW2: the output matrix as whole numbers of 8 or 6 bits and an f16 scale for each 32 of them, in
// two planes
//   (kernels.h, RowType); the tensor of the lower plane has the name of the upper one and kLowPlaneSuffix. 8 bits hold
//   just what Q8_0 holds.
// Tensors stand in the order of their use: embedding, layers, norm of the output. Keys are those of the original and
// bitnet.pack.version, bitnet.pack.chunk_bytes and bitnet.pack.chunk_crc32: the CRC-32 (zlib's) of each chunk of the
// data section, so that a copy made in parallel ranges can be verified as it arrives.
#pragma once

#include <cstddef>
#include <string>

namespace bitnet {

inline constexpr const char* kLowPlaneSuffix = ".low";
inline constexpr unsigned kPackVersion = 1;
inline constexpr size_t kPackChunkBytes = size_t{8} << 20;

// Writes the model of the GGUF file `input` packed to `output`, by way of a temporary file beside it. output_bits: 8
// or 6. Throws Error.
void pack(const std::string& input, const std::string& output, unsigned output_bits);

}  // namespace bitnet
