// The embedding: plain rows, of which a step reads one.
#pragma once

#include <cstddef>

#include "native_engine.h"

namespace goslet {

// Row `index` of a matrix in rows (runtime/weights.py) as float32: out (row length).
void decode_row(const TensorView& matrix, std::size_t index, float* out);

// Bytes that a tensor in rows of this shape takes, without its scales, and its scales' bytes. The product of
// its sizes is at most 2^40, as program_tensors.cpp sees to.
std::size_t rows_data_bytes(Format format, const std::vector<std::size_t>& shape);
std::size_t rows_scales_bytes(std::size_t group, const std::vector<std::size_t>& shape);

}  // namespace goslet
