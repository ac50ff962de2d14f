// The fused steps that a program is made of, and the memory that they work in.
//
// A step runs on every thread of a team at once; it ends with the team in step (Member::sync), so that the next one may
// read what any thread wrote. Rows are tokens: some of one session, one of each of many sessions, or both.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/matrix.h"
#include "native_engine.h"
#include "thread_pool.h"

namespace goslet {

// Zeroed floats or integers, aligned to a cache line.
template <typename T>
class AlignedArray {
  public:
    AlignedArray() = default;
    // Throws std::bad_alloc.
    explicit AlignedArray(std::size_t size)
        : data_(static_cast<T*>(::operator new(size * sizeof(T) + 1, std::align_val_t{kAlignment}))) {
        std::fill(data_.get(), data_.get() + size, T{});
    }
    T* get() const noexcept { return data_.get(); }

  private:
    static constexpr std::size_t kAlignment = 64;
    struct Delete {
        void operator()(T* data) const noexcept { ::operator delete(data, std::align_val_t{kAlignment}); }
    };
    std::unique_ptr<T, Delete> data_;
};

// A named place for kMaxRows rows of `size` numbers between steps. Rows are `stride` apart. Where it is padded the
// numbers behind `size` stay zero, as products ask for; a piece of the embedded token has the next piece there.
struct Register {
    std::size_t size;
    std::size_t stride;
    std::size_t offset;  // of row 0 in the workspace's floats
    bool padded;
};

// What steps ask of a workspace beyond registers.
struct Needs {
    std::size_t floats = 0;         // registers, all rows
    std::size_t thread_floats = 0;  // for each thread
    std::size_t packed_bytes = 0;   // packed activations of one row, over all inputs of one step
    std::size_t packed_groups = 0;  // their groups
};

// The memory of one pass; as many passes may run at once as there are workspaces.
class Workspace {
  public:
    Workspace(const Needs& needs, std::size_t n_threads);

    // Where activations are packed for integer weights: room for `capacity` rows of every input of a step, one input
    // behind the other.
    struct Packed {
        std::size_t capacity;
        std::uint8_t* integers;  // (needs.packed_bytes · capacity)
        float* scales;           // (needs.packed_groups · capacity)
        std::int32_t* sums;      // (needs.packed_groups · capacity)
    };

    float* row(const Register& place, std::size_t index) const {
        return floats_.get() + place.offset + index * place.stride;
    }
    float* thread_floats(std::size_t thread) const { return thread_floats_.get() + thread * thread_stride_; }
    // kMaxRows rows that all threads share, or a single row of one thread's own.
    Packed shared_packed() const { return packed_at(0, kMaxRows); }
    Packed thread_packed(std::size_t thread) const { return packed_at(kMaxRows + thread, 1); }

  private:
    Packed packed_at(std::size_t row, std::size_t capacity) const;

    std::size_t thread_stride_;
    std::size_t packed_stride_;
    std::size_t groups_stride_;
    AlignedArray<float> floats_;
    AlignedArray<float> thread_floats_;
    AlignedArray<std::uint8_t> integers_;
    AlignedArray<float> scales_;
    AlignedArray<std::int32_t> sums_;
};

// Consecutive rows of one session.
struct Span {
    StateBuffer* state;
    std::size_t first_row;
    std::size_t n_rows;
};

// One run of the whole program over at most kMaxRows rows.
struct Pass {
    const Kernels& kernels;
    const Workspace& workspace;
    std::vector<Span> spans;
    std::size_t n_rows;
    // Rows whose logits are wanted, ascending, and where each one's go (vocab_size).
    std::vector<std::size_t> output_rows;
    std::vector<float*> logits;
    bool skip_zeros;
    // Inputs of matrices in columns, seen and not zero.
    std::atomic<std::uint64_t>& inputs_seen;
    std::atomic<std::uint64_t>& inputs_active;
};

class Step {
  public:
    virtual ~Step() = default;
    virtual void run(Pass& pass, ThreadPool::Member& member) const = 0;
};

// A LayerNorm's constants.
struct Norm {
    const float* weight;
    const float* bias;
    float eps;
};

// h = norm(x); each output is h + (shift - h) · mix; the shift becomes the last row's h. On request h and the shift as
// it was before are kept in registers.
class NormShift final : public Step {
  public:
    struct Mix {
        const float* mix;
        Register out;
    };
    struct Kept {
        std::optional<Register> normed;
        std::optional<Register> previous;
    };
    NormShift(Register x, Norm norm, std::size_t shift_tensor, std::vector<Mix> mixes, Kept kept, Needs& needs);
    void run(Pass& pass, ThreadPool::Member& member) const override;

  private:
    // Columns [begin, end) of one row's outputs.
    void write(const Pass& pass, std::size_t row, const float* h, const float* previous, std::size_t begin,
               std::size_t end) const;

