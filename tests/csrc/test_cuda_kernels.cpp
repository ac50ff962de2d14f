// The CUDA kernels as the host's model of CUDA runs them: against the CPU's reference in double, in every order of
// threads; and the model itself, which must notice threads that wait for others in vain.
#include <cstring>
#include <string>
#include <vector>

#include "goslet_cuda.h"
#include "kernel_checks.h"
#include "kernels/cuda/device.h"
#include "kernels/reference.h"

namespace {

#define CHECK_EQ(found, expected) CHECK((found) == (expected))

namespace cuda = goslet::cuda;

// Numbers at a multiple of 16 bytes, as the interface asks for, poisoned until they are written.
template <typename T>
class Aligned {
  public:
    explicit Aligned(std::size_t n) : n_(n), bytes_(n * sizeof(T) + 16, 0xFF) {}
    explicit Aligned(const std::vector<T>& numbers) : Aligned(numbers.size()) {
        std::memcpy(data(), numbers.data(), n_ * sizeof(T));
    }
    T* data() {
        const auto address = reinterpret_cast<std::uintptr_t>(bytes_.data());
        return reinterpret_cast<T*>(bytes_.data() + (16 - address % 16) % 16);
    }
    std::size_t size() const { return n_; }
    std::vector<T> vector() { return {data(), data() + n_}; }

  private:
    std::size_t n_;
    std::vector<unsigned char> bytes_;
};

// Every conversion that the model has of its own, against arithmetic that is exact in double.
void check_conversions() {
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
        const __half half{static_cast<std::uint16_t>(bits)};
        const float value = __half2float(half);
        const int exponent = static_cast<int>(bits >> 10 & 31);
        const double fraction = static_cast<double>(bits & 0x3FF) / 1024;
        if (exponent == 31) {
            CHECK(fraction == 0 ? std::isinf(value) : std::isnan(value));
        } else {
            const double size = exponent == 0 ? std::ldexp(fraction, -14) : std::ldexp(1 + fraction, exponent - 15);
            CHECK_EQ(static_cast<double>(value), (bits & 0x8000) != 0 ? -size : size);
            CHECK_EQ(__float2half_rn(value).bits, bits);
            if (exponent < 30) {  // half-way to the next: to the even one; a little more: up
                const float next = __half2float({static_cast<std::uint16_t>(bits + 1)});
                const float middle = (value + next) / 2;
                CHECK_EQ(__float2half_rn(middle).bits, (bits & 1) != 0 ? bits + 1 : bits);
                CHECK_EQ(__float2half_rn(std::nextafter(middle, next)).bits, bits + 1);
                CHECK_EQ(__float2half_rn(std::nextafter(middle, value)).bits, bits);
            }
        }
        const float wide = __bfloat162float({static_cast<std::uint16_t>(bits)});
        if (!std::isnan(wide)) {
            CHECK_EQ(__float2bfloat16_rn(wide).bits, bits);
        }
    }
    CHECK_EQ(__float2half_rn(65519.0F).bits, 0x7BFF);
    CHECK_EQ(__float2half_rn(65520.0F).bits, 0x7C00);
    CHECK(std::isnan(__half2float(__float2half_rn(kNan))));
    CHECK_EQ(__float2bfloat16_rn(kInfinity).bits, 0x7F80);
}

void all_meet(int* sum) {
    __syncthreads();
    *sum += 1;
}

void half_meet(int* sum) {
    if (threadIdx.x < 16) {
        return;
    }
    __syncthreads();
    *sum += 1;
}

void one_lane_missing(float* out) {
    if (threadIdx.x != 5) {
        *out = __shfl_xor_sync(0xFFFFFFFF, 1.0F, 1);
    }
}

