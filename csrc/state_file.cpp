#include "state_file.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "container.h"

namespace goslet {
namespace {

using Kind = ContainerError::Kind;

constexpr ContainerKind kStateFile{"GOSLETST", 1, "state file"};
constexpr const char* kSection = "state";
constexpr std::size_t kCountFloats = sizeof(std::int64_t) / sizeof(float);

void check_finite(const StateSpec& spec, const StateBuffer& state) {
    for (std::size_t index = 0; index < spec.tensors.size(); ++index) {
        const StateTensorSpec& tensor = spec.tensors[index];
        const float* const values = state.tensor(index);
        if (!std::all_of(values, values + tensor.n_elements(), [](float value) { return std::isfinite(value); })) {
            throw ContainerError(Kind::kNotFinite, "the state holds NaN or infinity", "tensor " + shown(tensor.name));
        }
    }
}

void check_layout(const StateSpec& expected, const StateSpec& found) {
    const std::size_t n_tensors = std::max(expected.tensors.size(), found.tensors.size());
    for (std::size_t index = 0; index < n_tensors; ++index) {
        const auto* const wanted = index < expected.tensors.size() ? &expected.tensors[index] : nullptr;
        const auto* const there = index < found.tensors.size() ? &found.tensors[index] : nullptr;
        if (wanted == nullptr || there == nullptr || !(*wanted == *there)) {
            throw ContainerError(Kind::kMismatch, "the state has another layout", "tensor " + std::to_string(index),
                                 wanted == nullptr ? "none" : wanted->shown(),
                                 there == nullptr ? "none" : there->shown());
        }
    }
}

// The token count of a state file that is of this model and layout.
std::int64_t check_header(const Json& header, const std::string& model_id, const StateSpec& spec) {
    const std::string& found_id = header.need("model_id", "header").text("model_id");
    if (found_id != model_id) {
        throw ContainerError(Kind::kMismatch, "the state is of another model", "", "model " + model_id,
                             "model " + shown(found_id));
    }
    const Json& found = header.need("state", "header");
    // First of all the version: another one may describe its tensors differently.
    const std::int64_t version = found.need("layout_version", "state").integer("state.layout_version");
    if (version != spec.layout_version) {
        throw ContainerError(Kind::kMismatch, "the state has another layout version", "",
                             std::to_string(spec.layout_version), std::to_string(version));
    }
    check_layout(spec, StateSpec::from_json(found, "state"));
    const std::int64_t count = header.need("tokens_seen", "header").integer("tokens_seen");
    if (count < 0) {
        throw ContainerError(Kind::kDamaged, "is not a count", "tokens_seen", "", std::to_string(count));
    }
    return count;
}

}  // namespace

std::vector<StateTensorLayout> buffer_layout(const StateSpec& spec) {
    std::vector<StateTensorLayout> layout;
    for (const StateTensorSpec& tensor : spec.tensors) {
        layout.push_back({tensor.shape, static_cast<float>(tensor.init)});
    }
    layout.push_back({{kCountFloats}, 0.0F});
    return layout;
}

std::int64_t tokens_seen(const StateBuffer& state) {
    std::int64_t count;
    std::memcpy(&count, state.tensor(state.layout().size() - 1), sizeof count);
    return count;
}

void fill_state(const StateSpec& spec, std::string_view values, StateBuffer& state) {
    if (values.size() != spec.size_bytes()) {
        throw ContainerError(Kind::kDamaged, "has a wrong length", "section state",
                             std::to_string(spec.size_bytes()) + " bytes", std::to_string(values.size()) + " bytes");
    }
    std::size_t offset = 0;
    for (std::size_t index = 0; index < spec.tensors.size(); ++index) {
        const std::size_t n_bytes = spec.tensors[index].n_elements() * sizeof(float);
        std::memcpy(state.tensor(index), values.data() + offset, n_bytes);
        offset += n_bytes;
    }
    check_finite(spec, state);
}

void save_state(const std::string& path, const std::string& model_id, const StateSpec& spec, const StateBuffer& state) {
    check_finite(spec, state);
    std::string values;
    values.reserve(spec.size_bytes());
    for (std::size_t index = 0; index < spec.tensors.size(); ++index) {
        values.append(reinterpret_cast<const char*>(state.tensor(index)),
                      spec.tensors[index].n_elements() * sizeof(float));
    }
    const std::string members = "\"model_id\":\"" + model_id +
                                "\",\"tokens_seen\":" + std::to_string(tokens_seen(state)) +
                                ",\"state\":" + spec.to_json();
    write_container(path, kStateFile, members, kSection, values);
}

void load_state(const std::string& path, const std::string& model_id, const StateSpec& spec, StateBuffer& state) {
    const Container container(path, kStateFile);
    std::int64_t count = 0;
    try {
        count = check_header(container.header(), model_id, spec);
    } catch (const JsonError& error) {
        throw ContainerError(Kind::kDamaged, error.what());
    }
    // A copy, which nobody can change between the check and its use.
    StateBuffer staged(state.layout());
    fill_state(spec, container.section(kSection), staged);
    std::memcpy(staged.tensor(spec.tensors.size()), &count, sizeof count);
    state.copy_from(staged);
}

}  // namespace goslet
