// Layer norm, token shift, activations and the ways to combine, for every instruction set that runs here, against the
// formulas in double, which are not the reference kernels': those are tested here too. Tolerances: kernel_checks.h.
#include <cmath>
#include <cstddef>
#include <utility>

#include "kernel_checks.h"

namespace {

using goslet::Activation;
using goslet::Combine;

const Activation kActivations[] = {Activation::kNone,     Activation::kTanh,        Activation::kSigmoid,
                                   Activation::kSilu,     Activation::kReluSquared, Activation::kDecay,
                                   Activation::kDoubleExp};

double sigmoid(double x) {
    return 1.0 / (1.0 + std::exp(-x));
}

double activated(Activation activation, double x) {
    switch (activation) {
        case Activation::kNone:
            return x;
        case Activation::kTanh:
            return std::tanh(x);
        case Activation::kSigmoid:
            return sigmoid(x);
        case Activation::kSilu:
            return x * sigmoid(x);
        case Activation::kReluSquared:
            return x > 0.0 ? x * x : 0.0;
        case Activation::kDecay:
            return std::exp(-std::exp(-0.5) * sigmoid(x));
        case Activation::kDoubleExp:
            return std::exp(-std::exp(x));
    }
    return kNan;
}

void check_layer_norm(const Kernels& kernels, const Floats& x, float eps) {
    const std::size_t n = x.size();
    const Floats weight = normal(n, 0.3F, 1.0F);
    const Floats bias = normal(n);
    const Normed expected = normed(Doubles(x.begin(), x.end()), Doubles(n, 0.0), eps);
    Output out(n);
    kernels.layer_norm(x.data(), weight.data(), bias.data(), eps, n, out.data());
    CHECK(out.guards_are_whole());
    for (std::size_t i = 0; i < n; ++i) {
        const double scaled = expected.numbers[i] * weight[i];
        const double tolerance =
            expected.tolerances[i] * std::fabs(weight[i]) + 2 * kU * (std::fabs(scaled) + std::fabs(bias[i]));
        CHECK_CLOSE(out[i], scaled + bias[i], kSecondOrder * tolerance);
    }
}

}  // namespace

TEST(layer_norm_is_that_of_the_formula) {
    for_every_isa([](const Kernels& kernels) {
        for (const std::size_t n : kSizes) {
            check_layer_norm(kernels, normal(n), 1e-5F);
            check_layer_norm(kernels, normal(n, 1e-3F), 64e-5F);
            check_layer_norm(kernels, normal(n, 1e4F), 1e-5F);
        }
    });
}

// The difference of the sums of squares, 1e6, and of the square of sums would lose the variance of 1 altogether: its
// rounding is 0.06 for each number.
TEST(layer_norm_finds_a_small_variance_about_a_large_mean) {
    for_every_isa([](const Kernels& kernels) {
        for (const std::size_t n : {9, 100, 768}) {
            check_layer_norm(kernels, normal(n, 1.0F, 1000.0F), 1e-5F);
        }
    });
}

TEST(layer_norm_of_equal_numbers_is_its_bias) {
    for_every_isa([](const Kernels& kernels) {
        for (const std::size_t n : kSizes) {
            const Floats x(n, 0.5F), weight(n, 2.0F), bias(n, 0.25F);  // exact in every sum
            Output out(n);
            kernels.layer_norm(x.data(), weight.data(), bias.data(), 1e-5F, n, out.data());
            for (std::size_t i = 0; i < n; ++i) {
                // The mean's quotient may still round where n is no power of two, by u·0.5; 1/sqrt(1e-5) is 317.
                CHECK_CLOSE(out[i], 0.25, 2.0 * 317 * kU);
            }
        }
    });
}

TEST(lerp_is_that_of_the_formula) {
    for_every_isa([](const Kernels& kernels) {
        for (const std::size_t n : kSizes) {
            const Floats x = normal(n), previous = normal(n), mix = uniform(n, -0.5F, 1.5F);
            Output out(n);
            kernels.lerp(x.data(), previous.data(), mix.data(), n, out.data());
            CHECK(out.guards_are_whole());
            for (std::size_t i = 0; i < n; ++i) {
                const double change = (static_cast<double>(previous[i]) - x[i]) * mix[i];
                const double expected = x[i] + change;
                // Difference, product, sum.
                CHECK_CLOSE(out[i], expected, kSecondOrder * kU * (2 * std::fabs(change) + std::fabs(expected)));
            }
        }
    });
}

