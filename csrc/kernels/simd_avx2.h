// simd.h for AVX2 with FMA and F16C. Include <immintrin.h> and simd.h before the target pragma, this after it.

namespace goslet {
namespace {

// The same vector, of which the compiler does not know where it comes from.
GOSLET_INLINE __m256i opaque(__m256i a) {
    __asm__("" : "+v"(a));
    return a;
}

struct F32x8 {
    __m256 v;
};
struct I32x8 {
    __m256i v;
};

GOSLET_INLINE F32x8 operator+(F32x8 a, F32x8 b) {
    return {_mm256_add_ps(a.v, b.v)};
}
GOSLET_INLINE F32x8 operator-(F32x8 a, F32x8 b) {
    return {_mm256_sub_ps(a.v, b.v)};
}
GOSLET_INLINE F32x8 operator*(F32x8 a, F32x8 b) {
    return {_mm256_mul_ps(a.v, b.v)};
}
GOSLET_INLINE F32x8 operator/(F32x8 a, F32x8 b) {
    return {_mm256_div_ps(a.v, b.v)};
}
GOSLET_INLINE F32x8 fma(F32x8 a, F32x8 b, F32x8 c) {
    return {_mm256_fmadd_ps(a.v, b.v, c.v)};
}
GOSLET_INLINE F32x8 min(F32x8 a, F32x8 b) {
    return {_mm256_min_ps(a.v, b.v)};
}
GOSLET_INLINE F32x8 max(F32x8 a, F32x8 b) {
    return {_mm256_max_ps(a.v, b.v)};
}
GOSLET_INLINE F32x8 abs(F32x8 a) {
    return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)};
}

GOSLET_INLINE I32x8 operator+(I32x8 a, I32x8 b) {
    return {_mm256_add_epi32(a.v, b.v)};
}
GOSLET_INLINE I32x8 operator-(I32x8 a, I32x8 b) {
    return {_mm256_sub_epi32(a.v, b.v)};
}
GOSLET_INLINE I32x8 operator&(I32x8 a, I32x8 b) {
    return {_mm256_and_si256(a.v, b.v)};
}
GOSLET_INLINE I32x8 operator|(I32x8 a, I32x8 b) {
    return {_mm256_or_si256(a.v, b.v)};
}
template <int n>
GOSLET_INLINE I32x8 shift_left(I32x8 a) {
    return {_mm256_slli_epi32(a.v, n)};
}
template <int n>
GOSLET_INLINE I32x8 shift_right(I32x8 a) {
    return {_mm256_srli_epi32(a.v, n)};
}

GOSLET_INLINE F32x8 zero() {
    return {_mm256_setzero_ps()};
}
GOSLET_INLINE I32x8 zero_i32() {
    return {_mm256_setzero_si256()};
}
GOSLET_INLINE F32x8 broadcast(float x) {
    return {_mm256_set1_ps(x)};
}
GOSLET_INLINE I32x8 broadcast_i32(std::int32_t x) {
    return {_mm256_set1_epi32(x)};
}
GOSLET_INLINE F32x8 load(const float* x) {
    return {_mm256_loadu_ps(x)};
}
GOSLET_INLINE void store(float* x, F32x8 a) {
    _mm256_storeu_ps(x, a.v);
}
GOSLET_INLINE I32x8 load_i32(const std::int32_t* x) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))};
}
GOSLET_INLINE I32x8 load_bits(const std::uint8_t* x) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))};
}
GOSLET_INLINE I32x8 load_lanes24(const std::uint8_t* x) {
    const __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    const __m256i high = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x + 16)));
    return {_mm256_or_si256(low, _mm256_slli_epi32(high, 16))};
}
GOSLET_INLINE void store_i32(std::int32_t* x, I32x8 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), a.v);
}

