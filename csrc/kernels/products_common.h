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

// A group's sums without what int4's offset of 8 or int3's of 4 added too much.
template <Format kFormat>
GOSLET_INLINE I32x8 without_offset(I32x8 sums, const Activations& x, std::size_t row, std::size_t group) {
    if constexpr (kFormat == Format::kInt4) {
        return sums - broadcast_i32(x.sums[group * x.slots + row]);
    } else if constexpr (kFormat == Format::kInt3) {
        return sums - broadcast_i32(x.sums[group * x.slots + row] / 2);
    }
    return sums;
}

// Outputs from a thread's first to its last.
struct OutputRange {
    std::size_t begin;
    std::size_t end;
};
inline OutputRange outputs_of(const Matrix& matrix, std::size_t first_unit, std::size_t end_unit) {
    return {first_unit * matrix.unit_outputs(), smaller(end_unit * matrix.unit_outputs(), matrix.n_out)};
}

// Four inputs of eight outputs from where their nibbles are the low halves of all bytes, or the high ones.
GOSLET_INLINE Quads low_quads(I32x8 x) {
    return {x & broadcast_i32(0x0F0F0F0F)};
}
GOSLET_INLINE Quads high_quads(I32x8 x) {
    return {shift_right<4>(x) & broadcast_i32(0x0F0F0F0F)};
}

// The same where they are the three low bits of all bytes.
GOSLET_INLINE Quads low_threes(I32x8 x) {
    return {x & broadcast_i32(0x07070707)};
}

// How the weights of an integer format meet activations, `Activation`: `Words` are eight outputs' weights for kInputs
// inputs; `Sums` are their sums over a group of activations.
template <Format>
struct IntegerFormat;
template <>
struct IntegerFormat<Format::kInt8> {
    using Activation = std::int16_t;
    using Words = Pairs;
    using Sums = I32x8;
    static constexpr std::size_t kInputs = 2;

    static GOSLET_INLINE Sums no_sums() { return zero_i32(); }
    static const Activation* activations(const Activations& x) { return x.integers16; }
    static std::size_t group(const Matrix& matrix) { return matrix.group; }
    // Inputs of a group of which `left` padded inputs, with those of later groups, are left.
    static std::size_t inputs_of_group(const Matrix& matrix, std::size_t left) { return smaller(matrix.group, left); }
    // The weights' group that a group of activations is in.
    static constexpr std::size_t scale_of(const Matrix&, std::size_t group) { return group; }

    // kTileWords words from kTileBytes of a tile.
    static constexpr std::size_t kTileWords = 1;
    static constexpr std::size_t kTileBytes = 16;
    static GOSLET_INLINE void unpack_tile(const std::uint8_t* data, Words* words) { words[0] = load_int8_pairs(data); }

    // kColumnWords vectors of outputs from kInputs inputs `input_bytes` apart of a block of columns.
    static constexpr std::size_t kColumnWords = Int8Columns::kPairs;
    static GOSLET_INLINE void unpack_columns(const std::uint8_t* data, std::size_t input_bytes, std::size_t vector,
                                             Words* words) {
        Int8Columns::unpack(data, data + input_bytes, vector, words);
    }
    using Columns = Int8Columns;
};
// What int4 and int3 share.
struct ByteActivations {
    using Activation = std::int8_t;
    using Words = Quads;
    using Sums = QuadSums;
    static constexpr std::size_t kInputs = 4;

    static GOSLET_INLINE Sums no_sums() { return no_quad_sums(); }
    static const Activation* activations(const Activations& x) { return x.integers8; }
    // Constant, so that loops over a group are unrolled.
    static constexpr std::size_t group(const Matrix&) { return kColumnPadding; }
    static constexpr std::size_t inputs_of_group(const Matrix&, std::size_t) { return kColumnPadding; }
    static std::size_t scale_of(const Matrix& matrix, std::size_t group) {
        static_assert(kColumnPadding == 32);
        return group >> matrix.group / 64;  // of 32, 64 or 128
    }
};
template <>
struct IntegerFormat<Format::kInt4> : ByteActivations {
    static constexpr std::size_t kTileWords = 2;
    static constexpr std::size_t kTileBytes = 32;
    static GOSLET_INLINE void unpack_tile(const std::uint8_t* data, Words* words) {
        const I32x8 x = load_bits(data);
        words[0] = low_quads(x);
        words[1] = high_quads(x);
    }

