// Products against sums in double over plain rows, which the packer here puts into the layouts of matrix.h.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"
#include "kernels/kernels.h"

using namespace goslet;

namespace {

constexpr double kUnit = 0x1p-24;  // half a unit in the last place, relative
constexpr double kSmallestFloat = 0x1p-149;

enum class Data { kOrdinary, kLargest, kTiny };

double f16_value(std::uint16_t bits) {
    const int exponent = bits >> 10 & 31;
    const double magnitude =
        exponent == 0 ? std::ldexp(bits & 1023, -24) : std::ldexp(1024 + (bits & 1023), exponent - 25);
    return bits >> 15 != 0 ? -magnitude : magnitude;
}

float f32_of_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// One matrix as plain rows and packed.
struct Weights {
    Matrix matrix;
    std::vector<double> values;        // (n_out, n_in): numbers, for integer formats without their scale
    std::vector<double> group_scales;  // (n_out, n_groups)
    std::vector<std::uint8_t> data;
    std::vector<std::uint16_t> scales;

    double value(std::size_t output, std::size_t input) const { return values[output * matrix.n_in + input]; }
    double scale(std::size_t output, std::size_t group) const {
        return group_scales[output * matrix.n_groups() + group];
    }
};

// The bits that are stored for a random number, and the number.
struct Stored {
    std::uint32_t bits;
    double value;
};

Stored random_number(Format format, Data data, std::mt19937& random) {
    const std::uint32_t sign = random() & 1;
    switch (format) {
        case Format::kF32: {
            const std::uint32_t exponent = data == Data::kTiny ? 0 : 110 + random() % 20;
            const std::uint32_t bits = sign << 31 | exponent << 23 | (random() & 0x7FFFFF);
            return {bits, f32_of_bits(bits)};
        }
        case Format::kF16: {
            const std::uint32_t exponent = data == Data::kTiny ? 0 : (data == Data::kLargest ? 30 : 1 + random() % 20);
            const std::uint32_t bits = sign << 15 | exponent << 10 | (random() & 0x3FF);
            return {bits, f16_value(static_cast<std::uint16_t>(bits))};
        }
        case Format::kBf16: {
            const std::uint32_t exponent = data == Data::kTiny ? 0 : 110 + random() % 20;
            const std::uint32_t bits = sign << 15 | exponent << 7 | (random() & 0x7F);
            return {bits, f32_of_bits(bits << 16)};
        }
        case Format::kInt8: {
            const int most = 127;
            const int value = data == Data::kLargest ? (sign != 0 ? -most : most)
                                                     : static_cast<int>(random() % (2 * most + 1)) - most;
            return {static_cast<std::uint8_t>(value), static_cast<double>(value)};
        }
        case Format::kInt4: {
            const int value = data == Data::kLargest ? (sign != 0 ? -8 : 7) : static_cast<int>(random() % 16) - 8;
            return {static_cast<std::uint8_t>(value + 8), static_cast<double>(value)};
        }
        case Format::kInt3: {
            const int value = data == Data::kLargest ? (sign != 0 ? -4 : 3) : static_cast<int>(random() % 8) - 4;
            return {static_cast<std::uint8_t>(value + 4), static_cast<double>(value)};
        }
    }
    return {0, 0.0};
}

std::uint16_t random_scale(Format format, Data data, std::mt19937& random) {
    const std::uint32_t sign = format == Format::kInt3 ? (random() & 1) << 15 : 0;
    switch (random() % 8) {
        case 0:
            return 0;
        case 1:
            return static_cast<std::uint16_t>(sign | (random() & 0x3FF));  // subnormal
        default:
            return static_cast<std::uint16_t>(sign | ((data == Data::kTiny ? 1 : 1 + random() % 15) << 10) |
                                              (random() & 0x3FF));
    }
}

void put_bits(std::vector<std::uint8_t>& data, std::size_t byte, std::size_t bit, std::uint32_t bits) {
    data[byte] |= static_cast<std::uint8_t>(bits << bit);
}

void put_three_bits(Weights& weights, std::size_t output, std::size_t input, std::uint32_t bits) {
    const Matrix& matrix = weights.matrix;
    if (matrix.layout == Layout::kTiles) {
        const std::size_t block = (output / 8 * matrix.padded_in() / 32 + input / 32) * 96;
        const std::size_t byte = block + 4 * (output % 8) + input % 4;
        const std::size_t quad = input % 32 / 4;
        if (quad < 6) {
            put_bits(weights.data, byte + quad / 2 * 32, quad % 2 * 3, bits);
        } else {
            put_bits(weights.data, byte + (quad - 6) * 32, 6, bits & 3);
            put_bits(weights.data, byte + 64, quad, bits >> 2);
        }
        return;
    }
    const std::size_t half = (output / 128 * matrix.padded_in() + input) * 48 + output % 128 / 64 * 24;
    const std::size_t lane = output % 8;
    const std::uint32_t lane_bits = bits << output % 64 / 8 * 3;
    put_bits(weights.data, half + 2 * lane, 0, lane_bits & 0xFF);
    put_bits(weights.data, half + 2 * lane + 1, 0, lane_bits >> 8 & 0xFF);
    put_bits(weights.data, half + 16 + lane, 0, lane_bits >> 16);
}

// Puts a number's stored bits at its place: see matrix.h.
void put(Weights& weights, std::size_t output, std::size_t input, std::uint32_t bits) {
    const Matrix& matrix = weights.matrix;
    const std::size_t size = format_bits(matrix.format) / 8;
    std::vector<std::uint8_t>& data = weights.data;
    if (matrix.format == Format::kInt3) {
        put_three_bits(weights, output, input, bits);
        return;
    }
    if (matrix.layout == Layout::kTiles) {
        const std::size_t tile = output / 8;
        const std::size_t lane = output % 8;
        if (matrix.format == Format::kInt4) {
            const std::size_t block = (tile * matrix.padded_in() / 8 + input / 8) * 32;
            const std::size_t bit = (4 * lane + input % 4) * 8 + 4 * (input % 8 / 4);
            data[block + bit / 8] |= static_cast<std::uint8_t>(bits << bit % 8);
        } else if (matrix.format == Format::kInt8) {
            const std::size_t pair = (tile * matrix.padded_in() / 2 + input / 2) * 16;
            data[pair + 2 * lane + (input & 1)] = static_cast<std::uint8_t>(bits);
        } else {
            std::memcpy(&data[((tile * matrix.padded_in() + input) * 8 + lane) * size], &bits, size);
        }
    } else if (matrix.format == Format::kInt4) {
        const std::size_t line = (output / 128 * matrix.padded_in() + input) * 64;
        const std::size_t bit = output % 128 / 64 * 256 + (output % 8) * 32 + 4 * (output % 64 / 8);
        data[line + bit / 8] |= static_cast<std::uint8_t>(bits << bit % 8);
    } else {
        const std::size_t place = (output / 64 * matrix.padded_in() + input) * 64 + output % 64;
        std::memcpy(&data[place * size], &bits, size);
    }
}

Weights make_weights(Format format, Layout layout, std::size_t group, std::size_t n_out, std::size_t n_in, Data kind,
                     std::mt19937& random) {
    Weights weights;
    weights.matrix = {format, layout, group, n_out, n_in, nullptr, nullptr};
    Matrix& matrix = weights.matrix;
    weights.data.resize(matrix.data_bytes());
    weights.values.resize(n_out * n_in);
    for (std::size_t output = 0; output < matrix.padded_out(); ++output) {
        for (std::size_t input = 0; input < matrix.padded_in(); ++input) {
            if (output < n_out && input < n_in) {
                const Stored number = random_number(format, kind, random);
                weights.values[output * n_in + input] = number.value;
                put(weights, output, input, number.bits);
            } else {
                put(weights, output, input, format == Format::kInt4 ? 8 : (format == Format::kInt3 ? 4 : 0));
            }
        }
    }
    const std::size_t n_groups = matrix.n_groups();
    weights.scales.resize(matrix.scales_bytes() / 2);
    weights.group_scales.resize(n_out * n_groups);
    for (std::size_t output = 0; output < n_out; ++output) {
        for (std::size_t i = 0; i < n_groups; ++i) {
            const std::uint16_t bits = random_scale(format, kind, random);
            weights.group_scales[output * n_groups + i] = f16_value(bits);
            const std::size_t width = layout == Layout::kTiles ? 8 : (takes_bytes(format) ? 128 : 64);
            weights.scales[(output / width * n_groups + i) * width + output % width] = bits;
        }
    }
    matrix.data = weights.data.data();
    matrix.scales = weights.scales.empty() ? nullptr : weights.scales.data();
    return weights;
}

struct Inputs {
    std::size_t stride;
    std::vector<float> floats;
    std::vector<std::int16_t> integers;  // those against int4 and int3 fit into 8 bits
    std::vector<std::int8_t> integers8;  // the same
    std::vector<float> scales;
    std::vector<std::int32_t> sums;