void check_meetings() {
    int sum = 0;
    CHECK_EQ(cuda::launch(all_meet, {3, 40}, nullptr, &sum), 0);
    CHECK_EQ(sum, 120);
    const int code = cuda::launch(half_meet, {1, 64}, nullptr, &sum);
    CHECK(code > 0);
    CHECK(std::string(goslet_cuda_error(code)).find("wait for others") != std::string::npos);
    float out = 0;
    CHECK(cuda::launch(one_lane_missing, {1, 32}, nullptr, &out) > 0);
    CHECK(cuda::launch(all_meet, {1, 1025}, nullptr, &sum) > 0);
    CHECK(cuda::launch(all_meet, {1, 32, 1 << 20}, nullptr, &sum) > 0);
    CHECK_EQ(cuda::launch(all_meet, {1, 32}, nullptr, &sum), 0);  // and the model goes on afterwards
}

double largest(const Doubles& numbers) {
    double size = 0;
    for (const double number : numbers) {
        size = std::fmax(size, std::fabs(number));
    }
    return size;
}

void check_near(const Floats& found, const Doubles& expected, const char* what) {
    double error = 0;
    for (std::size_t i = 0; i < found.size(); ++i) {
        error = std::isnan(found[i]) ? kInfinity : std::fmax(error, std::fabs(found[i] - expected[i]));
    }
    if (!(error <= 1e-6 * largest(expected))) {
        std::fprintf(stderr, "%s: %g of range\n", what, error / largest(expected));
        CHECK(false);
    }
}

void check_wkv7(std::size_t batch, std::size_t n_head, std::size_t n) {
    const std::size_t width = batch * n_head * n;
    const auto vector = [&] { return Aligned<float>(normal(width, 1.0F / std::sqrt(static_cast<float>(n)))); };
    Aligned<float> r = vector();
    Aligned<float> k = vector();
    Aligned<float> v = vector();
    Aligned<float> kappa = vector();
    Aligned<float> a = vector();
    Aligned<float> w(uniform(width, 0.545F, 1.0F));
    Aligned<float> state(normal(width * n));
    Aligned<float> y(width);
    Aligned<float> next(width * n);
    CHECK_EQ(goslet_cuda_wkv7(GOSLET_CUDA_F32, GOSLET_CUDA_F32, static_cast<std::int64_t>(batch),
                              static_cast<std::int64_t>(n_head), static_cast<std::int64_t>(n), r.data(), w.data(),
                              k.data(), v.data(), kappa.data(), a.data(), state.data(), y.data(), next.data(), nullptr),
             0);
    Doubles y_expected(width);
    Doubles next_expected(width * n);
    for (std::size_t head = 0; head < batch * n_head; ++head) {
        for (std::size_t i = 0; i < n; ++i) {
            const float* const row = state.data() + (head * n + i) * n;
            double removed = 0;
            for (std::size_t j = 0; j < n; ++j) {
                removed += static_cast<double>(row[j]) * kappa.data()[head * n + j];
            }
            for (std::size_t j = 0; j < n; ++j) {
                const std::size_t key = head * n + j;
                const double moved = static_cast<double>(row[j]) * w.data()[key] -
                                     removed * kappa.data()[key] * a.data()[key] +
                                     static_cast<double>(v.data()[head * n + i]) * k.data()[key];
                next_expected[(head * n + i) * n + j] = moved;
                y_expected[head * n + i] += moved * r.data()[key];
            }
        }
    }
    check_near(y.vector(), y_expected, "wkv7 y");
    check_near(next.vector(), next_expected, "wkv7 state");
    Aligned<float> again(width);
    CHECK_EQ(
        goslet_cuda_wkv7(GOSLET_CUDA_F32, GOSLET_CUDA_F32, static_cast<std::int64_t>(batch),
                         static_cast<std::int64_t>(n_head), static_cast<std::int64_t>(n), r.data(), w.data(), k.data(),
                         v.data(), kappa.data(), a.data(), state.data(), again.data(), state.data(), nullptr),
        0);
    CHECK(again.vector() == y.vector());
    CHECK(state.vector() == next.vector());
}

