// The tables that kernels_*.cpp define. Those of another architecture than the compiler's are not there.
#pragma once

#include "kernels.h"

namespace goslet {

extern const Kernels kReferenceKernels;
extern const Kernels kPortableKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kNeonKernels;
extern const Kernels kNeonDotprodKernels;

}  // namespace goslet