    Register x_;
    Norm norm_;
    std::size_t shift_tensor_;
    std::vector<Mix> mixes_;
    Kept kept_;
    Register normed_;
};

// What is added to a product's outputs before anything else: up · low + kept · x, where `low` is a register that an
// earlier step filled, and row o of `kept` holds few numbers, each for the input of x that `kept_inputs` names.
struct Residual {
    std::size_t rank = 0;
    Register low{};             // unused with rank 0
    const float* up = nullptr;  // (rank, n_out)
    std::size_t n_kept = 0;
    const float* kept = nullptr;                 // (n_out, n_kept)
    const std::uint16_t* kept_inputs = nullptr;  // (n_out, n_kept), each below n_in

    // y[o - begin] += the residual's output o, for the outputs [begin, end) of one row.
    void add(const float* low_row, const float* x, std::size_t n_out, std::size_t begin, std::size_t end,
             float* y) const;
};

// Matrix products that need not wait for each other.
class Linear final : public Step {
  public:
    struct Product {
        Matrix matrix;
        Register x;
        Register out;
        Residual residual;
        const float* bias;  // or null
        Activation activation;
        Combine combine;
        Register a, b;  // its operands, where it takes them

        // Whether y must lie elsewhere while it is combined, because out is read.
        bool needs_sum() const {
            return combine == Combine::kAdd || combine == Combine::kGateAdd ||
                   (combine != Combine::kSet && a.offset == out.offset);
        }
    };
    Linear(std::vector<Product> products, Needs& needs);
    void run(Pass& pass, ThreadPool::Member& member) const override;

  private:
    // An input as some of the products want it packed.
    struct Input {
        Register x;
        Matrix matrix;             // any of these products'
        std::size_t offset;        // bytes of packed integers of the inputs before it, for a capacity of one row
        std::size_t group_offset;  // their scales and sums
    };
    void count_zeros(const Pass& pass, const Workspace::Packed& packed) const;
    void multiply(const Product& product, std::size_t input, const Pass& pass, const Workspace::Packed& packed,
                  std::size_t first_unit, std::size_t end_unit) const;

    std::vector<Product> products_;
    std::vector<std::size_t> product_inputs_;  // (products): index into inputs_; unused for floating weights
    std::vector<Input> inputs_;
    std::size_t n_units_ = 0;
    bool has_columns_ = false;
    Register sum_{};  // where the one product lies that needs it
};

// RWKV-4's time mix behind the projections, some channels at a time.
class Wkv4 final : public Step {
  public:
    struct Inputs {
        Register r, k, v, out;
        const float *decay, *first;
        std::size_t aa, bb, pp;  // tensors of the state
    };
    explicit Wkv4(Inputs inputs) : in_(inputs) {}
    void run(Pass& pass, ThreadPool::Member& member) const override;

  private:
    Inputs in_;
};

// RWKV-5's and 6's, head by head.
class Wkv6 final : public Step {
  public:
    struct Inputs {
        Register r, k, v, out;
        std::optional<Register> g;  // not in 5.0
        std::optional<Register> w;  // in 6; in 5 `decay`
        const float* decay;
        const float* bonus;
        Norm norm;
        std::size_t state;  // tensor
        std::size_t n_head, head_size;
    };
    explicit Wkv6(Inputs inputs) : in_(inputs) {}
    void run(Pass& pass, ThreadPool::Member& member) const override;

  private:
    Inputs in_;
};

// RWKV-7's, head by head.
class Wkv7 final : public Step {
  public:
    struct Inputs {
        Register r, w, k, v, a, g, first_value, out;
        bool is_first;       // layer 0 defines first_value, the others read it through value_mix
        Register value_mix;  // unused in layer 0
        const float *k_k, *k_a, *r_k;
        Norm norm;
        std::size_t state;  // tensor
        std::size_t n_head, head_size;
    };
    explicit Wkv7(Inputs inputs) : in_(inputs) {}
    void run(Pass& pass, ThreadPool::Member& member) const override;

  private:
    Inputs in_;
};

// out = x · matrix, a square matrix that came with the token.
class TokenProduct final : public Step {
  public:
    TokenProduct(Register x, Register matrix, Register out) : x_(x), matrix_(matrix), out_(out) {}
    void run(Pass& pass, ThreadPool::Member& member) const override;

  private:
    Register x_;
    Register matrix_;
    Register out_;
};

// The last LayerNorm and the head, for the rows whose logits are wanted.
class Logits final : public Step {
  public:
    Logits(Register x, Norm norm, Matrix head, Needs& needs);
    void run(Pass& pass, ThreadPool::Member& member) const override;

  private:
    Register x_;
    Norm norm_;
    Matrix head_;
    Register normed_;
};

// A place in the workspace for kMaxRows rows of `size` numbers.
Register make_register(std::size_t size, Needs& needs);

}  // namespace goslet
