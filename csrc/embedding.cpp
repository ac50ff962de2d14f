#include "embedding.h"

#include <cmath>
#include <cstdint>
#include <cstring>

namespace goslet {
namespace {

template <typename T>
T read_as(const std::uint8_t* bytes) {
    T value;
    std::memcpy(&value, bytes, sizeof value);
    return value;
}

float from_bits(std::uint32_t bits) {
    return read_as<float>(reinterpret_cast<const std::uint8_t*>(&bits));
}

float half_to_float(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000U) << 16;
    const std::uint32_t exponent = half >> 10 & 0x1FU;
    const std::uint32_t fraction = half & 0x3FFU;
    if (exponent == 0) {
        const float magnitude = std::ldexp(static_cast<float>(fraction), -24);
        return sign == 0 ? magnitude : -magnitude;
    }
    if (exponent == 31) {
        return from_bits(sign | 0x7F800000U | fraction << 13);
    }
    return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

std::size_t n_rows(const std::vector<std::size_t>& shape) {
    std::size_t rows = 1;
    for (std::size_t axis = 0; axis + 1 < shape.size(); ++axis) {
        rows *= shape[axis];
    }
    return rows;
}

std::size_t row_bytes(Format format, std::size_t k) {
    return (k * format_bits(format) + 7) / 8;
}

std::size_t row_groups(std::size_t group, std::size_t k) {
    return group == 0 ? 0 : (k + group - 1) / group;
}

}  // namespace

std::size_t rows_data_bytes(Format format, const std::vector<std::size_t>& shape) {
    return n_rows(shape) * row_bytes(format, shape.back());
}

std::size_t rows_scales_bytes(std::size_t group, const std::vector<std::size_t>& shape) {
    return 2 * n_rows(shape) * row_groups(group, shape.back());
}

void decode_row(const TensorView& matrix, std::size_t index, float* out) {
    const std::size_t k = matrix.shape.back();
    const std::uint8_t* const row = matrix.data + index * row_bytes(matrix.format, k);
    const std::uint8_t* const scales = matrix.scales + 2 * index * row_groups(matrix.group, k);
    const auto scale = [&](std::size_t column) {
        return half_to_float(read_as<std::uint16_t>(scales + 2 * (column / matrix.group)));
    };
    switch (matrix.format) {
        case Format::kF32:
            std::memcpy(out, row, 4 * k);
            return;
        case Format::kF16:
            for (std::size_t column = 0; column < k; ++column) {
                out[column] = half_to_float(read_as<std::uint16_t>(row + 2 * column));
            }
            return;
        case Format::kU16:
            for (std::size_t column = 0; column < k; ++column) {
                out[column] = static_cast<float>(read_as<std::uint16_t>(row + 2 * column));
            }
            return;
        case Format::kBf16:
            for (std::size_t column = 0; column < k; ++column) {
                out[column] = from_bits(static_cast<std::uint32_t>(read_as<std::uint16_t>(row + 2 * column)) << 16);
            }
            return;
        case Format::kInt8:
            for (std::size_t column = 0; column < k; ++column) {
                out[column] = static_cast<float>(static_cast<std::int8_t>(row[column])) * scale(column);
            }
            return;
        case Format::kInt4:
            for (std::size_t column = 0; column < k; ++column) {
                const int nibble = row[column / 2] >> (column % 2 * 4) & 15;
                out[column] = static_cast<float>((nibble ^ 8) - 8) * scale(column);
            }
            return;
        case Format::kInt3:
            for (std::size_t column = 0; column < k; ++column) {
                // The byte of its last bit may be the one behind, or the same.
                const std::size_t bit = 3 * column;
                const int bits = (row[bit / 8] | row[(bit + 2) / 8] << 8) >> bit % 8 & 7;
                out[column] = static_cast<float>((bits ^ 4) - 4) * scale(column);
            }
            return;
    }
}

}  // namespace goslet
