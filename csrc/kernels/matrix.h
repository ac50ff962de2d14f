// A stored weight matrix as the kernels see it, and the activations that meet it.
//
// Both layouts put eight outputs side by side, so that a vector register of eight lanes holds eight outputs, nothing is
// summed across lanes, and an output's sum does not depend on how many rows of activations are multiplied at once.
// n_in is padded to a multiple of kColumnPadding with numbers that are zero; padded scales are zero.
//
//   tiles    outputs in tiles of 8 (the last one padded); a tile holds its columns one after another:
//            f32, f16, bf16   column c: 8 numbers, one for each output
//            int8             columns 2p and 2p+1: 16 bytes, byte 2·output + (c & 1)
//            int4             columns 8b to 8b+7: 32 bytes, four for each output; the low half of byte i holds
//                             column 8b+i, the high half column 8b+4+i, each as number + 8
//            int3             columns 32b to 32b+31: three planes of 32 bytes, four for each output; with n(q) the
//            number
//                             of column 32b+4q+i plus 4, bits 0 to 2 of byte i of plane p hold n(2p) and bits 3 to 5
//                             n(2p+1); bits 6 and 7 hold the two low bits of n(6) in plane 0, those of n(7) in plane 1,
//                             and in plane 2 the high bits of n(6) and n(7)
//            scales           (n_tiles, groups, 8) fp16
//   columns  outputs in blocks of 64, for int4 and int3 of 128 (the last one padded); a block holds one input after
//            another, each in whole cache lines, for int3 in three quarters of one, so that inputs whose activation is
//            zero need not be read:
//            f32, f16, bf16, int8   64 numbers, one for each output
//            int4             64 bytes: sixteen little-endian 32-bit lanes; lane 8h + j, bits 4s to 4s+3, hold the
//                             number of output 64h + 8s + j, plus 8
//            int3             48 bytes, 24 for each half: eight lanes of 24 bits, the low 16 bits of all before the
//            high 8
//                             of all; lane j of half h, bits 3s to 3s+2, hold the number of output 64h + 8s + j, plus 4
//            scales           (n_blocks, groups, outputs of a block) fp16
#pragma once

#include <cstddef>
#include <cstdint>

namespace goslet {

constexpr std::size_t kTileRows = 8;
constexpr std::size_t kColumnPadding = 32;
// Rows of activations that one product takes at most; longer prompts and larger batches go in pieces.
constexpr std::size_t kMaxRows = 64;

// kU16 are places in another tensor; no product takes it.
enum class Format : std::uint8_t { kF32, kF16, kBf16, kInt8, kInt4, kInt3, kU16 };
enum class Layout : std::uint8_t { kTiles, kColumns };

constexpr std::size_t round_up(std::size_t size, std::size_t multiple) {
    return (size + multiple - 1) / multiple * multiple;
}

constexpr bool is_integer(Format format) {
    return format == Format::kInt8 || format == Format::kInt4 || format == Format::kInt3;
}

// Whether activations that meet weights of this format have 8 bits, and groups of their own.
constexpr bool takes_bytes(Format format) {
    return format == Format::kInt4 || format == Format::kInt3;
}

constexpr std::size_t format_bits(Format format) {
    switch (format) {
        case Format::kF32:
            return 32;
        case Format::kF16:
        case Format::kBf16:
        case Format::kU16:
            return 16;
        case Format::kInt8:
            return 8;
        case Format::kInt4:
            return 4;
        case Format::kInt3:
            return 3;
    }
    return 0;
}

// Bytes of an activation that meets weights of this format.
constexpr std::size_t activation_bytes(Format format) {
    return takes_bytes(format) ? 1 : (format == Format::kInt8 ? 2 : 4);
}

// Outputs that are stored together, and to a multiple of which they are padded.
constexpr std::size_t stored_together(Format format, Layout layout) {
    return layout == Layout::kTiles ? kTileRows : (takes_bytes(format) ? 128 : 64);
}

// A view of one matrix (n_out, n_in); owns nothing.
struct Matrix {
    Format format;
    Layout layout;
    std::size_t group;  // inputs that share a scale: 32, 64 or 128; 0 for the floating formats
    std::size_t n_out;
    std::size_t n_in;
    const std::uint8_t* data;
    const std::uint16_t* scales;  // fp16; null for the floating formats

    std::size_t padded_in() const { return round_up(n_in, kColumnPadding); }
    std::size_t n_groups() const { return group == 0 ? 0 : (n_in + group - 1) / group; }
    // Inputs whose activations share a scale, and how many such groups there are; 0 for the floating formats.
    std::size_t activation_group() const { return takes_bytes(format) ? kColumnPadding : group; }
    std::size_t n_activation_groups() const {
        return group == 0 ? 0 : (n_in + activation_group() - 1) / activation_group();
    }
    // Outputs that one unit of work covers; a product is cut into units between threads. Rows beside each other work on
    // four tiles at once.
    std::size_t unit_outputs() const {
        return layout == Layout::kTiles ? 4 * kTileRows : stored_together(format, layout);
    }
    std::size_t n_units() const { return (n_out + unit_outputs() - 1) / unit_outputs(); }
    std::size_t padded_out() const { return round_up(n_out, stored_together(format, layout)); }
    std::size_t data_bytes() const { return padded_out() * padded_in() * format_bits(format) / 8; }
    std::size_t scales_bytes() const { return 2 * padded_out() * n_groups(); }
};

// Activations as a product reads them.
//
// Against floating weights: `floats`, rows `stride` apart, with zeros from n_in to the next multiple of kColumnPadding.
//
// Against integer weights: x = integers · scale of the row's group, with zeros from n_in to the end of the last group,
// and `sums` the sum of each group's integers, times 8: what int4's offset adds to a product, and twice what int3's
// does. The integers have 16 bits and the weights' groups for int8; against int4 and int3, whose own rounding is
// coarser by far, 8 bits and groups of kColumnPadding, which takes half of the arithmetic. All rows of a group lie
// together, because a product works on one group of every row at a time: with rows a power of two apart, they would
// fall into few sets of a cache.
struct Activations {
    std::size_t n_rows;              // at most kMaxRows
    std::size_t stride;              // of floats
    const float* floats;             // (n_rows, stride), or null
    std::size_t slots;               // rows that there is room for in each group, at least n_rows
    const std::int16_t* integers16;  // (n_activation_groups, slots, activation_group) for int8, or null
    const std::int8_t* integers8;    // the same for int4 and int3, or null
    const float* scales;             // (n_activation_groups, slots), or null
    const std::int32_t* sums;        // (n_activation_groups, slots), or null
};

}  // namespace goslet
