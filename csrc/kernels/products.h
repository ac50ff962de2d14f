// Products of stored matrices and activations, written once over simd.h.
//
// An output's sum is formed in one fixed way, so that it depends neither on how many rows there are, nor on the cut
// into units, nor on whether zeros are skipped. Integer weights: the sum over a group is exact, and the groups are
// added in order. Floating weights: inputs with an even index make one sum and those with an odd index another, in
// order.
//
// One row is limited by memory, so its weights go from memory to registers once, and are fetched ahead. More rows are
// limited by arithmetic, so a panel of weights is unpacked into the first-level cache and meets several rows at a time.
//
// Include kernels.h, simd.h, the standard headers below and a simd_*.h first.

namespace goslet {
namespace {

constexpr std::size_t kLanes = 8;
constexpr std::size_t kMaxGroup = 128;
constexpr std::size_t kLineBytes = 64;
// How far ahead of its use data is fetched. On the machines measured, 2 KiB was better than 1 and 4.
constexpr std::size_t kAheadBytes = 2048;
// Inputs that a panel of floating weights holds.
constexpr std::size_t kFloatChunk = 64;
// A panel's width in vectors.
constexpr std::size_t kPanelVectors = 2;
constexpr std::size_t kPanelOutputs = kPanelVectors * kLanes;
// Outputs of a matrix in columns that one row works on at once: their sums stay in the first-level cache while
// memory is read along the inputs.
constexpr std::size_t kSpanUnits = 16;

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

// Groups whose largest number is smaller count as zeros: 32767 / largest must not overflow.
constexpr float kSmallestRange = 1e-30f;

inline void pack(const float* x, std::size_t n, std::size_t group, std::int16_t* integers, float* scales,
                 std::int32_t* sums) {
    for (std::size_t begin = 0; begin < n; begin += group, integers += group, ++scales, ++sums) {
        const float* from = x + begin;
        const std::size_t count = smaller(group, n - begin);
        std::memset(integers, 0, group * sizeof(std::int16_t));
        *sums = 0;
        F32x8 most = zero();
        F32x8 finite = zero();  // stays zero, or becomes NaN
        for (std::size_t i = 0; i < count; i += kLanes) {
            const F32x8 values = count - i >= kLanes ? load(from + i) : load_partial(from + i, count - i);
            most = max(most, abs(values));
            finite = fma(values, zero(), finite);
        }
        if (!(sum(finite) == 0.0f)) {
            *scales = __builtin_nanf("");  // the outputs become NaN too
            continue;
        }
        const float range = largest(most);
        if (range < kSmallestRange) {
            *scales = 0.0f;
            continue;
        }
        *scales = range / 32767.0f;
        const F32x8 factor = broadcast(32767.0f / range);
        I32x8 total = zero_i32();
        for (std::size_t i = 0; i < count; i += kLanes) {
            const F32x8 values = count - i >= kLanes ? load(from + i) : load_partial(from + i, count - i);
            const F32x8 scaled = values * factor;
            pack_i16(integers + i, scaled);
            total = total + to_i32(scaled);
        }
        std::int32_t lanes[kLanes];
        store_i32(lanes, total);
        for (std::size_t i = 0; i < kLanes; ++i) {
            *sums += 8 * lanes[i];
        }
    }
}

// What an integer sum of a group adds to an output.
GOSLET_INLINE F32x8 add_group(F32x8 total, I32x8 sum, F32x8 x_scale, const std::uint16_t* scales) {
    return fma(to_f32(sum) * x_scale, load_weights(reinterpret_cast<const F16*>(scales)), total);
}

// A group's integer sums start from what int4's offset of 8 will have added too much.
template <Format kFormat>
GOSLET_INLINE I32x8 first_sum(const Activations& x, std::size_t row, std::size_t group, std::size_t n_groups) {
    return kFormat == Format::kInt4 ? broadcast_i32(-x.sums[row * n_groups + group]) : zero_i32();
}

template <Format>
struct IntegerFormat;
template <>
struct IntegerFormat<Format::kInt8> {
    using Tile = Int8Tile;
    using Columns = Int8Columns;
};
template <>
struct IntegerFormat<Format::kInt4> {
    using Tile = Int4Tile;
    using Columns = Int4Columns;
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

// One row, integers in tiles; kTiles of them at once, beginning with `tile`.
template <Format kFormat, std::size_t kTiles>
GOSLET_INLINE void row_of_integer_tiles(const Matrix& matrix, const Activations& x, std::size_t tile, float* out) {
    using Tile = typename IntegerFormat<kFormat>::Tile;
    constexpr std::size_t kInputs = 2 * Tile::kPairs;  // of one unpacking
    constexpr std::size_t kChains = 4;                 // so that a sum need not wait for the one before
    const std::size_t padded_in = matrix.padded_in();
    const std::size_t n_groups = matrix.n_groups();
    const std::size_t tile_bytes = padded_in / kInputs * Tile::kBytes;
    const std::uint8_t* start = matrix.data + tile * tile_bytes;
    const std::uint8_t* data = start;
    const std::uint16_t* scales = matrix.scales + tile * n_groups * kLanes;
    F32x8 totals[kTiles];
    for (std::size_t t = 0; t < kTiles; ++t) {
        totals[t] = zero();
    }
    for (std::size_t group = 0; group < n_groups; ++group) {
        const std::size_t begin = group * matrix.group;
        const std::size_t end = smaller(begin + matrix.group, padded_in);
        I32x8 sums[kTiles][kChains];
        for (std::size_t t = 0; t < kTiles; ++t) {
            sums[t][0] = first_sum<kFormat>(x, 0, group, n_groups);
            for (std::size_t chain = 1; chain < kChains; ++chain) {
                sums[t][chain] = zero_i32();
            }
        }
        for (std::size_t line = begin; line < end; line += kLineBytes / Tile::kBytes * kInputs) {
            std::size_t ahead = data - start + kAheadBytes;
            ahead += ahead < tile_bytes ? 0 : (kTiles - 1) * tile_bytes;
            for (std::size_t t = 0; t < kTiles; ++t) {
                fetch_first(start + t * tile_bytes + ahead);
            }
#pragma GCC unroll 4
            for (std::size_t part = 0; part < kLineBytes / Tile::kBytes; ++part) {
                const std::int16_t* integers = x.integers + line + part * kInputs;
#pragma GCC unroll 4
                for (std::size_t t = 0; t < kTiles; ++t) {
                    Pairs pairs[Tile::kPairs];
                    Tile::unpack(data + t * tile_bytes + part * Tile::kBytes, pairs);
#pragma GCC unroll 4
                    for (std::size_t p = 0; p < Tile::kPairs; ++p) {
                        I32x8& sum = sums[t][(part * Tile::kPairs + p) % kChains];
                        sum = dot(sum, pairs[p], input_pair(integers + 2 * p));
                    }
                }
            }
            data += kLineBytes;
        }
        const F32x8 x_scale = broadcast(x.scales[group]);
        for (std::size_t t = 0; t < kTiles; ++t) {
            const I32x8 sum = (sums[t][0] + sums[t][1]) + (sums[t][2] + sums[t][3]);
            totals[t] = add_group(totals[t], sum, x_scale, scales + (t * n_groups + group) * kLanes);
        }
    }
    for (std::size_t t = 0; t < kTiles; ++t) {
        store_outputs(out, (tile + t) * kLanes, matrix.n_out, totals[t]);
    }
}

// One row, floats in tiles.
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

template <Format kFormat, std::size_t kTiles>
GOSLET_INLINE void row_of_tiles(const Matrix& matrix, const Activations& x, std::size_t tile, float* out) {
    if constexpr (is_integer(kFormat)) {
        row_of_integer_tiles<kFormat, kTiles>(matrix, x, tile, out);
    } else {
        row_of_float_tiles<kFormat, kTiles>(matrix, x, tile, out);
    }
}

template <Format kFormat>
inline void multiply_format(const Matrix& matrix, const Activations& x, std::size_t first_unit, std::size_t end_unit,
                            float* out, std::size_t out_stride, bool skip_zeros) {
    const bool in_tiles = matrix.layout == Layout::kTiles;
    if (x.n_rows == 1 && in_tiles) {
        constexpr std::size_t kTiles = is_integer(kFormat) ? kIntegerTilesAtOnce : kFloatTilesAtOnce;
        std::size_t tile = first_unit;
        for (; tile + kTiles <= end_unit; tile += kTiles) {
            row_of_tiles<kFormat, kTiles>(matrix, x, tile, out);
        }
        for (; tile < end_unit; ++tile) {
            row_of_tiles<kFormat, 1>(matrix, x, tile, out);
        }
    } else if constexpr (is_integer(kFormat)) {
        if (x.n_rows == 1) {
            row_of_integer_columns<kFormat>(matrix, x, first_unit, end_unit, out, skip_zeros);
        } else if (in_tiles) {
            rows_of_integers<kFormat, Layout::kTiles>(matrix, x, first_unit, end_unit, out, out_stride);
        } else {
            rows_of_integers<kFormat, Layout::kColumns>(matrix, x, first_unit, end_unit, out, out_stride);
        }
    } else {
        if (x.n_rows == 1) {
            row_of_float_columns<kFormat>(matrix, x, first_unit, end_unit, out, skip_zeros);
        } else if (in_tiles) {
            rows_of_floats<kFormat, Layout::kTiles>(matrix, x, first_unit, end_unit, out, out_stride);
        } else {
            rows_of_floats<kFormat, Layout::kColumns>(matrix, x, first_unit, end_unit, out, out_stride);
        }
    }
}

inline void multiply(const Matrix& matrix, const Activations& x, std::size_t first_unit, std::size_t end_unit,
                     float* out, std::size_t out_stride, bool skip_zeros) {
    switch (matrix.format) {
        case Format::kF32:
            return multiply_format<Format::kF32>(matrix, x, first_unit, end_unit, out, out_stride, skip_zeros);
        case Format::kF16:
            return multiply_format<Format::kF16>(matrix, x, first_unit, end_unit, out, out_stride, skip_zeros);
        case Format::kBf16:
            return multiply_format<Format::kBf16>(matrix, x, first_unit, end_unit, out, out_stride, skip_zeros);
        case Format::kInt8:
            return multiply_format<Format::kInt8>(matrix, x, first_unit, end_unit, out, out_stride, skip_zeros);
        case Format::kInt4:
            return multiply_format<Format::kInt4>(matrix, x, first_unit, end_unit, out, out_stride, skip_zeros);
    }
}

}  // namespace
}  // namespace goslet
