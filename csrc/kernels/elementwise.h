// Layer norm, token shift and activations, over the eight lanes of simd.h. Included by kernels_*.cpp after one of the
// simd_*.h. No lambdas: Clang does not compile them for the instruction set of the file around them.

namespace goslet {
namespace {

// The program loader refuses larger heads.
constexpr std::size_t kMaxHeadSize = 256;

// NaN where x is NaN: every min and max gives NaN or its second operand then.
GOSLET_INLINE F32x8 clamp(F32x8 x, float lowest, float highest) {
    return min(broadcast(highest), max(broadcast(lowest), x));
}

// exp(x) = 2^n · (1 + fraction), n whole and |r| = |x - n·ln 2| <= 0.3466.
//
// `fraction` is exp(r) - 1 as its Taylor polynomial of degree 7: the remainder is below 0.3466^8 / 8! · 1.05 = 5.4e-9,
// which is 0.07 units in the last place of an exp(r) of at least 0.707, and of `fraction` itself, which shares the
// polynomial's first term r, below 1.6e-8 · 1.2. For x within ±87.3, where 2^n is a normal number; NaN gives NaN.
struct Exponential {
    F32x8 power;
    F32x8 fraction;
};

GOSLET_INLINE Exponential exponential(F32x8 x) {
    // Adding 1.5 · 2^23 rounds to a whole number and leaves it in the low bits: nothing is converted, so that NaN does
    // not meet a conversion to integers, which would be undefined.
    const F32x8 rounder = broadcast(12582912.0f);
    const F32x8 rounded = fma(x, broadcast(1.44269504f), rounder);
    const F32x8 n = rounded - rounder;
    // ln 2 in two parts, the first of 9 bits, so that its product with n (8 bits) is exact.
    const F32x8 r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), x));
    F32x8 series = broadcast(1.0f / 5040);
    series = fma(series, r, broadcast(1.0f / 720));
    series = fma(series, r, broadcast(1.0f / 120));
    series = fma(series, r, broadcast(1.0f / 24));
    series = fma(series, r, broadcast(1.0f / 6));
    series = fma(series, r, broadcast(0.5f));
    return {f32_of_bits(shift_left<23>(bits_of(rounded)) + broadcast_i32(127 << 23)), fma(r * r, series, r)};
}

GOSLET_INLINE F32x8 exp_within_range(F32x8 x) {
    const Exponential e = exponential(x);
    return fma(e.power, e.fraction, e.power);
}

// Beyond ±87 the result is that of ±87: 1.6e-38, or 1 as it is from 17 on. Error: exp 1.1, sum 0.5, quotient 0.5 units
// of 2^-23.
GOSLET_INLINE F32x8 sigmoid(F32x8 x) {
    const F32x8 one = broadcast(1.0f);
    return one / (one + exp_within_range(clamp(zero() - x, -87.0f, 87.0f)));
}

// From e = exp(2x) - 1, which 2^n · fraction + (2^n - 1) gives without cancellation near 0: e / (e + 2). From |x| = 10
// on it is ±1 in float32.
GOSLET_INLINE F32x8 tanh(F32x8 x) {
    const Exponential e = exponential(clamp(x + x, -20.0f, 20.0f));
    const F32x8 less_one = fma(e.power, e.fraction, e.power - broadcast(1.0f));
    return less_one / (less_one + broadcast(2.0f));
}

// exp(-exp(x)). Beyond an inner exponential of 87 the result is that of 87: 1.6e-38.
GOSLET_INLINE F32x8 double_exp(F32x8 x) {
    const F32x8 inner = exp_within_range(clamp(x, -87.0f, 87.0f));
    return exp_within_range(clamp(zero() - inner, -87.0f, 0.0f));
}

template <Activation kActivation>
GOSLET_INLINE F32x8 activated(F32x8 x) {
    if constexpr (kActivation == Activation::kTanh) {
        return tanh(x);
    } else if constexpr (kActivation == Activation::kSigmoid) {
        return sigmoid(x);
    } else if constexpr (kActivation == Activation::kSilu) {
        return x * sigmoid(x);
    } else if constexpr (kActivation == Activation::kReluSquared) {
        const F32x8 positive = max(zero(), x);
        return positive * positive;
    } else if constexpr (kActivation == Activation::kDecay) {
        return exp_within_range(broadcast(-0.60653066f) * sigmoid(x));  // -exp(-1/2)
    } else if constexpr (kActivation == Activation::kDoubleExp) {
        return double_exp(x);
    } else {
        return x;
    }
}

template <Activation kActivation>
inline void activate_all(const float* bias, std::size_t n, float* y) {
    std::size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const F32x8 x = load(y + i);
        store(y + i, activated<kActivation>(bias == nullptr ? x : x + load(bias + i)));
    }
    if (i < n) {
        const F32x8 x = load_partial(y + i, n - i);
        const F32x8 sum_with_bias = bias == nullptr ? x : x + load_partial(bias + i, n - i);
        store_partial(y + i, activated<kActivation>(sum_with_bias), n - i);
    }
}

inline void activate(Activation activation, const float* bias, std::size_t n, float* y) {
    switch (activation) {
        case Activation::kNone:
            return activate_all<Activation::kNone>(bias, n, y);
        case Activation::kTanh:
            return activate_all<Activation::kTanh>(bias, n, y);
        case Activation::kSigmoid:
            return activate_all<Activation::kSigmoid>(bias, n, y);
        case Activation::kSilu:
            return activate_all<Activation::kSilu>(bias, n, y);
        case Activation::kReluSquared:
            return activate_all<Activation::kReluSquared>(bias, n, y);
        case Activation::kDecay:
            return activate_all<Activation::kDecay>(bias, n, y);
        case Activation::kDoubleExp:
            return activate_all<Activation::kDoubleExp>(bias, n, y);
    }
}

