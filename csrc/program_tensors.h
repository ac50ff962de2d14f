// The tensors that a program names, held to what it needs of them: each is of the shape and layout that a step asks
// for, or refused by name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernels/matrix.h"
#include "native_engine.h"
#include "steps.h"

namespace goslet {

// A shape as errors show it.
std::string shape_text(const std::vector<std::size_t>& shape);

// What steps point into besides the file.
struct DecodedTensors {
    std::vector<AlignedArray<float>> numbers;
    std::vector<AlignedArray<std::uint16_t>> places;
};

// Members called with a place name it in the EngineError that they throw.
class ProgramTensors {
  public:
    // Checks lengths, formats and groups of all tensors. What is decoded is kept in `decoded`, which must outlive this.
    ProgramTensors(const std::vector<TensorView>& tensors, DecodedTensors& decoded);

    const TensorView& of_shape(const std::string& name, const std::string& place,
                               const std::vector<std::size_t>& shape) const;

    // A tensor in rows, [n_rows, up to max_columns].
    const TensorView& rows(const std::string& name, const std::string& place, std::size_t n_rows,
                           std::size_t max_columns) const;

    // A packed matrix.
    Matrix matrix(const std::string& name, const std::string& place, std::size_t n_out, std::size_t n_in) const;

    // A vector of `size` numbers.
    const float* vector(const std::string& name, const std::string& place, std::size_t size);

    // A tensor in rows as float32, made once however many steps have it.
    const float* decoded(const TensorView& stored);

    // The same of a matrix, with its axes exchanged.
    const float* turned(const TensorView& stored);

    // Places of inputs: a copy, which stays within bounds whatever becomes of the file.
    const std::uint16_t* places(const TensorView& stored);

  private:
    const TensorView& named(const std::string& name, const std::string& place) const;

    DecodedTensors& kept_;
    std::unordered_map<std::string, const TensorView*> tensors_;
    std::unordered_map<std::string, const float*> decoded_;
    std::unordered_map<std::string, const float*> turned_;
    std::unordered_map<std::string, const std::uint16_t*> places_;
};

}  // namespace goslet
