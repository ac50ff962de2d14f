// A model of CUDA on the host, for tests: blocks run one after another, the threads of a block are fibers that change
// places at barriers and at what a warp does together. What differs between GPUs and this model: blocks never run at
// the same time, and between two meetings a thread runs alone. A kernel whose threads do not all come to a meeting is
// reported, never waited for.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>

#include "goslet_cuda.h"
#include "grid.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// Blocks run one after another, so one place is enough for what a block shares.
#define __shared__ static
#define threadIdx (::goslet::cuda::host::here().thread)
#define blockIdx (::goslet::cuda::host::here().block)
#define blockDim (::goslet::cuda::host::here().threads)

struct __half {
    std::uint16_t bits;
};

struct __nv_bfloat16 {
    std::uint16_t bits;
};

float __half2float(__half value);
__half __float2half_rn(float value);
float __bfloat162float(__nv_bfloat16 value);
__nv_bfloat16 __float2bfloat16_rn(float value);
std::uint32_t __byte_perm(std::uint32_t low, std::uint32_t high, std::uint32_t selector);
float __uint_as_float(std::uint32_t bits);
float __shfl_xor_sync(std::uint32_t mask, float value, int lane_mask);
void __syncthreads();

namespace goslet::cuda {

namespace host {

struct Index {
    unsigned x;
};

struct Place {
    Index thread;
    Index block;
    Index threads;
};

// Where the code that asks runs.
const Place& here();

// Runs `body` as each thread of each block. 0, or a code for device_error.
int run(const Grid& grid, const std::function<void()>& body);

void* dynamic_shared();

}  // namespace host

const char* device_error(int code);

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), const Grid& grid, goslet_cuda_stream, Arguments... arguments) {
    return host::run(grid, [&] { kernel(arguments...); });
}

template <typename T>
T* dynamic_shared() {
    return static_cast<T*>(host::dynamic_shared());
}

template <typename T>
T load_streamed(const T* from) {
    return *from;
}

template <typename T>
void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
template <>
void multiply_add<__half>(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
template <>
void multiply_add<__nv_bfloat16>(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);

template <typename T>
std::uint32_t subtract_pairs(std::uint32_t a, std::uint32_t b);
template <>
std::uint32_t subtract_pairs<__half>(std::uint32_t a, std::uint32_t b);
template <>
std::uint32_t subtract_pairs<__nv_bfloat16>(std::uint32_t a, std::uint32_t b);

std::uint32_t multiply_add_pairs(std::uint32_t a, std::uint32_t b, std::uint32_t c);

inline std::uint32_t and_or(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
    return (a & b) | c;
}

inline int same_in_warp(int value) {
    return value;
}

std::uint32_t bf16_pair(float low, float high);

}  // namespace goslet::cuda

// The order in which a block's threads take turns, and blocks theirs. A kernel must not depend on it.
enum goslet_cuda_host_order_kind : std::uint32_t {
    GOSLET_CUDA_HOST_FORWARD = 0,
    GOSLET_CUDA_HOST_BACKWARDS = 1,
    // One warp as far as it comes, then the next: where a barrier is missing, it finds what the others still need.
    GOSLET_CUDA_HOST_GREEDY = 2,
    GOSLET_CUDA_HOST_GREEDY_BACKWARDS = 3,
    // This and all above are seeds, for a new order at every meeting.
    GOSLET_CUDA_HOST_RANDOM = 4,
};
extern "C" GOSLET_CUDA_API void goslet_cuda_host_order(std::uint32_t order);
