// Products of 1 to 8 rows of activations with 4-bit and 8-bit weights, as goslet_cuda.h lays them out.
//
// They are bounded by memory, so every weight is read once, 16 bytes a lane. With f16 and bf16 the arithmetic is the
// tensor cores': 16 outputs meet the rows in multiply_add, whose 8 columns are the rows of activations. The order of
// inputs within a step is free, as long as weights and activations agree, and the layout is such that the 16 bytes
// which a lane loads are its operands one after another, and that one multiply_add never mixes two groups. A block has
// 16 outputs; its warps share the inputs.
#include <initializer_list>

#include "device.h"

namespace goslet::cuda {
namespace {

constexpr std::int64_t kMaxRows = 8;
constexpr std::int64_t kMaxDimension = 1 << 20;
constexpr int kPaddedTo = 128;
constexpr int kTile = 16;
constexpr int kMaxWarps = 8;
constexpr int kStepBytes = 64;  // of one output
constexpr int kStepsAhead = 2;  // loaded before the first is used

// Inputs that a step of one output has.
template <int kBits>
constexpr int kStep = kStepBytes * 8 / kBits;

__device__ __forceinline__ Words4 load_once(const std::uint8_t* from) {
    return load_streamed(reinterpret_cast<const Words4*>(from));
}

// Two numbers of T in a word, made of integers in an exponent's low bits: kOffset + q, exactly.
template <typename T>
struct Magic;
template <>
struct Magic<__half> {
    static constexpr std::uint32_t kBits = 0x64006400;        // 1024
    static constexpr std::uint32_t kInt4Offset = 0x64086408;  // 1032
    static constexpr std::uint32_t kInt8Offset = 0x64806480;  // 1152
};
template <>
struct Magic<__nv_bfloat16> {
    static constexpr std::uint32_t kBits = 0x43004300;        // 128
    static constexpr std::uint32_t kInt4Offset = 0x43084308;  // 136
};

// The four pairs of a word of 4-bit numbers: of inputs 0 and 2, 1 and 3, 4 and 6, 5 and 7.
template <typename T>
__device__ __forceinline__ void int4_pairs(std::uint32_t word, std::uint32_t (&pairs)[4]) {
    constexpr int kShifts[4] = {0, 8, 4, 12};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const std::uint32_t offset = ((word >> kShifts[i]) & 0x000F000F) | Magic<T>::kBits;
        pairs[i] = subtract_pairs<T>(offset, Magic<T>::kInt4Offset);
    }
}

// The two pairs of a word of 8-bit numbers: of inputs 0 and 1, 2 and 3.
template <typename T>
__device__ __forceinline__ void int8_pairs(std::uint32_t word, std::uint32_t (&pairs)[2]);

template <>
__device__ __forceinline__ void int8_pairs<__half>(std::uint32_t word, std::uint32_t (&pairs)[2]) {
    const std::uint32_t bytes = word ^ 0x80808080;  // plus 128
    pairs[0] = subtract_pairs<__half>(__byte_perm(bytes, 0x64646464, 0x4140), Magic<__half>::kInt8Offset);
    pairs[1] = subtract_pairs<__half>(__byte_perm(bytes, 0x64646464, 0x4342), Magic<__half>::kInt8Offset);
}

// A bf16 cannot hold 128 + 128 exactly beside its neighbours, so these go by way of float.
template <>
__device__ __forceinline__ void int8_pairs<__nv_bfloat16>(std::uint32_t word, std::uint32_t (&pairs)[2]) {
    const std::uint32_t bytes = word ^ 0x80808080;
    constexpr float kOffset = 8388608.0f + 128.0f;
    float numbers[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        numbers[i] = __uint_as_float(__byte_perm(bytes, 0x4B000000, 0x7540 + i)) - kOffset;
    }
    pairs[0] = bf16_pair(numbers[0], numbers[1]);
    pairs[1] = bf16_pair(numbers[2], numbers[3]);
}

// The scales of one output's groups of 32 or more in a step, each as float.
template <int kScales>
__device__ __forceinline__ void load_scales(const __half* from, float (&scales)[kScales]) {
    struct alignas(2 * kScales) Halves {
        __half at[kScales];
    };
    const Halves halves = *reinterpret_cast<const Halves*>(from);
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
        scales[i] = __half2float(halves.at[i]);
    }
}

