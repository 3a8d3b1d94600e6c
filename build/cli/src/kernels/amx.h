// What AMX adds to AVX-512 with VBMI (kernels.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "amx_scratch.h"
#include "kernels.h"

namespace bitnet::amx {

// Whether the operating system lets this process use the tiles, for which it must be asked.
bool permitted();

void matmul(const TernaryRows& w, const Activations& x, const float* activation_scales, float weight_scale,
            AmxScratch& scratch, float* out, size_t out_stride);
void column_matmul(const TernaryColumns& w, size_t first_row, size_t n_rows, const Activations& x,
                   const float* activation_scales, float weight_scale, AmxScratch& scratch, float* out,
                   size_t out_stride);

}  // namespace bitnet::amx
