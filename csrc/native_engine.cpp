#include "native_engine.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <mutex>
#include <unordered_set>
#include <utility>

#include "embedding.h"
#include "program.h"
#include "steps.h"
#include "thread_pool.h"

namespace goslet {
namespace {

void count_tokens(StateBuffer& state, std::size_t n_tokens) {
    // The count lies in the bytes of the last tensor; it stops at the largest int64.
    float* const place = state.tensor(state.layout().size() - 1);
    std::int64_t count = 0;
    std::memcpy(&count, place, sizeof count);
    const std::int64_t room = std::numeric_limits<std::int64_t>::max() - count;
    count += std::min(room, static_cast<std::int64_t>(n_tokens));
    std::memcpy(place, &count, sizeof count);
}

}  // namespace

std::optional<Format> format_named(std::string_view name) {
    static constexpr std::pair<std::string_view, Format> kNames[] = {
        {"f32", Format::kF32},   {"f16", Format::kF16},   {"bf16", Format::kBf16}, {"int8", Format::kInt8},
        {"int4", Format::kInt4}, {"int3", Format::kInt3}, {"u16", Format::kU16}};
    for (const auto& [known, format] : kNames) {
        if (name == known) {
            return format;
        }
    }
    return std::nullopt;
}

std::optional<TensorLayout> layout_named(std::string_view name) {
    static constexpr std::pair<std::string_view, TensorLayout> kNames[] = {
        {"rows", TensorLayout::kRows}, {"tiles", TensorLayout::kTiles}, {"columns", TensorLayout::kColumns}};
    for (const auto& [known, layout] : kNames) {
        if (name == known) {
            return layout;
        }
    }
    return std::nullopt;
}

struct NativeEngine::Impl {
    Impl(const EngineParts& parts, const NativeOptions& chosen)
        : options(chosen),
          isa(chosen_isa()),
          kernels(kernels_for(isa)),
          program(load_program(parts)),
          vocab_size(parts.vocab_size),
          pool(chosen.n_threads, chosen.pin) {
        for (const NamedStateTensor& tensor : parts.state) {
            state_layout.push_back(tensor.layout);
        }
        state_layout.push_back({{2}, 0.0F});
    }

    // Workspaces are made as calls meet, and kept.
    std::unique_ptr<Workspace> take_workspace() {
        {
            const std::lock_guard<std::mutex> lock(mutex);
            if (!idle.empty()) {
                std::unique_ptr<Workspace> space = std::move(idle.back());
                idle.pop_back();
                return space;
            }
            idle.reserve(++n_workspaces);
        }
        return std::make_unique<Workspace>(program.needs, options.n_threads);
    }

    void give_workspace(std::unique_ptr<Workspace> space) noexcept {
        const std::lock_guard<std::mutex> lock(mutex);
        idle.push_back(std::move(space));
    }

    void check(const std::vector<Sequence>& sequences) const {
        std::unordered_set<const StateBuffer*> states;
        for (const Sequence& sequence : sequences) {
            if (sequence.n_tokens == 0) {
                throw std::invalid_argument("a sequence has no tokens");
            }
            if (!(sequence.state->layout() == state_layout)) {
                throw std::invalid_argument("a state has another layout than the engine's");
            }
            if (!states.insert(sequence.state).second) {
                throw std::invalid_argument("a state is given twice");
            }
            for (std::size_t index = 0; index < sequence.n_tokens; ++index) {
                const std::int64_t token = sequence.tokens[index];
                if (token < 0 || static_cast<std::uint64_t>(token) >= vocab_size) {
                    throw std::invalid_argument("token " + std::to_string(token) + " is outside the vocabulary");
                }
            }
        }
    }

    void run(Pass& pass) {
        pool.run([&](ThreadPool::Member& member) {
            for (const auto& step : program.steps) {
                step->run(pass, member);
            }
        });
    }

    NativeOptions options;
    Isa isa;
    const Kernels& kernels;
    Program program;
    std::size_t vocab_size;
    std::vector<StateTensorLayout> state_layout;
    ThreadPool pool;
    std::mutex mutex;
    std::vector<std::unique_ptr<Workspace>> idle;
    std::size_t n_workspaces = 0;
    std::atomic<std::uint64_t> inputs_seen{0};
    std::atomic<std::uint64_t> inputs_active{0};
};

NativeEngine::NativeEngine(const EngineParts& parts, const NativeOptions& options)
    : impl_(std::make_unique<Impl>(parts, options)) {}

NativeEngine::~NativeEngine() = default;

const std::vector<StateTensorLayout>& NativeEngine::state_layout() const noexcept {
    return impl_->state_layout;
}
std::size_t NativeEngine::vocab_size() const noexcept {
    return impl_->vocab_size;
}
std::size_t NativeEngine::n_threads() const noexcept {
    return impl_->options.n_threads;
}
const char* NativeEngine::isa() const noexcept {
    return isa_name(impl_->isa);
}

NativeEngine::Density NativeEngine::density() const noexcept {
    return {impl_->inputs_seen.load(std::memory_order_relaxed), impl_->inputs_active.load(std::memory_order_relaxed)};
}

void NativeEngine::feed(const std::vector<Sequence>& sequences) {
    impl_->check(sequences);
    std::unique_ptr<Workspace> space = impl_->take_workspace();
    Pass pass{impl_->kernels,      *space, {}, 0, {}, {}, impl_->options.skip_zeros, impl_->inputs_seen,
              impl_->inputs_active};
    // All that can fail for want of memory does so before the first state moves.
    pass.spans.reserve(kMaxRows);
    pass.output_rows.reserve(kMaxRows);
    pass.logits.reserve(kMaxRows);
    std::size_t at = 0;    // sequence
    std::size_t done = 0;  // tokens of it
    while (at < sequences.size()) {
        pass.spans.clear();
        pass.output_rows.clear();
        pass.logits.clear();
        pass.n_rows = 0;
        while (at < sequences.size() && pass.n_rows < kMaxRows) {
            const Sequence& sequence = sequences[at];
            const std::size_t n_rows = std::min(kMaxRows - pass.n_rows, sequence.n_tokens - done);
            pass.spans.push_back({sequence.state, pass.n_rows, n_rows});
            for (std::size_t row = 0; row < n_rows; ++row) {
                const std::size_t token = done + row;
                decode_row(impl_->program.embedding, static_cast<std::size_t>(sequence.tokens[token]),
                           space->row(impl_->program.input, pass.n_rows + row));
                const bool is_last = token + 1 == sequence.n_tokens;
                if (sequence.logits != nullptr && (sequence.all_logits || is_last)) {
                    pass.output_rows.push_back(pass.n_rows + row);
                    pass.logits.push_back(sequence.logits + (sequence.all_logits ? token : 0) * impl_->vocab_size);
                }
            }
            pass.n_rows += n_rows;
            done += n_rows;
            if (done == sequence.n_tokens) {
                ++at;
                done = 0;
            }
        }
        impl_->run(pass);
        for (const Span& span : pass.spans) {
            count_tokens(*span.state, span.n_rows);
        }
    }
    impl_->give_workspace(std::move(space));
}

}  // namespace goslet
