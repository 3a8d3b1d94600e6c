// Members of the table for AVX-512 with VBMI that differ from the one without (kernels.h).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace bitnet::avx512_vbmi {

void expand_trits(const uint8_t* packed, size_t units, uint8_t* codes);
void lut_column_numbers(const TernaryColumns& w, size_t first_row, size_t n_rows, LutScratch& scratch);
void trit_matmul(const TernaryRows& w, const Activations& x, int32_t* out, size_t out_stride);

void add_trit_columns(const TernaryColumns& w, const int8_t* x, ColumnRun here, ColumnRun next, int32_t* sums);

}  // namespace bitnet::avx512_vbmi
