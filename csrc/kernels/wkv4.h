// RWKV-4's recurrence, over the eight lanes of simd.h; see elementwise.h.

namespace goslet {
namespace {

// exp of a difference from the larger of two exponents. Below -87 it is that of -87, 1.6e-38: nothing beside the 1 of
// the larger one.
GOSLET_INLINE F32x8 share_of(F32x8 exponent, F32x8 largest) {
    return exp_within_range(clamp(exponent - largest, -87.0f, 0.0f));
}

inline void wkv4(const Wkv4Channels& in) {
    for (std::size_t i = 0; i < in.n; i += 8) {
        const std::size_t count = in.n - i < 8 ? in.n - i : 8;
        const F32x8 k = load_up_to_8(in.k + i, count);
        const F32x8 v = load_up_to_8(in.v + i, count);
        const F32x8 aa = load_up_to_8(in.aa + i, count);
        const F32x8 bb = load_up_to_8(in.bb + i, count);
        const F32x8 pp = load_up_to_8(in.pp + i, count);

        const F32x8 first = load_up_to_8(in.first + i, count) + k;
        const F32x8 now = max(pp, first);
        const F32x8 past = share_of(pp, now);
        const F32x8 present = share_of(first, now);
        const F32x8 wkv = fma(past, aa, present * v) / fma(past, bb, present);
        store_partial(in.y + i, load_up_to_8(in.r + i, count) * wkv, count);

        const F32x8 decayed = pp + load_up_to_8(in.decay + i, count);
        const F32x8 top = max(decayed, k);
        const F32x8 kept = share_of(decayed, top);
        const F32x8 added = share_of(k, top);
        store_partial(in.aa + i, fma(kept, aa, added * v), count);
        store_partial(in.bb + i, fma(kept, bb, added), count);
        store_partial(in.pp + i, top, count);
    }
}

}  // namespace
}  // namespace goslet
