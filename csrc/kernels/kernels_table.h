// The table of an instruction set's kernels. Included by kernels_*.cpp after one of the simd_*.h.
#include "elementwise.h"
#include "wkv4.h"
#include "wkv6.h"
#include "wkv7.h"

namespace goslet {
namespace {

// Everything but what is given is the same code for all instruction sets, compiled for this one.
constexpr Kernels kernels_table(const char* isa, decltype(Kernels::pack16) pack16, decltype(Kernels::pack8) pack8,
                                decltype(Kernels::multiply) multiply) {
    return {isa, pack16, pack8, multiply, layer_norm, lerp, activate, combine, small_product, wkv4, wkv6, wkv7};
}

}  // namespace
}  // namespace goslet
