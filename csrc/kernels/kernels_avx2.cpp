// The kernels for AVX2 with FMA and F16C.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd.h"
#include "tables.h"

#if defined(__x86_64__)

#include <immintrin.h>

// Only what follows is compiled for AVX2, and it defines nothing that another file could share: a function of the
// standard library compiled here might be linked into all of the program. For GCC it holds to the end of the file,
// where templates are compiled.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "simd_avx2.h"

namespace goslet {
namespace {

// 16 registers: 4 rows of 2 vectors leave room for the operands.
constexpr std::size_t kRowsAtOnce = 4;
constexpr std::size_t kFloatTilesAtOnce = 4;

}  // namespace
}  // namespace goslet

#include "kernels_table.h"
#include "products.h"

namespace goslet {

const Kernels kAvx2Kernels = kernels_table("avx2", pack<std::int16_t>, pack<std::int8_t>, multiply);

}  // namespace goslet

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
