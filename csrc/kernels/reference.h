// The plain kernels: scalar, with double inside, and written to be read. Every fast kernel is tested against these.
#pragma once

#include <cstddef>
#include <vector>

#include "kernels.h"

namespace goslet::reference {

// Numbers with mean 0 and variance 1, but for eps; the variance is the biased one.
std::vector<double> normalized(const std::vector<double>& x, double eps);
void layer_norm(const float* x, const float* weight, const float* bias, float eps, std::size_t n, float* out);
void lerp(const float* x, const float* previous, const float* mix, std::size_t n, float* out);
void activate(Activation activation, const float* bias, std::size_t n, float* y);
void combine(Combine how, const float* y, const float* a, const float* b, std::size_t n, float* out);
void small_product(const float* x, const float* matrix, std::size_t n, float* out);
void wkv4(const Wkv4Channels& channels);
void wkv6(const Wkv6Head& head);
void wkv7(const Wkv7Head& head);

}  // namespace goslet::reference
