#include "host_shim.h"

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <random>
#include <vector>

namespace goslet::cuda::host {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxSharedBytes = 48 * 1024;
constexpr std::size_t kStackBytes = 256 * 1024;
constexpr int kDiverged = 1;
constexpr int kBadLaunch = 2;

// What the lanes of a warp show each other.
struct Shown {
    std::array<std::uint32_t, 8> words;
};

// Threads that meet: those of a warp, or of a block.
struct Meeting {
    int n_threads = 0;
    int n_here = 0;
    std::uint64_t n_past = 0;
};

struct Fiber {
    ucontext_t context;
    Place place;
    std::unique_ptr<char[]> stack;
    bool done = false;
    Meeting* waits_for = nullptr;
    std::uint64_t n_past = 0;  // of the meeting, when the wait began
};

struct AlignedDelete {
    void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{16}); }
};

std::mutex one_launch;
std::unique_ptr<void, AlignedDelete> shared_memory;
std::uint32_t order = 0;
std::vector<Fiber> fibers;
std::vector<Meeting> warps;
Meeting block;
// Two places for each thread: one may still be read while the other is written for the next meeting, no further.
std::array<std::array<Shown, kMaxThreads>, 2> shown;
Fiber* current = nullptr;
ucontext_t scheduler;
const std::function<void()>* kernel = nullptr;

void enter() {
    (*kernel)();
    current->done = true;
}

void meet(Meeting& meeting) {
    Fiber& self = *current;
    self.n_past = meeting.n_past;
    if (++meeting.n_here == meeting.n_threads) {
        meeting.n_here = 0;
        ++meeting.n_past;
        return;
    }
    self.waits_for = &meeting;
    swapcontext(&self.context, &scheduler);
    self.waits_for = nullptr;
}

// What every lane of this thread's warp shows.
const Shown* exchange(const Shown& own) {
    const unsigned thread = current->place.thread.x;
    Meeting& warp = warps[thread / kWarp];
    auto& places = shown[warp.n_past % 2];
    places[thread] = own;
    meet(warp);
    return &places[thread / kWarp * kWarp];
}

bool can_run(const Fiber& fiber) {
    return !fiber.done && (fiber.waits_for == nullptr || fiber.waits_for->n_past != fiber.n_past);
}

void start(Fiber& fiber) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &scheduler;
    fiber.done = false;
    fiber.waits_for = nullptr;
    makecontext(&fiber.context, enter, 0);
}

bool is_backwards() {
    return order == GOSLET_CUDA_HOST_BACKWARDS || order == GOSLET_CUDA_HOST_GREEDY_BACKWARDS;
}

bool is_greedy() {
    return order == GOSLET_CUDA_HOST_GREEDY || order == GOSLET_CUDA_HOST_GREEDY_BACKWARDS;
}

template <typename Items>
void put_in_order(Items& items, std::mt19937& random) {
    if (is_backwards()) {
        std::reverse(items.begin(), items.end());
    } else if (order >= GOSLET_CUDA_HOST_RANDOM) {
        std::shuffle(items.begin(), items.end(), random);
    }
}

// Gives each of some threads a turn; whether any of them could take it.
bool take_turns(const std::vector<int>& turns) {
    bool ran = false;
    for (const int thread : turns) {
        Fiber& fiber = fibers[static_cast<std::size_t>(thread)];
        if (can_run(fiber)) {
            current = &fiber;
            swapcontext(&scheduler, &fiber.context);
            ran = true;
        }
    }
    return ran;
}

