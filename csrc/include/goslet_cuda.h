// goslet's CUDA kernels behind a plain C interface, so that the TensorRT plugin, a CUDA backend, tests and programs in
// other languages call the same code.
//
// Every function starts its work on the given stream, allocates nothing and waits for nothing, so all of them can be
// captured in a CUDA graph. It returns 0, one of the negative codes below when an argument is wrong (nothing is
// started then), or the positive cudaError_t of the launch. Pointers are to device memory unless said otherwise;
// activations, states and weights must be aligned to 16 bytes.
#ifndef GOSLET_CUDA_H
#define GOSLET_CUDA_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define GOSLET_CUDA_API __declspec(dllexport)
#else
#define GOSLET_CUDA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Grows with every change of this interface or of a layout that it documents.
#define GOSLET_CUDA_VERSION 1

// What the inputs of quantized weights are padded to a multiple of.
#define GOSLET_CUDA_PADDED_TO 128

// A cudaStream_t; null is the default stream.
typedef void* goslet_cuda_stream;

typedef enum { GOSLET_CUDA_F32 = 0, GOSLET_CUDA_F16 = 1, GOSLET_CUDA_BF16 = 2 } goslet_cuda_type;

enum {
    GOSLET_CUDA_OK = 0,
    GOSLET_CUDA_BAD_TYPE = -1,  // a type that the function does not take
    GOSLET_CUDA_BAD_SIZE = -2,  // a size that is zero, too large, or not a multiple of what it must be
    GOSLET_CUDA_NULL_POINTER = -3,
    GOSLET_CUDA_UNALIGNED = -4  // a pointer that is not aligned to 16 bytes
};

// GOSLET_CUDA_VERSION of the library.
GOSLET_CUDA_API int goslet_cuda_version(void);

// One line about a code that a function returned; valid for ever.
GOSLET_CUDA_API const char* goslet_cuda_error(int code);

// RWKV-4's recurrence for one token of `batch` sessions, as goslet::Wkv4 of the step graph. k, v and y are [batch,
// n_embd] of `type`; w = -exp(time_decay) and u = time_first are float [n_embd]; aa, bb and pp are float [batch,
// n_embd]. An output may lie where its input does, or apart from it, and nowhere else.
GOSLET_CUDA_API int goslet_cuda_wkv4(goslet_cuda_type type, int64_t batch, int64_t n_embd, const void* k, const void* v,
                                     const float* w, const float* u, const float* aa_in, const float* bb_in,
                                     const float* pp_in, void* y, float* aa_out, float* bb_out, float* pp_out,
                                     goslet_cuda_stream stream);

// RWKV-5's and 6's: y = r(diag(u) kᵀv + S), S ← diag(w) S + kᵀv, as goslet::Wkv5 and Wkv6. r, k, v and y are [batch,
// n_head, head_size] of `type`; w is float, [n_head, head_size] where `w_by_token` is 0 (5) and [batch, n_head,
// head_size] where it is 1 (6); u is float [n_head, head_size]. The states are [batch, n_head, head_size (key),
// head_size (value)] of `state_type`, float or f16; state_out may be state_in or lie apart from it.
GOSLET_CUDA_API int goslet_cuda_wkv6(goslet_cuda_type type, goslet_cuda_type state_type, int64_t batch, int64_t n_head,
                                     int64_t head_size, const void* r, const void* k, const void* v, const float* w,
                                     int w_by_token, const float* u, const void* state_in, void* y, void* state_out,
                                     goslet_cuda_stream stream);

// RWKV-7's: S ← S diag(w) - (S κ)(κ·a)ᵀ + v kᵀ, y = S r, as goslet::Wkv7. r, k, v, kappa, a and y are [batch, n_head,
// head_size] of `type`, kappa normalised per head; w is float of that shape: near 1 a shorter type would lose most of
// its distance from 1. The states are [batch, n_head, head_size (value), head_size (key)] of `state_type`, float or
// f16; state_out may be state_in or lie apart from it.
GOSLET_CUDA_API int goslet_cuda_wkv7(goslet_cuda_type type, goslet_cuda_type state_type, int64_t batch, int64_t n_head,
                                     int64_t head_size, const void* r, const float* w, const void* k, const void* v,
                                     const void* kappa, const void* a, const void* state_in, void* y, void* state_out,
                                     goslet_cuda_stream stream);

// y = x Wᵀ for 1 to 8 rows of x [n_rows, n_in] and y [n_rows, n_out] of `type`, W [n_out, n_in] of 4 or 8 bits with a
// scale for every `group` (32, 64 or 128) inputs of an output. n_in must be a multiple of 32. Sums are float; with f16
// and bf16 the products are those of the tensor cores, exact before they are added. There are no products with 3 bits:
// goslet's int3 goes in as the same numbers in 4.
//
// n_in is padded to the next multiple of GOSLET_CUDA_PADDED_TO, the numbers there are zero (their halves 8) and so are
// their scales. Words of 32 bits are little-endian.
//
//   weights   an output's numbers after another's. 4 bits: 64 bytes for every 128 inputs; word 4c + j of these holds
//             inputs 32j + 8c to 32j + 8c + 7, each as the number plus 8: bits 4i to 4i + 3 the one at 2i, bits 4i + 16
//             to 4i + 19 the one at 2i + 1. 8 bits: 64 bytes for every 64 inputs; word 4c + j holds inputs 32(j / 2) +
//             8c + 4(j mod 2) and the three after it, each as the signed number.
//   scales    (n_out, padded n_in / group) fp16
GOSLET_CUDA_API int goslet_cuda_product(goslet_cuda_type type, int bits, int64_t group, int64_t n_rows, int64_t n_in,
                                        int64_t n_out, const void* x, const void* weights, const void* scales, void* y,
                                        goslet_cuda_stream stream);

#ifdef __cplusplus
}
#endif

#endif