    Activations rows(const Matrix& matrix, std::size_t first, std::size_t n_rows) const {
        if (is_integer(matrix.format)) {
            const std::size_t place = first * matrix.activation_group();
            const bool narrow = takes_bytes(matrix.format);
            return {n_rows,
                    0,
                    nullptr,
                    kMaxRows,
                    narrow ? nullptr : &integers[place],
                    narrow ? &integers8[place] : nullptr,
                    &scales[first],
                    &sums[first]};
        }
        return {n_rows, stride, &floats[first * stride], 0, nullptr, nullptr, nullptr, nullptr};
    }
};

// kMaxRows rows: of every four, one with zeros as a squared ReLU leaves them, one of zeros only (the second), two
// dense.
Inputs make_inputs(const Matrix& matrix, Data kind, std::mt19937& random) {
    Inputs inputs;
    const std::size_t group = matrix.activation_group();
    const std::size_t n_groups = matrix.n_activation_groups();
    const int most = takes_bytes(matrix.format) ? 127 : 32767;
    inputs.stride = round_up(matrix.n_in, kColumnPadding) + kColumnPadding;
    inputs.floats.resize(kMaxRows * inputs.stride);
    inputs.integers.resize(kMaxRows * n_groups * group);
    inputs.scales.resize(kMaxRows * n_groups);
    inputs.sums.resize(kMaxRows * n_groups);
    for (std::size_t row = 0; row < kMaxRows; ++row) {
        for (std::size_t i = 0; i < matrix.n_in; ++i) {
            if (row % 4 == 1 || (row % 4 == 0 && random() % 10 < 7)) {
                continue;
            }
            const bool negative = (random() & 1) != 0;
            const int integer = kind == Data::kLargest ? most : static_cast<int>(random() % (most + 1U));
            inputs.floats[row * inputs.stride + i] =
                std::ldexp(static_cast<float>(negative ? -integer : integer), kind == Data::kTiny ? -20 : -13);
            if (group != 0) {
                const std::size_t slot = i / group * kMaxRows + row;
                inputs.integers[slot * group + i % group] = static_cast<std::int16_t>(negative ? -integer : integer);
                inputs.sums[slot] += 8 * (negative ? -integer : integer);
            }
        }
        for (std::size_t i = 0; i < n_groups; ++i) {
            inputs.scales[i * kMaxRows + row] = std::ldexp(static_cast<float>(1 + random() % 4096), -24);
        }
    }
    inputs.integers8.assign(inputs.integers.begin(), inputs.integers.end());
    return inputs;
}

struct Expected {
    std::vector<double> values, tolerances;  // (kMaxRows, n_out)
};

// Integers: a group's sum is exact; its conversion, its product with the activations' scale and the fused addition
// round once each, and later groups round the total again: two roundings and one for each group, each of at most the
// sum of the terms' sizes. Floats: chunks of 64, so at most 64 additions (fused or not, then with a rounded product) in
// a chunk and one for each chunk. Products below the normal numbers lose up to half of the smallest float each. The
// result in double is rounded beyond all of these.
Expected expect(const Weights& weights, const Inputs& inputs) {
    const Matrix& matrix = weights.matrix;
    const std::size_t step = std::max<std::size_t>(matrix.activation_group(), 1);
    Expected expected;
    for (std::size_t row = 0; row < kMaxRows; ++row) {
        for (std::size_t output = 0; output < matrix.n_out; ++output) {
            double total = 0.0;
            double size = 0.0;
            for (std::size_t begin = 0; begin < matrix.n_in; begin += step) {
                double term = 0.0;
                if (matrix.group == 0) {
                    term = weights.value(output, begin) * inputs.floats[row * inputs.stride + begin];
                } else {
                    const std::size_t slot = begin / step * kMaxRows + row;
                    for (std::size_t i = begin; i < std::min(begin + step, matrix.n_in); ++i) {
                        term += weights.value(output, i) * inputs.integers[slot * step + i - begin];
                    }
                    term *= inputs.scales[slot] * weights.scale(output, begin / matrix.group);
                }
                total += term;
                size += std::fabs(term);
            }
            const auto n_roundings = static_cast<double>(matrix.group == 0 ? std::min<std::size_t>(matrix.n_in, 64) +
                                                                                 1 + (matrix.n_in + 63) / 64
                                                                           : matrix.n_activation_groups() + 2);
            expected.values.push_back(total);
            expected.tolerances.push_back(1.001 * n_roundings * kUnit * size +
                                          static_cast<double>(matrix.n_in) * kSmallestFloat);
        }
    }
    return expected;
}

// Outputs in rows with room behind them; the room and what is not yet computed hold one NaN.
struct Outputs {
    static constexpr std::size_t kRoom = 9;
    static constexpr std::uint32_t kPoison = 0x7FC0DEAD;
    std::size_t stride;
    std::vector<float> numbers;