// What a lane loads for one step: two outputs' weights and scales.
template <int kScales>
struct Loaded {
    Words4 weights[2];
    float scales[2][kScales];
};

template <typename T, int kBits, int kGroup>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    product_tile(int n_rows, std::int64_t n_in, std::int64_t n_out, const T* __restrict__ x,
                 const std::uint8_t* __restrict__ weights, const __half* __restrict__ scales, T* __restrict__ y) {
    constexpr int kWordInputs = 32 / kBits;
    constexpr int kGroupsInStep = kStep<kBits> / kGroup;  // 0 where a group is longer than a step
    constexpr int kScales = kGroupsInStep > 0 ? kGroupsInStep : 1;
    constexpr int kWordsInGroup = 4 / kScales;
    __shared__ float sums[kMaxWarps][kMaxRows][kTile];

    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    const int n_warps = static_cast<int>(blockDim.x) / kWarp;
    const int row = lane / 4;  // of the tile's outputs, and of x
    const int quarter = lane % 4;
    const std::int64_t padded_in = (n_in + kPaddedTo - 1) / kPaddedTo * kPaddedTo;
    const int n_steps = static_cast<int>(padded_in / kStep<kBits>);
    const std::int64_t n_groups = padded_in / kGroup;
    const std::int64_t outputs[2] = {static_cast<std::int64_t>(blockIdx.x) * kTile + row,
                                     static_cast<std::int64_t>(blockIdx.x) * kTile + row + 8};
    const std::uint8_t* const own_weights = weights + quarter * 16;
    const T* const own_x = x + row * n_in;

    const auto load_step = [&](int step, Loaded<kScales>& loaded) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (outputs[half] < n_out) {
                loaded.weights[half] = load_once(own_weights + (outputs[half] * n_steps + step) * kStepBytes);
                const std::int64_t group = static_cast<std::int64_t>(step) * kStep<kBits> / kGroup;
                load_scales<kScales>(scales + outputs[half] * n_groups + group, loaded.scales[half]);
            } else {
                loaded.weights[half] = Words4{};
#pragma unroll
                for (int i = 0; i < kScales; ++i) {
                    loaded.scales[half][i] = 0.0f;
                }
            }
        }
    };

    float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const auto add_step = [&](int step, const Loaded<kScales>& loaded) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            if constexpr (kBits == 4) {
                // Inputs 32·word + 8·quarter and on, in four words of two.
                const std::int64_t input = static_cast<std::int64_t>(step) * kStep<kBits> + 32 * word + 8 * quarter;
                Words4 pairs{};
                if (row < n_rows && input < n_in) {
                    pairs = *reinterpret_cast<const Words4*>(own_x + input);
                }
                std::uint32_t first[4];
                std::uint32_t second[4];
                int4_pairs<T>(loaded.weights[0].at[word], first);
                int4_pairs<T>(loaded.weights[1].at[word], second);
#pragma unroll
                for (int part = 0; part < 2; ++part) {
                    const std::uint32_t low = pairs.at[2 * part];
                    const std::uint32_t high = pairs.at[2 * part + 1];
                    multiply_add<T>(sum, {first[2 * part], second[2 * part], first[2 * part + 1], second[2 * part + 1]},
                                    {__byte_perm(low, high, 0x5410), __byte_perm(low, high, 0x7632)});
                }
            } else {
                const std::int64_t input = static_cast<std::int64_t>(step) * kStep<kBits> + 32 * (word / 2) +
                                           8 * quarter + kWordInputs * (word % 2);
                std::uint32_t pairs[2] = {0, 0};
                if (row < n_rows && input < n_in) {
                    const auto* const from = reinterpret_cast<const std::uint32_t*>(own_x + input);
                    pairs[0] = from[0];
                    pairs[1] = from[1];
                }
                std::uint32_t first[2];
                std::uint32_t second[2];
                int8_pairs<T>(loaded.weights[0].at[word], first);
                int8_pairs<T>(loaded.weights[1].at[word], second);
                multiply_add<T>(sum, {first[0], second[0], first[1], second[1]}, pairs);
            }
            if ((word + 1) % kWordsInGroup == 0) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    total[i] += loaded.scales[i / 2][word / kWordsInGroup] * sum[i];
                    sum[i] = 0.0f;
                }
            }
        }
    };

    for (int step = warp; step < n_steps; step += kStepsAhead * n_warps) {
        Loaded<kScales> loaded[kStepsAhead];
#pragma unroll
        for (int ahead = 0; ahead < kStepsAhead; ++ahead) {
            if (step + ahead * n_warps < n_steps) {
                load_step(step + ahead * n_warps, loaded[ahead]);
            }
        }
#pragma unroll
        for (int ahead = 0; ahead < kStepsAhead; ++ahead) {
            if (step + ahead * n_warps < n_steps) {
                add_step(step + ahead * n_warps, loaded[ahead]);
            }
        }
    }

