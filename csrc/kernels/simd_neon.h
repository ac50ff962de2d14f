// simd.h for 64-bit ARM's NEON.

namespace goslet {
namespace {

struct F32x8 {
    float32x4_t low, high;
};
struct I32x8 {
    int32x4_t low, high;
};

GOSLET_INLINE F32x8 operator+(F32x8 a, F32x8 b) {
    return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)};
}
GOSLET_INLINE F32x8 operator-(F32x8 a, F32x8 b) {
    return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)};
}
GOSLET_INLINE F32x8 operator*(F32x8 a, F32x8 b) {
    return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)};
}
GOSLET_INLINE F32x8 operator/(F32x8 a, F32x8 b) {
    return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)};
}
GOSLET_INLINE F32x8 fma(F32x8 a, F32x8 b, F32x8 c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
GOSLET_INLINE F32x8 min(F32x8 a, F32x8 b) {
    return {vminq_f32(a.low, b.low), vminq_f32(a.high, b.high)};
}
GOSLET_INLINE F32x8 max(F32x8 a, F32x8 b) {
    return {vmaxq_f32(a.low, b.low), vmaxq_f32(a.high, b.high)};
}
GOSLET_INLINE F32x8 abs(F32x8 a) {
    return {vabsq_f32(a.low), vabsq_f32(a.high)};
}

GOSLET_INLINE I32x8 operator+(I32x8 a, I32x8 b) {
    return {vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)};
}
GOSLET_INLINE I32x8 operator-(I32x8 a, I32x8 b) {
    return {vsubq_s32(a.low, b.low), vsubq_s32(a.high, b.high)};
}
GOSLET_INLINE I32x8 operator&(I32x8 a, I32x8 b) {
    return {vandq_s32(a.low, b.low), vandq_s32(a.high, b.high)};
}
GOSLET_INLINE I32x8 operator|(I32x8 a, I32x8 b) {
    return {vorrq_s32(a.low, b.low), vorrq_s32(a.high, b.high)};
}
template <int n>
GOSLET_INLINE I32x8 shift_left(I32x8 a) {
    return {vshlq_n_s32(a.low, n), vshlq_n_s32(a.high, n)};
}
template <int n>
GOSLET_INLINE I32x8 shift_right(I32x8 a) {
    return {vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.low), n)),
            vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.high), n))};
}

GOSLET_INLINE F32x8 broadcast(float x) {
    return {vdupq_n_f32(x), vdupq_n_f32(x)};
}
GOSLET_INLINE I32x8 broadcast_i32(std::int32_t x) {
    return {vdupq_n_s32(x), vdupq_n_s32(x)};
}
GOSLET_INLINE F32x8 zero() {
    return broadcast(0.0f);
}
GOSLET_INLINE I32x8 zero_i32() {
    return broadcast_i32(0);
}
GOSLET_INLINE F32x8 load(const float* x) {
    return {vld1q_f32(x), vld1q_f32(x + 4)};
}
GOSLET_INLINE void store(float* x, F32x8 a) {
    vst1q_f32(x, a.low);
    vst1q_f32(x + 4, a.high);
}
GOSLET_INLINE I32x8 load_i32(const std::int32_t* x) {
    return {vld1q_s32(x), vld1q_s32(x + 4)};
}
GOSLET_INLINE I32x8 load_bits(const std::uint8_t* x) {
    return {vreinterpretq_s32_u8(vld1q_u8(x)), vreinterpretq_s32_u8(vld1q_u8(x + 16))};
}
GOSLET_INLINE I32x8 load_lanes24(const std::uint8_t* x) {
    const uint16x8_t low = vreinterpretq_u16_u8(vld1q_u8(x));
    const uint16x8_t high = vmovl_u8(vld1_u8(x + 16));
    return {vreinterpretq_s32_u16(vzip1q_u16(low, high)), vreinterpretq_s32_u16(vzip2q_u16(low, high))};
}
GOSLET_INLINE void store_i32(std::int32_t* x, I32x8 a) {
    vst1q_s32(x, a.low);
    vst1q_s32(x + 4, a.high);
}
GOSLET_INLINE F32x8 load_partial(const float* x, std::size_t n) {
    float lanes[8] = {};
    std::memcpy(lanes, x, n * sizeof(float));
    return load(lanes);
}
GOSLET_INLINE void store_partial(float* x, F32x8 a, std::size_t n) {
    float lanes[8];
    store(lanes, a);
    std::memcpy(x, lanes, n * sizeof(float));
}

GOSLET_INLINE F32x8 to_f32(I32x8 a) {
    return {vcvtq_f32_s32(a.low), vcvtq_f32_s32(a.high)};
}
GOSLET_INLINE I32x8 to_i32(F32x8 a) {
    return {vcvtnq_s32_f32(a.low), vcvtnq_s32_f32(a.high)};
}
GOSLET_INLINE I32x8 bits_of(F32x8 a) {
    return {vreinterpretq_s32_f32(a.low), vreinterpretq_s32_f32(a.high)};
}
GOSLET_INLINE F32x8 f32_of_bits(I32x8 a) {
    return {vreinterpretq_f32_s32(a.low), vreinterpretq_f32_s32(a.high)};
}