    Outputs(std::size_t n_rows, std::size_t n_out)
        : stride(n_out + kRoom), numbers(n_rows * stride, f32_of_bits(kPoison)) {}
    bool poisoned(std::size_t at) const {
        std::uint32_t bits;
        std::memcpy(&bits, &numbers[at], sizeof bits);
        return bits == kPoison;
    }
    const float* row(std::size_t i) const { return &numbers[i * stride]; }
};

Outputs product(const Kernels& kernels, const Matrix& matrix, const Activations& x, bool skip_zeros) {
    Outputs out(x.n_rows, matrix.n_out);
    kernels.multiply(matrix, x, 0, matrix.n_units(), out.numbers.data(), out.stride, skip_zeros);
    return out;
}

bool same_bits(const float* a, const float* b, std::size_t n) {
    return std::memcmp(a, b, n * sizeof(float)) == 0;
}

std::string describe(const Kernels& kernels, const Matrix& matrix) {
    static const char* const kFormats[] = {"f32", "f16", "bf16", "int8", "int4", "int3"};
    return std::string(kernels.isa) + " " + kFormats[static_cast<int>(matrix.format)] +
           (matrix.layout == Layout::kTiles ? " tiles" : " columns") + ", group " + std::to_string(matrix.group) +
           ", " + std::to_string(matrix.n_out) + " x " + std::to_string(matrix.n_in);
}

void check_product(const Kernels& kernels, const Weights& weights, const Inputs& inputs, const Expected& expected,
                   std::mt19937& random) {
    const Matrix& matrix = weights.matrix;
    const std::size_t n_out = matrix.n_out;
    const std::string name = describe(kernels, matrix);
    const auto require = [&](bool condition, const char* what) {
        if (!condition) {
            check::fail(__FILE__, __LINE__, name + ": " + what);
        }
    };
    const Outputs all = product(kernels, matrix, inputs.rows(matrix, 0, kMaxRows), false);
    bool within = true;
    bool untouched = true;
    for (std::size_t row = 0; row < kMaxRows; ++row) {
        for (std::size_t output = 0; output < n_out; ++output) {
            const std::size_t at = row * n_out + output;
            // Written so that NaN fails.
            within = within && std::fabs(all.row(row)[output] - expected.values[at]) <= expected.tolerances[at];
        }
        for (std::size_t i = n_out; i < all.stride; ++i) {
            untouched = untouched && all.poisoned(row * all.stride + i);
        }
    }
    require(within, "outputs differ from the sums in double");
    require(untouched, "wrote past the last output");

    for (const std::size_t n_rows : {2, 3, 5, 8, 17}) {
        const std::size_t first = random() % (kMaxRows - n_rows);
        const Outputs some = product(kernels, matrix, inputs.rows(matrix, first, n_rows), false);
        for (std::size_t row = 0; row < n_rows; ++row) {
            require(same_bits(some.row(row), all.row(first + row), n_out), "the number of rows changes a result");
        }
    }
    for (const std::size_t row : {0, 1, 2, 63}) {
        const Activations x = inputs.rows(matrix, row, 1);
        const Outputs dense = product(kernels, matrix, x, false);
        require(same_bits(dense.row(0), all.row(row), n_out), "a row alone is not what it is among others");
        const Outputs sparse = product(kernels, matrix, x, true);
        require(same_bits(sparse.row(0), dense.row(0), n_out), "skipping zeros changes a result");
        for (std::size_t i = n_out; i < dense.stride; ++i) {
            require(dense.poisoned(i) && sparse.poisoned(i), "a row alone wrote past the last output");
        }
    }

    // A cut into pieces, and nothing written outside a piece.
    for (const std::size_t n_rows : {1, 5}) {
        const Activations x = inputs.rows(matrix, 0, n_rows);
        Outputs pieces(n_rows, n_out);
        for (std::size_t begin = 0; begin < matrix.n_units();) {
            const std::size_t end = std::min<std::size_t>(begin + 1 + random() % 4, matrix.n_units());
            kernels.multiply(matrix, x, begin, end, pieces.numbers.data(), pieces.stride, true);
            for (std::size_t i = end * matrix.unit_outputs(); i < n_out; ++i) {
                require(pieces.poisoned((n_rows - 1) * pieces.stride + i), "wrote past its units");
            }
            begin = end;
        }
        for (std::size_t row = 0; row < n_rows; ++row) {
            require(same_bits(pieces.row(row), all.row(row), n_out), "the cut into units changes a result");
        }
    }
}

void check_products(const std::vector<std::size_t>& sizes_out, const std::vector<std::size_t>& sizes_in, Data kind) {
    std::mt19937 random(7);
    for (const Format format :
         {Format::kF32, Format::kF16, Format::kBf16, Format::kInt8, Format::kInt4, Format::kInt3}) {
        for (const Layout layout : {Layout::kTiles, Layout::kColumns}) {
            for (const std::size_t group : {32, 64, 128}) {
                if (!is_integer(format) && group != 32) {
                    continue;
                }
                for (const std::size_t n_out : sizes_out) {
                    for (const std::size_t n_in : sizes_in) {
                        const Weights weights =
                            make_weights(format, layout, is_integer(format) ? group : 0, n_out, n_in, kind, random);
                        const Inputs inputs = make_inputs(weights.matrix, kind, random);
                        const Expected expected = expect(weights, inputs);
                        for (const Isa isa : available_isas()) {
                            // The plain form is slow, and has nothing that depends on the sizes.
                            if (isa != Isa::kReference || n_out * n_in < 4000) {
                                check_product(kernels_for(isa), weights, inputs, expected, random);
                            }
                        }
                    }
                }
            }
        }
    }
}

}  // namespace

