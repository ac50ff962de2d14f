// Products of 1 to 8 rows of activations with 4-bit and 8-bit weights, as goslet_cuda.h lays them out.
//
// They are meant to be bounded by memory, so every weight is read once, 16 bytes a lane. With f16 and bf16 the
// arithmetic is the tensor cores': 16 outputs meet the rows in multiply_add, whose 8 columns are the rows of
// activations. The order of inputs within a step is free, as long as weights and activations agree, and the layout is
// such that the 16 bytes which a lane loads are its operands one after another, and that one multiply_add never mixes
// two groups. A block has 16 outputs; its warps share the inputs.
#include <initializer_list>

#include "device.h"

namespace goslet::cuda {
namespace {

constexpr std::int64_t kMaxRows = 8;
constexpr std::int64_t kMaxDimension = 1 << 20;
constexpr int kPaddedTo = GOSLET_CUDA_PADDED_TO;
constexpr int kTile = 16;
constexpr int kMaxWarps = 16;
// Four warps share a tile, and up to sixteen where there are fewer of them than keep a large GPU busy. Measured on an
// H200: without a split the head of 1.5B takes 1.4 times as long with 8 bits, as its blocks live too long.
constexpr int kUsualSplitBits = 2;
constexpr std::int64_t kBusyWarps = 2048;
constexpr int kMaxStagedBytes = 40 * 1024;  // a block may have 48 KB without asking

// Units of 16 bytes from a staged row to the next: 64 bytes more than it needs, so that rows lie in different banks.
constexpr __host__ __device__ int staged_row_units(int n_inputs) {
    return n_inputs / 8 + 4;
}
constexpr int kStepBytes = 64;  // of one output
constexpr int kStepsAhead = 2;  // loaded before the first is used

// Inputs that a step of one output has.
template <int kBits>
constexpr int kStep = kStepBytes * 8 / kBits;

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

// The four pairs of a word of 4-bit numbers, in the order of the inputs.
template <typename T>
__device__ __forceinline__ void int4_pairs(std::uint32_t word, std::uint32_t (&pairs)[4]);

// With 1024 in the exponent, the second halves of bytes count sixteen times: no shift is needed for them, and shifts
// and logic are what a GPU has least of here.
template <>
__device__ __forceinline__ void int4_pairs<__half>(std::uint32_t word, std::uint32_t (&pairs)[4]) {
    constexpr std::uint32_t kSixteenths = 0x2C002C00;
    constexpr std::uint32_t kMinus72 = 0xD480D480;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const std::uint32_t bytes = word >> (8 * i);
        pairs[2 * i] =
            subtract_pairs<__half>(and_or(bytes, 0x000F000F, Magic<__half>::kBits), Magic<__half>::kInt4Offset);
        pairs[2 * i + 1] = multiply_add_pairs(and_or(bytes, 0x00F000F0, Magic<__half>::kBits), kSixteenths, kMinus72);
    }
}

template <>
__device__ __forceinline__ void int4_pairs<__nv_bfloat16>(std::uint32_t word, std::uint32_t (&pairs)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const std::uint32_t offset = and_or(word >> (4 * i), 0x000F000F, Magic<__nv_bfloat16>::kBits);
        pairs[i] = subtract_pairs<__nv_bfloat16>(offset, Magic<__nv_bfloat16>::kInt4Offset);
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

// What a lane loads of the weights for one step: those of two outputs, and their scales. Nothing is converted before it
// is needed, since a thread waits at the first instruction that needs what it loads.
template <int kScales>
struct Loaded {
    struct alignas(2 * kScales) Scales {
        __half at[kScales];
    };
    Words4 weights[2];
    Scales scales[2];
};

// 2^`split_bits` warps share the inputs of a tile, and a block has as many tiles as its warps allow. Weights go to
// registers, some steps before they are used; activations to shared memory, `n_rounds` rounds of steps at a time.
template <typename T, int kBits, int kGroup>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    product_tile(int n_rows, int n_in, int n_out, int split_bits, int n_rounds, const T* __restrict__ x,
                 const std::uint8_t* __restrict__ weights, const __half* __restrict__ scales, T* __restrict__ y) {
    constexpr int kGroupsInStep = kStep<kBits> / kGroup;  // 0 where a group is longer than a step
    constexpr int kScales = kGroupsInStep > 0 ? kGroupsInStep : 1;
    constexpr int kWordsInGroup = 4 / kScales;
    using Step = Loaded<kScales>;
    Words4* const staged = dynamic_shared<Words4>();

    const int thread = static_cast<int>(threadIdx.x);
    const int n_threads = static_cast<int>(blockDim.x);
    const int lane = thread % kWarp;
    const int warp = same_in_warp(thread / kWarp);
    const int split = 1 << split_bits;
    const int n_tiles = n_threads / kWarp >> split_bits;
    const int part = warp & (split - 1);
    const int row = lane / 4;  // of the tile's outputs, and of x
    const int quarter = lane % 4;
    const int padded_in = (n_in + kPaddedTo - 1) / kPaddedTo * kPaddedTo;
    const int n_steps = padded_in / kStep<kBits>;
    const int first_output = (static_cast<int>(blockIdx.x) * n_tiles + (warp >> split_bits)) * kTile;
    // Rows and outputs past the last stand in for nothing: what they give is not stored.
    const std::uint8_t* own_weights[2];
    const __half* own_scales[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int output = first_output + row + 8 * half;
        const std::int64_t stored = output < n_out ? output : n_out - 1;
        own_weights[half] = weights + stored * n_steps * kStepBytes + quarter * 16;
        own_scales[half] = scales + stored * (padded_in / kGroup);
    }

    const auto load_weights = [&](int step, Step& loaded) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            loaded.weights[half] =
                load_streamed(reinterpret_cast<const Words4*>(own_weights[half] + step * kStepBytes));
            loaded.scales[half] =
                *reinterpret_cast<const typename Step::Scales*>(own_scales[half] + step * kStep<kBits> / kGroup);
        }
    };

