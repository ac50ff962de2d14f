// Eight lanes at a time. Each simd_*.h defines this for one instruction set, in an unnamed namespace, and each
// instruction set's .cpp file includes one of them and then the kernels that are written over it:
//
//   F32x8                    eight floats:    + - * /, fma(a, b, c) = a·b + c (one rounding where the hardware has it),
//                            min, max, abs, sum, largest
//   I32x8                    eight integers of 32 bits:    + - & |, shift_left<n>
//   load, store, load_partial, store_partial (of n lanes, 0 <= n <= 8; the others read as zero), load_i32, store_i32,
//   broadcast(float), broadcast_i32, zero(), zero_i32()
//   to_f32(I32x8), to_i32(F32x8) (to the nearest, ties to even, for |x| < 2^22), bits_of(F32x8), f32_of_bits(I32x8)
//   load_weights(pointer)    eight f32, f16 or bf16 numbers as floats
//
// For integer products, lanes are outputs, and two inputs are taken at once, as 16-bit integers:
//
//   Pairs                    eight outputs' weights for two inputs;  store_pairs, load_pairs keep them in memory
//   InputPair                the two inputs' activations for all lanes;  input_pair(pointer to two int16)
//   dot(sum, Pairs, InputPair)   sum + weight · activation of both inputs
//   Int8Tile, Int4Tile       unpack kBytes of a tile: its next 2 · kPairs inputs
//   Int8Columns, Int4Columns unpack two inputs of a block of columns: kPairs vectors of outputs, from `vector` on
//
//   pack_i16(pointer, F32x8) eight floats, rounded to the nearest, as int16
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
