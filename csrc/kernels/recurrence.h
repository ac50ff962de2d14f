// The recurrences of RWKV-4 to 7 for one number of a state, in plain form: the source that the CPU's reference and the
// CUDA kernels share. The CPU's fast kernels (wkv4.h, wkv6.h, wkv7.h) are held to the reference.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define GOSLET_BOTH __host__ __device__ __forceinline__
#else
#define GOSLET_BOTH inline
#endif

namespace goslet::recurrence {

template <typename Real>
struct Wkv4State {
    Real aa;  // numerator and
    Real bb;  // denominator of the past's mean, both divided by
    Real pp;  // exp(pp)
};

// RWKV-4: the weighted mean of values up to this one. w is what a step adds to the past's exponents, u what the present
// one's has over them.
template <typename Real>
GOSLET_BOTH Real wkv4(Real k, Real v, Real w, Real u, Wkv4State<Real>& state) {
    const Real first = u + k;
    const Real now = std::fmax(state.pp, first);
    const Real past = std::exp(state.pp - now);
    const Real present = std::exp(first - now);
    const Real mean = (past * state.aa + present * v) / (past * state.bb + present);
    const Real decayed = state.pp + w;
    const Real top = std::fmax(decayed, k);
    const Real kept = std::exp(decayed - top);
    const Real added = std::exp(k - top);
    state.aa = kept * state.aa + added * v;
    state.bb = kept * state.bb + added;
    state.pp = top;
    return mean;
}

// RWKV-5 and 6: moves the state of one key and one value on, and returns what it adds to the value's output, which is
// read from the old state.
template <typename Real>
GOSLET_BOTH Real wkv6(Real r, Real k, Real v, Real w, Real u, Real& state) {
    const Real written = k * v;
    const Real seen = r * (u * written + state);
    state = w * state + written;
    return seen;
}

// RWKV-7: the same, read from the new state. `removed` is the sum over keys of the old state times kappa.
template <typename Real>
GOSLET_BOTH Real wkv7(Real r, Real w, Real k, Real v, Real kappa_a, Real removed, Real& state) {
    state = state * w - removed * kappa_a + v * k;
    return state * r;
}

}  // namespace goslet::recurrence
