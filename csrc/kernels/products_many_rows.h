// Two to kMaxRows rows of activations: limited by arithmetic. See products.h.
#pragma once

#include "products_common.h"

namespace goslet {
namespace {

// A panel's width in vectors.
constexpr std::size_t kPanelVectors = 2;
constexpr std::size_t kPanelOutputs = kPanelVectors * kLanes;
// The outputs that all rows work on at once: panels and totals of more would push each other out of the first-level
// cache.
constexpr std::size_t kPanels = 2;
constexpr std::size_t kStripOutputs = kPanels * kPanelOutputs;
constexpr std::size_t kStripVectors = kPanels * kPanelVectors;

// The tile of a strip's vector: one past the range is never stored, and its last one stands in for it.
inline std::size_t tile_of(std::size_t output, std::size_t vector, std::size_t end_output) {
    return smaller(output / kLanes + vector, (end_output - 1) / kLanes);
}

// The weights of one group of activations of a strip.
template <Format kFormat, Layout kLayout>
struct IntegerPanels {
    using Integers = IntegerFormat<kFormat>;
    using Words = typename Integers::Words;
    static constexpr std::size_t kMostWords = (takes_bytes(kFormat) ? kColumnPadding : kMaxGroup) / Integers::kInputs;
    using Panel = Words[kMostWords][kPanelVectors];

    alignas(64) Panel panels[kPanels];

    Words* place(std::size_t word, std::size_t vector) {
        return &panels[vector / kPanelVectors][word][vector % kPanelVectors];
    }

    // Of inputs [begin, end).
    void unpack(const Matrix& matrix, std::size_t output, std::size_t end_output, std::size_t begin, std::size_t end) {
        const std::size_t n_words = (end - begin) / Integers::kInputs;
        if constexpr (kLayout == Layout::kTiles) {
            constexpr std::size_t kInputs = Integers::kTileWords * Integers::kInputs;
            for (std::size_t v = 0; v < kStripVectors; ++v) {
                const std::size_t tile = tile_of(output, v, end_output);
                const std::uint8_t* data =
                    matrix.data + (tile * matrix.padded_in() + begin) / kInputs * Integers::kTileBytes;
                for (std::size_t word = 0; word < n_words; word += Integers::kTileWords) {
                    Words words[Integers::kTileWords];
                    Integers::unpack_tile(data, words);
                    for (std::size_t line = 0; line < Integers::kTileBytes; line += kLineBytes) {
                        fetch_second(data + line + kAheadBytes);
                    }
                    data += Integers::kTileBytes;
#pragma GCC unroll 8
                    for (std::size_t w = 0; w < Integers::kTileWords; ++w) {
                        store_words(place(word + w, v), words[w]);
                    }
                }
            }
        } else {
            constexpr std::size_t kOutputs = stored_together(kFormat, Layout::kColumns);
            constexpr std::size_t kInputBytes = kOutputs * format_bits(kFormat) / 8;
            constexpr std::size_t kPartBytes = kBlockOutputs * format_bits(kFormat) / 8;
            const std::uint8_t* data = matrix.data + (output / kOutputs * matrix.padded_in() + begin) * kInputBytes +
                                       output % kOutputs / kBlockOutputs * kPartBytes;
            const std::size_t first_vector = output % kBlockOutputs / kLanes;
            for (std::size_t word = 0; word < n_words; ++word, data += Integers::kInputs * kInputBytes) {
#pragma GCC unroll 4
                for (std::size_t input = 0; input < Integers::kInputs; ++input) {
                    fetch_second(data + input * kInputBytes + kAheadBytes);
                }
#pragma GCC unroll 4
                for (std::size_t v = 0; v < kStripVectors; v += Integers::kColumnWords) {
                    Words words[Integers::kColumnWords];
                    Integers::unpack_columns(data, kInputBytes, first_vector + v, words);
#pragma GCC unroll 4
                    for (std::size_t w = 0; w < Integers::kColumnWords; ++w) {
                        store_words(place(word, v + w), words[w]);
                    }
                }
            }
        }
    }

