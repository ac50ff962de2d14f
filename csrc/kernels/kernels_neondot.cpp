// The kernels for 64-bit ARM with the dot products of ARMv8.2.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd.h"
#include "tables.h"

// Clang before 16 has these instructions only where all of a file may use them.
#if defined(__aarch64__) && (!defined(__clang__) || __clang_major__ >= 16)

#include <arm_neon.h>

// As for AVX-512: only what follows is compiled for them.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#define GOSLET_DOTPROD
#include "simd_neon.h"

namespace goslet {
namespace {

// 32 registers of 16 bytes: 4 rows of 2 vectors take 16.
constexpr std::size_t kRowsAtOnce = 4;
constexpr std::size_t kFloatTilesAtOnce = 4;

}  // namespace
}  // namespace goslet

#include "kernels_table.h"
#include "products.h"

namespace goslet {

const Kernels kNeonDotprodKernels = kernels_table("neondot", pack<std::int16_t>, pack<std::int8_t>, multiply);

}  // namespace goslet

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
