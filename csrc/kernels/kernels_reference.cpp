// The plain products: one number at a time, straight from matrix.h.
#include <cmath>
#include <cstring>
#include <limits>

#include "reference.h"
#include "tables.h"

namespace goslet {

namespace {

double f16_value(std::uint16_t bits) {
    const int exponent = bits >> 10 & 31;
    const int fraction = bits & 1023;
    double magnitude = std::ldexp(fraction + (exponent > 0 ? 1024 : 0), (exponent > 0 ? exponent : 1) - 25);
    if (exponent == 31) {
        magnitude = fraction == 0 ? HUGE_VAL : std::nan("");
    }
    return bits >> 15 != 0 ? -magnitude : magnitude;
}

double f32_value(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

std::uint32_t little_endian(const std::uint8_t* data, std::size_t n_bytes) {
    std::uint32_t number = 0;
    for (std::size_t i = 0; i < n_bytes; ++i) {
        number |= static_cast<std::uint32_t>(data[i]) << 8 * i;
    }
    return number;
}

// Where the number at (output, input) begins, in bits; for int3, what holds it.
std::size_t bit_of(const Matrix& matrix, std::size_t output, std::size_t input) {
    const std::size_t bits = format_bits(matrix.format);
    if (matrix.layout == Layout::kTiles) {
        const std::size_t tile = output / kTileRows * kTileRows * matrix.padded_in();
        const std::size_t lane = output % kTileRows;
        switch (matrix.format) {
            case Format::kInt8:
                return (tile + input / 2 * 16 + 2 * lane + input % 2) * bits;
            case Format::kInt4:
                return (tile + input / 8 * 64) * bits + lane * 32 + input % 4 * 8 + input % 8 / 4 * 4;
            case Format::kInt3:
                // Where bits are scattered, see three_bits.
                return (tile + input / 32 * 256) * bits;
            default:
                return (tile + input * kTileRows + lane) * bits;
        }
    }
    const std::size_t outputs = stored_together(matrix.format, matrix.layout);
    const std::size_t place = (output / outputs * matrix.padded_in() + input) * outputs;
    const std::size_t inside = output % outputs;
    if (matrix.format == Format::kInt3) {
        return place * bits + inside / 64 * 192;
    }
    if (matrix.format == Format::kInt4) {
        return place * bits + inside / 64 * 256 + inside % 8 * 32 + inside % 64 / 8 * 4;
    }
    return (place + inside) * bits;
}

int bit_at(const std::uint8_t* data, std::size_t bit) {
    return data[bit / 8] >> bit % 8 & 1;
}

// The number of int3, plus 4.
int three_bits(const Matrix& matrix, std::size_t output, std::size_t input) {
    std::size_t bits[3];  // where the lowest, the middle and the highest lie
    const std::size_t first = bit_of(matrix, output, input);
    if (matrix.layout == Layout::kTiles) {
        const std::size_t quad = input % 32 / 4;
        const std::size_t byte = first + output % kTileRows * 32 + input % 4 * 8;
        for (std::size_t i = 0; i < 3; ++i) {
            const std::size_t plane = quad < 6 ? quad / 2 : (i < 2 ? quad - 6 : 2);
            const std::size_t inside = quad < 6 ? quad % 2 * 3 + i : (i < 2 ? 6 + i : quad);
            bits[i] = byte + plane * 256 + inside;
        }
    } else {
        const std::size_t lane = output % 8;
        for (std::size_t i = 0; i < 3; ++i) {
            const std::size_t inside = output % 64 / 8 * 3 + i;
            bits[i] = first + (inside < 16 ? lane * 16 + inside : 128 + lane * 8 + inside - 16);
        }
    }
    return bit_at(matrix.data, bits[0]) | bit_at(matrix.data, bits[1]) << 1 | bit_at(matrix.data, bits[2]) << 2;
}

double weight(const Matrix& matrix, std::size_t output, std::size_t input) {
    const std::size_t bit = bit_of(matrix, output, input);
    const std::uint8_t* data = matrix.data + bit / 8;
    switch (matrix.format) {
        case Format::kF32:
            return f32_value(little_endian(data, 4));
        case Format::kF16:
            return f16_value(static_cast<std::uint16_t>(little_endian(data, 2)));
        case Format::kBf16:
            return f32_value(little_endian(data, 2) << 16);
        case Format::kInt8:
            return static_cast<std::int8_t>(*data);
        case Format::kInt4:
            return static_cast<double>(*data >> bit % 8 & 15) - 8.0;
        case Format::kInt3:
            return three_bits(matrix, output, input) - 4.0;
        case Format::kU16:
            break;
    }
    return 0.0;
}

double scale(const Matrix& matrix, std::size_t output, std::size_t group) {
    const std::size_t outputs = stored_together(matrix.format, matrix.layout);
    return f16_value(matrix.scales[(output / outputs * matrix.n_groups() + group) * outputs + output % outputs]);
}

template <typename Integer>
void pack(const float* x, std::size_t n, std::size_t group, std::size_t slots, Integer* integers, float* scales,
          std::int32_t* sums) {
    const double most = std::numeric_limits<Integer>::max();
    for (std::size_t begin = 0; begin < n; begin += group, integers += slots * group, scales += slots, sums += slots) {
        const std::size_t end = begin + group < n ? begin + group : n;
        double range = 0.0;
        bool finite = true;
        for (std::size_t i = begin; i < end; ++i) {
            range = std::fmax(range, std::fabs(static_cast<double>(x[i])));
            finite = finite && std::isfinite(x[i]);
        }
        *scales = finite ? static_cast<float>(range / most) : std::nanf("");
        *sums = 0;
        for (std::size_t i = 0; i < group; ++i) {
            const bool some = finite && range > 0.0 && begin + i < end;
            integers[i] = some ? static_cast<Integer>(std::nearbyint(x[begin + i] * most / range)) : Integer{0};
            *sums += 8 * integers[i];
        }
    }
}

void multiply(const Matrix& matrix, const Activations& x, std::size_t first_unit, std::size_t end_unit, float* out,
              std::size_t out_stride, bool /*skip_zeros*/) {
    const std::size_t end_output = end_unit * matrix.unit_outputs();
    for (std::size_t row = 0; row < x.n_rows; ++row) {
        for (std::size_t output = first_unit * matrix.unit_outputs(); output < end_output && output < matrix.n_out;
             ++output) {
            double total = 0.0;
            if (is_integer(matrix.format)) {
                const std::size_t size = matrix.activation_group();
                for (std::size_t group = 0; group < matrix.n_activation_groups(); ++group) {
                    double sum = 0.0;
                    for (std::size_t i = group * size; i < (group + 1) * size && i < matrix.n_in; ++i) {
                        const std::size_t at = (group * x.slots + row) * size + i % size;
                        sum += weight(matrix, output, i) *
                               (takes_bytes(matrix.format) ? x.integers8[at] : x.integers16[at]);
                    }
                    total += sum * x.scales[group * x.slots + row] * scale(matrix, output, group * size / matrix.group);
                }
            } else {
                for (std::size_t i = 0; i < matrix.n_in; ++i) {
                    total += weight(matrix, output, i) * x.floats[row * x.stride + i];
                }
            }
            out[row * out_stride + output] = static_cast<float>(total);
        }
    }
}

}  // namespace

const Kernels kReferenceKernels = {"reference",
                                   pack<std::int16_t>,
                                   pack<std::int8_t>,
                                   multiply,
                                   reference::layer_norm,
                                   reference::lerp,
                                   reference::activate,
                                   reference::combine,
                                   reference::small_product,
                                   reference::wkv4,
                                   reference::wkv6,
                                   reference::wkv7};

}  // namespace goslet
