// simd.h in the vector types that GCC and Clang have for every CPU.

namespace goslet {
namespace {

// Four lanes, because every common CPU has registers of 16 bytes and wider ones would change the calling convention.
typedef float Float4 __attribute__((vector_size(16)));
typedef std::int32_t Int4 __attribute__((vector_size(16)));
typedef std::uint32_t Unsigned4 __attribute__((vector_size(16)));
typedef std::uint16_t UnsignedShort4 __attribute__((vector_size(8)));
typedef std::int8_t Byte4 __attribute__((vector_size(4)));
typedef std::uint8_t UnsignedByte4 __attribute__((vector_size(4)));

struct F32x8 {
    Float4 low, high;
};
struct I32x8 {
    Int4 low, high;
};

GOSLET_INLINE F32x8 operator+(F32x8 a, F32x8 b) {
    return {a.low + b.low, a.high + b.high};
}
GOSLET_INLINE F32x8 operator-(F32x8 a, F32x8 b) {
    return {a.low - b.low, a.high - b.high};
}
GOSLET_INLINE F32x8 operator*(F32x8 a, F32x8 b) {
    return {a.low * b.low, a.high * b.high};
}
GOSLET_INLINE F32x8 operator/(F32x8 a, F32x8 b) {
    return {a.low / b.low, a.high / b.high};
}
GOSLET_INLINE F32x8 fma(F32x8 a, F32x8 b, F32x8 c) {
    return a * b + c;
}

// Unsigned, because what is made of NaN's bits may overflow.
GOSLET_INLINE I32x8 operator+(I32x8 a, I32x8 b) {
    return {(Int4)((Unsigned4)a.low + (Unsigned4)b.low), (Int4)((Unsigned4)a.high + (Unsigned4)b.high)};
}
GOSLET_INLINE I32x8 operator-(I32x8 a, I32x8 b) {
    return {(Int4)((Unsigned4)a.low - (Unsigned4)b.low), (Int4)((Unsigned4)a.high - (Unsigned4)b.high)};
}
GOSLET_INLINE I32x8 operator&(I32x8 a, I32x8 b) {
    return {a.low & b.low, a.high & b.high};
}
GOSLET_INLINE I32x8 operator|(I32x8 a, I32x8 b) {
    return {a.low | b.low, a.high | b.high};
}
template <int n>
GOSLET_INLINE I32x8 shift_left(I32x8 a) {
    return {(Int4)((Unsigned4)a.low << n), (Int4)((Unsigned4)a.high << n)};
}
template <int n>
GOSLET_INLINE I32x8 shift_right(I32x8 a) {
    return {(Int4)((Unsigned4)a.low >> n), (Int4)((Unsigned4)a.high >> n)};
}

GOSLET_INLINE F32x8 broadcast(float x) {
    const Float4 four = {x, x, x, x};
    return {four, four};
}
GOSLET_INLINE I32x8 broadcast_i32(std::int32_t x) {
    const Int4 four = {x, x, x, x};
    return {four, four};
}
GOSLET_INLINE F32x8 zero() {
    return broadcast(0.0f);
}
GOSLET_INLINE I32x8 zero_i32() {
    return broadcast_i32(0);
}
GOSLET_INLINE F32x8 load(const float* x) {
    F32x8 a;
    std::memcpy(&a, x, sizeof a);
    return a;
}
GOSLET_INLINE void store(float* x, F32x8 a) {
    std::memcpy(x, &a, sizeof a);
}
GOSLET_INLINE I32x8 load_i32(const std::int32_t* x) {
    I32x8 a;
    std::memcpy(&a, x, sizeof a);
    return a;
}
GOSLET_INLINE I32x8 load_bits(const std::uint8_t* x) {
    I32x8 a;
    std::memcpy(&a, x, sizeof a);
    return a;
}
GOSLET_INLINE void store_i32(std::int32_t* x, I32x8 a) {
    std::memcpy(x, &a, sizeof a);
}
GOSLET_INLINE F32x8 load_partial(const float* x, std::size_t n) {
    float lanes[8] = {};
    std::memcpy(lanes, x, n * sizeof(float));
    return load(lanes);
}
GOSLET_INLINE void store_partial(float* x, F32x8 a, std::size_t n) {
    std::memcpy(x, &a, n * sizeof(float));
}

GOSLET_INLINE I32x8 bits_of(F32x8 a) {
    return {(Int4)a.low, (Int4)a.high};
}
GOSLET_INLINE F32x8 f32_of_bits(I32x8 a) {
    return {(Float4)a.low, (Float4)a.high};
}
GOSLET_INLINE I32x8 less(F32x8 a, F32x8 b) {
    return {(Int4)(a.low < b.low), (Int4)(a.high < b.high)};
}
GOSLET_INLINE F32x8 select(I32x8 mask, F32x8 a, F32x8 b) {
    const I32x8 other = {~mask.low, ~mask.high};
    return f32_of_bits((bits_of(a) & mask) | (bits_of(b) & other));
}
GOSLET_INLINE F32x8 min(F32x8 a, F32x8 b) {
    return select(less(a, b), a, b);
}
GOSLET_INLINE F32x8 max(F32x8 a, F32x8 b) {
    return select(less(b, a), a, b);
}
GOSLET_INLINE F32x8 abs(F32x8 a) {
    return f32_of_bits(bits_of(a) & broadcast_i32(0x7FFFFFFF));
}

GOSLET_INLINE F32x8 to_f32(I32x8 a) {
    return {__builtin_convertvector(a.low, Float4), __builtin_convertvector(a.high, Float4)};
}
// Adding 1.5 · 2^23 leaves no bits for a fraction, and the sum's rounding is the rounding wanted.
GOSLET_INLINE I32x8 to_i32(F32x8 a) {
    return bits_of(a + broadcast(12582912.0f)) - bits_of(broadcast(12582912.0f));
}

GOSLET_INLINE float sum(F32x8 a) {
    const Float4 x = a.low + a.high;
    return (x[0] + x[2]) + (x[1] + x[3]);
}
GOSLET_INLINE float largest(F32x8 a) {
    const F32x8 x = max(a, {a.high, a.low});
    const float even = x.low[0] > x.low[2] ? x.low[0] : x.low[2];
    const float odd = x.low[1] > x.low[3] ? x.low[1] : x.low[3];
    return even > odd ? even : odd;
}

// Eight small integers in memory, each as 32 bits.
template <typename Small4>
GOSLET_INLINE I32x8 load_small(const void* x) {
    Small4 small[2];
    std::memcpy(small, x, sizeof small);
    return {__builtin_convertvector(small[0], Int4), __builtin_convertvector(small[1], Int4)};
}
GOSLET_INLINE I32x8 load_lanes24(const std::uint8_t* x) {
    return load_small<UnsignedShort4>(x) | shift_left<16>(load_small<UnsignedByte4>(x + 16));
}
GOSLET_INLINE F32x8 load_weights(const float* x) {
    return load(x);
}
GOSLET_INLINE F32x8 load_weights(const F16* x) {
    const I32x8 half = load_small<UnsignedShort4>(x);
    const I32x8 magnitude = shift_left<13>(half & broadcast_i32(0x7FFF));
    // The exponents' biases differ by 112. A subnormal half has one exponent more and no leading one, which is taken
    // off; arithmetic on subnormal floats would be slow.
    const F32x8 normal = f32_of_bits(magnitude + broadcast_i32(112 << 23));
    const F32x8 subnormal = f32_of_bits(magnitude + broadcast_i32(113 << 23)) - broadcast(0x1p-14f);
    const F32x8 finite = select(less(normal, broadcast(0x1p-14f)), subnormal, normal);
    const F32x8 value =
        select(less(normal, broadcast(0x1p16f)), finite, f32_of_bits(magnitude | broadcast_i32(0x7F800000)));
    return f32_of_bits(bits_of(value) | shift_left<16>(half & broadcast_i32(0x8000)));
}
GOSLET_INLINE F32x8 load_weights(const Bf16* x) {
    return f32_of_bits(shift_left<16>(load_small<UnsignedShort4>(x)));
}

struct Pairs {
    I32x8 v;  // 16-bit lane 2 · output + input
};
struct InputPair {
    Int4 v;
};
GOSLET_INLINE InputPair load_inputs(const std::int16_t* x) {
    std::int32_t both;
    std::memcpy(&both, x, sizeof both);
    return {broadcast_i32(both).low};
}
GOSLET_INLINE Pairs load_words(const Pairs* x) {
    return *x;
}
GOSLET_INLINE void store_words(Pairs* x, Pairs a) {
    *x = a;
}

GOSLET_INLINE Int4 dot(Int4 sum, Int4 weights, Int4 x) {
#ifdef __SSE2__
    return sum + (Int4)_mm_madd_epi16((__m128i)weights, (__m128i)x);
#else
    return sum + ((Int4)((Unsigned4)weights << 16) >> 16) * ((Int4)((Unsigned4)x << 16) >> 16) +
           (weights >> 16) * (x >> 16);
#endif
}
GOSLET_INLINE I32x8 dot(I32x8 sum, Pairs weights, InputPair x) {
    return {dot(sum.low, weights.v.low, x.v), dot(sum.high, weights.v.high, x.v)};
}

GOSLET_INLINE I32x8 one_by_one(I32x8 sum) {
    return sum;
}
GOSLET_INLINE I32x8 total_of(I32x8 sums) {
    return sums;
}
GOSLET_INLINE Pairs load_int8_pairs(const std::uint8_t* data) {
    std::int16_t lanes[16];
    for (std::size_t i = 0; i < 16; ++i) {
        lanes[i] = static_cast<std::int8_t>(data[i]);
    }
    Pairs pairs;
    std::memcpy(&pairs, lanes, sizeof pairs);
    return pairs;
}

struct Quads {
    I32x8 v;  // byte 4 · output + input
};
struct InputQuad {
    Int4 even, odd;  // inputs 0 and 2, and 1 and 3, as 16-bit lanes
};
struct QuadSums {
    I32x8 v;
};
GOSLET_INLINE InputQuad load_inputs(const std::int8_t* x) {
    const std::int16_t even[2] = {x[0], x[2]};
    const std::int16_t odd[2] = {x[1], x[3]};
    return {load_inputs(even).v, load_inputs(odd).v};
}
GOSLET_INLINE Quads load_words(const Quads* x) {
    return *x;
}
GOSLET_INLINE void store_words(Quads* x, Quads a) {
    *x = a;
}
GOSLET_INLINE QuadSums no_quad_sums() {
    return {zero_i32()};
}
GOSLET_INLINE QuadSums dot(QuadSums sums, Quads weights, InputQuad x) {
    const I32x8 even = weights.v & broadcast_i32(0x00FF00FF);
    const I32x8 odd = shift_right<8>(weights.v) & broadcast_i32(0x00FF00FF);
    return {{dot(dot(sums.v.low, even.low, x.even), odd.low, x.odd),
             dot(dot(sums.v.high, even.high, x.even), odd.high, x.odd)}};
}
GOSLET_INLINE QuadSums operator+(QuadSums a, QuadSums b) {
    return {a.v + b.v};
}
GOSLET_INLINE I32x8 total_of(QuadSums sums) {
    return sums.v;
}

// Of four nibbles in every 16-bit lane, a vector for each.
GOSLET_INLINE void split_nibbles(I32x8 x, Pairs* pairs) {
    const I32x8 mask = broadcast_i32(0x000F000F);
    pairs[0] = {x & mask};
    pairs[1] = {shift_right<4>(x) & mask};
    pairs[2] = {shift_right<8>(x) & mask};
    pairs[3] = {shift_right<12>(x) & mask};
}

// Of four numbers of three bits in every 16-bit lane, a vector for each.
GOSLET_INLINE void split_threes(I32x8 x, Pairs* pairs) {
    const I32x8 mask = broadcast_i32(0x00070007);
    pairs[0] = {x & mask};
    pairs[1] = {shift_right<3>(x) & mask};
    pairs[2] = {shift_right<6>(x) & mask};
    pairs[3] = {shift_right<9>(x) & mask};
}

struct Int8Columns {
    static constexpr std::size_t kPairs = 1;
    static GOSLET_INLINE void unpack(const std::uint8_t* first, const std::uint8_t* second, std::size_t vector,
                                     Pairs* pairs) {
        const I32x8 x1 = load_small<Byte4>(first + 8 * vector);
        const I32x8 x2 = load_small<Byte4>(second + 8 * vector);
        pairs[0] = {(x1 & broadcast_i32(0xFFFF)) | shift_left<16>(x2)};
    }
};

struct Int4Columns {
    static constexpr std::size_t kPairs = 4;
    static GOSLET_INLINE void unpack(const std::uint8_t* first, const std::uint8_t* second, std::size_t vector,
                                     Pairs* pairs) {
        I32x8 x1, x2;
        std::memcpy(&x1, first, sizeof x1);
        std::memcpy(&x2, second, sizeof x2);
        // Vectors 0 to 3 are in the low halves of the 32-bit lanes, the others in the high halves.
        split_nibbles(vector == 0 ? (x1 & broadcast_i32(0xFFFF)) | shift_left<16>(x2)
                                  : shift_right<16>(x1) | (x2 & broadcast_i32(-0x10000)),
                      pairs);
    }
};

struct Int3Columns {
    static constexpr std::size_t kPairs = 8;
    static GOSLET_INLINE void unpack(const std::uint8_t* first, const std::uint8_t* second, std::size_t, Pairs* pairs) {
        const I32x8 x1 = load_lanes24(first);
        const I32x8 x2 = load_lanes24(second);
        split_threes((x1 & broadcast_i32(0xFFF)) | shift_left<16>(x2 & broadcast_i32(0xFFF)), pairs);
        split_threes(shift_right<12>(x1) | (shift_left<4>(x2) & broadcast_i32(0xFFF0000)), pairs + 4);
    }
};

template <typename Integer>
GOSLET_INLINE void store_rounded(Integer* x, F32x8 a) {
    const I32x8 wide = to_i32(a);
    for (std::size_t i = 0; i < 4; ++i) {
        x[i] = static_cast<Integer>(wide.low[i]);
        x[4 + i] = static_cast<Integer>(wide.high[i]);
    }
}

}  // namespace
}  // namespace goslet
