// One row of activations: limited by memory. See products.h.
#pragma once

#include "products_common.h"

namespace goslet {
namespace {

// Outputs of a matrix in columns that one row works on at once: their sums stay in the first-level cache while
// memory is read along the inputs.
constexpr std::size_t kSpanUnits = 16;

// One row, integers in one tile. Tiles side by side would share the activations' loads, but two streams of memory were
// slower than one.
template <Format kFormat>
GOSLET_INLINE void row_of_integer_tile(const Matrix& matrix, const Activations& x, std::size_t tile, float* out) {
    using Tile = typename IntegerFormat<kFormat>::Tile;
    constexpr std::size_t kInputs = 2 * Tile::kPairs;  // of one unpacking
    constexpr std::size_t kUnpackings = kLineBytes / Tile::kBytes;
    constexpr std::size_t kChains = 4;  // so that a sum need not wait for the one before
    const std::size_t padded_in = matrix.padded_in();
    const std::size_t n_groups = matrix.n_groups();
    const std::uint8_t* data = matrix.data + tile * padded_in / kInputs * Tile::kBytes;
    const std::uint16_t* scales = matrix.scales + tile * n_groups * kLanes;
    F32x8 total = zero();
    for (std::size_t group = 0; group < n_groups; ++group, scales += kLanes) {
        const std::size_t end = smaller((group + 1) * matrix.group, padded_in);
        I32x8 sums[kChains] = {first_sum<kFormat>(x, 0, group, n_groups), zero_i32(), zero_i32(), zero_i32()};
        for (std::size_t input = group * matrix.group; input < end; input += kUnpackings * kInputs) {
            fetch_first(data + kAheadBytes);
#pragma GCC unroll 4
            for (std::size_t i = 0; i < kUnpackings; ++i, data += Tile::kBytes) {
                const std::int16_t* integers = x.integers + input + i * kInputs;
                Pairs pairs[Tile::kPairs];
                Tile::unpack(data, pairs);
#pragma GCC unroll 4
                for (std::size_t p = 0; p < Tile::kPairs; ++p) {
                    I32x8& sum = sums[(i * Tile::kPairs + p) % kChains];
                    sum = dot(sum, pairs[p], input_pair(integers + 2 * p));
                }
            }
        }
        const I32x8 sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        total = add_group(total, sum, broadcast(x.scales[group]), scales);
    }
    store_outputs(out, tile * kLanes, matrix.n_out, total);
}

// One row, floats in kTiles tiles at once, which give enough sums that need not wait for each other.
template <Format kFormat, std::size_t kTiles>
GOSLET_INLINE void row_of_float_tiles(const Matrix& matrix, const Activations& x, std::size_t tile, float* out) {
    using Number = typename FloatFormat<kFormat>::Number;
    const std::size_t padded_in = matrix.padded_in();
    const std::size_t tile_numbers = padded_in * kLanes;
    const Number* data = reinterpret_cast<const Number*>(matrix.data) + tile * tile_numbers;
    F32x8 even[kTiles];
    F32x8 odd[kTiles];
    for (std::size_t t = 0; t < kTiles; ++t) {
        even[t] = odd[t] = zero();
    }
    constexpr std::size_t kColumns = kLineBytes / (kLanes * sizeof(Number));
    constexpr std::size_t kStep = kColumns < 2 ? 2 : kColumns;
    for (std::size_t column = 0; column < padded_in; column += kStep) {
        for (std::size_t t = 0; t < kTiles; ++t) {
            for (std::size_t line = 0; line < kStep / kColumns; ++line) {
                fetch_second(reinterpret_cast<const std::uint8_t*>(data + t * tile_numbers + column * kLanes) +
                             line * kLineBytes + kAheadBytes);
            }
        }
#pragma GCC unroll 4
        for (std::size_t c = column; c < column + kStep; c += 2) {
            const F32x8 first = broadcast(x.floats[c]);
            const F32x8 second = broadcast(x.floats[c + 1]);
#pragma GCC unroll 4
            for (std::size_t t = 0; t < kTiles; ++t) {
                even[t] = fma(first, load_weights(data + t * tile_numbers + c * kLanes), even[t]);
                odd[t] = fma(second, load_weights(data + t * tile_numbers + (c + 1) * kLanes), odd[t]);
            }
        }
    }
    for (std::size_t t = 0; t < kTiles; ++t) {
        store_outputs(out, (tile + t) * kLanes, matrix.n_out, even[t] + odd[t]);
    }
}

// Inputs of a matrix in columns that meet all units of a span before the next ones do: enough to keep a sum in
// registers for a while, and few enough to read memory forward.
constexpr std::size_t kColumnsAtOnce = 16;

// Two inputs of a matrix in columns. One without a partner has itself, with a zero.
struct TwoInputs {
    std::size_t offsets[2];  // of their weights, in bytes
    std::int16_t x[2];
};

// The inputs [begin, end) in pairs, without those whose activation is zero if `skip_zeros`. Returns how many pairs.
inline std::size_t list_pairs(const std::int16_t* x, std::size_t begin, std::size_t end, bool skip_zeros,
                              std::size_t input_bytes, TwoInputs* pairs) {
    std::size_t count = 0;
    for (std::size_t i = begin; i < end; ++i) {
        TwoInputs& pair = pairs[count / 2];
        pair.offsets[count % 2] = i * input_bytes;
        pair.x[count % 2] = x[i];
        count += !skip_zeros || x[i] != 0;
    }
    if (count % 2 != 0) {
        pairs[count / 2].offsets[1] = pairs[count / 2].offsets[0];
        pairs[count / 2].x[1] = 0;
    }
    return (count + 1) / 2;
}

// One row, integers in columns.
template <Format kFormat>
inline void row_of_integer_columns(const Matrix& matrix, const Activations& x, std::size_t first_unit,
                                   std::size_t end_unit, float* out, bool skip_zeros) {
    using Columns = typename IntegerFormat<kFormat>::Columns;
    constexpr std::size_t kUnitVectors = kColumnsBlock / kLanes;
    constexpr std::size_t kUnitBytes = kColumnsBlock * format_bits(kFormat) / 8;
    constexpr std::size_t kPairsAtOnce = kColumnsAtOnce / 2;
    const std::size_t padded_in = matrix.padded_in();
    const std::size_t n_groups = matrix.n_groups();
    const std::size_t input_bytes = matrix.n_units() * kUnitBytes;
    for (std::size_t span = first_unit; span < end_unit; span += kSpanUnits) {
        const std::size_t span_end = smaller(span + kSpanUnits, end_unit);
        const std::size_t n_numbers = (span_end - span) * kColumnsBlock;
        alignas(64) float totals[kSpanUnits * kColumnsBlock];
        alignas(64) std::int32_t sums[kSpanUnits * kColumnsBlock];
        for (std::size_t i = 0; i < n_numbers; i += kLanes) {
            store(totals + i, zero());
        }
        // This group's pairs and the next group's, whose weights are fetched while this group ends.
        TwoInputs pairs[kMaxGroup + 1];
        std::size_t n_pairs =
            list_pairs(x.integers, 0, smaller(matrix.group, padded_in), skip_zeros, input_bytes, pairs);
        for (std::size_t group = 0; group < n_groups; ++group) {
            const std::size_t next = smaller((group + 1) * matrix.group, padded_in);
            const std::size_t n_next = list_pairs(x.integers, next, smaller(next + matrix.group, padded_in), skip_zeros,
                                                  input_bytes, pairs + n_pairs);
            for (std::size_t i = 0; i < n_numbers; i += kLanes) {
                store_i32(sums + i, first_sum<kFormat>(x, 0, group, n_groups));
            }
            for (std::size_t begin = 0; begin < n_pairs; begin += kPairsAtOnce) {
                const std::size_t end = smaller(begin + kPairsAtOnce, n_pairs);
                for (std::size_t unit = span; unit < span_end; ++unit) {
                    const std::uint8_t* data = matrix.data + unit * kUnitBytes;
                    std::int32_t* unit_sums = sums + (unit - span) * kColumnsBlock;
                    I32x8 partial[kUnitVectors];
#pragma GCC unroll 8
                    for (std::size_t v = 0; v < kUnitVectors; ++v) {
                        partial[v] = load_i32(unit_sums + v * kLanes);
                    }
                    for (std::size_t i = begin; i < end; ++i) {
                        const TwoInputs& ahead = pairs[smaller(i + kPairsAtOnce, n_pairs + n_next - 1)];
                        fetch_second(data + ahead.offsets[0]);
                        fetch_second(data + ahead.offsets[1]);
                        const std::uint8_t* first = data + pairs[i].offsets[0];
                        const std::uint8_t* second = data + pairs[i].offsets[1];
                        const InputPair activations = input_pair(pairs[i].x);
#pragma GCC unroll 8
                        for (std::size_t v = 0; v < kUnitVectors; v += Columns::kPairs) {
                            Pairs weights[Columns::kPairs];
                            Columns::unpack(first, second, v, weights);
#pragma GCC unroll 8
                            for (std::size_t p = 0; p < Columns::kPairs; ++p) {
                                partial[v + p] = dot(partial[v + p], weights[p], activations);
                            }
                        }
                    }
#pragma GCC unroll 8
                    for (std::size_t v = 0; v < kUnitVectors; ++v) {
                        store_i32(unit_sums + v * kLanes, partial[v]);
                    }
                }
            }
            const F32x8 x_scale = broadcast(x.scales[group]);
            const std::uint16_t* scales = matrix.scales + group * matrix.padded_out() + span * kColumnsBlock;
            for (std::size_t i = 0; i < n_numbers; i += kLanes) {
                store(totals + i, add_group(load(totals + i), load_i32(sums + i), x_scale, scales + i));
            }
            std::memmove(pairs, pairs + n_pairs, n_next * sizeof pairs[0]);
            n_pairs = n_next;
        }
        for (std::size_t i = 0; i < n_numbers; i += kLanes) {
            store_outputs(out, span * kColumnsBlock + i, matrix.n_out, load(totals + i));
        }
    }
}

// One row, floats in columns. Of every kFloatChunk inputs, those with an even index come first.
template <Format kFormat>
inline void row_of_float_columns(const Matrix& matrix, const Activations& x, std::size_t first_unit,
                                 std::size_t end_unit, float* out, bool skip_zeros) {
    using Number = typename FloatFormat<kFormat>::Number;
    constexpr std::size_t kUnitVectors = kColumnsBlock / kLanes;
    constexpr std::size_t kUnitBytes = kColumnsBlock * sizeof(Number);
    const std::size_t padded_in = matrix.padded_in();
    const std::size_t padded_out = matrix.padded_out();
    for (std::size_t span = first_unit; span < end_unit; span += kSpanUnits) {
        const std::size_t span_end = smaller(span + kSpanUnits, end_unit);
        const std::size_t n_numbers = (span_end - span) * kColumnsBlock;
        alignas(64) float totals[2][kSpanUnits * kColumnsBlock];
        for (std::size_t i = 0; i < n_numbers; i += kLanes) {
            store(totals[0] + i, zero());
            store(totals[1] + i, zero());
        }
        for (std::size_t chunk = 0; chunk < padded_in; chunk += kFloatChunk) {
            std::size_t inputs[kFloatChunk + 1];
            std::size_t ends[2];
            std::size_t count = 0;
            for (std::size_t parity = 0; parity < 2; ++parity) {
                for (std::size_t i = chunk + parity; i < smaller(chunk + kFloatChunk, padded_in); i += 2) {
                    inputs[count] = i;
                    count += !skip_zeros || x.floats[i] != 0.0f;
                }
                ends[parity] = count;
            }
            std::size_t begin = 0;
            while (begin < count) {
                const std::size_t parity = begin < ends[0] ? 0 : 1;
                const std::size_t end = smaller(begin + kColumnsAtOnce, ends[parity]);
                for (std::size_t unit = span; unit < span_end; ++unit) {
                    const Number* data = reinterpret_cast<const Number*>(matrix.data) + unit * kColumnsBlock;
                    float* unit_totals = totals[parity] + (unit - span) * kColumnsBlock;
                    F32x8 sums[kUnitVectors];
#pragma GCC unroll 8
                    for (std::size_t v = 0; v < kUnitVectors; ++v) {
                        sums[v] = load(unit_totals + v * kLanes);
                    }
                    for (std::size_t i = begin; i < end; ++i) {
                        // Past the chunk, the next one's first inputs are a guess, which is right without zeros.
                        const std::size_t ahead = i + kColumnsAtOnce < count
                                                      ? inputs[i + kColumnsAtOnce]
                                                      : chunk + kFloatChunk + 2 * (i + kColumnsAtOnce - count);
                        for (std::size_t byte = 0; byte < kUnitBytes; byte += kLineBytes) {
                            fetch_second(reinterpret_cast<const std::uint8_t*>(data + ahead * padded_out) + byte);
                        }
                        const F32x8 activation = broadcast(x.floats[inputs[i]]);
                        const Number* weights = data + inputs[i] * padded_out;
#pragma GCC unroll 8
                        for (std::size_t v = 0; v < kUnitVectors; ++v) {
                            sums[v] = fma(activation, load_weights(weights + v * kLanes), sums[v]);
                        }
                    }
#pragma GCC unroll 8
                    for (std::size_t v = 0; v < kUnitVectors; ++v) {
                        store(unit_totals + v * kLanes, sums[v]);
                    }
                }
                begin = end;
            }
        }
        for (std::size_t i = 0; i < n_numbers; i += kLanes) {
            store_outputs(out, span * kColumnsBlock + i, matrix.n_out, load(totals[0] + i) + load(totals[1] + i));
        }
    }
}

}  // namespace
}  // namespace goslet
