// Members of the table for AVX-512 with VBMI that differ from the one without (kernels.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace bitnet::avx512_vbmi {

void expand_trits(const uint8_t* packed, size_t units, uint8_t* codes);
void trits_by_vector(const TernaryRows& w, const int8_t* x, int32_t sum, int32_t* out);

}  // namespace bitnet::avx512_vbmi
