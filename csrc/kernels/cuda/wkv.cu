// The state updates of RWKV-4 to 7 for one token of many sessions; the arithmetic is that of recurrence.h.
//
// They are bounded by memory: a state is read and written once and everything else is small. Every thread reads its
// part of the state before it writes any, and no two threads share a part, so that the new state may lie where the old
// one does. Hence no __restrict__ on states.
#include <initializer_list>

#include "../recurrence.h"
#include "device.h"

namespace goslet::cuda {
namespace {

constexpr std::int64_t kMaxBatch = 1 << 20;
constexpr std::int64_t kMaxWidth = 1 << 20;
constexpr std::int64_t kMaxHeadSize = 256;
// Heads from which on a GPU is busy with one block for each; below it, heads are cut.
constexpr std::int64_t kManyHeads = 256;
constexpr int kHead = 64;  // the head size of all released models

// -------------------------------------------------------------------------------------------------------------- RWKV-4

constexpr int kWkv4Threads = 64;

template <typename T>
__global__ void __launch_bounds__(kWkv4Threads)
    wkv4(unsigned n, unsigned n_embd, const T* k, const T* v, const float* w, const float* u, const float* aa_in,
         const float* bb_in, const float* pp_in, T* y, float* aa_out, float* bb_out, float* pp_out) {
    const unsigned i = blockIdx.x * kWkv4Threads + threadIdx.x;
    if (i >= n) {
        return;
    }
    const unsigned channel = i % n_embd;
    recurrence::Wkv4State<float> state{aa_in[i], bb_in[i], pp_in[i]};
    y[i] = from_float<T>(recurrence::wkv4<float>(to_float(k[i]), to_float(v[i]), w[channel], u[channel], state));
    aa_out[i] = state.aa;
    bb_out[i] = state.bb;
    pp_out[i] = state.pp;
}

// -------------------------------------------------------------------------------------------------------- RWKV-5 and 6

// One number or four side by side.
template <int kCount>
struct Run {
    float at[kCount];
};

template <int kCount, typename T>
__device__ __forceinline__ Run<kCount> load_run(const T* from) {
    static_assert(kCount == 1 || kCount == 4, "one access");
    if constexpr (kCount == 1) {
        return {{to_float(*from)}};
    } else {
        const Four four = load4(from);
        return {{four.at[0], four.at[1], four.at[2], four.at[3]}};
    }
}

constexpr int kWkv6Threads = 256;

// Heads of 64. A block has `kColumns` of the 64 values of a head, four a thread; a thread has `kRows` keys after
// another.
template <typename T, typename S, int kColumns>
__global__ void __launch_bounds__(kWkv6Threads)
    wkv6_64(unsigned n_head, const T* r, const T* k, const T* v, const float* w, bool w_by_token, const float* u,
            const S* state_in, T* y, S* state_out) {
    constexpr int kBlocks = kHead / kColumns;
    constexpr int kLanes = kColumns / 4;
    constexpr int kGroups = kWkv6Threads / kLanes;
    constexpr int kRows = kHead / kGroups;
    static_assert(kRows >= 1 && kLanes <= kWarp, "every thread has a row and a row lies within a warp");
    __shared__ float sums[kWkv6Threads / kWarp][kColumns];

    const int thread = static_cast<int>(threadIdx.x);
    const unsigned head = blockIdx.x / kBlocks;
    const int column = static_cast<int>(blockIdx.x % kBlocks) * kColumns + thread % kLanes * 4;
    const int first = thread / kLanes * kRows;
    const std::int64_t own = static_cast<std::int64_t>(head) * kHead;
    const std::int64_t shared = head % n_head * kHead;
    const std::int64_t decays = w_by_token ? own : shared;

    Four state[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        state[i] = load4(state_in + (own + first + i) * kHead + column);
    }
    const Run<kRows> receptance = load_run<kRows>(r + own + first);
    const Run<kRows> key = load_run<kRows>(k + own + first);
    const Run<kRows> decay = load_run<kRows>(w + decays + first);
    const Run<kRows> bonus = load_run<kRows>(u + shared + first);
    const Four value = load4(v + own + column);
    Four part{{0.0f, 0.0f, 0.0f, 0.0f}};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            part.at[j] += recurrence::wkv6<float>(receptance.at[i], key.at[i], value.at[j], decay.at[i], bonus.at[i],
                                                  state[i].at[j]);
        }
        store4(state_out + (own + first + i) * kHead + column, state[i]);
    }

#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int offset = kWarp / 2; offset >= kLanes; offset /= 2) {
            part.at[j] += __shfl_xor_sync(0xFFFFFFFF, part.at[j], offset);
        }
        if (thread % kWarp < kLanes) {
            sums[thread / kWarp][thread % kWarp * 4 + j] = part.at[j];
        }
    }
    __syncthreads();
    if (thread < kColumns) {
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < kWkv6Threads / kWarp; ++warp) {
            sum += sums[warp][thread];
        }
        y[own + static_cast<int>(blockIdx.x % kBlocks) * kColumns + thread] = from_float<T>(sum);
    }
}

