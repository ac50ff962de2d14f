// Eight lanes at a time. Each simd_*.h defines this for one instruction set, in an unnamed namespace, and each
// instruction set's .cpp file includes one of them and then the kernels that are written over it:
//
//   F32x8                    eight floats:    + - * /, fma(a, b, c) = a·b + c (one rounding where the hardware has it),
//                            min, max, abs, sum, largest
//   I32x8                    eight integers of 32 bits:    + - & |, shift_left<n>, shift_right<n> (which fills with 0)
//   load, store, load_partial, store_partial (of n lanes, 0 <= n <= 8; the others read as zero), load_i32, store_i32,
//   load_bits (32 bytes), load_lanes24 (the low 16 bits of eight lanes, then the next 8 of each), broadcast(float),
//   broadcast_i32, zero(), zero_i32() to_f32(I32x8), to_i32(F32x8) (to the nearest, ties to even, for |x| < 2^22),
//   bits_of(F32x8), f32_of_bits(I32x8) load_weights(pointer)    eight f32, f16 or bf16 numbers as floats
//
// For integer products, lanes are outputs, and two or four inputs are taken at once. As 16-bit integers:
//
//   Pairs                    eight outputs' weights for two inputs;  store_words, load_words keep them in memory
//   InputPair                the two inputs' activations for all lanes;  load_inputs(pointer to two int16)
//   dot(I32x8 sums, Pairs, InputPair)   sums + weight · activation of both inputs
//   one_by_one(I32x8)        keeps a sum from being formed as a tree, whose leaves would not fit into the registers,
//   where
//                            a compiler was seen to do that and to lose by it
//   load_int8_pairs          16 bytes of a tile of int8
//   Int8Columns, Int4Columns, Int3Columns unpack two inputs of a block of columns: kPairs vectors of outputs, from
//   `vector` on
//
// And int4's numbers, from 0 to 15, and int3's, from 0 to 7, as bytes against activations of 8 bits:
//
//   Quads                    eight outputs' weights for four inputs, in the bytes of an I32x8;  store_words, load_words
//   InputQuad                the four inputs' activations for all lanes;  load_inputs(pointer to four int8)
//   QuadSums                 sums of up to 32 inputs, in as few bits as these need;  +, no_quad_sums()
//   dot(QuadSums, Quads, InputQuad)     sums + weight · activation of all four inputs
//
//   total_of(I32x8 or QuadSums)         the outputs' sums as I32x8
//   store_rounded(pointer, F32x8)       eight floats, rounded to the nearest, as int16 or int8
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// What a vector lives in registers for must not become a call.
#define GOSLET_INLINE inline __attribute__((always_inline))

namespace goslet {

struct F16 {
    std::uint16_t bits;
};
struct Bf16 {
    std::uint16_t bits;
};

}  // namespace goslet