GOSLET_INLINE __m256i first_lanes(std::size_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
GOSLET_INLINE F32x8 load_partial(const float* x, std::size_t n) {
    return {_mm256_maskload_ps(x, first_lanes(n))};
}
GOSLET_INLINE void store_partial(float* x, F32x8 a, std::size_t n) {
    _mm256_maskstore_ps(x, first_lanes(n), a.v);
}

GOSLET_INLINE F32x8 to_f32(I32x8 a) {
    return {_mm256_cvtepi32_ps(a.v)};
}
GOSLET_INLINE I32x8 to_i32(F32x8 a) {
    return {_mm256_cvtps_epi32(a.v)};
}
GOSLET_INLINE I32x8 bits_of(F32x8 a) {
    return {_mm256_castps_si256(a.v)};
}
GOSLET_INLINE F32x8 f32_of_bits(I32x8 a) {
    return {_mm256_castsi256_ps(a.v)};
}

GOSLET_INLINE float sum(F32x8 a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
GOSLET_INLINE float largest(F32x8 a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

GOSLET_INLINE F32x8 load_weights(const float* x) {
    return load(x);
}
GOSLET_INLINE F32x8 load_weights(const F16* x) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))};
}
GOSLET_INLINE F32x8 load_weights(const Bf16* x) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}

struct Pairs {
    __m256i v;  // lane 2 · output + input
};
struct InputPair {
    __m256i v;
};
GOSLET_INLINE InputPair load_inputs(const std::int16_t* x) {
    std::int32_t both;
    std::memcpy(&both, x, sizeof both);
    return {_mm256_set1_epi32(both)};
}
GOSLET_INLINE Pairs load_words(const Pairs* x) {
    return {_mm256_load_si256(&x->v)};
}
GOSLET_INLINE void store_words(Pairs* x, Pairs a) {
    _mm256_store_si256(&x->v, a.v);
}
GOSLET_INLINE I32x8 dot(I32x8 sum, Pairs weights, InputPair x) {
#ifdef GOSLET_VNNI
    return {_mm256_dpwssd_epi32(sum.v, weights.v, x.v)};
#else
    return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(weights.v, x.v))};
#endif
}

GOSLET_INLINE I32x8 one_by_one(I32x8 sum) {
    return {opaque(sum.v)};
}
GOSLET_INLINE I32x8 total_of(I32x8 sums) {
    return sums;
}
GOSLET_INLINE Pairs load_int8_pairs(const std::uint8_t* data) {
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)))};
}

struct Quads {
    I32x8 v;  // byte 4 · output + input
};
struct InputQuad {
    __m256i v;
};
struct QuadSums {
    __m256i v;  // with VNNI a lane for each output, otherwise two of 16 bits
};
GOSLET_INLINE InputQuad load_inputs(const std::int8_t* x) {
    std::int32_t all;
    std::memcpy(&all, x, sizeof all);
    return {_mm256_set1_epi32(all)};
}
GOSLET_INLINE Quads load_words(const Quads* x) {
    return {{_mm256_load_si256(&x->v.v)}};
}
GOSLET_INLINE void store_words(Quads* x, Quads a) {
    _mm256_store_si256(&x->v.v, a.v.v);
}
GOSLET_INLINE QuadSums no_quad_sums() {
    return {_mm256_setzero_si256()};
}
#ifdef GOSLET_VNNI
GOSLET_INLINE QuadSums dot(QuadSums sums, Quads weights, InputQuad x) {
    return {_mm256_dpbusd_epi32(sums.v, weights.v.v, x.v)};
}
GOSLET_INLINE QuadSums operator+(QuadSums a, QuadSums b) {
    return {_mm256_add_epi32(a.v, b.v)};
}
GOSLET_INLINE I32x8 total_of(QuadSums sums) {
    return {sums.v};
}
#else
GOSLET_INLINE QuadSums dot(QuadSums sums, Quads weights, InputQuad x) {
    return {opaque(_mm256_add_epi16(sums.v, _mm256_maddubs_epi16(weights.v.v, x.v)))};
}
GOSLET_INLINE QuadSums operator+(QuadSums a, QuadSums b) {
    return {_mm256_add_epi16(a.v, b.v)};
}
GOSLET_INLINE I32x8 total_of(QuadSums sums) {
    return {_mm256_madd_epi16(sums.v, _mm256_set1_epi16(1))};
}
#endif