// Any head. A block has 32 values, one a lane; its warps share the keys.
template <typename T, typename S>
__global__ void __launch_bounds__(kWkv6Threads)
    wkv6_any(unsigned n_head, int n, const T* r, const T* k, const T* v, const float* w, bool w_by_token,
             const float* u, const S* state_in, T* y, S* state_out) {
    constexpr int kWarps = kWkv6Threads / kWarp;
    __shared__ float sums[kWarps][kWarp];
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const unsigned blocks = static_cast<unsigned>(n + kWarp - 1) / kWarp;
    const unsigned head = blockIdx.x / blocks;
    const int column = static_cast<int>(blockIdx.x % blocks) * kWarp + lane;
    const std::int64_t own = static_cast<std::int64_t>(head) * n;
    const std::int64_t shared = static_cast<std::int64_t>(head % n_head) * n;
    const std::int64_t decays = w_by_token ? own : shared;
    float part = 0.0f;
    if (column < n) {
        const float value = to_float(v[own + column]);
        for (int row = warp; row < n; row += kWarps) {
            const std::int64_t place = (own + row) * n + column;
            float state = to_float(state_in[place]);
            part += recurrence::wkv6<float>(to_float(r[own + row]), to_float(k[own + row]), value, w[decays + row],
                                            u[shared + row], state);
            state_out[place] = from_float<S>(state);
        }
    }
    sums[warp][lane] = part;
    __syncthreads();
    if (warp == 0 && column < n) {
        float sum = 0.0f;
        for (int i = 0; i < kWarps; ++i) {
            sum += sums[i][lane];
        }
        y[own + column] = from_float<T>(sum);
    }
}

// -------------------------------------------------------------------------------------------------------------- RWKV-7

constexpr int kWkv7Threads = 128;

// Heads of 64. Sixteen lanes hold a row of the state, four keys each; a thread has `kRows` rows.
template <typename T, typename S, int kRows>
__global__ void __launch_bounds__(kWkv7Threads)
    wkv7_64(const T* r, const float* w, const T* k, const T* v, const T* kappa, const T* a, const S* state_in, T* y,
            S* state_out) {
    constexpr int kLanes = kHead / 4;
    constexpr int kGroups = kWkv7Threads / kLanes;
    constexpr int kBlocks = kHead / (kGroups * kRows);
    const std::int64_t own = blockIdx.x / kBlocks * kHead;
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const int column = lane * 4;
    const int first = static_cast<int>(blockIdx.x % kBlocks) * kGroups * kRows + static_cast<int>(threadIdx.x) / kLanes;

    Four state[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        state[i] = load4(state_in + (own + first + i * kGroups) * kHead + column);
    }
    const Four removal = load4(kappa + own + column);
    const Four rate = load4(a + own + column);
    const Four decay = load4(w + own + column);
    const Four key = load4(k + own + column);
    const Four receptance = load4(r + own + column);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const int row = first + i * kGroups;
        const float value = to_float(v[own + row]);
        float removed = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            removed += state[i].at[j] * removal.at[j];
        }
        removed = sum_over_lanes<kLanes>(removed);
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            sum += recurrence::wkv7<float>(receptance.at[j], decay.at[j], key.at[j], value, removal.at[j] * rate.at[j],
                                           removed, state[i].at[j]);
        }
        store4(state_out + (own + row) * kHead + column, state[i]);
        sum = sum_over_lanes<kLanes>(sum);
        if (lane == 0) {
            y[own + row] = from_float<T>(sum);
        }
    }
}