// False where threads are left that wait for others which never come.
bool run_block(std::int64_t index, int n_threads, std::mt19937& random) {
    warps.assign(static_cast<std::size_t>((n_threads + kWarp - 1) / kWarp), Meeting{});
    block = Meeting{};
    block.n_threads = n_threads;
    std::vector<int> turns(static_cast<std::size_t>(n_threads));
    std::iota(turns.begin(), turns.end(), 0);
    for (const int thread : turns) {
        ++warps[static_cast<std::size_t>(thread / kWarp)].n_threads;
        Fiber& fiber = fibers[static_cast<std::size_t>(thread)];
        fiber.place = {
            {static_cast<unsigned>(thread)}, {static_cast<unsigned>(index)}, {static_cast<unsigned>(n_threads)}};
        start(fiber);
    }
    // Warps that are given turns together; greedy ones go as far as they come before the next.
    std::vector<std::vector<int>> parties(is_greedy() ? warps.size() : 1);
    for (const int thread : turns) {
        parties[is_greedy() ? static_cast<std::size_t>(thread / kWarp) : 0].push_back(thread);
    }
    put_in_order(parties, random);
    for (std::vector<int>& party : parties) {
        put_in_order(party, random);
    }
    for (bool ran = true; ran;) {
        ran = false;
        for (std::vector<int>& party : parties) {
            while (take_turns(party)) {
                ran = true;
                if (order >= GOSLET_CUDA_HOST_RANDOM) {
                    put_in_order(party, random);
                }
            }
        }
    }
    return std::all_of(turns.begin(), turns.end(),
                       [](int thread) { return fibers[static_cast<std::size_t>(thread)].done; });
}

std::uint32_t pair_of(std::uint16_t low, std::uint16_t high) {
    return low | static_cast<std::uint32_t>(high) << 16;
}

template <typename T>
float half_of(std::uint32_t pair, int index) {
    const T number{static_cast<std::uint16_t>(pair >> (16 * index))};
    if constexpr (std::is_same_v<T, __half>) {
        return __half2float(number);
    } else {
        return __bfloat162float(number);
    }
}

template <typename T>
std::uint16_t bits_of(float value) {
    if constexpr (std::is_same_v<T, __half>) {
        return __float2half_rn(value).bits;
    } else {
        return __float2bfloat16_rn(value).bits;
    }
}

// The product with float64 sums of each 16: a tensor core's own order of summation is not documented.
template <typename T>
void multiply_add_of(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    const Shown* const lanes = exchange({{a[0], a[1], a[2], a[3], b[0], b[1]}});
    const int lane = static_cast<int>(current->place.thread.x) % kWarp;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2);
        const int column = lane % 4 * 2 + i % 2;
        double sum = 0.0;
        for (int k = 0; k < 16; ++k) {
            // k lies with the quarter (k mod 8) / 2, in its first or second pair.
            const std::uint32_t* const left = lanes[row % 8 * 4 + k % 8 / 2].words.data();
            const std::uint32_t* const right = lanes[column * 4 + k % 8 / 2].words.data() + 4;
            sum += static_cast<double>(half_of<T>(left[row / 8 + 2 * (k / 8)], k % 2)) *
                   static_cast<double>(half_of<T>(right[k / 8], k % 2));
        }
        c[i] = static_cast<float>(c[i] + sum);
    }
}

template <typename T>
std::uint32_t subtract_pairs_of(std::uint32_t a, std::uint32_t b) {
    return pair_of(bits_of<T>(half_of<T>(a, 0) - half_of<T>(b, 0)), bits_of<T>(half_of<T>(a, 1) - half_of<T>(b, 1)));
}

}  // namespace

const Place& here() {
    return current->place;
}

void* dynamic_shared() {
    return shared_memory.get();
}

int run(const Grid& grid, const std::function<void()>& body) {
    const auto [n_blocks, n_threads, shared_bytes] = grid;
    if (n_blocks < 1 || n_blocks > INT32_MAX || n_threads < 1 || n_threads > kMaxThreads || shared_bytes < 0 ||
        shared_bytes > kMaxSharedBytes) {
        return kBadLaunch;
    }
    const std::lock_guard<std::mutex> lock(one_launch);
    // As large as it was asked for, so that a sanitizer sees what lies past its end.
    shared_memory.reset(::operator new(static_cast<std::size_t>(shared_bytes), std::align_val_t{16}));
    while (fibers.size() < static_cast<std::size_t>(n_threads)) {
        fibers.emplace_back().stack = std::make_unique<char[]>(kStackBytes);
    }
    kernel = &body;
    std::mt19937 random(order);
    std::vector<std::int64_t> blocks(static_cast<std::size_t>(n_blocks));
    std::iota(blocks.begin(), blocks.end(), 0);
    put_in_order(blocks, random);
    for (const std::int64_t index : blocks) {
        if (!run_block(index, n_threads, random)) {
            return kDiverged;
        }
    }
    return 0;
}

}  // namespace goslet::cuda::host

