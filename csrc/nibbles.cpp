#include "nibbles.h"

#include <algorithm>

namespace goslet {
namespace {

// A tile is kTile pairs of input rows by kTile bytes of each: a cache line of every row is read once and used whole,
// and the two tiles below stay in L1 together (8 KiB).
constexpr std::size_t kTile = 64;

struct Tile {
    alignas(64) std::uint8_t even[kTile][kTile];  // (pair of rows, byte): bytes of the result's rows 2 * byte
    alignas(64) std::uint8_t odd[kTile][kTile];   // the same of its rows 2 * byte + 1
};

void combine_pair(const std::uint8_t* even_pair, const std::uint8_t* odd_pair, std::size_t stride, std::size_t n_bytes,
                  std::uint8_t* even, std::uint8_t* odd) {
    for (std::size_t byte = 0; byte < n_bytes; ++byte) {
        even[byte] = static_cast<std::uint8_t>((even_pair[byte] & 0x0F) | (even_pair[stride + byte] << 4));
        odd[byte] = static_cast<std::uint8_t>((odd_pair[byte] >> 4) | (odd_pair[stride + byte] & 0xF0));
    }
}

}  // namespace

void transpose_int4(const std::uint8_t* rows, std::size_t n, std::size_t k, std::uint8_t* out) {
    const std::size_t stride = nibble_bytes(k);
    const std::size_t n_pairs = n / 2;
    // Row r of the result starts at nibble r * n, in the middle of a byte when both are odd. Its first nibble then
    // shares that byte with the row before, and its pairs begin one input row further on.
    const std::size_t skip = n % 2;
    Tile tile;
    for (std::size_t pair = 0; pair < n_pairs; pair += kTile) {
        const std::size_t tile_pairs = std::min(kTile, n_pairs - pair);
        for (std::size_t byte = 0; byte < stride; byte += kTile) {
            const std::size_t tile_bytes = std::min(kTile, stride - byte);
            for (std::size_t p = 0; p < tile_pairs; ++p) {
                const std::uint8_t* const even_pair = rows + 2 * (pair + p) * stride + byte;
                combine_pair(even_pair, even_pair + skip * stride, stride, tile_bytes, tile.even[p], tile.odd[p]);
            }
            for (std::size_t b = 0; b < tile_bytes; ++b) {
                const std::size_t r = 2 * (byte + b);
                std::uint8_t* const even = out + r * n / 2 + pair;
                for (std::size_t p = 0; p < tile_pairs; ++p) {
                    even[p] = tile.even[p][b];
                }
                if (r + 1 == k) {
                    continue;
                }
                std::uint8_t* const odd = out + ((r + 1) * n + skip) / 2 + pair;
                for (std::size_t p = 0; p < tile_pairs; ++p) {
                    odd[p] = tile.odd[p][b];
                }
            }
        }
    }
    if (n % 2 == 0) {
        return;
    }
    // The nibbles that no pair took: the last of every even row, with the first of the odd row after it.
    for (std::size_t r = 0; r < k; r += 2) {
        const std::uint8_t low = rows[(n - 1) * stride + r / 2] & 0x0F;
        const std::uint8_t high = r + 1 < k ? rows[r / 2] & 0xF0 : 0;
        out[(r * n + n - 1) / 2] = static_cast<std::uint8_t>(low | high);
    }
}

}  // namespace goslet