TEST(products_of_awkward_sizes) {
    check_products({1, 7, 8, 9, 63, 65, 130}, {1, 31, 33, 100, 257}, Data::kOrdinary);
}

TEST(products_of_a_layers_size) {
    check_products({24, 1100}, {768}, Data::kOrdinary);
}

// Sums of 128 products of 127 and 32767 must fit; half-precision weights go up to 65504.
TEST(products_of_the_largest_numbers) {
    check_products({9, 65}, {33, 257}, Data::kLargest);
}

TEST(products_of_subnormal_numbers) {
    check_products({9, 65}, {33, 257}, Data::kTiny);
}

// All weights and all activations of one sign: the largest sum there is, which random signs stay far below.
TEST(sums_do_not_overflow) {
    for (const Format format : {Format::kInt8, Format::kInt4, Format::kInt3}) {
        for (const Layout layout : {Layout::kTiles, Layout::kColumns}) {
            const bool narrow = takes_bytes(format);
            // Where numbers are stored as ones that are not negative, both ends are largest in some sum.
            const int offset = format == Format::kInt4 ? 8 : (format == Format::kInt3 ? 4 : 0);
            for (const int weight : {narrow ? -offset : -127, narrow ? offset - 1 : 127}) {
                Weights weights;
                weights.matrix = {format, layout, 128, 64, 128, nullptr, nullptr};
                const Matrix& matrix = weights.matrix;
                weights.data.resize(matrix.data_bytes());
                weights.scales.assign(matrix.scales_bytes() / 2, 0x3C00);  // 1
                for (std::size_t output = 0; output < 64; ++output) {
                    for (std::size_t input = 0; input < 128; ++input) {
                        put(weights, output, input, static_cast<std::uint8_t>(weight + offset));
                    }
                }
                weights.matrix.data = weights.data.data();
                weights.matrix.scales = weights.scales.data();
                const int most = narrow ? 127 : 32767;
                for (const int integer : {most, -most}) {
                    Inputs inputs;
                    inputs.stride = 128;
                    inputs.integers.assign(kMaxRows * 128, static_cast<std::int16_t>(integer));
                    inputs.integers8.assign(kMaxRows * 128, static_cast<std::int8_t>(integer));
                    inputs.scales.assign(kMaxRows * matrix.n_activation_groups(), 1.0f);
                    inputs.sums.assign(inputs.scales.size(), 8 * static_cast<int>(matrix.activation_group()) * integer);
                    for (const Isa isa : available_isas()) {
                        for (const std::size_t n_rows : {1, 2}) {
                            const Outputs out =
                                product(kernels_for(isa), matrix, inputs.rows(matrix, 0, n_rows), false);
                            const double expected = 128.0 * weight * integer;
                            CHECK_CLOSE(out.row(n_rows - 1)[63], expected, kUnit * std::fabs(expected));
                        }
                    }
                }
            }
        }
    }
}

