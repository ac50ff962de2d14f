// RWKV-7's recurrence, over the eight lanes of simd.h; see elementwise.h.

namespace goslet {
namespace {

// What every row of the state meets, in whole vectors: past the head's size all are zero.
struct WkvTerms {
    alignas(32) float r[kMaxHeadSize];
    alignas(32) float w[kMaxHeadSize];
    alignas(32) float k[kMaxHeadSize];
    alignas(32) float kappa[kMaxHeadSize];
    alignas(32) float kappa_a[kMaxHeadSize];
    alignas(32) float v[kMaxHeadSize];
};

// The next state's vector at j, and its part of the row's product with r.
GOSLET_INLINE F32x8 next_state(const WkvTerms& terms, std::size_t j, F32x8 state, F32x8 minus_removed, F32x8 value) {
    const F32x8 kept = fma(minus_removed, load(terms.kappa_a + j), state * load(terms.w + j));
    return fma(value, load(terms.k + j), kept);
}

// One row of a state of 8 · kVectors keys, which stays in registers between its two uses. Returns its product with r.
template <std::size_t kVectors>
inline float wkv7_row(const WkvTerms& terms, float value, float* row) {
    F32x8 state[kVectors];
    F32x8 removed[2] = {zero(), zero()};
#pragma GCC unroll 8
    for (std::size_t part = 0; part < kVectors; ++part) {
        state[part] = load(row + 8 * part);
        removed[part % 2] = fma(state[part], load(terms.kappa + 8 * part), removed[part % 2]);
    }
    const F32x8 minus_removed = broadcast(-sum(removed[0] + removed[1]));
    const F32x8 values = broadcast(value);
    F32x8 y[2] = {zero(), zero()};
#pragma GCC unroll 8
    for (std::size_t part = 0; part < kVectors; ++part) {
        const F32x8 next = next_state(terms, 8 * part, state[part], minus_removed, values);
        store(row + 8 * part, next);
        y[part % 2] = fma(next, load(terms.r + 8 * part), y[part % 2]);
    }
    return sum(y[0] + y[1]);
}

// The same for any number of keys.
inline float wkv7_any_row(const WkvTerms& terms, float value, std::size_t n, float* row) {
    const std::size_t whole = n / 8 * 8;
    F32x8 removed = zero();
    for (std::size_t j = 0; j < whole; j += 8) {
        removed = fma(load(row + j), load(terms.kappa + j), removed);
    }
    F32x8 last = zero();
    if (whole < n) {
        last = load_partial(row + whole, n - whole);
        removed = fma(last, load(terms.kappa + whole), removed);
    }
    const F32x8 minus_removed = broadcast(-sum(removed));
    const F32x8 values = broadcast(value);
    F32x8 y = zero();
    for (std::size_t j = 0; j < whole; j += 8) {
        const F32x8 next = next_state(terms, j, load(row + j), minus_removed, values);
        store(row + j, next);
        y = fma(next, load(terms.r + j), y);
    }
    if (whole < n) {
        const F32x8 next = next_state(terms, whole, last, minus_removed, values);
        store_partial(row + whole, next, n - whole);
        y = fma(next, load(terms.r + whole), y);
    }
    return sum(y);
}

inline void wkv7(const Wkv7Head& head) {
    const std::size_t n = head.head_size;
    WkvTerms terms;
    const F32x8 one = broadcast(1.0f);
    F32x8 squares = zero();
    F32x8 bonuses = zero();
    for (std::size_t j = 0; j < n; j += 8) {
        const std::size_t count = n - j < 8 ? n - j : 8;
        F32x8 v = load_up_to_8(head.v + j, count);
        if (head.value_mix == nullptr) {
            std::memcpy(head.first_value + j, head.v + j, count * sizeof(float));
        } else {
            v = fma(load_up_to_8(head.first_value + j, count) - v, load_up_to_8(head.value_mix + j, count), v);
        }
        const F32x8 a = load_up_to_8(head.a + j, count);
        const F32x8 r = load_up_to_8(head.r + j, count);
        const F32x8 key = load_up_to_8(head.k + j, count);
        const F32x8 kappa = key * load_up_to_8(head.k_k + j, count);
        const F32x8 k = key * fma(a - one, load_up_to_8(head.k_a + j, count), one);
        squares = fma(kappa, kappa, squares);
        bonuses = fma(r * k, load_up_to_8(head.r_k + j, count), bonuses);
        store(terms.r + j, r);
        store(terms.w + j, load_up_to_8(head.w + j, count));
        store(terms.k + j, k);
        store(terms.kappa + j, kappa);
        store(terms.kappa_a + j, a);
        store(terms.v + j, v);
    }
    const float norm = std::sqrt(sum(squares));
    const F32x8 inverse_norm = broadcast(1.0f / (norm < 1e-12f ? 1e-12f : norm));  // NaN stays
    for (std::size_t j = 0; j < n; j += 8) {
        const F32x8 kappa = load(terms.kappa + j) * inverse_norm;
        store(terms.kappa + j, kappa);
        store(terms.kappa_a + j, kappa * load(terms.kappa_a + j));
    }

    if (n == 64) {
        for (std::size_t i = 0; i < n; ++i) {
            head.y[i] = wkv7_row<8>(terms, terms.v[i], head.state + i * n);
        }
    } else {
        for (std::size_t i = 0; i < n; ++i) {
            head.y[i] = wkv7_any_row(terms, terms.v[i], n, head.state + i * n);
        }
    }

    layer_norm(head.y, head.norm_weight, head.norm_bias, head.norm_eps, n, head.y);
    const F32x8 bonus = broadcast(sum(bonuses));
    for (std::size_t j = 0; j < n; j += 8) {
        const std::size_t count = n - j < 8 ? n - j : 8;
        const F32x8 y = fma(bonus, load(terms.v + j), load_up_to_8(head.y + j, count));
        store_partial(head.y + j, y * load_up_to_8(head.g + j, count), count);
    }
}

}  // namespace
}  // namespace goslet
