// One row of activations: limited by memory. See products.h.
#pragma once

#include "products_common.h"

namespace goslet {
namespace {

// Integers, one tile at a time. Tiles side by side would share the activations' loads, but two streams of memory were
// slower than one.
template <Format kFormat>
inline void row_of_integer_tiles(const Matrix& matrix, const Activations& x, std::size_t first_unit,
                                 std::size_t end_unit, float* out) {
    using Integers = IntegerFormat<kFormat>;
    constexpr std::size_t kInputs = Integers::kTileWords * Integers::kInputs;  // of one unpacking
    constexpr std::size_t kUnpackings = Integers::kTileBytes < kLineBytes ? kLineBytes / Integers::kTileBytes : 1;
    constexpr std::size_t kChains = 4;  // so that a sum need not wait for the one before
    const std::size_t padded_in = matrix.padded_in();
    const std::size_t n_groups = matrix.n_activation_groups();
    const std::size_t group_size = Integers::group(matrix);
    const std::size_t slots = x.slots;
    const OutputRange range = outputs_of(matrix, first_unit, end_unit);
    const std::uint8_t* data = matrix.data + range.begin / kLanes * padded_in / kInputs * Integers::kTileBytes;
    const std::uint16_t* scales = matrix.scales + range.begin * matrix.n_groups();
    for (std::size_t output = range.begin; output < range.end; output += kLanes) {
        F32x8 total = zero();
        for (std::size_t group = 0; group < n_groups; ++group) {
            const std::size_t n_inputs = Integers::inputs_of_group(matrix, padded_in - group * group_size);
            const auto* integers = Integers::activations(x) + group * slots * group_size;
            typename Integers::Sums sums[kChains];
#pragma GCC unroll 4
            for (std::size_t chain = 0; chain < kChains; ++chain) {
                sums[chain] = Integers::no_sums();
            }
#pragma GCC unroll 2
            for (std::size_t input = 0; input < n_inputs; input += kUnpackings * kInputs) {
#pragma GCC unroll 2
                for (std::size_t line = 0; line < kUnpackings * Integers::kTileBytes; line += kLineBytes) {
                    fetch_first(data + line + kAheadBytes);
                }
#pragma GCC unroll 4
                for (std::size_t i = 0; i < kUnpackings; ++i, data += Integers::kTileBytes, integers += kInputs) {
                    typename Integers::Words words[Integers::kTileWords];
                    Integers::unpack_tile(data, words);
#pragma GCC unroll 8
                    for (std::size_t w = 0; w < Integers::kTileWords; ++w) {
                        auto& sum = sums[(i * Integers::kTileWords + w) % kChains];
                        sum = dot(sum, words[w], load_inputs(integers + w * Integers::kInputs));
                    }
                }
            }
            const I32x8 sum = without_offset<kFormat>(total_of((sums[0] + sums[1]) + (sums[2] + sums[3])), x, 0, group);
            const F32x8 scale = load_scales(scales + Integers::scale_of(matrix, group) * kLanes);
            total = fma(to_f32(sum) * broadcast(x.scales[group * slots]), scale, total);
        }
        scales += matrix.n_groups() * kLanes;
        store_outputs(out, output, matrix.n_out, total);
    }
}

// Floats in kTiles tiles, which give as many sums that need not wait for each other.
template <Format kFormat, std::size_t kTiles>
GOSLET_INLINE void row_of_adjacent_tiles(const Matrix& matrix, const Activations& x, std::size_t output, float* out) {
    using Number = typename FloatFormat<kFormat>::Number;
    constexpr std::size_t kLineNumbers = kLineBytes / sizeof(Number);
    const std::size_t padded_in = matrix.padded_in();
    const std::size_t tile_numbers = padded_in * kLanes;
    const Number* data = reinterpret_cast<const Number*>(matrix.data) + output * padded_in;
    F32x8 totals[kTiles];
    for (std::size_t t = 0; t < kTiles; ++t) {
        totals[t] = zero();
    }
    for (std::size_t chunk = 0; chunk < padded_in; chunk += kFloatChunk) {
        const std::size_t end = smaller(chunk + kFloatChunk, padded_in);
        F32x8 sums[kTiles];
        for (std::size_t t = 0; t < kTiles; ++t) {
            sums[t] = zero();
        }
        for (std::size_t input = chunk; input < end; input += kLineNumbers / kLanes) {
            for (std::size_t t = 0; t < kTiles; ++t) {
                fetch_second(reinterpret_cast<const std::uint8_t*>(data + t * tile_numbers + input * kLanes) +
                             kAheadBytes);
            }
#pragma GCC unroll 4
            for (std::size_t i = input; i < input + kLineNumbers / kLanes; ++i) {
                const F32x8 activation = broadcast(x.floats[i]);
#pragma GCC unroll 4
                for (std::size_t t = 0; t < kTiles; ++t) {
                    sums[t] = fma(activation, load_weights(data + t * tile_numbers + i * kLanes), sums[t]);
                }
            }
        }
        for (std::size_t t = 0; t < kTiles; ++t) {
            totals[t] = totals[t] + sums[t];
        }
    }
    for (std::size_t t = 0; t < kTiles; ++t) {
        store_outputs(out, output + t * kLanes, matrix.n_out, totals[t]);
    }
}

template <Format kFormat>
inline void row_of_float_tiles(const Matrix& matrix, const Activations& x, std::size_t first_unit, std::size_t end_unit,
                               float* out) {
    const OutputRange range = outputs_of(matrix, first_unit, end_unit);
    std::size_t output = range.begin;
    for (; output + kFloatTilesAtOnce * kLanes <= range.end; output += kFloatTilesAtOnce * kLanes) {
        row_of_adjacent_tiles<kFormat, kFloatTilesAtOnce>(matrix, x, output, out);
    }
    for (; output < range.end; output += kLanes) {
        row_of_adjacent_tiles<kFormat, 1>(matrix, x, output, out);
    }
}

// Some inputs of a group or chunk, counted from its first, with their activations. An odd one has itself as a partner,
// with a zero.
template <typename Number, std::size_t kMost>
struct Inputs {
    std::uint16_t at[kMost + 1];
    Number x[kMost + 1];
    std::size_t count;

