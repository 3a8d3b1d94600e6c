// Packed models: the same weights in fewer bytes, laid out once, ahead of the upload.
//
// A packed file is a GGUF container:
// - ternary weights have the type TRITS: five in a byte (kernels.h, expand_trits); the tensor's scale (f32) and 28 zero
//   bytes follow;
// - the embedding and the output matrix are Q8_0 or Q6_K;
// - tensors stand in the order of their use: embedding, layers, norm of the output.
// Keys are those of the original and bitnet.pack.version (gguf.h), bitnet.pack.chunk_bytes and bitnet.pack.chunk_crc32:
// the CRC-32 (zlib's) of each chunk of the data section, so that a copy made in parallel ranges can be verified as it
// arrives.
#pragma once

#include <cstddef>
#include <string>

namespace bitnet {

inline constexpr size_t kPackChunkBytes = size_t{8} << 20;

// Writes the model of the GGUF file `input` packed to `output`, by way of a temporary file beside it, holding some
// megabytes of it at a time. output_bits: 8 or 6, of the embedding and the output matrix. Throws Error.
void pack(const std::string& input, const std::string& output, unsigned output_bits);

}  // namespace bitnet
