// Everything that is worth a vector instruction, as one table of functions for each instruction set.
//
// `kernels_for` gives a table; `best_isa` names the best that this CPU runs. kReference is the plain form that the
// others are tested against: scalar, in double where a sum is formed, and free of cleverness.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "matrix.h"

namespace goslet {

// What happens to a product's sum before it is stored. `kSilu` is x · sigmoid(x), `kDecay` RWKV-7's
// exp(-exp(-1/2) · sigmoid(x)), `kDoubleExp` RWKV-6's exp(-exp(x)).
enum class Activation : std::uint8_t { kNone, kTanh, kSigmoid, kSilu, kReluSquared, kDecay, kDoubleExp };

// What becomes of such a y: out = y, out + y, y · a, out + y · a or a + (b - a) · y.
enum class Combine : std::uint8_t { kSet, kAdd, kGate, kGateAdd, kLerp };

// RWKV-4's time mix for one token (RWKV-4 paper, appendix on numerical stability). Every channel goes its own way, so
// n of them may be any part of a layer's.
struct Wkv4Channels {
    std::size_t n;
    const float* r;      // (n) receptance behind its sigmoid
    const float* k;      // (n)
    const float* v;      // (n)
    const float* decay;  // (n) what a step adds to the past's exponents, below 0
    const float* first;  // (n) what the present token's exponent has over it
    float* aa;           // (n) numerator, updated in place
    float* bb;           // (n) denominator
    float* pp;           // (n) their exponent
    float* y;            // (n) r · the weighted mean of values
};

// One head of RWKV-5's or 6's time mix for one token ("Eagle and Finch", section 4). The output is read from the state
// as it was.
struct Wkv6Head {
    std::size_t head_size;     // N
    const float* r;            // (N) receptance
    const float* w;            // (N) decay, by key
    const float* k;            // (N)
    const float* v;            // (N)
    const float* g;            // (N) gate; null in 5.0
    const float* bonus;        // (N) the present token's weight, by key
    const float* norm_weight;  // (N)
    const float* norm_bias;    // (N)
    float norm_eps;
    float* state;  // (N key, N value), updated in place
    float* y;      // (N) gated output
};

// One head of RWKV-7's time mix for one token (RWKV-7 paper, equations 16 to 18, and the released code's value
// residual). Every pointer but `state` and `y` is to the head's N numbers of one token.
struct Wkv7Head {
    std::size_t head_size;     // N
    const float* r;            // (N) receptance
    const float* w;            // (N) decay
    const float* k;            // (N) key, not yet scaled by the in-context learning rate
    const float* v;            // (N) value, before the value residual
    const float* a;            // (N) in-context learning rate
    const float* g;            // (N) gate
    const float* value_mix;    // (N) share of the first layer's value; null in layer 0
    float* first_value;        // (N) layer 0's value: written in layer 0, read in the others
    const float* k_k;          // (N)
    const float* k_a;          // (N)
    const float* r_k;          // (N)
    const float* norm_weight;  // (N)
    const float* norm_bias;    // (N)
    float norm_eps;
    float* state;  // (N value, N key), updated in place
    float* y;      // (N) gated output
};

struct Kernels {
    const char* isa;

    // One row of activations, x (n), into its place among `slots` rows for weights in int8 (16 bits) or int4 and int3
    // (8 bits): integers (n_groups, slots, group), scales and sums (n_groups, slots), each from this row's slot on.
    // scale = max|x| / 32767 of the group, or / 127; 0 for a group of zeros.
    void (*pack16)(const float* x, std::size_t n, std::size_t group, std::size_t slots, std::int16_t* integers,
                   float* scales, std::int32_t* sums);
    void (*pack8)(const float* x, std::size_t n, std::size_t group, std::size_t slots, std::int8_t* integers,
                  float* scales, std::int32_t* sums);

    // out[row · out_stride + output] = sum over inputs, for the outputs of units [first_unit, end_unit) and every row
    // of x. Writes no output past n_out. With `skip_zeros`, a matrix in columns and one row of activations, inputs
    // whose activation is zero are not read; the result is the same to the last bit.
    void (*multiply)(const Matrix& matrix, const Activations& x, std::size_t first_unit, std::size_t end_unit,
                     float* out, std::size_t out_stride, bool skip_zeros);

    // LayerNorm of x (n).
    void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, std::size_t n, float* out);
    // out = x + (previous - x) · mix, all (n).
    void (*lerp)(const float* x, const float* previous, const float* mix, std::size_t n, float* out);
    // y = activation(y + bias), in place; bias may be null.
    void (*activate)(Activation activation, const float* bias, std::size_t n, float* y);
    // As `Combine` says; a and b are read where it takes them, and a may be out.
    void (*combine)(Combine how, const float* y, const float* a, const float* b, std::size_t n, float* out);
    // out[j] = sum over i of x[i] · matrix[i · n + j], all of n.
    void (*small_product)(const float* x, const float* matrix, std::size_t n, float* out);
    void (*wkv4)(const Wkv4Channels& channels);
    void (*wkv6)(const Wkv6Head& head);
    void (*wkv7)(const Wkv7Head& head);
};

enum class Isa : std::uint8_t { kReference, kPortable, kAvx2, kAvx512, kAvx512Vnni, kNeon, kNeonDotprod };

// Names: reference, portable, avx2, avx512, avx512vnni, neon, neondot. Throws std::invalid_argument, listing them.
Isa isa_named(std::string_view name);
const char* isa_name(Isa isa);
// Those that are compiled in and that this CPU runs, from the plainest to the best; kReference and kPortable always.
std::vector<Isa> available_isas();
// The best of them, or the one that the environment's GOSLET_ISA names. Throws std::invalid_argument when that one is
// unknown or does not run here.
Isa chosen_isa();
// Throws std::invalid_argument when this CPU does not run it.
const Kernels& kernels_for(Isa isa);

}  // namespace goslet