    template <typename Activation>
    void take_all(const Activation* activations, std::size_t n) {
        for (std::size_t i = 0; i < n; ++i) {
            at[i] = static_cast<std::uint16_t>(i);
            x[i] = activations[i];
        }
        count = n;
    }

    // Only those that are not zero, whose weights begin to be fetched.
    template <typename Activation>
    void take_active(const Activation* activations, std::size_t n, const std::uint8_t* weights,
                     std::size_t input_bytes) {
        count = 0;
        for (std::size_t i = 0; i < n; ++i) {
            at[count] = static_cast<std::uint16_t>(i);
            x[count] = activations[i];
            count += activations[i] != Activation{0};
        }
        for (std::size_t i = 0; i < count; ++i) {
            for (std::size_t line = 0; line < input_bytes; line += kLineBytes) {
                fetch_second(weights + at[i] * input_bytes + line);
            }
            if (input_bytes % kLineBytes != 0) {
                fetch_second(weights + (at[i] + 1) * input_bytes - 1);  // its last line may be one more
            }
        }
        at[count] = count == 0 ? std::uint16_t{0} : at[count - 1];
        x[count] = Number{0};
    }
};

// Integers in columns, one block at a time, its groups one after another, and each group in parts of kBlockOutputs.
template <Format kFormat, bool kSkipZeros>
inline void row_of_integer_columns(const Matrix& matrix, const Activations& x, std::size_t first_unit,
                                   std::size_t end_unit, float* out) {
    using Integers = IntegerFormat<kFormat>;
    using Columns = typename Integers::Columns;
    constexpr std::size_t kOutputs = stored_together(kFormat, Layout::kColumns);
    constexpr std::size_t kParts = kOutputs / kBlockOutputs;
    constexpr std::size_t kInputBytes = kOutputs * format_bits(kFormat) / 8;
    const std::size_t padded_in = matrix.padded_in();
    const std::size_t group_size = Integers::group(matrix);
    const std::uint8_t* data = matrix.data + first_unit * padded_in * kInputBytes;
    const std::uint16_t* scales = matrix.scales + first_unit * matrix.n_groups() * kOutputs;
    Inputs<std::int16_t, kMaxGroup> lists[2];
    for (std::size_t unit = first_unit; unit < end_unit; ++unit) {
        F32x8 totals[kParts][kBlockVectors];
        for (std::size_t part = 0; part < kParts; ++part) {
            for (std::size_t v = 0; v < kBlockVectors; ++v) {
                totals[part][v] = zero();
            }
        }
        for (std::size_t group = 0; group < matrix.n_activation_groups(); ++group) {
            const std::size_t left = padded_in - group * group_size;
            const std::size_t n_inputs = smaller(group_size, left);
            const auto* integers = Integers::activations(x) + group * x.slots * group_size;
            const std::uint16_t* group_scales = scales + Integers::scale_of(matrix, group) * kOutputs;
            Inputs<std::int16_t, kMaxGroup>& inputs = lists[kSkipZeros ? group % 2 : 0];
            if constexpr (kSkipZeros) {
                // One group ahead, so that its weights arrive while this one is worked on.
                if (group == 0) {
                    inputs.take_active(integers, n_inputs, data, kInputBytes);
                }
                lists[(group + 1) % 2].take_active(integers + x.slots * group_size,
                                                   smaller(group_size, left - n_inputs), data + n_inputs * kInputBytes,
                                                   kInputBytes);
            } else {
                inputs.take_all(integers, n_inputs);
            }
            const F32x8 x_scale = broadcast(x.scales[group * x.slots]);
            for (std::size_t part = 0; part < kParts; ++part) {
                const std::uint8_t* weights = data + part * (kInputBytes / kParts);
                I32x8 sums[kBlockVectors];
#pragma GCC unroll 8
                for (std::size_t v = 0; v < kBlockVectors; ++v) {
                    sums[v] = zero_i32();
                }
                for (std::size_t i = 0; i < inputs.count; i += 2) {
                    const std::uint8_t* first = weights + inputs.at[i] * kInputBytes;
                    const std::uint8_t* second = weights + inputs.at[i + 1] * kInputBytes;
                    if (!kSkipZeros && part == 0) {
                        fetch_first(first + kAheadBytes);
                        fetch_first(second + kAheadBytes);
                    }
                    const InputPair activations = load_inputs(inputs.x + i);
#pragma GCC unroll 8
                    for (std::size_t v = 0; v < kBlockVectors; v += Columns::kPairs) {
                        Pairs pairs[Columns::kPairs];
                        Columns::unpack(first, second, v, pairs);
#pragma GCC unroll 8
                        for (std::size_t p = 0; p < Columns::kPairs; ++p) {
                            sums[v + p] = one_by_one(dot(sums[v + p], pairs[p], activations));
                        }
                    }
                }
#pragma GCC unroll 8
                for (std::size_t v = 0; v < kBlockVectors; ++v) {
                    const F32x8 scale = load_scales(group_scales + part * kBlockOutputs + v * kLanes);
                    totals[part][v] =
                        fma(to_f32(without_offset<kFormat>(sums[v], x, 0, group)) * x_scale, scale, totals[part][v]);
                }
            }
            data += n_inputs * kInputBytes;
        }
        scales += matrix.n_groups() * kOutputs;
        for (std::size_t part = 0; part < kParts; ++part) {
            for (std::size_t v = 0; v < kBlockVectors; ++v) {
                store_outputs(out, unit * kOutputs + part * kBlockOutputs + v * kLanes, matrix.n_out, totals[part][v]);
            }
        }
    }
}

// Floats in columns, one block at a time.
template <Format kFormat, bool kSkipZeros>
inline void row_of_float_columns(const Matrix& matrix, const Activations& x, std::size_t first_unit,
                                 std::size_t end_unit, float* out) {
    using Number = typename FloatFormat<kFormat>::Number;
    constexpr std::size_t kInputBytes = kBlockOutputs * sizeof(Number);
    const std::size_t padded_in = matrix.padded_in();
    const std::uint8_t* data = matrix.data + first_unit * padded_in * kInputBytes;
    Inputs<float, kFloatChunk> lists[2];
    for (std::size_t unit = first_unit; unit < end_unit; ++unit) {
        F32x8 totals[kBlockVectors];
        for (std::size_t v = 0; v < kBlockVectors; ++v) {
            totals[v] = zero();
        }
        for (std::size_t chunk = 0; chunk < padded_in; chunk += kFloatChunk) {
            const std::size_t n_inputs = smaller(kFloatChunk, padded_in - chunk);
            Inputs<float, kFloatChunk>& inputs = lists[kSkipZeros ? chunk / kFloatChunk % 2 : 0];
            if constexpr (kSkipZeros) {
                if (chunk == 0) {
                    inputs.take_active(x.floats, n_inputs, data, kInputBytes);
                }
                const std::size_t next = chunk + n_inputs;
                lists[(chunk / kFloatChunk + 1) % 2].take_active(x.floats + next,
                                                                 smaller(kFloatChunk, padded_in - next),
                                                                 data + n_inputs * kInputBytes, kInputBytes);
            } else {
                inputs.take_all(x.floats + chunk, n_inputs);
            }
            F32x8 sums[kBlockVectors];
#pragma GCC unroll 8
            for (std::size_t v = 0; v < kBlockVectors; ++v) {
                sums[v] = zero();
            }
            for (std::size_t i = 0; i < inputs.count; ++i) {
                const std::uint8_t* weights = data + inputs.at[i] * kInputBytes;
                if constexpr (!kSkipZeros) {
                    for (std::size_t line = 0; line < kInputBytes; line += kLineBytes) {
                        fetch_first(weights + line + kAheadBytes);
                    }
                }
                const F32x8 activation = broadcast(inputs.x[i]);
#pragma GCC unroll 8
                for (std::size_t v = 0; v < kBlockVectors; ++v) {
                    sums[v] =
                        fma(activation, load_weights(reinterpret_cast<const Number*>(weights) + v * kLanes), sums[v]);
                }
            }
#pragma GCC unroll 8
            for (std::size_t v = 0; v < kBlockVectors; ++v) {
                totals[v] = totals[v] + sums[v];
            }
            data += n_inputs * kInputBytes;
        }
        for (std::size_t v = 0; v < kBlockVectors; ++v) {
            store_outputs(out, unit * kBlockOutputs + v * kLanes, matrix.n_out, totals[v]);
        }
    }
}

}  // namespace
}  // namespace goslet