// Any head. A warp has a row of the state.
template <typename T, typename S>
__global__ void __launch_bounds__(kWkv7Threads, 1)
    wkv7_any(int n, const T* r, const float* w, const T* k, const T* v, const T* kappa, const T* a, const S* state_in,
             T* y, S* state_out) {
    constexpr int kWarps = kWkv7Threads / kWarp;
    constexpr int kParts = kMaxHeadSize / kWarp;
    const int blocks = (n + kWarps - 1) / kWarps;
    const std::int64_t own = blockIdx.x / blocks * n;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int row = static_cast<int>(blockIdx.x % blocks) * kWarps + static_cast<int>(threadIdx.x) / kWarp;
    if (row >= n) {
        return;
    }
    float state[kParts];
    float removed = 0.0f;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
        const int column = part * kWarp + lane;
        state[part] = column < n ? to_float(state_in[(own + row) * n + column]) : 0.0f;
        removed += column < n ? state[part] * to_float(kappa[own + column]) : 0.0f;
    }
    removed = sum_over_lanes<kWarp>(removed);
    const float value = to_float(v[own + row]);
    float sum = 0.0f;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
        const int column = part * kWarp + lane;
        if (column < n) {
            const float kappa_a = to_float(kappa[own + column]) * to_float(a[own + column]);
            sum += recurrence::wkv7<float>(to_float(r[own + column]), w[own + column], to_float(k[own + column]), value,
                                           kappa_a, removed, state[part]);
            state_out[(own + row) * n + column] = from_float<S>(state[part]);
        }
    }
    sum = sum_over_lanes<kWarp>(sum);
    if (lane == 0) {
        y[own + row] = from_float<T>(sum);
    }
}

// --------------------------------------------------------------------------------------------------------------- calls

template <typename T>
const T* as(const void* pointer) {
    return static_cast<const T*>(pointer);
}

template <typename T>
T* as(void* pointer) {
    return static_cast<T*>(pointer);
}

// Calls `body` with a number of each of the two types.
template <typename Body>
int with_types(goslet_cuda_type type, goslet_cuda_type state_type, const Body& body) {
    const auto with_state = [&](auto number) {
        switch (state_type) {
            case GOSLET_CUDA_F32:
                return body(number, float{});
            case GOSLET_CUDA_F16:
                return body(number, __half{});
            default:
                return static_cast<int>(GOSLET_CUDA_BAD_TYPE);
        }
    };
    switch (type) {
        case GOSLET_CUDA_F32:
            return with_state(float{});
        case GOSLET_CUDA_F16:
            return with_state(__half{});
        case GOSLET_CUDA_BF16:
            return with_state(__nv_bfloat16{});
        default:
            return GOSLET_CUDA_BAD_TYPE;
    }
}

bool is_size(std::int64_t size, std::int64_t largest) {
    return size >= 1 && size <= largest;
}

int check_heads(std::int64_t batch, std::int64_t n_head, std::int64_t head_size) {
    const bool fits = is_size(batch, kMaxBatch) && is_size(head_size, kMaxHeadSize) && is_size(n_head, kMaxWidth) &&
                      n_head * head_size <= kMaxWidth && batch * n_head * head_size <= std::int64_t{1} << 30;
    return fits ? GOSLET_CUDA_OK : GOSLET_CUDA_BAD_SIZE;
}

}  // namespace
}  // namespace goslet::cuda

using namespace goslet::cuda;