void check_wkv6(std::size_t batch, std::size_t n_head, std::size_t n) {
    const std::size_t width = batch * n_head * n;
    Aligned<float> r(normal(width));
    Aligned<float> k(normal(width));
    Aligned<float> v(normal(width));
    Aligned<float> w(uniform(width, 0.3F, 1.0F));
    Aligned<float> u(normal(n_head * n));
    Aligned<float> state(normal(width * n));
    Aligned<float> y(width);
    Aligned<float> next(width * n);
    CHECK_EQ(goslet_cuda_wkv6(GOSLET_CUDA_F32, GOSLET_CUDA_F32, static_cast<std::int64_t>(batch),
                              static_cast<std::int64_t>(n_head), static_cast<std::int64_t>(n), r.data(), k.data(),
                              v.data(), w.data(), 1, u.data(), state.data(), y.data(), next.data(), nullptr),
             0);
    Doubles y_expected(width);
    Doubles next_expected(width * n);
    for (std::size_t head = 0; head < batch * n_head; ++head) {
        for (std::size_t i = 0; i < n; ++i) {
            const std::size_t key = head * n + i;
            for (std::size_t j = 0; j < n; ++j) {
                const double written = static_cast<double>(k.data()[key]) * v.data()[head * n + j];
                const double old = state.data()[key * n + j];
                y_expected[head * n + j] += r.data()[key] * (u.data()[key % (n_head * n)] * written + old);
                next_expected[key * n + j] = w.data()[key] * old + written;
            }
        }
    }
    check_near(y.vector(), y_expected, "wkv6 y");
    check_near(next.vector(), next_expected, "wkv6 state");
    Aligned<float> again(width);
    CHECK_EQ(goslet_cuda_wkv6(GOSLET_CUDA_F32, GOSLET_CUDA_F32, static_cast<std::int64_t>(batch),
                              static_cast<std::int64_t>(n_head), static_cast<std::int64_t>(n), r.data(), k.data(),
                              v.data(), w.data(), 1, u.data(), state.data(), again.data(), state.data(), nullptr),
             0);
    CHECK(again.vector() == y.vector());
    CHECK(state.vector() == next.vector());
}

void check_wkv4(std::size_t n) {
    Aligned<float> k(normal(n, 3.0F));
    Aligned<float> v(normal(n));
    Aligned<float> w(uniform(n, -5.0F, -0.01F));
    Aligned<float> u(normal(n));
    Aligned<float> aa(normal(n));
    Aligned<float> bb(uniform(n, 0.5F, 2.0F));
    Aligned<float> pp(normal(n));
    pp.data()[0] = -1e30F;  // an empty past
    Floats aa_expected = aa.vector();
    Floats bb_expected = bb.vector();
    Floats pp_expected = pp.vector();
    Floats y_expected(n);
    const Floats ones(n, 1.0F);
    goslet::reference::wkv4({n, ones.data(), k.data(), v.data(), w.data(), u.data(), aa_expected.data(),
                             bb_expected.data(), pp_expected.data(), y_expected.data()});
    Aligned<float> y(n);
    CHECK_EQ(goslet_cuda_wkv4(GOSLET_CUDA_F32, 1, static_cast<std::int64_t>(n), k.data(), v.data(), w.data(), u.data(),
                              aa.data(), bb.data(), pp.data(), y.data(), aa.data(), bb.data(), pp.data(), nullptr),
             0);
    check_near(y.vector(), {y_expected.begin(), y_expected.end()}, "wkv4 y");
    check_near(aa.vector(), {aa_expected.begin(), aa_expected.end()}, "wkv4 aa");
    check_near(bb.vector(), {bb_expected.begin(), bb_expected.end()}, "wkv4 bb");
    CHECK(pp.vector() == pp_expected);
}

