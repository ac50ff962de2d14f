// The recurrence of RWKV-5 and 6, over the eight lanes of simd.h; see elementwise.h.

namespace goslet {
namespace {

// Columns of the state from `first` on, 8 · kVectors of them, whose values and outputs stay in registers while the rows
// pass. `bonus` is the sum over keys of r · bonus · k.
template <std::size_t kVectors>
inline void wkv6_columns(const Wkv6Head& head, std::size_t first, float bonus) {
    const std::size_t n = head.head_size;
    F32x8 v[kVectors];
    F32x8 y[kVectors];
#pragma GCC unroll 8
    for (std::size_t part = 0; part < kVectors; ++part) {
        v[part] = load(head.v + first + 8 * part);
        y[part] = broadcast(bonus) * v[part];
    }
    for (std::size_t i = 0; i < n; ++i) {
        float* const row = head.state + i * n + first;
        const F32x8 r = broadcast(head.r[i]);
        const F32x8 w = broadcast(head.w[i]);
        const F32x8 k = broadcast(head.k[i]);
#pragma GCC unroll 8
        for (std::size_t part = 0; part < kVectors; ++part) {
            const F32x8 state = load(row + 8 * part);
            y[part] = fma(r, state, y[part]);
            store(row + 8 * part, fma(w, state, k * v[part]));
        }
    }
#pragma GCC unroll 8
    for (std::size_t part = 0; part < kVectors; ++part) {
        store(head.y + first + 8 * part, y[part]);
    }
}

// The last columns, fewer than 8.
inline void wkv6_rest(const Wkv6Head& head, std::size_t first, float bonus) {
    const std::size_t n = head.head_size;
    const std::size_t count = n - first;
    const F32x8 v = load_partial(head.v + first, count);
    F32x8 y = broadcast(bonus) * v;
    for (std::size_t i = 0; i < n; ++i) {
        float* const row = head.state + i * n + first;
        const F32x8 state = load_partial(row, count);
        y = fma(broadcast(head.r[i]), state, y);
        store_partial(row, fma(broadcast(head.w[i]), state, broadcast(head.k[i]) * v), count);
    }
    store_partial(head.y + first, y, count);
}

inline void wkv6(const Wkv6Head& head) {
    const std::size_t n = head.head_size;
    F32x8 bonuses = zero();
    for (std::size_t i = 0; i < n; i += 8) {
        const std::size_t count = n - i < 8 ? n - i : 8;
        const F32x8 weighted = load_up_to_8(head.bonus + i, count) * load_up_to_8(head.k + i, count);
        bonuses = fma(load_up_to_8(head.r + i, count), weighted, bonuses);
    }
    const float bonus = sum(bonuses);
    std::size_t first = 0;
    for (; first + 32 <= n; first += 32) {
        wkv6_columns<4>(head, first, bonus);
    }
    for (; first + 8 <= n; first += 8) {
        wkv6_columns<1>(head, first, bonus);
    }
    if (first < n) {
        wkv6_rest(head, first, bonus);
    }
    layer_norm(head.y, head.norm_weight, head.norm_bias, head.norm_eps, n, head.y);
    if (head.g != nullptr) {
        combine(Combine::kGate, head.y, head.g, nullptr, n, head.y);
    }
}

}  // namespace
}  // namespace goslet