extern "C" {

int goslet_cuda_wkv4(goslet_cuda_type type, int64_t batch, int64_t n_embd, const void* k, const void* v, const float* w,
                     const float* u, const float* aa_in, const float* bb_in, const float* pp_in, void* y, float* aa_out,
                     float* bb_out, float* pp_out, goslet_cuda_stream stream) {
    if (!is_size(batch, kMaxBatch) || !is_size(n_embd, kMaxWidth) || batch * n_embd > std::int64_t{1} << 30) {
        return GOSLET_CUDA_BAD_SIZE;
    }
    if (const int code = check_pointers({k, v, w, u, aa_in, bb_in, pp_in, y, aa_out, bb_out, pp_out})) {
        return code;
    }
    const std::int64_t n = batch * n_embd;
    return with_types(type, GOSLET_CUDA_F32, [&](auto number, auto) {
        using T = decltype(number);
        return launch(wkv4<T>, {(n + kWkv4Threads - 1) / kWkv4Threads, kWkv4Threads}, stream, static_cast<unsigned>(n),
                      static_cast<unsigned>(n_embd), as<T>(k), as<T>(v), w, u, aa_in, bb_in, pp_in, as<T>(y), aa_out,
                      bb_out, pp_out);
    });
}

int goslet_cuda_wkv6(goslet_cuda_type type, goslet_cuda_type state_type, int64_t batch, int64_t n_head,
                     int64_t head_size, const void* r, const void* k, const void* v, const float* w, int w_by_token,
                     const float* u, const void* state_in, void* y, void* state_out, goslet_cuda_stream stream) {
    if (const int code = check_heads(batch, n_head, head_size)) {
        return code;
    }
    if (const int code = check_pointers({r, k, v, w, u, state_in, y, state_out})) {
        return code;
    }
    const std::int64_t heads = batch * n_head;
    const int n = static_cast<int>(head_size);
    const bool by_token = w_by_token != 0;
    return with_types(type, state_type, [&](auto number, auto state) {
        using T = decltype(number);
        using S = decltype(state);
        const auto start = [&](auto kernel, std::int64_t blocks_per_head) {
            return launch(kernel, {heads * blocks_per_head, kWkv6Threads}, stream, static_cast<unsigned>(n_head),
                          as<T>(r), as<T>(k), as<T>(v), w, by_token, u, as<S>(state_in), as<T>(y), as<S>(state_out));
        };
        if (n == kHead) {
            return heads >= kManyHeads ? start(wkv6_64<T, S, kHead>, 1) : start(wkv6_64<T, S, kHead / 4>, 4);
        }
        return launch(wkv6_any<T, S>, {heads * ((n + kWarp - 1) / kWarp), kWkv6Threads}, stream,
                      static_cast<unsigned>(n_head), n, as<T>(r), as<T>(k), as<T>(v), w, by_token, u, as<S>(state_in),
                      as<T>(y), as<S>(state_out));
    });
}

int goslet_cuda_wkv7(goslet_cuda_type type, goslet_cuda_type state_type, int64_t batch, int64_t n_head,
                     int64_t head_size, const void* r, const float* w, const void* k, const void* v, const void* kappa,
                     const void* a, const void* state_in, void* y, void* state_out, goslet_cuda_stream stream) {
    if (const int code = check_heads(batch, n_head, head_size)) {
        return code;
    }
    if (const int code = check_pointers({r, w, k, v, kappa, a, state_in, y, state_out})) {
        return code;
    }
    const std::int64_t heads = batch * n_head;
    const int n = static_cast<int>(head_size);
    return with_types(type, state_type, [&](auto number, auto state) {
        using T = decltype(number);
        using S = decltype(state);
        const auto start = [&](auto kernel, std::int64_t blocks_per_head) {
            return launch(kernel, {heads * blocks_per_head, kWkv7Threads}, stream, as<T>(r), w, as<T>(k), as<T>(v),
                          as<T>(kappa), as<T>(a), as<S>(state_in), as<T>(y), as<S>(state_out));
        };
        if (n == kHead) {
            return heads >= kManyHeads ? start(wkv7_64<T, S, 4>, 2) : start(wkv7_64<T, S, 1>, 8);
        }
        constexpr int kWarps = kWkv7Threads / kWarp;
        return launch(wkv7_any<T, S>, {heads * ((n + kWarps - 1) / kWarps), kWkv7Threads}, stream, n, as<T>(r), w,
                      as<T>(k), as<T>(v), as<T>(kappa), as<T>(a), as<S>(state_in), as<T>(y), as<S>(state_out));
    });
}

int goslet_cuda_version(void) {
    return GOSLET_CUDA_VERSION;
}

const char* goslet_cuda_error(int code) {
    switch (code) {
        case GOSLET_CUDA_OK:
            return "no error";
        case GOSLET_CUDA_BAD_TYPE:
            return "the function does not take this type";
        case GOSLET_CUDA_BAD_SIZE:
            return "a size is zero, too large, or not a multiple of what it must be";
        case GOSLET_CUDA_NULL_POINTER:
            return "a pointer is null";
        case GOSLET_CUDA_UNALIGNED:
            return "a pointer is not aligned to 16 bytes";
        default:
            return code > 0 ? device_error(code) : "is no code of this library";
    }
}

}  // extern "C"