// A product whose every number is small and whole is exact, so that a number in the wrong place cannot hide.
void check_product(int bits, std::size_t group, std::size_t n_rows, std::size_t n_in, std::size_t n_out) {
    const std::size_t padded = (n_in + 127) / 128 * 128;
    Aligned<std::uint32_t> weights(
        std::vector<std::uint32_t>(n_out * padded * static_cast<std::size_t>(bits) / 32, bits == 4 ? 0x88888888U : 0U));
    Aligned<std::uint16_t> scales(std::vector<std::uint16_t>(n_out * padded / group, 0));
    Aligned<std::uint16_t> x(n_rows * n_in);
    Aligned<std::uint16_t> y(n_rows * n_out);
    std::uniform_int_distribution<int> small(-3, 3);
    std::vector<double> expected(n_rows * n_out);
    for (std::size_t i = 0; i < n_rows * n_in; ++i) {
        x.data()[i] = __float2half_rn(static_cast<float>(small(generator))).bits;
    }
    for (std::size_t output = 0; output < n_out; ++output) {
        for (std::size_t input = 0; input < n_in; ++input) {
            const int number = small(generator);
            const std::size_t within = input % (bits == 4 ? 128 : 64);
            const std::size_t step = input / (bits == 4 ? 128 : 64);
            const std::size_t c = within % 32 / 8;
            const std::size_t row_words = padded * static_cast<std::size_t>(bits) / 32;
            if (bits == 4) {
                const std::size_t word = 16 * step + 4 * c + within / 32;
                const std::size_t shift = 4 * (within % 8 / 2) + 16 * (within % 2);
                std::uint32_t& bit_field = weights.data()[output * row_words + word];
                bit_field = (bit_field & ~(15U << shift)) | static_cast<std::uint32_t>(number + 8) << shift;
            } else {
                const std::size_t word = 16 * step + 4 * c + 2 * (within / 32) + within % 8 / 4;
                weights.data()[output * row_words + word] |= (static_cast<std::uint32_t>(number) & 0xFFU)
                                                             << (8 * (within % 4));
            }
            const float scale = (output + input / group) % 2 == 0 ? 1.0F : 0.5F;
            scales.data()[output * (padded / group) + input / group] = __float2half_rn(scale).bits;
            for (std::size_t row = 0; row < n_rows; ++row) {
                expected[row * n_out + output] += scale * number * __half2float({x.data()[row * n_in + input]});
            }
        }
    }
    CHECK_EQ(
        goslet_cuda_product(GOSLET_CUDA_F16, bits, static_cast<std::int64_t>(group), static_cast<std::int64_t>(n_rows),
                            static_cast<std::int64_t>(n_in), static_cast<std::int64_t>(n_out), x.data(), weights.data(),
                            scales.data(), y.data(), nullptr),
        0);
    for (std::size_t i = 0; i < expected.size(); ++i) {
        CHECK_EQ(static_cast<double>(__half2float({y.data()[i]})), expected[i]);
    }
}

