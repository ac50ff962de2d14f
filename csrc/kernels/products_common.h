// What products of one row and of more have in common. See products.h.
#pragma once

namespace goslet {
namespace {

constexpr std::size_t kLanes = 8;
constexpr std::size_t kMaxGroup = 128;
constexpr std::size_t kLineBytes = 64;
// How far ahead of its use data is fetched. On the machines measured, 2 KiB was better than 1 and 4.
constexpr std::size_t kAheadBytes = 2048;
// Inputs that a panel of floating weights holds.
constexpr std::size_t kFloatChunk = 64;

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

// What an integer sum of a group adds to an output.
GOSLET_INLINE F32x8 add_group(F32x8 total, I32x8 sum, F32x8 x_scale, const std::uint16_t* scales) {
    return fma(to_f32(sum) * x_scale, load_weights(reinterpret_cast<const F16*>(scales)), total);
}

// A group's integer sums start from what int4's offset of 8 will have added too much.
template <Format kFormat>
GOSLET_INLINE I32x8 first_sum(const Activations& x, std::size_t row, std::size_t group, std::size_t n_groups) {
    return kFormat == Format::kInt4 ? broadcast_i32(-x.sums[row * n_groups + group]) : zero_i32();
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