GOSLET_INLINE float sum(F32x8 a) {
    return vaddvq_f32(vaddq_f32(a.low, a.high));
}
GOSLET_INLINE float largest(F32x8 a) {
    return vmaxvq_f32(vmaxq_f32(a.low, a.high));
}

GOSLET_INLINE F32x8 load_weights(const float* x) {
    return load(x);
}
GOSLET_INLINE F32x8 load_weights(const F16* x) {
    const float16x8_t half = vreinterpretq_f16_u16(vld1q_u16(&x->bits));
    return {vcvt_f32_f16(vget_low_f16(half)), vcvt_high_f32_f16(half)};
}
GOSLET_INLINE F32x8 load_weights(const Bf16* x) {
    const uint16x8_t top = vld1q_u16(&x->bits);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(top), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(top, 16))};
}

// Loads take adjacent numbers apart at no cost, so the two inputs' weights are kept apart.
struct Pairs {
    int16x8_t first, second;
};
struct InputPair {
    int16x4_t v;
};
GOSLET_INLINE InputPair load_inputs(const std::int16_t* x) {
    std::int32_t both;
    std::memcpy(&both, x, sizeof both);
    return {vreinterpret_s16_s32(vdup_n_s32(both))};
}
GOSLET_INLINE Pairs load_words(const Pairs* x) {
    return *x;
}
GOSLET_INLINE void store_words(Pairs* x, Pairs a) {
    *x = a;
}
GOSLET_INLINE I32x8 dot(I32x8 sum, Pairs weights, InputPair x) {
    sum.low = vmlal_lane_s16(sum.low, vget_low_s16(weights.first), x.v, 0);
    sum.high = vmlal_high_lane_s16(sum.high, weights.first, x.v, 0);
    sum.low = vmlal_lane_s16(sum.low, vget_low_s16(weights.second), x.v, 1);
    sum.high = vmlal_high_lane_s16(sum.high, weights.second, x.v, 1);
    return sum;
}

GOSLET_INLINE I32x8 one_by_one(I32x8 sum) {
    return sum;
}
GOSLET_INLINE I32x8 total_of(I32x8 sums) {
    return sums;
}
GOSLET_INLINE Pairs load_int8_pairs(const std::uint8_t* data) {
    const uint8x8x2_t apart = vld2_u8(data);
    return {vmovl_s8(vreinterpret_s8_u8(apart.val[0])), vmovl_s8(vreinterpret_s8_u8(apart.val[1]))};
}

struct Quads {
    I32x8 v;  // byte 4 · output + input
};
struct InputQuad {
    int8x16_t v;
};
GOSLET_INLINE InputQuad load_inputs(const std::int8_t* x) {
    std::int32_t all;
    std::memcpy(&all, x, sizeof all);
    return {vreinterpretq_s8_s32(vdupq_n_s32(all))};
}
GOSLET_INLINE Quads load_words(const Quads* x) {
    return *x;
}
GOSLET_INLINE void store_words(Quads* x, Quads a) {
    *x = a;
}
#ifdef GOSLET_DOTPROD
struct QuadSums {
    I32x8 v;
};
GOSLET_INLINE QuadSums no_quad_sums() {
    return {zero_i32()};
}
GOSLET_INLINE QuadSums dot(QuadSums sums, Quads weights, InputQuad x) {
    return {{vdotq_s32(sums.v.low, vreinterpretq_s8_s32(weights.v.low), x.v),
             vdotq_s32(sums.v.high, vreinterpretq_s8_s32(weights.v.high), x.v)}};
}
GOSLET_INLINE QuadSums operator+(QuadSums a, QuadSums b) {
    return {a.v + b.v};
}
GOSLET_INLINE I32x8 total_of(QuadSums sums) {
    return sums.v;
}
#else
// Sums of 16 bits for each output and input: eight products of at most 15 · 127 fit, and 32 inputs have no more.
struct QuadSums {
    int16x8_t low[2], high[2];
};
GOSLET_INLINE QuadSums no_quad_sums() {
    const int16x8_t none = vdupq_n_s16(0);
    return {{none, none}, {none, none}};
}
GOSLET_INLINE QuadSums dot(QuadSums sums, Quads weights, InputQuad x) {
    const int8x16_t low = vreinterpretq_s8_s32(weights.v.low);
    const int8x16_t high = vreinterpretq_s8_s32(weights.v.high);
    return {{vmlal_s8(sums.low[0], vget_low_s8(low), vget_low_s8(x.v)), vmlal_high_s8(sums.low[1], low, x.v)},
            {vmlal_s8(sums.high[0], vget_low_s8(high), vget_low_s8(x.v)), vmlal_high_s8(sums.high[1], high, x.v)}};
}
GOSLET_INLINE QuadSums operator+(QuadSums a, QuadSums b) {
    return {{vaddq_s16(a.low[0], b.low[0]), vaddq_s16(a.low[1], b.low[1])},
            {vaddq_s16(a.high[0], b.high[0]), vaddq_s16(a.high[1], b.high[1])}};
}
GOSLET_INLINE I32x8 total_of(QuadSums sums) {
    return {vpaddq_s32(vpaddlq_s16(sums.low[0]), vpaddlq_s16(sums.low[1])),
            vpaddq_s32(vpaddlq_s16(sums.high[0]), vpaddlq_s16(sums.high[1]))};
}
#endif