    static F32x8 scale(const Matrix& matrix, std::size_t output, std::size_t vector, std::size_t end_output,
                       std::size_t group) {
        const std::size_t n_groups = matrix.n_groups();
        if constexpr (kLayout == Layout::kTiles) {
            return load_scales(matrix.scales + (tile_of(output, vector, end_output) * n_groups + group) * kLanes);
        } else {
            constexpr std::size_t kOutputs = stored_together(kFormat, Layout::kColumns);
            return load_scales(matrix.scales + (output / kOutputs * n_groups + group) * kOutputs + output % kOutputs +
                               vector * kLanes);
        }
    }
};

// One group of a strip and of rows [row, n_rows), kRows at a time and what is left in halves of that.
template <Format kFormat, std::size_t kRows, typename Panel>
inline void add_integers(const Panel* panels, const Matrix& matrix, std::size_t n_inputs, const F32x8* scales,
                         const Activations& x, std::size_t row, std::size_t group,
                         float (*totals)[kMaxRows][kPanelOutputs]) {
    using Integers = IntegerFormat<kFormat>;
    const std::size_t group_size = Integers::group(matrix);
    const std::size_t n_words = Integers::inputs_of_group(matrix, n_inputs) / Integers::kInputs;
    for (; row + kRows <= x.n_rows; row += kRows) {
        const auto* integers = Integers::activations(x) + (group * x.slots + row) * group_size;
        for (std::size_t panel = 0; panel < kPanels; ++panel) {
            typename Integers::Sums sums[kRows][kPanelVectors];
#pragma GCC unroll 8
            for (std::size_t r = 0; r < kRows; ++r) {
                sums[r][0] = sums[r][1] = Integers::no_sums();
            }
#pragma GCC unroll 8
            for (std::size_t word = 0; word < n_words; ++word) {
                const auto first = load_words(&panels[panel][word][0]);
                const auto second = load_words(&panels[panel][word][1]);
#pragma GCC unroll 8
                for (std::size_t r = 0; r < kRows; ++r) {
                    const auto activations = load_inputs(integers + r * group_size + word * Integers::kInputs);
                    sums[r][0] = dot(sums[r][0], first, activations);
                    sums[r][1] = dot(sums[r][1], second, activations);
                }
            }
#pragma GCC unroll 8
            for (std::size_t r = 0; r < kRows; ++r) {
                const F32x8 x_scale = broadcast(x.scales[group * x.slots + row + r]);
#pragma GCC unroll 2
                for (std::size_t v = 0; v < kPanelVectors; ++v) {
                    float* total = totals[panel][row + r] + v * kLanes;
                    const I32x8 sum = without_offset<kFormat>(total_of(sums[r][v]), x, row + r, group);
                    store(total, fma(to_f32(sum) * x_scale, scales[panel * kPanelVectors + v], load(total)));
                }
            }
        }
    }
    if constexpr (kRows > 1) {
        add_integers<kFormat, kRows / 2>(panels, matrix, n_inputs, scales, x, row, group, totals);
    }
}

inline void store_strip(const float (*totals)[kMaxRows][kPanelOutputs], std::size_t n_rows, std::size_t output,
                        std::size_t end_output, float* out, std::size_t out_stride) {
    for (std::size_t row = 0; row < n_rows; ++row) {
        for (std::size_t i = 0; i < kStripOutputs; i += kLanes) {
            store_outputs(out + row * out_stride, output + i, end_output,
                          load(totals[i / kPanelOutputs][row] + i % kPanelOutputs));
        }
    }
}

template <Format kFormat, Layout kLayout>
inline void rows_of_integers(const Matrix& matrix, const Activations& x, std::size_t first_unit, std::size_t end_unit,
                             float* out, std::size_t out_stride) {
    using Integers = IntegerFormat<kFormat>;
    const std::size_t padded_in = matrix.padded_in();
    const OutputRange range = outputs_of(matrix, first_unit, end_unit);
    IntegerPanels<kFormat, kLayout> weights;
    alignas(64) float totals[kPanels][kMaxRows][kPanelOutputs];
    for (std::size_t output = range.begin; output < range.end; output += kStripOutputs) {
        for (std::size_t panel = 0; panel < kPanels; ++panel) {
            std::memset(totals[panel], 0, x.n_rows * sizeof totals[0][0]);
        }
        for (std::size_t group = 0; group < matrix.n_activation_groups(); ++group) {
            const std::size_t begin = group * Integers::group(matrix);
            const std::size_t end = begin + Integers::inputs_of_group(matrix, padded_in - begin);
            weights.unpack(matrix, output, range.end, begin, end);
            F32x8 scales[kStripVectors];
            for (std::size_t v = 0; v < kStripVectors; ++v) {
                scales[v] = weights.scale(matrix, output, v, range.end, Integers::scale_of(matrix, group));
            }
            add_integers<kFormat, kRowsAtOnce>(weights.panels, matrix, end - begin, scales, x, 0, group, totals);
        }
        store_strip(totals, x.n_rows, output, range.end, out, out_stride);
    }
}

// One chunk of a strip, and rows [row, n_rows).
template <std::size_t kRows>
inline void add_floats(const float (*panels)[kFloatChunk][kPanelOutputs], std::size_t n_inputs, const Activations& x,
                       std::size_t row, std::size_t first_input, float (*totals)[kMaxRows][kPanelOutputs]) {
    for (; row + kRows <= x.n_rows; row += kRows) {
        const float* floats = x.floats + row * x.stride + first_input;
        for (std::size_t panel = 0; panel < kPanels; ++panel) {
            F32x8 sums[kRows][kPanelVectors];
#pragma GCC unroll 8
            for (std::size_t r = 0; r < kRows; ++r) {
                sums[r][0] = sums[r][1] = zero();
            }
#pragma GCC unroll 4
            for (std::size_t i = 0; i < n_inputs; ++i) {
                const F32x8 first = load(panels[panel][i]);
                const F32x8 second = load(panels[panel][i] + kLanes);
#pragma GCC unroll 8
                for (std::size_t r = 0; r < kRows; ++r) {
                    const F32x8 activation = broadcast(floats[r * x.stride + i]);
                    sums[r][0] = fma(activation, first, sums[r][0]);
                    sums[r][1] = fma(activation, second, sums[r][1]);
                }
            }
#pragma GCC unroll 8
            for (std::size_t r = 0; r < kRows; ++r) {
                float* total = totals[panel][row + r];
                store(total, load(total) + sums[r][0]);
                store(total + kLanes, load(total + kLanes) + sums[r][1]);
            }
        }
    }
    if constexpr (kRows > 1) {
        add_floats<kRows / 2>(panels, n_inputs, x, row, first_input, totals);
    }
}

template <Format kFormat, Layout kLayout>
inline void rows_of_floats(const Matrix& matrix, const Activations& x, std::size_t first_unit, std::size_t end_unit,
                           float* out, std::size_t out_stride) {
    using Number = typename FloatFormat<kFormat>::Number;
    const std::size_t padded_in = matrix.padded_in();
    const OutputRange range = outputs_of(matrix, first_unit, end_unit);
    const Number* data = reinterpret_cast<const Number*>(matrix.data);
    alignas(64) float panels[kPanels][kFloatChunk][kPanelOutputs];
    alignas(64) float totals[kPanels][kMaxRows][kPanelOutputs];
    for (std::size_t output = range.begin; output < range.end; output += kStripOutputs) {
        for (std::size_t panel = 0; panel < kPanels; ++panel) {
            std::memset(totals[panel], 0, x.n_rows * sizeof totals[0][0]);
        }
        for (std::size_t chunk = 0; chunk < padded_in; chunk += kFloatChunk) {
            const std::size_t n_inputs = smaller(kFloatChunk, padded_in - chunk);
            for (std::size_t v = 0; v < kStripVectors; ++v) {
                // Tiles are as blocks of eight outputs.
                constexpr std::size_t kOutputs = stored_together(kFormat, kLayout);
                const std::size_t first =
                    kLayout == Layout::kTiles ? tile_of(output, v, range.end) * kLanes : output + v * kLanes;
                const Number* from = data + (first / kOutputs * padded_in + chunk) * kOutputs + first % kOutputs;
                for (std::size_t i = 0; i < n_inputs; ++i) {
                    store(panels[v / kPanelVectors][i] + v % kPanelVectors * kLanes, load_weights(from + i * kOutputs));
                }
            }
            add_floats<kRowsAtOnce>(panels, n_inputs, x, 0, chunk, totals);
        }
        store_strip(totals, x.n_rows, output, range.end, out, out_stride);
    }
}

}  // namespace
}  // namespace goslet
