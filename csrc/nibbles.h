// Rearranging packed 4-bit weights.
#pragma once

#include <cstddef>
#include <cstdint>

namespace goslet {

// Bytes that `count` nibbles take, two in a byte.
constexpr std::size_t nibble_bytes(std::size_t count) {
    return count / 2 + count % 2;
}

// Transposes a matrix of nibbles.
//   rows: (n, nibble_bytes(k)), row by row; low nibble first; the last high nibble of a row is ignored where k is odd
//   out:  nibble_bytes(k * n) bytes; the (k, n) matrix packed without gaps, low nibble first, a last high nibble of 0
// The caller makes sure that k * n does not overflow and that the two do not overlap.
void transpose_int4(const std::uint8_t* rows, std::size_t n, std::size_t k, std::uint8_t* out);

}  // namespace goslet
