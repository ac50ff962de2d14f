// What the CUDA kernels are written in: CUDA under nvcc, and elsewhere a model of it that runs on the host, so that the
// same files are tested where there is no GPU (host_shim.h).
#pragma once

#include <cstdint>
#include <initializer_list>

#include "goslet_cuda.h"
#include "grid.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include "host_shim.h"
#endif

namespace goslet::cuda {

#if defined(__CUDACC__)

// Starts a kernel; 0 or the cudaError_t of the launch.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), const Grid& grid, goslet_cuda_stream stream, Arguments... arguments) {
    kernel<<<static_cast<unsigned>(grid.n_blocks), static_cast<unsigned>(grid.n_threads),
             static_cast<std::size_t>(grid.shared_bytes), static_cast<cudaStream_t>(stream)>>>(arguments...);
    return static_cast<int>(cudaGetLastError());
}

// What the threads of a block share: `shared_bytes` of its grid.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
    extern __shared__ uint4 memory[];
    return reinterpret_cast<T*>(memory);
}

// c += a b for a (16, 16), b (16, 8) and c (16, 8), spread over a warp as PTX says for mma.m16n8k16: with lane = 4·row
// + quarter, a holds the pairs (row, 2·quarter), (row + 8, 2·quarter), (row, 2·quarter + 8), (row + 8, 2·quarter + 8),
// b the pairs (2·quarter, row) and (2·quarter + 8, row), and c (row, 2·quarter), its right neighbour, and the same at
// row + 8.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void multiply_add<__half>(float (&c)[4], const std::uint32_t (&a)[4],
                                                     const std::uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&c)[4], const std::uint32_t (&a)[4],
                                                            const std::uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Differences of the two numbers of each word.
template <typename T>
__device__ __forceinline__ std::uint32_t subtract_pairs(std::uint32_t a, std::uint32_t b);

template <>
__device__ __forceinline__ std::uint32_t subtract_pairs<__half>(std::uint32_t a, std::uint32_t b) {
    std::uint32_t difference;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
    return difference;
}

template <>
__device__ __forceinline__ std::uint32_t subtract_pairs<__nv_bfloat16>(std::uint32_t a, std::uint32_t b) {
    constexpr std::uint32_t kMinusOnes = 0xBF80BF80;
    std::uint32_t difference;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(difference) : "r"(b), "r"(kMinusOnes), "r"(a));
    return difference;
}

// A load of what is read once: it need not stay in the first cache.
template <typename T>
__device__ __forceinline__ T load_streamed(const T* from) {
    static_assert(sizeof(T) == sizeof(uint4), "one access");
    const uint4 words = __ldcs(reinterpret_cast<const uint4*>(from));
    T loaded;
    memcpy(&loaded, &words, sizeof loaded);
    return loaded;
}

inline const char* device_error(int code) {
    return cudaGetErrorString(static_cast<cudaError_t>(code));
}

// (a & b) | c in one instruction, which two constants would otherwise make two of.
__device__ __forceinline__ std::uint32_t and_or(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
    std::uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

// a · b + c for the two f16 of each word.
__device__ __forceinline__ std::uint32_t multiply_add_pairs(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
    std::uint32_t result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

// A number that is the same in all lanes, said to the compiler.
__device__ __forceinline__ int same_in_warp(int value) {
    return __shfl_sync(0xFFFFFFFF, value, 0);
}

// Two floats, rounded to bf16, low one first.
__device__ __forceinline__ std::uint32_t bf16_pair(float low, float high) {
    std::uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

#endif

__device__ __forceinline__ float to_float(float value) {
    return value;
}
__device__ __forceinline__ float to_float(__half value) {
    return __half2float(value);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 value) {
    return __bfloat162float(value);
}

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

// Four numbers side by side, moved in one access.
struct Four {
    float at[4];
};

struct alignas(16) Words4 {
    std::uint32_t at[4];
};

template <typename T>
struct alignas(4 * sizeof(T)) Packed4 {
    T at[4];
};

template <typename T>
__device__ __forceinline__ Four load4(const T* from) {
    const Packed4<T> packed = *reinterpret_cast<const Packed4<T>*>(from);
    return {{to_float(packed.at[0]), to_float(packed.at[1]), to_float(packed.at[2]), to_float(packed.at[3])}};
}

template <typename T>
__device__ __forceinline__ void store4(T* to, const Four& four) {
    *reinterpret_cast<Packed4<T>*>(to) = {
        {from_float<T>(four.at[0]), from_float<T>(four.at[1]), from_float<T>(four.at[2]), from_float<T>(four.at[3])}};
}

// The sum over the lanes that differ in the bits below `width`, a power of two.
template <int width>
__device__ __forceinline__ float sum_over_lanes(float value) {
#pragma unroll
    for (int offset = width / 2; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(0xFFFFFFFF, value, offset);
    }
    return value;
}

// ---------------------------------------------------------------------------------------------------- what calls check

inline bool aligned(const void* pointer) {
    return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

// The first of the pointers that is null or not aligned, as a code.
inline int check_pointers(std::initializer_list<const void*> pointers) {
    for (const void* pointer : pointers) {
        if (pointer == nullptr) {
            return GOSLET_CUDA_NULL_POINTER;
        }
    }
    for (const void* pointer : pointers) {
        if (!aligned(pointer)) {
            return GOSLET_CUDA_UNALIGNED;
        }
    }
    return GOSLET_CUDA_OK;
}

}  // namespace goslet::cuda