void pack(const Kernels& kernels, const std::vector<float>& x, std::size_t group, std::size_t slots,
          std::int16_t* integers, float* scales, std::int32_t* sums) {
    kernels.pack16(x.data(), x.size(), group, slots, integers, scales, sums);
}
void pack(const Kernels& kernels, const std::vector<float>& x, std::size_t group, std::size_t slots,
          std::int8_t* integers, float* scales, std::int32_t* sums) {
    kernels.pack8(x.data(), x.size(), group, slots, integers, scales, sums);
}

// Rows side by side, as products read them: each is what it is alone, and nothing else is written.
template <typename Integer>
void check_rows_side_by_side() {
    constexpr std::size_t kGroup = 32;
    constexpr std::size_t kSlots = 3;
    std::mt19937 random(4);
    std::normal_distribution<float> normal;
    for (const std::size_t n : {1, 33, 100}) {
        const std::size_t n_groups = (n + kGroup - 1) / kGroup;
        for (const Isa isa : available_isas()) {
            const Kernels& kernels = kernels_for(isa);
            std::vector<Integer> integers(n_groups * kSlots * kGroup, 77);
            std::vector<float> scales(n_groups * kSlots, -1.0f);
            std::vector<std::int32_t> sums(n_groups * kSlots, 77);
            for (const std::size_t row : {2, 0}) {
                std::vector<float> x(n);
                std::generate(x.begin(), x.end(), [&] { return normal(random); });
                pack(kernels, x, kGroup, kSlots, &integers[row * kGroup], &scales[row], &sums[row]);
                std::vector<Integer> alone(n_groups * kGroup);
                std::vector<float> alone_scales(n_groups);
                std::vector<std::int32_t> alone_sums(n_groups);
                pack(kernels, x, kGroup, 1, alone.data(), alone_scales.data(), alone_sums.data());
                for (std::size_t i = 0; i < n_groups; ++i) {
                    const std::size_t slot = i * kSlots + row;
                    CHECK(scales[slot] == alone_scales[i] && sums[slot] == alone_sums[i]);
                    CHECK(std::equal(&alone[i * kGroup], &alone[i * kGroup] + kGroup, &integers[slot * kGroup]));
                }
            }
            for (std::size_t i = 0; i < n_groups; ++i) {
                const std::size_t slot = i * kSlots + 1;
                CHECK(scales[slot] == -1.0f && sums[slot] == 77);
                CHECK(std::count(&integers[slot * kGroup], &integers[slot * kGroup] + kGroup, 77) == kGroup);
            }
        }
    }
}