    float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const auto add_step = [&](const Step& loaded, const Words4* inputs) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            if constexpr (kBits == 4) {
                const Words4 pairs = inputs[4 * word];
                std::uint32_t first[4];
                std::uint32_t second[4];
                int4_pairs<T>(loaded.weights[0].at[word], first);
                int4_pairs<T>(loaded.weights[1].at[word], second);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    multiply_add<T>(sum, {first[2 * half], second[2 * half], first[2 * half + 1], second[2 * half + 1]},
                                    {pairs.at[2 * half], pairs.at[2 * half + 1]});
                }
            } else {
                const Words4 pairs = inputs[4 * (word / 2)];
                std::uint32_t first[2];
                std::uint32_t second[2];
                int8_pairs<T>(loaded.weights[0].at[word], first);
                int8_pairs<T>(loaded.weights[1].at[word], second);
                multiply_add<T>(sum, {first[0], second[0], first[1], second[1]},
                                {pairs.at[2 * (word % 2)], pairs.at[2 * (word % 2) + 1]});
            }
            if ((word + 1) % kWordsInGroup == 0) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    total[i] += __half2float(loaded.scales[i / 2].at[word / kWordsInGroup]) * sum[i];
                    sum[i] = 0.0f;
                }
            }
        }
    };

    Step loaded[kStepsAhead];