GOSLET_INLINE F32x8 load_up_to_8(const float* x, std::size_t n) {
    return n == 8 ? load(x) : load_partial(x, n);
}

template <Combine kHow>
inline void combine_all(const float* y, const float* a, const float* b, std::size_t n, float* out) {
    for (std::size_t i = 0; i < n; i += 8) {
        const std::size_t count = n - i < 8 ? n - i : 8;
        F32x8 result = load_up_to_8(y + i, count);
        if constexpr (kHow == Combine::kAdd) {
            result = load_up_to_8(out + i, count) + result;
        } else if constexpr (kHow == Combine::kGate) {
            result = result * load_up_to_8(a + i, count);
        } else if constexpr (kHow == Combine::kGateAdd) {
            result = fma(result, load_up_to_8(a + i, count), load_up_to_8(out + i, count));
        } else if constexpr (kHow == Combine::kLerp) {
            const F32x8 from = load_up_to_8(a + i, count);
            result = fma(load_up_to_8(b + i, count) - from, result, from);
        }
        store_partial(out + i, result, count);
    }
}

inline void combine(Combine how, const float* y, const float* a, const float* b, std::size_t n, float* out) {
    switch (how) {
        case Combine::kSet:
            return combine_all<Combine::kSet>(y, a, b, n, out);
        case Combine::kAdd:
            return combine_all<Combine::kAdd>(y, a, b, n, out);
        case Combine::kGate:
            return combine_all<Combine::kGate>(y, a, b, n, out);
        case Combine::kGateAdd:
            return combine_all<Combine::kGateAdd>(y, a, b, n, out);
        case Combine::kLerp:
            return combine_all<Combine::kLerp>(y, a, b, n, out);
    }
}

inline void small_product(const float* x, const float* matrix, std::size_t n, float* out) {
    for (std::size_t j = 0; j < n; j += 8) {
        const std::size_t count = n - j < 8 ? n - j : 8;
        F32x8 sums = zero();
        for (std::size_t i = 0; i < n; ++i) {
            sums = fma(broadcast(x[i]), load_up_to_8(matrix + i * n + j, count), sums);
        }
        store_partial(out + j, sums, count);
    }
}

inline void lerp(const float* x, const float* previous, const float* mix, std::size_t n, float* out) {
    std::size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const F32x8 now = load(x + i);
        store(out + i, fma(load(previous + i) - now, load(mix + i), now));
    }
    if (i < n) {
        const std::size_t count = n - i;
        const F32x8 now = load_partial(x + i, count);
        const F32x8 change = load_partial(previous + i, count) - now;
        store_partial(out + i, fma(change, load_partial(mix + i, count), now), count);
    }
}

// The mean of x, and 1 / sqrt(variance + eps) with the biased variance about that mean: two passes, because the
// difference of two large sums would lose a small variance.
struct Moments {
    float mean;
    float inverse_deviation;
};

GOSLET_INLINE F32x8 add_square(F32x8 x, F32x8 total) {
    return fma(x, x, total);
}

GOSLET_INLINE Moments moments(const float* x, std::size_t n, float eps) {
    // Four sums at a time: one would wait for each addition.
    F32x8 sums[4] = {zero(), zero(), zero(), zero()};
    std::size_t i = 0;
    for (; i + 32 <= n; i += 32) {
#pragma GCC unroll 8
        for (std::size_t part = 0; part < 4; ++part) {
            sums[part] = sums[part] + load(x + i + 8 * part);
        }
    }
    for (; i + 8 <= n; i += 8) {
        sums[0] = sums[0] + load(x + i);
    }
    if (i < n) {
        sums[1] = sums[1] + load_partial(x + i, n - i);
    }
    const float mean = sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(n);

    const F32x8 means = broadcast(mean);
    F32x8 squares[4] = {zero(), zero(), zero(), zero()};
    for (i = 0; i + 32 <= n; i += 32) {
#pragma GCC unroll 8
        for (std::size_t part = 0; part < 4; ++part) {
            squares[part] = add_square(load(x + i + 8 * part) - means, squares[part]);
        }
    }
    for (; i + 8 <= n; i += 8) {
        squares[0] = add_square(load(x + i) - means, squares[0]);
    }
    if (i < n) {
        // Through memory once more, so that the lanes past the end are zero and not the mean.
        float differences[8];
        store(differences, load_partial(x + i, n - i) - means);
        squares[1] = add_square(load_partial(differences, n - i), squares[1]);
    }
    const float variance = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(n);
    return {mean, 1.0f / std::sqrt(variance + eps)};
}

inline void layer_norm(const float* x, const float* weight, const float* bias, float eps, std::size_t n, float* out) {
    const Moments found = moments(x, n, eps);
    const F32x8 mean = broadcast(found.mean);
    const F32x8 scale = broadcast(found.inverse_deviation);
    std::size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        store(out + i, fma((load(x + i) - mean) * scale, load(weight + i), load(bias + i)));
    }
    if (i < n) {
        const std::size_t count = n - i;
        const F32x8 normed = (load_partial(x + i, count) - mean) * scale;
        store_partial(out + i, fma(normed, load_partial(weight + i, count), load_partial(bias + i, count)), count);
    }
}

}  // namespace
}  // namespace goslet