#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sums[warp][2 * quarter + i % 2][row + 8 * (i / 2)] = total[i];
    }
    __syncthreads();
    for (int place = static_cast<int>(threadIdx.x); place < n_rows * kTile; place += static_cast<int>(blockDim.x)) {
        const std::int64_t output = static_cast<std::int64_t>(blockIdx.x) * kTile + place % kTile;
        if (output < n_out) {
            float sum = 0.0f;
            for (int i = 0; i < n_warps; ++i) {
                sum += sums[i][place / kTile][place % kTile];
            }
            y[place / kTile * n_out + output] = from_float<T>(sum);
        }
    }
}

// With float activations, plainly: a warp has an output, a lane every 32nd word of it.
template <int kBits>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    product_float(int n_rows, std::int64_t n_in, std::int64_t n_out, int group, const float* __restrict__ x,
                  const std::uint32_t* __restrict__ weights, const __half* __restrict__ scales, float* __restrict__ y) {
    constexpr int kWordInputs = 32 / kBits;
    constexpr int kWordsInStep = kStepBytes / 4;
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const std::int64_t output = static_cast<std::int64_t>(blockIdx.x) * kMaxWarps + threadIdx.x / kWarp;
    if (output >= n_out) {
        return;
    }
    const std::int64_t padded_in = (n_in + kPaddedTo - 1) / kPaddedTo * kPaddedTo;
    const std::int64_t n_words = padded_in / kWordInputs;
    float sums[kMaxRows] = {};
    for (std::int64_t index = lane; index < n_words; index += kWarp) {
        const std::uint32_t word = weights[output * n_words + index];
        const int quarter = static_cast<int>(index % kWordsInStep) / 4;
        const int part = static_cast<int>(index % 4);
        std::int64_t input = index / kWordsInStep * kStep<kBits> + 8 * quarter;
        input += kBits == 4 ? 32 * part : 32 * (part / 2) + 4 * (part % 2);
        if (input >= n_in) {
            continue;
        }
        const float scale = __half2float(scales[output * (padded_in / group) + input / group]);
        float numbers[kWordInputs];
#pragma unroll
        for (int i = 0; i < kWordInputs; ++i) {
            if constexpr (kBits == 4) {
                numbers[i] = static_cast<float>((word >> (8 * (i % 4) + 4 * (i / 4))) & 15) - 8.0f;
            } else {
                numbers[i] = static_cast<float>(static_cast<std::int8_t>(word >> (8 * i)));
            }
        }
#pragma unroll
        for (int row = 0; row < kMaxRows; ++row) {
            if (row < n_rows) {
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < kWordInputs; ++i) {
                    sum += numbers[i] * x[row * n_in + input + i];
                }
                sums[row] += scale * sum;
            }
        }
    }