    static constexpr std::size_t kColumnWords = 4;
    static GOSLET_INLINE void unpack_columns(const std::uint8_t* data, std::size_t input_bytes, std::size_t vector,
                                             Words* words) {
        I32x8 x[kInputs];
#pragma GCC unroll 4
        for (std::size_t i = 0; i < kInputs; ++i) {
            // Vectors 0 to 3 are in the low halves of the 32-bit lanes, the others in the high halves.
            x[i] = load_bits(data + i * input_bytes);
            x[i] = vector == 0 ? x[i] : shift_right<16>(x[i]);
        }
        const I32x8 low = broadcast_i32(0xFF);
        const I32x8 high = broadcast_i32(0xFF00);
        const I32x8 even = (x[0] & low) | shift_left<8>(x[1] & low) | shift_left<16>(x[2] & low) | shift_left<24>(x[3]);
        const I32x8 odd =
            shift_right<8>(x[0] & high) | (x[1] & high) | shift_left<8>(x[2] & high) | shift_left<16>(x[3] & high);
        words[0] = low_quads(even);
        words[1] = high_quads(even);
        words[2] = low_quads(odd);
        words[3] = high_quads(odd);
    }
    using Columns = Int4Columns;
};
template <>
struct IntegerFormat<Format::kInt3> : ByteActivations {
    static constexpr std::size_t kTileWords = 8;
    static constexpr std::size_t kTileBytes = 96;
    static GOSLET_INLINE void unpack_tile(const std::uint8_t* data, Words* words) {
        const I32x8 x[3] = {load_bits(data), load_bits(data + 32), load_bits(data + 64)};
#pragma GCC unroll 3
        for (std::size_t plane = 0; plane < 3; ++plane) {
            words[2 * plane] = low_threes(x[plane]);
            words[2 * plane + 1] = low_threes(shift_right<3>(x[plane]));
        }
        const I32x8 low = broadcast_i32(0x03030303);
        const I32x8 high = broadcast_i32(0x04040404);
        words[6] = {(shift_right<6>(x[0]) & low) | (shift_right<4>(x[2]) & high)};
        words[7] = {(shift_right<6>(x[1]) & low) | (shift_right<5>(x[2]) & high)};
    }

    static constexpr std::size_t kColumnWords = 4;
    static GOSLET_INLINE void unpack_columns(const std::uint8_t* data, std::size_t input_bytes, std::size_t vector,
                                             Words* words) {
        I32x8 x[kInputs];
#pragma GCC unroll 4
        for (std::size_t i = 0; i < kInputs; ++i) {
            // Vectors 0 to 3 are in the low halves of the 24-bit lanes, the others in the high halves.
            x[i] = load_lanes24(data + i * input_bytes);
            x[i] = vector == 0 ? x[i] : shift_right<12>(x[i]);
        }
        // Two numbers of an input in each byte.
        const I32x8 low = broadcast_i32(0x3F);
        const I32x8 high = broadcast_i32(0xFC0);
        const I32x8 first =
            (x[0] & low) | shift_left<8>(x[1] & low) | shift_left<16>(x[2] & low) | shift_left<24>(x[3] & low);
        const I32x8 second = shift_right<6>(x[0] & high) | shift_left<2>(x[1] & high) | shift_left<10>(x[2] & high) |
                             shift_left<18>(x[3] & high);
        words[0] = low_threes(first);
        words[1] = low_threes(shift_right<3>(first));
        words[2] = low_threes(second);
        words[3] = low_threes(shift_right<3>(second));
    }
    using Columns = Int3Columns;
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
