// Products of stored matrices and activations, written once over simd.h.
//
// An output's sum is formed in one fixed way, so that it depends neither on how many rows there are, nor on the cut
// into units, nor on whether zeros are skipped. The inputs are cut into groups, those of floating weights into chunks
// of kFloatChunk; the sum over a group of integers is exact, the sum over a chunk is formed in order, and these sums
// are added in order.
//
// One row is limited by memory, so its weights go from memory to registers once, and are fetched ahead. More rows are
// limited by arithmetic, so a panel of weights is unpacked into the first-level cache and meets several rows at a time.
//
// kernels_*.cpp include a simd_*.h first, and say how much fits into the registers: kRowsAtOnce, kFloatTilesAtOnce.
#pragma once

#include "products_common.h"
#include "products_many_rows.h"
#include "products_one_row.h"

namespace goslet {
namespace {

// Groups whose largest number is smaller count as zeros: 32767 / largest must not overflow.
constexpr float kSmallestRange = 1e-30f;

template <typename Integer>
inline void pack(const float* x, std::size_t n, std::size_t group, std::size_t slots, Integer* integers, float* scales,
                 std::int32_t* sums) {
    constexpr float kMost = sizeof(Integer) == 1 ? 127.0f : 32767.0f;
    for (std::size_t begin = 0; begin < n; begin += group, integers += group * slots, scales += slots, sums += slots) {
        const float* from = x + begin;
        const std::size_t count = smaller(group, n - begin);
        std::memset(integers, 0, group * sizeof(Integer));
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
        *scales = range / kMost;
        const F32x8 factor = broadcast(kMost / range);
        I32x8 total = zero_i32();
        for (std::size_t i = 0; i < count; i += kLanes) {
            const F32x8 values = count - i >= kLanes ? load(from + i) : load_partial(from + i, count - i);
            const F32x8 scaled = values * factor;
            store_rounded(integers + i, scaled);
            total = total + to_i32(scaled);
        }
        std::int32_t lanes[kLanes];
        store_i32(lanes, total);
        for (std::size_t i = 0; i < kLanes; ++i) {
            *sums += 8 * lanes[i];
        }
    }
}

template <Format kFormat>
inline void multiply_format(const Matrix& matrix, const Activations& x, std::size_t first_unit, std::size_t end_unit,
                            float* out, std::size_t out_stride, bool skip_zeros) {
    const bool in_tiles = matrix.layout == Layout::kTiles;
    if constexpr (is_integer(kFormat)) {
        if (x.n_rows == 1 && in_tiles) {
            row_of_integer_tiles<kFormat>(matrix, x, first_unit, end_unit, out);
        } else if (x.n_rows == 1 && skip_zeros) {
            row_of_integer_columns<kFormat, true>(matrix, x, first_unit, end_unit, out);
        } else if (x.n_rows == 1) {
            row_of_integer_columns<kFormat, false>(matrix, x, first_unit, end_unit, out);
        } else if (in_tiles) {
            rows_of_integers<kFormat, Layout::kTiles>(matrix, x, first_unit, end_unit, out, out_stride);
        } else {
            rows_of_integers<kFormat, Layout::kColumns>(matrix, x, first_unit, end_unit, out, out_stride);
        }
    } else {
        if (x.n_rows == 1 && in_tiles) {
            row_of_float_tiles<kFormat>(matrix, x, first_unit, end_unit, out);
        } else if (x.n_rows == 1 && skip_zeros) {
            row_of_float_columns<kFormat, true>(matrix, x, first_unit, end_unit, out);
        } else if (x.n_rows == 1) {
            row_of_float_columns<kFormat, false>(matrix, x, first_unit, end_unit, out);
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
        case Format::kInt3:
            return multiply_format<Format::kInt3>(matrix, x, first_unit, end_unit, out, out_stride, skip_zeros);
        case Format::kU16:
            return;
    }
}

}  // namespace
}  // namespace goslet