#pragma unroll
    for (int row = 0; row < kMaxRows; ++row) {
        const float sum = sum_over_lanes<kWarp>(sums[row]);
        if (lane == 0 && row < n_rows) {
            y[row * n_out + output] = sum;
        }
    }
}

struct Product {
    int n_rows;
    std::int64_t n_in;
    std::int64_t n_out;
    const void* x;
    const void* weights;
    const void* scales;
    void* y;
    goslet_cuda_stream stream;
};

template <typename T, int kBits, int kGroup>
int start_tile(const Product& product) {
    const std::int64_t n_steps = (product.n_in + kPaddedTo - 1) / kPaddedTo * (kPaddedTo / kStep<kBits>);
    const int n_warps = static_cast<int>(n_steps < kMaxWarps ? n_steps : kMaxWarps);
    return launch(product_tile<T, kBits, kGroup>, (product.n_out + kTile - 1) / kTile, n_warps * kWarp, product.stream,
                  product.n_rows, product.n_in, product.n_out, static_cast<const T*>(product.x),
                  static_cast<const std::uint8_t*>(product.weights), static_cast<const __half*>(product.scales),
                  static_cast<T*>(product.y));
}

template <typename T, int kBits>
int start(const Product& product, std::int64_t group) {
    switch (group) {
        case 32:
            return start_tile<T, kBits, 32>(product);
        case 64:
            return start_tile<T, kBits, 64>(product);
        default:
            return start_tile<T, kBits, 128>(product);
    }
}

template <int kBits>
int start(goslet_cuda_type type, const Product& product, std::int64_t group) {
    switch (type) {
        case GOSLET_CUDA_F16:
            return start<__half, kBits>(product, group);
        case GOSLET_CUDA_BF16:
            return start<__nv_bfloat16, kBits>(product, group);
        default:
            return launch(product_float<kBits>, (product.n_out + kMaxWarps - 1) / kMaxWarps, kMaxWarps * kWarp,
                          product.stream, product.n_rows, product.n_in, product.n_out, static_cast<int>(group),
                          static_cast<const float*>(product.x), static_cast<const std::uint32_t*>(product.weights),
                          static_cast<const __half*>(product.scales), static_cast<float*>(product.y));
    }
}

}  // namespace
}  // namespace goslet::cuda

using namespace goslet::cuda;

extern "C" int goslet_cuda_product(goslet_cuda_type type, int bits, int64_t group, int64_t n_rows, int64_t n_in,
                                   int64_t n_out, const void* x, const void* weights, const void* scales, void* y,
                                   goslet_cuda_stream stream) {
    if (type != GOSLET_CUDA_F32 && type != GOSLET_CUDA_F16 && type != GOSLET_CUDA_BF16) {
        return GOSLET_CUDA_BAD_TYPE;
    }
    const bool fits = (bits == 4 || bits == 8) && (group == 32 || group == 64 || group == 128) && n_rows >= 1 &&
                      n_rows <= kMaxRows && n_in >= 32 && n_in <= kMaxDimension && n_in % 32 == 0 && n_out >= 1 &&
                      n_out <= kMaxDimension;
    if (!fits) {
        return GOSLET_CUDA_BAD_SIZE;
    }
    if (const int code = check_pointers({x, weights, scales, y})) {
        return code;
    }
    const Product product{static_cast<int>(n_rows), n_in, n_out, x, weights, scales, y, stream};
    return bits == 4 ? start<4>(type, product, group) : start<8>(type, product, group);
}
