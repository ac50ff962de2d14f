// Two to kMaxRows rows of activations: limited by arithmetic. See products.h.
#pragma once

#include "products_common.h"

namespace goslet {
namespace {

// A panel's width in vectors.
constexpr std::size_t kPanelVectors = 2;
constexpr std::size_t kPanelOutputs = kPanelVectors * kLanes;

// Where the outputs of a strip are: a strip is what more rows than one work on at once. Two tiles make one panel, and a
// block of columns four.
template <Layout kLayout>
struct Strip {
    static constexpr std::size_t kPanels = kLayout == Layout::kTiles ? 1 : kColumnsBlock / kPanelOutputs;
    static constexpr std::size_t kUnits = kLayout == Layout::kTiles ? kPanelVectors : 1;
    static constexpr std::size_t kOutputs = kPanels * kPanelOutputs;
};

// The integers of one group of a strip, as pairs.
template <Format kFormat, Layout kLayout>
struct IntegerPanels {
    alignas(64) Pairs pairs[Strip<kLayout>::kPanels][kMaxGroup / 2][kPanelVectors];

    // Of inputs [begin, end); a tile at `end_unit` or past it is never stored, and the last one stands in for it.
    void unpack(const Matrix& matrix, std::size_t unit, std::size_t end_unit, std::size_t begin, std::size_t end) {
        if constexpr (kLayout == Layout::kTiles) {
            using Tile = typename IntegerFormat<kFormat>::Tile;
            constexpr std::size_t kInputs = 2 * Tile::kPairs;
            for (std::size_t t = 0; t < kPanelVectors; ++t) {
                const std::size_t tile = smaller(unit + t, end_unit - 1);
                const std::uint8_t* data = matrix.data + (tile * matrix.padded_in() + begin) / kInputs * Tile::kBytes;
                for (std::size_t pair = 0; pair < (end - begin) / 2; pair += Tile::kPairs) {
                    Pairs weights[Tile::kPairs];
                    Tile::unpack(data, weights);
                    fetch_second(data + kAheadBytes);
                    data += Tile::kBytes;
#pragma GCC unroll 4
                    for (std::size_t p = 0; p < Tile::kPairs; ++p) {
                        store_pairs(&pairs[0][pair + p][t], weights[p]);
                    }
                }
            }
        } else {
            using Columns = typename IntegerFormat<kFormat>::Columns;
            constexpr std::size_t kUnitBytes = kColumnsBlock * format_bits(kFormat) / 8;
            const std::size_t input_bytes = matrix.n_units() * kUnitBytes;
            const std::uint8_t* data = matrix.data + begin * input_bytes + unit * kUnitBytes;
            for (std::size_t pair = 0; pair < (end - begin) / 2; ++pair, data += 2 * input_bytes) {
                fetch_second(data + kUnitBytes);
                fetch_second(data + input_bytes + kUnitBytes);
#pragma GCC unroll 8
                for (std::size_t v = 0; v < kColumnsBlock / kLanes; v += Columns::kPairs) {
                    Pairs weights[Columns::kPairs];
                    Columns::unpack(data, data + input_bytes, v, weights);
#pragma GCC unroll 8
                    for (std::size_t p = 0; p < Columns::kPairs; ++p) {
                        store_pairs(&pairs[(v + p) / kPanelVectors][pair][(v + p) % kPanelVectors], weights[p]);
                    }
                }
            }
        }
    }
};

// One group of one panel and of rows [row, n_rows), kRows at a time and what is left in halves of that.
template <Format kFormat, std::size_t kRows>
inline void add_integer_panel(const Pairs (*panel)[kPanelVectors], std::size_t n_pairs, const Activations& x,
                              std::size_t row, std::size_t group, std::size_t group_size, std::size_t n_groups,
                              const std::uint16_t* const* scales, float (*totals)[kPanelOutputs]) {
    for (; row + kRows <= x.n_rows; row += kRows) {
        const std::int16_t* integers = x.integers + row * x.stride + group * group_size;
        I32x8 sums[kRows][kPanelVectors];
#pragma GCC unroll 8
        for (std::size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
            for (std::size_t v = 0; v < kPanelVectors; ++v) {
                sums[r][v] = first_sum<kFormat>(x, row + r, group, n_groups);
            }
        }
#pragma GCC unroll 4
        for (std::size_t pair = 0; pair < n_pairs; ++pair) {
            const Pairs first = load_pairs(&panel[pair][0]);
            const Pairs second = load_pairs(&panel[pair][1]);
#pragma GCC unroll 8
            for (std::size_t r = 0; r < kRows; ++r) {
                const InputPair activations = input_pair(integers + r * x.stride + 2 * pair);
                sums[r][0] = dot(sums[r][0], first, activations);
                sums[r][1] = dot(sums[r][1], second, activations);
            }
        }
#pragma GCC unroll 8
        for (std::size_t r = 0; r < kRows; ++r) {
            const F32x8 x_scale = broadcast(x.scales[(row + r) * n_groups + group]);
#pragma GCC unroll 2
            for (std::size_t v = 0; v < kPanelVectors; ++v) {
                float* total = totals[row + r] + v * kLanes;
                store(total, add_group(load(total), sums[r][v], x_scale, scales[v]));
            }
        }
    }
    if constexpr (kRows > 1) {
        add_integer_panel<kFormat, kRows / 2>(panel, n_pairs, x, row, group, group_size, n_groups, scales, totals);
    }
}

template <Format kFormat, Layout kLayout>
inline void rows_of_integers(const Matrix& matrix, const Activations& x, std::size_t first_unit, std::size_t end_unit,
                             float* out, std::size_t out_stride) {
    using Shape = Strip<kLayout>;
    const std::size_t padded_in = matrix.padded_in();
    const std::size_t n_groups = matrix.n_groups();
    IntegerPanels<kFormat, kLayout> panels;
    alignas(64) float totals[Shape::kPanels][kMaxRows][kPanelOutputs];
    for (std::size_t unit = first_unit; unit < end_unit; unit += Shape::kUnits) {
        for (std::size_t panel = 0; panel < Shape::kPanels; ++panel) {
            std::memset(totals[panel], 0, x.n_rows * sizeof totals[0][0]);
        }
        for (std::size_t group = 0; group < n_groups; ++group) {
            const std::size_t begin = group * matrix.group;
            const std::size_t end = smaller(begin + matrix.group, padded_in);
            panels.unpack(matrix, unit, end_unit, begin, end);
            for (std::size_t panel = 0; panel < Shape::kPanels; ++panel) {
                const std::uint16_t* scales[kPanelVectors];
                for (std::size_t v = 0; v < kPanelVectors; ++v) {
                    if constexpr (kLayout == Layout::kTiles) {
                        const std::size_t tile = smaller(unit + v, end_unit - 1);
                        scales[v] = matrix.scales + (tile * n_groups + group) * kLanes;
                    } else {
                        scales[v] = matrix.scales + group * matrix.padded_out() + unit * kColumnsBlock +
                                    panel * kPanelOutputs + v * kLanes;
                    }
                }
                add_integer_panel<kFormat, kRowsAtOnce>(panels.pairs[panel], (end - begin) / 2, x, 0, group,
                                                        matrix.group, n_groups, scales, totals[panel]);
            }
        }
        const std::size_t end_output = smaller(end_unit * matrix.unit_outputs(), matrix.n_out);
        for (std::size_t row = 0; row < x.n_rows; ++row) {
            for (std::size_t i = 0; i < Shape::kOutputs; i += kLanes) {
                store_outputs(out + row * out_stride, unit * matrix.unit_outputs() + i, end_output,
                              load(totals[i / kPanelOutputs][row] + i % kPanelOutputs));
            }
        }
    }
}

// One chunk of one panel, its inputs of one parity, and rows [row, n_rows).
template <std::size_t kRows>
inline void add_float_panel(const float (*panel)[kPanelOutputs], std::size_t n_inputs, std::size_t parity,
                            const Activations& x, std::size_t row, std::size_t first_input,
                            float (*totals)[kPanelOutputs]) {
    for (; row + kRows <= x.n_rows; row += kRows) {
        const float* floats = x.floats + row * x.stride + first_input;
        F32x8 sums[kRows][kPanelVectors];
#pragma GCC unroll 8
        for (std::size_t r = 0; r < kRows; ++r) {
            sums[r][0] = load(totals[row + r]);
            sums[r][1] = load(totals[row + r] + kLanes);
        }
        for (std::size_t i = parity; i < n_inputs; i += 2) {
            const F32x8 first = load(panel[i]);
            const F32x8 second = load(panel[i] + kLanes);
#pragma GCC unroll 8
            for (std::size_t r = 0; r < kRows; ++r) {
                const F32x8 activation = broadcast(floats[r * x.stride + i]);
                sums[r][0] = fma(activation, first, sums[r][0]);
                sums[r][1] = fma(activation, second, sums[r][1]);
            }
        }
#pragma GCC unroll 8
        for (std::size_t r = 0; r < kRows; ++r) {
            store(totals[row + r], sums[r][0]);
            store(totals[row + r] + kLanes, sums[r][1]);
        }
    }
    if constexpr (kRows > 1) {
        add_float_panel<kRows / 2>(panel, n_inputs, parity, x, row, first_input, totals);
    }
}

template <Format kFormat, Layout kLayout>
inline void rows_of_floats(const Matrix& matrix, const Activations& x, std::size_t first_unit, std::size_t end_unit,
                           float* out, std::size_t out_stride) {
    using Number = typename FloatFormat<kFormat>::Number;
    using Shape = Strip<kLayout>;
    const std::size_t padded_in = matrix.padded_in();
    alignas(64) float panels[Shape::kPanels][kFloatChunk][kPanelOutputs];
    alignas(64) float totals[Shape::kPanels][2][kMaxRows][kPanelOutputs];
    for (std::size_t unit = first_unit; unit < end_unit; unit += Shape::kUnits) {
        for (std::size_t panel = 0; panel < Shape::kPanels; ++panel) {
            std::memset(totals[panel][0], 0, x.n_rows * sizeof totals[0][0][0]);
            std::memset(totals[panel][1], 0, x.n_rows * sizeof totals[0][0][0]);
        }
        for (std::size_t chunk = 0; chunk < padded_in; chunk += kFloatChunk) {
            const std::size_t n_inputs = smaller(kFloatChunk, padded_in - chunk);
            for (std::size_t i = 0; i < n_inputs; ++i) {
                const Number* data = reinterpret_cast<const Number*>(matrix.data);
                for (std::size_t v = 0; v < Shape::kOutputs / kLanes; ++v) {
                    const std::size_t at = kLayout == Layout::kTiles
                                               ? (smaller(unit + v, end_unit - 1) * padded_in + chunk + i) * kLanes
                                               : (chunk + i) * matrix.padded_out() + unit * kColumnsBlock + v * kLanes;
                    store(panels[v / kPanelVectors][i] + v % kPanelVectors * kLanes, load_weights(data + at));
                }
            }
            for (std::size_t panel = 0; panel < Shape::kPanels; ++panel) {
                for (std::size_t parity = 0; parity < 2; ++parity) {
                    add_float_panel<kRowsAtOnce>(panels[panel], n_inputs, parity, x, 0, chunk, totals[panel][parity]);
                }
            }
        }
        const std::size_t end_output = smaller(end_unit * matrix.unit_outputs(), matrix.n_out);
        for (std::size_t row = 0; row < x.n_rows; ++row) {
            for (std::size_t i = 0; i < Shape::kOutputs; i += kLanes) {
                const std::size_t panel = i / kPanelOutputs;
                const std::size_t lane = i % kPanelOutputs;
                store_outputs(out + row * out_stride, unit * matrix.unit_outputs() + i, end_output,
                              load(totals[panel][0][row] + lane) + load(totals[panel][1][row] + lane));
            }
        }
    }
}

}  // namespace
}  // namespace goslet
