#include "state_buffer.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

namespace goslet {
namespace {

constexpr std::size_t kMaxElements = StateBuffer::kMaxSizeBytes / sizeof(float);
constexpr std::size_t kAlignmentElements = StateBuffer::kAlignment / sizeof(float);

[[noreturn]] void throw_too_large(std::size_t index) {
    throw std::length_error("state tensor " + std::to_string(index) + " takes the state past " +
                            std::to_string(StateBuffer::kMaxSizeBytes) + " bytes");
}

std::size_t checked_elements(const StateTensorLayout& tensor, std::size_t index) {
    if (tensor.shape.empty()) {
        throw std::invalid_argument("state tensor " + std::to_string(index) + " has no dimensions");
    }
    std::size_t n_elements = 1;
    for (const std::size_t size : tensor.shape) {
        if (size == 0) {
            throw std::invalid_argument("state tensor " + std::to_string(index) + " has a dimension of 0");
        }
        if (size > kMaxElements / n_elements) {
            throw_too_large(index);
        }
        n_elements *= size;
    }
    return n_elements;
}

}  // namespace

void StateBuffer::AlignedDelete::operator()(float* data) const noexcept {
    ::operator delete(data, std::align_val_t{kAlignment});
}

StateBuffer::StateBuffer(std::vector<StateTensorLayout> layout) : layout_(std::move(layout)) {
    if (layout_.empty()) {
        throw std::invalid_argument("a state needs at least one tensor");
    }
    std::size_t total = 0;
    for (std::size_t index = 0; index < layout_.size(); ++index) {
        const std::size_t n_elements = checked_elements(layout_[index], index);
        const std::size_t padded = (n_elements + kAlignmentElements - 1) / kAlignmentElements * kAlignmentElements;
        if (padded > kMaxElements - total) {
            throw_too_large(index);
        }
        offsets_.push_back(total);
        n_elements_.push_back(n_elements);
        total += padded;
    }
    size_bytes_ = total * sizeof(float);
    data_.reset(static_cast<float*>(::operator new(size_bytes_, std::align_val_t{kAlignment})));
    std::fill_n(data_.get(), total, 0.0F);
    reset();
}

void StateBuffer::reset() noexcept {
    for (std::size_t index = 0; index < layout_.size(); ++index) {
        std::fill_n(data_.get() + offsets_[index], n_elements_[index], layout_[index].init);
    }
}

void StateBuffer::copy_from(const StateBuffer& other) {
    if (&other == this) {
        return;
    }
    if (layout_ != other.layout_) {
        throw std::invalid_argument("the states have different layouts");
    }
    std::memcpy(data_.get(), other.data_.get(), size_bytes_);
}

std::unique_ptr<StateBuffer> StateBuffer::clone() const {
    auto twin = std::make_unique<StateBuffer>(layout_);
    twin->copy_from(*this);
    return twin;
}

}  // namespace goslet
