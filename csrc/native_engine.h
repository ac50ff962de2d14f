// The native CPU engine: a program of fused steps over packed weights, read in place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/matrix.h"
#include "state_buffer.h"

namespace goslet {

// An engine's parts do not fit together, or are not what this engine can run. `what()` is the problem.
class EngineError : public std::runtime_error {
  public:
    EngineError(const std::string& problem, std::string place, std::string expected = "", std::string found = "")
        : std::runtime_error(problem),
          place(std::move(place)),
          expected(std::move(expected)),
          found(std::move(found)) {}

    std::string place;
    std::string expected;
    std::string found;
};

// How a tensor is stored. Vectors are kRows, and so is the embedding, of which one row is read at a time; its layout is
// that of runtime/weights.py.
enum class TensorLayout : std::uint8_t { kRows, kTiles, kColumns };

// By the names that engine files use; nothing for another name.
std::optional<Format> format_named(std::string_view name);
std::optional<TensorLayout> layout_named(std::string_view name);

// A stored tensor; views into memory that outlives the engine.
struct TensorView {
    std::string name;
    Format format;
    TensorLayout layout;
    std::size_t group;  // 0 for the floating formats
    std::vector<std::size_t> shape;
    const std::uint8_t* data;
    std::size_t data_bytes;
    const std::uint8_t* scales;
    std::size_t scales_bytes;
};

struct NamedStateTensor {
    std::string name;
    StateTensorLayout layout;
};

// What an engine is made from: the parts of an engine file.
struct EngineParts {
    std::string_view program;  // JSON
    std::vector<TensorView> tensors;
    std::vector<NamedStateTensor> state;  // without the token count
    std::size_t vocab_size;
};

struct NativeOptions {
    std::size_t n_threads = 1;
    bool pin = false;
    // Leave the inputs of a matrix in columns unread where their activation is zero. Never changes a result.
    bool skip_zeros = true;
};

// Some tokens of one session.
struct Sequence {
    StateBuffer* state;          // NativeEngine::state_layout; moved on by n_tokens
    const std::int64_t* tokens;  // (n_tokens), within the vocabulary
    std::size_t n_tokens;
    float* logits;  // (n_tokens, vocab_size) with all_logits, (1, vocab_size) for the last token's, or null for none
    bool all_logits;
};

// Steps of different states may run at the same time from different threads; with more than one thread in the engine
// they take turns. A state must not be in two steps at once.
class NativeEngine {
  public:
    // Throws EngineError where the parts do not fit; nothing in `parts.program` is trusted.
    NativeEngine(const EngineParts& parts, const NativeOptions& options);
    ~NativeEngine();
    NativeEngine(const NativeEngine&) = delete;
    NativeEngine& operator=(const NativeEngine&) = delete;

    // The layout of a state: the tensors in order, and behind them two floats that hold the token count as one int64.
    const std::vector<StateTensorLayout>& state_layout() const noexcept;
    std::size_t vocab_size() const noexcept;
    std::size_t n_threads() const noexcept;
    const char* isa() const noexcept;

    // Feeds every sequence its tokens. All arguments are checked before any state is touched: throws
    // std::invalid_argument for a token outside the vocabulary, an empty sequence, a state of another layout or one
    // that is given twice, and std::bad_alloc or std::runtime_error (a child of fork()) likewise.
    void feed(const std::vector<Sequence>& sequences);

    // Inputs of matrices in columns that were seen, and those whose activation was not zero, in single-row products
    // since the engine was made.
    struct Density {
        std::uint64_t seen;
        std::uint64_t active;
    };
    Density density() const noexcept;

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace goslet
