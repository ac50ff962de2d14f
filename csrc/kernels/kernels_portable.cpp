// The kernels for any CPU, in the compiler's own vector types.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd.h"
#include "tables.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "simd_portable.h"

namespace goslet {
namespace {

constexpr std::size_t kRowsAtOnce = 2;
constexpr std::size_t kFloatTilesAtOnce = 2;

}  // namespace
}  // namespace goslet

#include "kernels_table.h"
#include "products.h"

namespace goslet {

const Kernels kPortableKernels = kernels_table("portable", pack<std::int16_t>, pack<std::int8_t>, multiply);

}  // namespace goslet