TEST(packed_rows_side_by_side) {
    check_rows_side_by_side<std::int16_t>();
    check_rows_side_by_side<std::int8_t>();
}

// A rounded number is off by at most half a step of scale, and by what the float quotient and product lose: 4 roundings
// of a number of up to `most` steps.
template <typename Integer>
void check_packed_activations() {
    constexpr int most = std::numeric_limits<Integer>::max();
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    for (const std::size_t group : {32, 64, 128}) {
        for (const std::size_t n : {1, 7, 31, 33, 100, 257, 768}) {
            std::vector<float> x(n);
            for (float& number : x) {
                number = normal(random) * std::ldexp(1.0f, static_cast<int>(random() % 40) - 20);
            }
            for (std::size_t i = 0; i < std::min<std::size_t>(n, group); ++i) {
                x[n - 1 - i] = n > group ? 0.0f : x[n - 1 - i];  // a group of zeros, but not the only one
            }
            const std::size_t n_groups = (n + group - 1) / group;
            for (const Isa isa : available_isas()) {
                std::vector<Integer> integers(n_groups * group + 1, 77);
                std::vector<float> scales(n_groups + 1, -1.0f);
                std::vector<std::int32_t> sums(n_groups + 1, 77);
                pack(kernels_for(isa), x, group, 1, integers.data(), scales.data(), sums.data());
                for (std::size_t i = 0; i < n_groups; ++i) {
                    double range = 0.0;
                    std::int32_t sum = 0;
                    for (std::size_t j = i * group; j < (i + 1) * group; ++j) {
                        const double number = j < n ? x[j] : 0.0;
                        range = std::max(range, std::fabs(number));
                        sum += integers[j];
                        CHECK_CLOSE(integers[j] * static_cast<double>(scales[i]), number,
                                    scales[i] * (0.5 + 4 * most * kUnit));
                    }
                    CHECK_CLOSE(scales[i], range / most, range / most * kUnit * 1.001);
                    CHECK(sums[i] == 8 * sum);
                }
                CHECK(integers.back() == 77 && scales.back() == -1.0f && sums.back() == 77);
            }
        }
    }
}