// One rounding in a sum or a product; a multiply-add may have two of the product's and of its own result.
TEST(combine_is_that_of_the_formulas) {
    for_every_isa([](const Kernels& kernels) {
        for (const std::size_t n : kSizes) {
            const Floats y = normal(n), before = normal(n), a = normal(n), b = normal(n);
            const auto check = [&](Combine how, const auto& formula) {
                Output out(before);
                kernels.combine(how, y.data(), a.data(), b.data(), n, out.data());
                CHECK(out.guards_are_whole());
                for (std::size_t i = 0; i < n; ++i) {
                    const auto [expected, change] = formula(i);
                    CHECK_CLOSE(out[i], expected, kSecondOrder * kU * (2 * std::fabs(change) + std::fabs(expected)));
                }
            };
            using Pair = std::pair<double, double>;
            check(Combine::kSet, [&](std::size_t i) { return Pair(y[i], 0.0); });
            check(Combine::kAdd, [&](std::size_t i) { return Pair(static_cast<double>(before[i]) + y[i], 0.0); });
            check(Combine::kGate, [&](std::size_t i) { return Pair(static_cast<double>(y[i]) * a[i], 0.0); });
            check(Combine::kGateAdd, [&](std::size_t i) {
                const double change = static_cast<double>(y[i]) * a[i];
                return Pair(before[i] + change, change);
            });
            check(Combine::kLerp, [&](std::size_t i) {
                const double change = (static_cast<double>(b[i]) - a[i]) * y[i];
                return Pair(a[i] + change, change);
            });
        }
    });
}

// As the engine calls it where a product is scaled by what its register holds, or stretched between two others.
TEST(combine_may_write_over_what_it_reads) {
    for_every_isa([](const Kernels& kernels) {
        for (const std::size_t n : kSizes) {
            const Floats y = normal(n), a = normal(n), b = normal(n);
            Output gated(a);
            kernels.combine(Combine::kGate, y.data(), gated.data(), nullptr, n, gated.data());
            Output stretched(y), apart(n);
            kernels.combine(Combine::kLerp, stretched.data(), a.data(), b.data(), n, stretched.data());
            kernels.combine(Combine::kLerp, y.data(), a.data(), b.data(), n, apart.data());
            for (std::size_t i = 0; i < n; ++i) {
                CHECK(gated[i] == y[i] * a[i]);
                CHECK(stretched[i] == apart[i]);
            }
        }
    });
}

TEST(small_product_is_that_of_the_formula) {
    for_every_isa([](const Kernels& kernels) {
        for (const std::size_t n : {1, 3, 8, 13, 32, 40}) {
            const Floats x = normal(n), matrix = normal(n * n);
            Output out(n);
            kernels.small_product(x.data(), matrix.data(), n, out.data());
            CHECK(out.guards_are_whole());
            for (std::size_t j = 0; j < n; ++j) {
                double expected = 0.0;
                double magnitude = 0.0;
                for (std::size_t i = 0; i < n; ++i) {
                    expected += static_cast<double>(x[i]) * matrix[i * n + j];
                    magnitude += std::fabs(static_cast<double>(x[i]) * matrix[i * n + j]);
                }
                CHECK_CLOSE(out[j], expected, kSecondOrder * (static_cast<double>(n) + 1) * kU * magnitude);
            }
        }
    });
}

// Relative to the result, in u: sigmoid 5 (exp 2.2, sum 1, quotient 1), silu 6 (a product more), decay 6 (exp 2.2 and
// its argument, at most 0.61 and off by the sigmoid's 4.2 and a product), relu² 1, and tanh 16, which is 1e-6: what the
// engine's 1e-5 leaves to it. A double exponential: 2.2 of the outer one, and the inner one's 2.2 times its value,
// which is the outer one's argument; below 1.7e-38 it may be anything. The sum with the bias moves x by u·|x + bias|,
// and the result by that times the derivative. |x| stays below 80, where no sigmoid is below 1.7e-38.
double units(Activation activation, double x) {
    switch (activation) {
        case Activation::kTanh:
            return 16;
        case Activation::kSigmoid:
            return 5;
        case Activation::kSilu:
        case Activation::kDecay:
            return 6;
        case Activation::kDoubleExp:
            return 3 + 3 * std::exp(std::fmin(x, 80.0));
        default:
            return 1;
    }
}

