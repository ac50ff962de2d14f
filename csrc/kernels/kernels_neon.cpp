// The kernels for 64-bit ARM, all of which has NEON.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd.h"
#include "tables.h"

#if defined(__aarch64__)

#include <arm_neon.h>

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

const Kernels kNeonKernels = kernels_table("neon", pack<std::int16_t>, pack<std::int8_t>, multiply);

}  // namespace goslet

#endif  // __aarch64__