#pragma unroll
    for (int ahead = 0; ahead < kStepsAhead; ++ahead) {
        if (part + ahead * split < n_steps) {
            load_weights(part + ahead * split, loaded[ahead]);
        }
    }
    const int steps_staged = n_rounds * kStepsAhead * split;
    const int row_units = staged_row_units(steps_staged * kStep<kBits>);
    const Words4* const own_inputs = staged + (row < n_rows ? row : n_rows - 1) * row_units + quarter;
    for (int chunk = 0; chunk < n_steps; chunk += steps_staged) {
        const int chunk_end = chunk + steps_staged < n_steps ? chunk + steps_staged : n_steps;
        if (chunk > 0) {
            __syncthreads();
        }
        const int n_units = (chunk_end - chunk) * (kStep<kBits> / 8);
        for (int staged_row = 0; staged_row < n_rows; ++staged_row) {
            const auto* const from = reinterpret_cast<const Words4*>(x + static_cast<std::int64_t>(staged_row) * n_in +
                                                                     chunk * kStep<kBits>);
            for (int unit = thread; unit < n_units; unit += n_threads) {
                staged[staged_row * row_units + unit] = chunk * kStep<kBits> + 8 * unit < n_in ? from[unit] : Words4{};
            }
        }
        __syncthreads();
        for (int begin = chunk + part; begin < chunk_end; begin += kStepsAhead * split) {
#pragma unroll
            for (int ahead = 0; ahead < kStepsAhead; ++ahead) {
                const int step = begin + ahead * split;
                if (step < chunk_end) {
                    add_step(loaded[ahead], own_inputs + (step - chunk) * (kStep<kBits> / 8));
                    if (step + kStepsAhead * split < n_steps) {
                        load_weights(step + kStepsAhead * split, loaded[ahead]);
                    }
                }
            }
        }
    }

    if (split == 1) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int to_row = 2 * quarter + i % 2;
            const int output = first_output + row + 8 * (i / 2);
            if (to_row < n_rows && output < n_out) {
                y[static_cast<std::int64_t>(to_row) * n_out + output] = from_float<T>(total[i]);
            }
        }
        return;
    }
    __syncthreads();
    float* const sums = reinterpret_cast<float*>(staged);  // (warps, kMaxRows, kTile)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sums[(warp * kMaxRows + 2 * quarter + i % 2) * kTile + row + 8 * (i / 2)] = total[i];
    }
    __syncthreads();
    for (int place = thread; place < n_tiles * kMaxRows * kTile; place += n_threads) {
        const int tile = place / (kMaxRows * kTile);
        const int to_row = place / kTile % kMaxRows;
        const int output = (static_cast<int>(blockIdx.x) * n_tiles + tile) * kTile + place % kTile;
        if (to_row < n_rows && output < n_out) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < kMaxWarps; ++i) {
                sum +=
                    i < split ? sums[(((tile << split_bits) + i) * kMaxRows + to_row) * kTile + place % kTile] : 0.0f;
            }
            y[static_cast<std::int64_t>(to_row) * n_out + output] = from_float<T>(sum);
        }
    }
}

// With float activations, plainly: a warp has an output, a lane every 32nd word of it.
template <int kBits>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
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
                numbers[i] = static_cast<float>((word >> (16 * (i % 2) + 4 * (i / 2))) & 15) - 8.0f;
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
    const int n_steps = static_cast<int>((product.n_in + kPaddedTo - 1) / kPaddedTo * (kPaddedTo / kStep<kBits>));
    const std::int64_t tiles = (product.n_out + kTile - 1) / kTile;
    const auto staged_bytes = [&](int split_bits, int n_rounds) {
        return product.n_rows * staged_row_units((n_rounds * kStepsAhead << split_bits) * kStep<kBits>) * 16;
    };
    int split_bits = 0;
    while (2 << split_bits <= kMaxWarps && 2 << split_bits <= n_steps &&
           (split_bits < kUsualSplitBits || (tiles << split_bits) < kBusyWarps) &&
           staged_bytes(split_bits + 1, 1) <= kMaxStagedBytes) {
        ++split_bits;
    }
    const int n_warps = split_bits < kUsualSplitBits ? 1 << kUsualSplitBits : 1 << split_bits;
    const int all_rounds = (n_steps + (kStepsAhead << split_bits) - 1) / (kStepsAhead << split_bits);
    int n_rounds = 1;
    while (n_rounds < all_rounds && staged_bytes(split_bits, n_rounds + 1) <= kMaxStagedBytes) {
        ++n_rounds;
    }
    const int sums_bytes = n_warps * static_cast<int>(kMaxRows) * kTile * static_cast<int>(sizeof(float));
    const int shared_bytes = staged_bytes(split_bits, n_rounds);
    const int n_tiles = n_warps >> split_bits;
    return launch(
        product_tile<T, kBits, kGroup>,
        {(tiles + n_tiles - 1) / n_tiles, n_warps * kWarp, shared_bytes > sums_bytes ? shared_bytes : sums_bytes},
        product.stream, product.n_rows, static_cast<int>(product.n_in), static_cast<int>(product.n_out), split_bits,
        n_rounds, static_cast<const T*>(product.x), static_cast<const std::uint8_t*>(product.weights),
        static_cast<const __half*>(product.scales), static_cast<T*>(product.y));
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
            return launch(product_float<kBits>, {(product.n_out + kMaxWarps - 1) / kMaxWarps, kMaxWarps * kWarp},
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