namespace goslet::cuda {

const char* device_error(int code) {
    return code == host::kDiverged ? "threads of a block wait for others that never come"
                                   : "the kernel cannot be started with these sizes";
}

template <>
void multiply_add<__half>(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    host::multiply_add_of<__half>(c, a, b);
}

template <>
void multiply_add<__nv_bfloat16>(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    host::multiply_add_of<__nv_bfloat16>(c, a, b);
}

template <>
std::uint32_t subtract_pairs<__half>(std::uint32_t a, std::uint32_t b) {
    return host::subtract_pairs_of<__half>(a, b);
}

template <>
std::uint32_t subtract_pairs<__nv_bfloat16>(std::uint32_t a, std::uint32_t b) {
    return host::subtract_pairs_of<__nv_bfloat16>(a, b);
}

std::uint32_t multiply_add_pairs(std::uint32_t a, std::uint32_t b, std::uint32_t c) {
    // A product of two f16 and its sum with a third are exact in double or close enough to round once.
    const auto one = [&](int i) {
        const double product = static_cast<double>(host::half_of<__half>(a, i)) * host::half_of<__half>(b, i);
        return host::bits_of<__half>(static_cast<float>(product + host::half_of<__half>(c, i)));
    };
    return host::pair_of(one(0), one(1));
}

std::uint32_t bf16_pair(float low, float high) {
    return host::pair_of(host::bits_of<__nv_bfloat16>(low), host::bits_of<__nv_bfloat16>(high));
}

}  // namespace goslet::cuda

using goslet::cuda::host::Shown;

float __uint_as_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

float __half2float(__half value) {
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000) << 16;
    const std::uint32_t exponent = value.bits >> 10 & 31;
    const std::uint32_t fraction = value.bits & 0x3FF;
    if (exponent == 0) {
        const float small = static_cast<float>(fraction) * 0x1p-24f;
        return sign != 0 ? -small : small;
    }
    const std::uint32_t wide = exponent == 31 ? 255 : exponent + 112;
    return __uint_as_float(sign | wide << 23 | fraction << 13);
}

__half __float2half_rn(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
    const std::uint32_t size = bits & 0x7FFFFFFF;
    if (size > 0x7F800000) {
        return {static_cast<std::uint16_t>(sign | 0x7FFF)};
    }
    if (size >= 0x477FF000) {  // rounds to more than the largest finite number
        return {static_cast<std::uint16_t>(sign | 0x7C00)};
    }
    if (size < 0x38800000) {  // a multiple of 2^-24; adding 0.5 lets the float's own rounding find it
        const float steps = __uint_as_float(size) + 0.5f;
        std::uint32_t found;
        std::memcpy(&found, &steps, sizeof found);
        return {static_cast<std::uint16_t>(sign | (found - 0x3F000000))};
    }
    const std::uint32_t rounded = size + 0xFFF + (size >> 13 & 1) - (112U << 23);
    return {static_cast<std::uint16_t>(sign | rounded >> 13)};
}

float __bfloat162float(__nv_bfloat16 value) {
    return __uint_as_float(static_cast<std::uint32_t>(value.bits) << 16);
}

__nv_bfloat16 __float2bfloat16_rn(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) {
        return {0x7FFF};
    }
    return {static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

std::uint32_t __byte_perm(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
    const std::uint64_t bytes = low | static_cast<std::uint64_t>(high) << 32;
    std::uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        result |= static_cast<std::uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
    }
    return result;
}

float __shfl_xor_sync(std::uint32_t, float value, int lane_mask) {
    Shown own{};
    std::memcpy(own.words.data(), &value, sizeof value);
    const Shown* const lanes = goslet::cuda::host::exchange(own);
    const unsigned lane = goslet::cuda::host::here().thread.x % goslet::cuda::kWarp;
    return __uint_as_float(lanes[lane ^ static_cast<unsigned>(lane_mask)].words[0]);
}

void __syncthreads() {
    goslet::cuda::host::meet(goslet::cuda::host::block);
}

void goslet_cuda_host_order(std::uint32_t order) {
    const std::lock_guard<std::mutex> lock(goslet::cuda::host::one_launch);
    goslet::cuda::host::order = order;
}