// Of four nibbles in every 16-bit lane, a vector for each.
GOSLET_INLINE void split_nibbles(__m256i x, Pairs* pairs) {
    const __m256i mask = _mm256_set1_epi16(0x000F);
    pairs[0] = {_mm256_and_si256(x, mask)};
    pairs[1] = {_mm256_and_si256(_mm256_srli_epi16(x, 4), mask)};
    pairs[2] = {_mm256_and_si256(_mm256_srli_epi16(x, 8), mask)};
    pairs[3] = {_mm256_srli_epi16(x, 12)};
}

struct Int8Columns {
    static constexpr std::size_t kPairs = 2;
    static GOSLET_INLINE void unpack(const std::uint8_t* first, const std::uint8_t* second, std::size_t vector,
                                     Pairs* pairs) {
        const __m128i x1 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first + 8 * vector));
        const __m128i x2 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(second + 8 * vector));
        pairs[0] = {_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(x1, x2))};
        pairs[1] = {_mm256_cvtepi8_epi16(_mm_unpackhi_epi8(x1, x2))};
    }
};

struct Int4Columns {
    static constexpr std::size_t kPairs = 4;
    static GOSLET_INLINE void unpack(const std::uint8_t* first, const std::uint8_t* second, std::size_t vector,
                                     Pairs* pairs) {
        const __m256i x1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
        const __m256i x2 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second));
        // Vectors 0 to 3 are in the low halves of the 32-bit lanes, the others in the high halves.
        split_nibbles(vector == 0 ? _mm256_blend_epi16(x1, _mm256_slli_epi32(x2, 16), 0xAA)
                                  : _mm256_blend_epi16(_mm256_srli_epi32(x1, 16), x2, 0xAA),
                      pairs);
    }
};

struct Int3Columns {
    static constexpr std::size_t kPairs = 8;
    static GOSLET_INLINE void unpack(const std::uint8_t* first, const std::uint8_t* second, std::size_t, Pairs* pairs) {
        const __m128i x1 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
        const __m128i x2 = _mm_loadu_si128(reinterpret_cast<const __m128i*>(second));
        const __m256i low = _mm256_set_m128i(_mm_unpackhi_epi16(x1, x2), _mm_unpacklo_epi16(x1, x2));
        const __m256i high =
            _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(first + 16)),
                                                   _mm_loadl_epi64(reinterpret_cast<const __m128i*>(second + 16))));
        const __m256i mask = _mm256_set1_epi16(7);
        pairs[0] = {_mm256_and_si256(low, mask)};
        pairs[1] = {_mm256_and_si256(_mm256_srli_epi16(low, 3), mask)};
        pairs[2] = {_mm256_and_si256(_mm256_srli_epi16(low, 6), mask)};
        pairs[3] = {_mm256_and_si256(_mm256_srli_epi16(low, 9), mask)};
        pairs[4] = {_mm256_and_si256(_mm256_srli_epi16(low, 12), mask)};
        pairs[5] = {_mm256_or_si256(_mm256_srli_epi16(low, 15),
                                    _mm256_and_si256(_mm256_add_epi16(high, high), _mm256_set1_epi16(6)))};
        pairs[6] = {_mm256_and_si256(_mm256_srli_epi16(high, 2), mask)};
        pairs[7] = {_mm256_srli_epi16(high, 5)};
    }
};

GOSLET_INLINE __m128i rounded_i16(F32x8 a) {
    const __m256i wide = _mm256_cvtps_epi32(a.v);
    return _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}
GOSLET_INLINE void store_rounded(std::int16_t* x, F32x8 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), rounded_i16(a));
}
GOSLET_INLINE void store_rounded(std::int8_t* x, F32x8 a) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(x), _mm_packs_epi16(rounded_i16(a), _mm_setzero_si128()));
}

}  // namespace
}  // namespace goslet