TEST(activations_are_those_of_the_formulas) {
    for_every_isa([](const Kernels& kernels) {
        for (const Activation activation : kActivations) {
            for (const float range : {1e-6F, 1e-2F, 1.0F, 10.0F, 70.0F}) {
                for (const std::size_t n : kSizes) {
                    for (const bool with_bias : {false, true}) {
                        const Floats before = uniform(n, -range, range);
                        const Floats bias = uniform(n, -range / 8, range / 8);
                        Output y(before);
                        kernels.activate(activation, with_bias ? bias.data() : nullptr, n, y.data());
                        CHECK(y.guards_are_whole());
                        for (std::size_t i = 0; i < n; ++i) {
                            const double x = with_bias ? static_cast<double>(before[i]) + bias[i] : before[i];
                            const double expected = activated(activation, x);
                            const double step = with_bias ? kU * std::fabs(x) : 0.0;
                            const double moved = std::fmax(std::fabs(activated(activation, x + step) - expected),
                                                           std::fabs(activated(activation, x - step) - expected));
                            const double floor = activation == Activation::kDoubleExp ? 1.7e-38 : 1e-45;
                            CHECK_CLOSE(
                                y[i], expected,
                                kSecondOrder * (units(activation, x) * kU * std::fabs(expected) + moved) + floor);
                        }
                    }
                }
            }
        }
    });
}

// Below 1.7e-38 a sigmoid is as good as 0: it multiplies numbers of ordinary size.
TEST(activations_of_large_numbers_are_their_limits) {
    for_every_isa([](const Kernels& kernels) {
        for (const float large : {90.0F, 1e4F, 3e38F, kInfinity}) {
            const auto of = [&](Activation activation, float x) {
                Floats y(9, x);
                kernels.activate(activation, nullptr, y.size(), y.data());
                for (const float number : y) {
                    CHECK(number == y[0]);
                }
                return y[0];
            };
            CHECK_CLOSE(of(Activation::kTanh, large), 1.0, 0.0);
            CHECK_CLOSE(of(Activation::kTanh, -large), -1.0, 0.0);
            CHECK_CLOSE(of(Activation::kSigmoid, large), 1.0, 0.0);
            CHECK_CLOSE(of(Activation::kSigmoid, -large), 0.0, 1.7e-38);
            CHECK_CLOSE(of(Activation::kReluSquared, -large), 0.0, 0.0);
            CHECK_CLOSE(of(Activation::kDecay, large), std::exp(-std::exp(-0.5)), 4 * kU);
            CHECK_CLOSE(of(Activation::kDecay, -large), 1.0, 0.0);
            CHECK_CLOSE(of(Activation::kDoubleExp, large), 0.0, 1.7e-38);
            CHECK_CLOSE(of(Activation::kDoubleExp, -large), 1.0, 0.0);
            if (large < kInfinity) {
                CHECK_CLOSE(of(Activation::kSilu, large), large, kU * large);
                CHECK_CLOSE(of(Activation::kSilu, -large), 0.0, 1.7e-38 * large);
            }
        }
    });
}

TEST(activations_keep_nan_in_its_place) {
    for_every_isa([](const Kernels& kernels) {
        for (const Activation activation : kActivations) {
            for (std::size_t place = 0; place < 11; ++place) {
                // The second has bits that an exponential takes for an exponent of 208 or so, which must not overflow.
                for (const char* const payload : {"", "0xD0"}) {
                    Floats y(11, 0.5F);
                    y[place] = std::nanf(payload);
                    kernels.activate(activation, nullptr, y.size(), y.data());
                    for (std::size_t i = 0; i < y.size(); ++i) {
                        CHECK(std::isnan(y[i]) == (i == place));
                    }
                }
            }
        }
    });
}