GOSLET_INLINE int8x8_t load_eight(const std::uint8_t* data) {
    return vreinterpret_s8_u8(vld1_u8(data));
}

GOSLET_INLINE uint16x8x2_t load_halves(const std::uint8_t* data) {
    const uint16x8_t low = vreinterpretq_u16_u8(vld1q_u8(data));
    const uint16x8_t high = vreinterpretq_u16_u8(vld1q_u8(data + 16));
    return {{vuzp1q_u16(low, high), vuzp2q_u16(low, high)}};
}

// Of four nibbles in every lane, a vector for each.
GOSLET_INLINE void split_nibbles(uint16x8_t first, uint16x8_t second, Pairs* pairs) {
    const uint16x8_t mask = vdupq_n_u16(0x000F);
    pairs[0].first = vreinterpretq_s16_u16(vandq_u16(first, mask));
    pairs[0].second = vreinterpretq_s16_u16(vandq_u16(second, mask));
    pairs[1].first = vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(first, 4), mask));
    pairs[1].second = vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(second, 4), mask));
    pairs[2].first = vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(first, 8), mask));
    pairs[2].second = vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(second, 8), mask));
    pairs[3].first = vreinterpretq_s16_u16(vshrq_n_u16(first, 12));
    pairs[3].second = vreinterpretq_s16_u16(vshrq_n_u16(second, 12));
}

struct Int8Columns {
    static constexpr std::size_t kPairs = 1;
    static GOSLET_INLINE void unpack(const std::uint8_t* first, const std::uint8_t* second, std::size_t vector,
                                     Pairs* pairs) {
        pairs[0] = {vmovl_s8(load_eight(first + 8 * vector)), vmovl_s8(load_eight(second + 8 * vector))};
    }
};

struct Int4Columns {
    static constexpr std::size_t kPairs = 4;
    static GOSLET_INLINE void unpack(const std::uint8_t* first, const std::uint8_t* second, std::size_t vector,
                                     Pairs* pairs) {
        // Vectors 0 to 3 are in the low halves of the 32-bit lanes, the others in the high halves.
        const uint16x8x2_t x1 = load_halves(first);
        const uint16x8x2_t x2 = load_halves(second);
        split_nibbles(x1.val[vector / 4], x2.val[vector / 4], pairs);
    }
};

// Of eight lanes of 24 bits, a vector for each of their eight numbers.
GOSLET_INLINE void split_threes(const std::uint8_t* data, int16x8_t* numbers) {
    const uint16x8_t low = vreinterpretq_u16_u8(vld1q_u8(data));
    const uint16x8_t high = vmovl_u8(vld1_u8(data + 16));
    const uint16x8_t mask = vdupq_n_u16(7);
    numbers[0] = vreinterpretq_s16_u16(vandq_u16(low, mask));
    numbers[1] = vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(low, 3), mask));
    numbers[2] = vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(low, 6), mask));
    numbers[3] = vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(low, 9), mask));
    numbers[4] = vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(low, 12), mask));
    numbers[5] = vreinterpretq_s16_u16(vandq_u16(vorrq_u16(vshrq_n_u16(low, 15), vaddq_u16(high, high)), mask));
    numbers[6] = vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(high, 2), mask));
    numbers[7] = vreinterpretq_s16_u16(vshrq_n_u16(high, 5));
}

struct Int3Columns {
    static constexpr std::size_t kPairs = 8;
    static GOSLET_INLINE void unpack(const std::uint8_t* first, const std::uint8_t* second, std::size_t, Pairs* pairs) {
        int16x8_t x1[kPairs], x2[kPairs];
        split_threes(first, x1);
        split_threes(second, x2);
        for (std::size_t i = 0; i < kPairs; ++i) {
            pairs[i] = {x1[i], x2[i]};
        }
    }
};

GOSLET_INLINE int16x8_t rounded_i16(F32x8 a) {
    const I32x8 wide = to_i32(a);
    return vcombine_s16(vqmovn_s32(wide.low), vqmovn_s32(wide.high));
}
GOSLET_INLINE void store_rounded(std::int16_t* x, F32x8 a) {
    vst1q_s16(x, rounded_i16(a));
}
GOSLET_INLINE void store_rounded(std::int8_t* x, F32x8 a) {
    vst1_s8(x, vqmovn_s16(rounded_i16(a)));
}

}  // namespace
}  // namespace goslet
