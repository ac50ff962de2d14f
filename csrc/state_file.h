// Writing and reading state files, as runtime/state.py does.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "state_buffer.h"
#include "state_spec.h"

namespace goslet {

// The layout of a state's buffer: the tensors in order, and behind them two floats that hold the token count.
std::vector<StateTensorLayout> buffer_layout(const StateSpec& spec);

std::int64_t tokens_seen(const StateBuffer& state);

// Fills a state's tensors with the numbers of a section `state`: little-endian float32 in the spec's order, without
// gaps. Throws ContainerError where there are too few or too many, or one is not finite.
void fill_state(const StateSpec& spec, std::string_view values, StateBuffer& state);

// Both take a state of `buffer_layout(spec)` and throw ContainerError: kNotFinite where the state holds NaN or
// infinity, kMismatch for the state of another model or layout.
//
// An existing file is replaced once the new one is whole.
void save_state(const std::string& path, const std::string& model_id, const StateSpec& spec, const StateBuffer& state);
// Whenever this throws, the state is unchanged.
void load_state(const std::string& path, const std::string& model_id, const StateSpec& spec, StateBuffer& state);

}  // namespace goslet
