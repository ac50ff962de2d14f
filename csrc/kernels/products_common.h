// What products of one row and of more have in common. See products.h.
#pragma once

namespace goslet {
namespace {

constexpr std::size_t kLanes = 8;
constexpr std::size_t kMaxGroup = 128;
constexpr std::size_t kLineBytes = 64;
// How far ahead of its use data is fetched. On the machines measured, 2 KiB was better than 1 and 4.
constexpr std::size_t kAheadBytes = 2048;
// Inputs whose products with floating weights make one sum.
constexpr std::size_t kFloatChunk = 64;
// Outputs that a block of columns is worked on at once; their sums fit into the registers.
constexpr std::size_t kBlockOutputs = 64;
constexpr std::size_t kBlockVectors = kBlockOutputs / kLanes;

GOSLET_INLINE std::size_t smaller(std::size_t a, std::size_t b) {
    return a < b ? a : b;
}

// Into the first-level cache, or only into the second: which is better was measured for each use.
GOSLET_INLINE void fetch_first(const void* data) {
    __builtin_prefetch(data, 0, 3);
}
GOSLET_INLINE void fetch_second(const void* data) {
    __builtin_prefetch(data, 0, 2);
}

GOSLET_INLINE void store_outputs(float* out, std::size_t first_output, std::size_t n_out, F32x8 values) {
    if (first_output + kLanes <= n_out) {
        store(out + first_output, values);
    } else if (first_output < n_out) {
        store_partial(out + first_output, values, n_out - first_output);
    }
}

GOSLET_INLINE F32x8 load_scales(const std::uint16_t* scales) {
    return load_weights(reinterpret_cast<const F16*>(scales));
}

// A group's integer sums start from what int4's offset of 8 will have added too much.
template <Format kFormat>
GOSLET_INLINE I32x8 first_sum(const Activations& x, std::size_t row, std::size_t group) {
    return kFormat == Format::kInt4 ? broadcast_i32(-x.sums[group * x.slots + row]) : zero_i32();
}

// Outputs from a thread's first to its last.
struct OutputRange {
    std::size_t begin;
    std::size_t end;
};
inline OutputRange outputs_of(const Matrix& matrix, std::size_t first_unit, std::size_t end_unit) {
    return {first_unit * matrix.unit_outputs(), smaller(end_unit * matrix.unit_outputs(), matrix.n_out)};
}

template <Format>
struct IntegerFormat;
template <>
struct IntegerFormat<Format::kInt8> {
    using Tile = Int8Tile;
    using Columns = Int8Columns;
};
template <>
struct IntegerFormat<Format::kInt4> {
    using Tile = Int4Tile;
    using Columns = Int4Columns;
};

template <Format>
struct FloatFormat;
template <>
struct FloatFormat<Format::kF32> {
    using Number = float;
};
template <>
struct FloatFormat<Format::kF16> {
    using Number = F16;
};
template <>
struct FloatFormat<Format::kBf16> {
    using Number = Bf16;
};

}  // namespace
}  // namespace goslet
