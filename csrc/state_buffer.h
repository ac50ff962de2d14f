// One model state: every tensor in a single allocation that never moves.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace goslet {

// Shape and fresh value of one float32 tensor of a state.
struct StateTensorLayout {
    std::vector<std::size_t> shape;
    float init;

    bool operator==(const StateTensorLayout& other) const { return shape == other.shape && init == other.init; }
};

// Owns the tensors of one state. The allocation and the start of every tensor are aligned to kAlignment bytes; gaps
// between tensors stay zero. Addresses are fixed from construction to destruction, so that backends may bind them.
class StateBuffer {
  public:
    static constexpr std::size_t kAlignment = 64;
    // Far above any real model (RWKV-7 14B needs 66 MB) and low enough that a forged shape cannot exhaust memory.
    static constexpr std::size_t kMaxSizeBytes = std::size_t{1} << 32;

    // Throws std::invalid_argument for an empty layout, shape or dimension, std::length_error past kMaxSizeBytes and
    // std::bad_alloc. The new buffer holds the fresh state.
    explicit StateBuffer(std::vector<StateTensorLayout> layout);

    StateBuffer(const StateBuffer&) = delete;
    StateBuffer& operator=(const StateBuffer&) = delete;

    void reset() noexcept;
    // Throws std::invalid_argument when the layouts differ; this buffer is then unchanged.
    void copy_from(const StateBuffer& other);
    std::unique_ptr<StateBuffer> clone() const;

    std::size_t size_bytes() const noexcept { return size_bytes_; }
    float* data() noexcept { return data_.get(); }
    const float* data() const noexcept { return data_.get(); }

    const std::vector<StateTensorLayout>& layout() const noexcept { return layout_; }
    // Tensor `index` of the layout; throws std::out_of_range.
    float* tensor(std::size_t index) { return data_.get() + offsets_.at(index); }
    const float* tensor(std::size_t index) const { return data_.get() + offsets_.at(index); }

  private:
    struct AlignedDelete {
        void operator()(float* data) const noexcept;
    };

    std::vector<StateTensorLayout> layout_;
    std::vector<std::size_t> offsets_;     // (tensors), in floats
    std::vector<std::size_t> n_elements_;  // (tensors)
    std::size_t size_bytes_ = 0;
    std::unique_ptr<float, AlignedDelete> data_;
};

}  // namespace goslet
