// The engine file, read-only and mapped, as runtime/enginefile.py describes it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "container.h"
#include "native_engine.h"
#include "state_buffer.h"
#include "state_spec.h"

namespace goslet {

// An open engine file. Everything in it that is needed to find things is checked against the file's size; graph,
// program and tokenizer also against their checksums. What the weights' numbers are is not looked at.
class EngineFile {
  public:
    // Throws ContainerError and std::bad_alloc.
    explicit EngineFile(const std::string& path);

    // Throws ContainerError where somebody has shortened the file since it was opened; asked before weights are read.
    void check_whole() const { container_.check_whole(); }
    const std::string& model_id() const noexcept { return model_id_; }
    std::size_t vocab_size() const noexcept { return vocab_size_; }
    const StateSpec& state_spec() const noexcept { return state_spec_; }
    // Empty for an engine that takes token ids only.
    const std::string& tokenizer_kind() const noexcept { return tokenizer_kind_; }
    // What the tokenizer's kind needs; only where there is one.
    std::string_view tokenizer() const { return container_.section("tokenizer"); }
    // What a session begins with. Throws ContainerError where the file's numbers for it are not whole or not finite.
    std::unique_ptr<StateBuffer> fresh_state() const;
    // Views that are good while the file is open. Throws ContainerError where it has no program.
    EngineParts parts() const;

  private:
    void read_header();

    Container container_;
    std::string model_id_;
    std::size_t vocab_size_ = 0;
    StateSpec state_spec_;
    std::string tokenizer_kind_;
    std::vector<TensorView> tensors_;
};

}  // namespace goslet