TEST(packed_activations) {
    check_packed_activations<std::int16_t>();
    check_packed_activations<std::int8_t>();
}

// Numbers near the ends of float's range, and a number that is none, which must reach the output.
template <typename Integer>
void check_packed_extremes() {
    constexpr int most = std::numeric_limits<Integer>::max();
    const float largest = std::numeric_limits<float>::max();
    for (const Isa isa : available_isas()) {
        Integer integers[32];
        float scale = 0.0f;
        std::int32_t sum = 0;
        std::vector<float> x(32, 0.0f);
        x[3] = -largest;
        x[4] = largest;
        pack(kernels_for(isa), x, 32, 1, integers, &scale, &sum);
        CHECK(integers[3] == -most && integers[4] == most && sum == 0);
        CHECK_CLOSE(scale / (largest / most), 1.0, 2 * kUnit);

        for (const float tiny : {1e-29f, 1e-33f, 1e-38f, 1e-45f}) {
            std::fill(x.begin(), x.end(), 0.0f);
            x[9] = tiny;
            pack(kernels_for(isa), x, 32, 1, integers, &scale, &sum);
            CHECK_CLOSE(integers[9] * static_cast<double>(scale), tiny, 1e-30);
            CHECK(integers[8] == 0 && sum == 8 * integers[9]);
        }
        for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
            for (const std::size_t at : {0, 17, 31}) {
                std::fill(x.begin(), x.end(), 1.0f);
                x[at] = bad;
                pack(kernels_for(isa), x, 32, 1, integers, &scale, &sum);
                CHECK(std::isnan(scale) && integers[at] == 0 && sum == 0);
            }
        }
    }
}

TEST(packed_extremes) {
    check_packed_extremes<std::int16_t>();
    check_packed_extremes<std::int8_t>();
}

#if defined(__x86_64__)
constexpr const char* kOtherIsa = "neondot";
#else
constexpr const char* kOtherIsa = "avx2";
#endif

TEST(instruction_sets_have_names) {
    for (const Isa isa : available_isas()) {
        CHECK(isa_named(isa_name(isa)) == isa);
        CHECK(std::string(kernels_for(isa).isa) == isa_name(isa));
        setenv("GOSLET_ISA", isa_name(isa), 1);
        CHECK(chosen_isa() == isa);
    }
    CHECK(available_isas()[0] == Isa::kReference && available_isas()[1] == Isa::kPortable);
    unsetenv("GOSLET_ISA");
    CHECK(chosen_isa() == available_isas().back());
    for (const char* const name : {"sse9", kOtherIsa}) {  // unknown; known, of another architecture
        setenv("GOSLET_ISA", name, 1);
        bool refused = false;
        try {
            chosen_isa();
        } catch (const std::invalid_argument& error) {
            refused = std::string(error.what()).find("portable") != std::string::npos;
        }
        CHECK(refused);
    }
    unsetenv("GOSLET_ISA");
}
