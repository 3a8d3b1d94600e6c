// Members of the table for AVX-512 with VBMI that differ from the one without (kernels.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace bitnet::avx512_vbmi {

void expand_trits(const uint8_t* packed, size_t units, uint8_t* codes);
void trit_matmul(const TernaryRows& w, const Activations& x, int32_t* out, size_t out_stride);

}  // namespace bitnet::avx512_vbmi
