// The plain kernels: scalar, with double inside, and written to be read. Every fast kernel is tested against these.
#pragma once

#include <cstddef>

#include "kernels.h"

namespace goslet::reference {

void layer_norm(const float* x, const float* weight, const float* bias, float eps, std::size_t n, float* out);
void lerp(const float* x, const float* previous, const float* mix, std::size_t n, float* out);
void activate(Activation activation, const float* bias, std::size_t n, float* y);
void add(const float* y, std::size_t n, float* out);
void wkv7(const Wkv7Head& head);

}  // namespace goslet::reference