void check_refusals() {
    Aligned<float> numbers(normal(256));
    float* const good = numbers.data();
    const auto product = [&](int bits, std::int64_t group, std::int64_t rows, std::int64_t in, const void* x, void* y) {
        return goslet_cuda_product(GOSLET_CUDA_F32, bits, group, rows, in, 4, x, good, good, y, nullptr);
    };
    CHECK_EQ(product(4, 32, 9, 64, good, good), GOSLET_CUDA_BAD_SIZE);
    CHECK_EQ(product(4, 32, 0, 64, good, good), GOSLET_CUDA_BAD_SIZE);
    CHECK_EQ(product(5, 32, 1, 64, good, good), GOSLET_CUDA_BAD_SIZE);
    CHECK_EQ(product(4, 33, 1, 64, good, good), GOSLET_CUDA_BAD_SIZE);
    CHECK_EQ(product(4, 32, 1, 33, good, good), GOSLET_CUDA_BAD_SIZE);
    CHECK_EQ(product(4, 32, 1, std::int64_t{1} << 40, good, good), GOSLET_CUDA_BAD_SIZE);
    CHECK_EQ(product(4, 32, 1, 64, nullptr, good), GOSLET_CUDA_NULL_POINTER);
    CHECK_EQ(product(4, 32, 1, 64, good + 1, good), GOSLET_CUDA_UNALIGNED);
    const auto wkv7 = [&](goslet_cuda_type type, goslet_cuda_type state, std::int64_t batch, std::int64_t n) {
        return goslet_cuda_wkv7(type, state, batch, 1, n, good, good, good, good, good, good, good, good, good,
                                nullptr);
    };
    CHECK_EQ(wkv7(GOSLET_CUDA_F32, GOSLET_CUDA_BF16, 1, 8), GOSLET_CUDA_BAD_TYPE);
    CHECK_EQ(wkv7(static_cast<goslet_cuda_type>(7), GOSLET_CUDA_F32, 1, 8), GOSLET_CUDA_BAD_TYPE);
    CHECK_EQ(wkv7(GOSLET_CUDA_F32, GOSLET_CUDA_F32, 1, 257), GOSLET_CUDA_BAD_SIZE);
    CHECK_EQ(wkv7(GOSLET_CUDA_F32, GOSLET_CUDA_F32, INT64_MAX, 8), GOSLET_CUDA_BAD_SIZE);
    CHECK_EQ(wkv7(GOSLET_CUDA_F32, GOSLET_CUDA_F32, -1, 8), GOSLET_CUDA_BAD_SIZE);
    CHECK_EQ(goslet_cuda_wkv7(GOSLET_CUDA_F32, GOSLET_CUDA_F32, 1 << 20, 32, 64, good, good, good, good, good, good,
                              good, good, good, nullptr),
             GOSLET_CUDA_BAD_SIZE);  // 2^31 numbers in a vector
    CHECK_EQ(goslet_cuda_version(), GOSLET_CUDA_VERSION);
    CHECK_EQ(std::string(goslet_cuda_error(-99)), "is no code of this library");
}

// A kernel must not depend on which of its threads runs first.
void in_every_order(void (*body)()) {
    for (const std::uint32_t order : {GOSLET_CUDA_HOST_FORWARD, GOSLET_CUDA_HOST_BACKWARDS, GOSLET_CUDA_HOST_GREEDY,
                                      GOSLET_CUDA_HOST_GREEDY_BACKWARDS, GOSLET_CUDA_HOST_RANDOM}) {
        goslet_cuda_host_order(order);
        body();
    }
    goslet_cuda_host_order(GOSLET_CUDA_HOST_FORWARD);
}

}  // namespace

TEST(the_models_conversions_are_exact) {
    check_conversions();
}

TEST(threads_that_wait_in_vain_are_reported) {
    check_meetings();
}

TEST(wrong_arguments_are_codes) {
    check_refusals();
}

TEST(recurrences_equal_the_reference_in_place_and_not) {
    in_every_order([] {
        for (const std::size_t n : {1, 5, 63, 64, 65}) {
            check_wkv7(1, 2, n);
            check_wkv6(2, 1, n);
        }
        check_wkv4(1);
        check_wkv4(200);
    });
    check_wkv7(1, 1, 256);
    check_wkv6(1, 1, 256);
    check_wkv7(8, 32, 64);  // heads enough for the kernels that have whole ones
    check_wkv6(8, 32, 64);
}

TEST(products_of_small_numbers_are_exact) {
    in_every_order([] {
        for (const int bits : {4, 8}) {
            for (const std::size_t group : {32, 64, 128}) {
                check_product(bits, group, 1, 32, 1);
                check_product(bits, group, 8, 352, 21);
                check_product(bits, group, 3, 2080, 40);
            }
            check_product(bits, 32, 8, 5280, 3);  // more activations than are staged at once
        }
    });
}
