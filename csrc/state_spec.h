// What a model's state looks like, as runtime/spec.py describes it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "json.h"

namespace goslet {

struct StateTensorSpec {
    std::string name;
    std::vector<std::size_t> shape;
    std::string axes;
    double init;

    bool operator==(const StateTensorSpec& other) const {
        return name == other.name && shape == other.shape && axes == other.axes && init == other.init;
    }
    std::size_t n_elements() const;
    // For messages.
    std::string shown() const;
};

struct StateSpec {
    std::int64_t layout_version;
    std::vector<StateTensorSpec> tensors;  // in the state's order

    // Throws JsonError and ContainerError; no state is larger than StateBuffer::kMaxSizeBytes.
    static StateSpec from_json(const Json& value, const std::string& place);
    std::string to_json() const;
    // Bytes of the tensors one after another, without gaps.
    std::size_t size_bytes() const;
};

}  // namespace goslet
