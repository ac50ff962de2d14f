// Layer norm, token shift, activations and RWKV-7's recurrence, for every instruction set that runs here, against the
// formulas in double. `wkv7` is held against equations 16 and 17 with matrices written out, as export/models/rwkv7.py
// states them, and not against the reference kernel, which is tested here too.
//
// Tolerances are first-order error bounds of float32 arithmetic, u = 2^-24 being the largest relative error of one
// rounding; a sum of n terms in any order is within n·u·Σ|term|. kSecondOrder stands for the products of errors.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "kernels/kernels.h"

namespace {

using goslet::Activation;
using goslet::Isa;
using goslet::Kernels;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

constexpr double kU = 1.0 / (1 << 24);
constexpr double kSecondOrder = 1.01;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
const std::size_t kSizes[] = {1, 5, 7, 8, 9, 31, 32, 33, 64, 100, 768};
const Activation kActivations[] = {Activation::kNone, Activation::kTanh, Activation::kSigmoid, Activation::kReluSquared,
                                   Activation::kDecay};

std::mt19937 generator(7);

Floats normal(std::size_t n, float scale = 1.0F, float mean = 0.0F) {
    std::normal_distribution<float> distribution(mean, scale);
    Floats numbers(n);
    for (float& number : numbers) {
        number = distribution(generator);
    }
    return numbers;
}

Floats uniform(std::size_t n, float low, float high) {
    std::uniform_real_distribution<float> distribution(low, high);
    Floats numbers(n);
    for (float& number : numbers) {
        number = distribution(generator);
    }
    return numbers;
}

// n numbers that a kernel must write, between numbers that it must not touch.
class Output {
  public:
    explicit Output(std::size_t n) : n_(n), numbers_(n + 2 * kGuard, kNan) {
        for (std::size_t i = 0; i < kGuard; ++i) {
            numbers_[i] = numbers_[kGuard + n + i] = kGuardValue;
        }
    }
    explicit Output(const Floats& numbers) : Output(numbers.size()) {
        std::copy(numbers.begin(), numbers.end(), data());
    }
    float* data() { return numbers_.data() + kGuard; }
    float operator[](std::size_t i) const { return numbers_[kGuard + i]; }
    bool guards_are_whole() const {
        for (std::size_t i = 0; i < kGuard; ++i) {
            if (numbers_[i] != kGuardValue || numbers_[kGuard + n_ + i] != kGuardValue) {
                return false;
            }
        }
        return true;
    }

  private:
    static constexpr std::size_t kGuard = 8;
    static constexpr float kGuardValue = -12345.0F;
    std::size_t n_;
    Floats numbers_;
};

template <typename Body>
void for_every_isa(Body body) {
    for (const Isa isa : goslet::available_isas()) {
        const int before = check::failures;
        body(goslet::kernels_for(isa));
        if (check::failures != before) {
            check::fail(__FILE__, __LINE__, std::string("the above with ") + goslet::isa_name(isa));
        }
    }
}

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
        case Activation::kReluSquared:
            return x > 0.0 ? x * x : 0.0;
        case Activation::kDecay:
            return std::exp(-std::exp(-0.5) * sigmoid(x));
    }
    return kNan;
}

// The numbers a norm gives and how far float32 may be from them, given the errors of its input.
//
// With d = x - mean and s = sqrt(mean(d²) + eps): the mean is off by at most (n + 1)·u·mean|x| and the mean of the
// input's errors; so every d by that, its own input's error and u·|d|. s is the root mean square of (d, sqrt(eps)), so
// it moves by no more than the root mean square of the errors of d, and by (n + 8)/2·u relatively through the sum of
// squares, the quotient, eps, root and reciprocal.
struct Normed {
    Doubles numbers;
    Doubles tolerances;
};

Normed normed(const Doubles& x, const Doubles& errors, double eps) {
    const double n = static_cast<double>(x.size());
    double mean = 0.0;
    double mean_error = 0.0;
    for (std::size_t i = 0; i < x.size(); ++i) {
        mean += x[i] / n;
        mean_error += ((n + 1) * kU * std::fabs(x[i]) + errors[i]) / n;
    }
    double variance = 0.0;
    double square_errors = 0.0;
    Doubles d_errors;
    for (std::size_t i = 0; i < x.size(); ++i) {
        const double d = x[i] - mean;
        d_errors.push_back(mean_error + errors[i] + kU * std::fabs(d));
        variance += d * d / n;
        square_errors += d_errors[i] * d_errors[i] / n;
    }
    const double s = std::sqrt(variance + eps);
    const double s_error = std::sqrt(square_errors) / s + ((n + 8) / 2 + 2) * kU;
    Normed out;
    for (std::size_t i = 0; i < x.size(); ++i) {
        const double number = (x[i] - mean) / s;
        out.numbers.push_back(number);
        out.tolerances.push_back(d_errors[i] / s + std::fabs(number) * (s_error + kU));
    }
    return out;
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

TEST(add_adds_in_place) {
    for_every_isa([](const Kernels& kernels) {
        for (const std::size_t n : kSizes) {
            const Floats y = normal(n), before = normal(n);
            Output out(before);
            kernels.add(y.data(), n, out.data());
            CHECK(out.guards_are_whole());
            for (std::size_t i = 0; i < n; ++i) {
                CHECK(out[i] == before[i] + y[i]);  // one rounding: the same everywhere
            }
        }
    });
}

// Relative to the result, in u: sigmoid 5 (exp 2.2, sum 1, quotient 1), decay 6 (exp 2.2 and its argument, at most 0.61
// and off by the sigmoid's 4.2 and a product), relu² 1, and tanh 16, which is 1e-6: what the engine's 1e-5 leaves to
// it. The sum with the bias moves x by u·|x + bias|, and the result by that times the derivative. |x| stays below 80,
// where no sigmoid is below 1.7e-38.
TEST(activations_are_those_of_the_formulas) {
    for_every_isa([](const Kernels& kernels) {
        for (const Activation activation : kActivations) {
            const double units = activation == Activation::kTanh      ? 16
                                 : activation == Activation::kSigmoid ? 5
                                 : activation == Activation::kDecay   ? 6
                                                                      : 1;
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
                            CHECK_CLOSE(y[i], expected,
                                        kSecondOrder * (units * kU * std::fabs(expected) + moved) + 1e-45);
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

namespace {

struct HeadInputs {
    explicit HeadInputs(std::size_t n)
        : r(normal(n)),
          w(uniform(n, 0.545F, 1.0F)),
          k(normal(n)),
          v(normal(n)),
          a(uniform(n, 0.0F, 1.0F)),
          g(normal(n)),
          value_mix(uniform(n, 0.0F, 1.0F)),
          first_value(normal(n)),
          k_k(normal(n, 0.3F, 0.8F)),
          k_a(normal(n, 0.3F, 1.0F)),
          r_k(normal(n, 0.3F)),
          norm_weight(normal(n, 0.3F, 1.0F)),
          norm_bias(normal(n)),
          state(normal(n * n)) {}
    Floats r, w, k, v, a, g, value_mix, first_value, k_k, k_a, r_k, norm_weight, norm_bias, state;
    float norm_eps = 64e-5F;
};

struct HeadOutputs {
    Output y, state, first_value;
};

HeadOutputs run(const Kernels& kernels, const HeadInputs& in, bool first_layer) {
    const std::size_t n = in.r.size();
    HeadOutputs out{Output(n), Output(in.state), first_layer ? Output(n) : Output(in.first_value)};
    goslet::Wkv7Head head{};
    head.head_size = n;
    head.r = in.r.data();
    head.w = in.w.data();
    head.k = in.k.data();
    head.v = in.v.data();
    head.a = in.a.data();
    head.g = in.g.data();
    head.value_mix = first_layer ? nullptr : in.value_mix.data();
    head.first_value = out.first_value.data();
    head.k_k = in.k_k.data();
    head.k_a = in.k_a.data();
    head.r_k = in.r_k.data();
    head.norm_weight = in.norm_weight.data();
    head.norm_bias = in.norm_bias.data();
    head.norm_eps = in.norm_eps;
    head.state = out.state.data();
    head.y = out.y.data();
    kernels.wkv7(head);
    CHECK(out.y.guards_are_whole());
    CHECK(out.state.guards_are_whole());
    CHECK(out.first_value.guards_are_whole());
    return out;
}

// S' = S · (diag(w) - kappa (kappa·a)ᵀ) + v kᵀ with the transition as a matrix, y = S' r; and with every quantity the
// error that float32 may have made in it, carried on to the next.
void check_wkv7(const Kernels& kernels, const HeadInputs& in, bool first_layer) {
    const std::size_t n = in.r.size();
    const double sum_error = (static_cast<double>(n) + 1) * kU;
    Doubles v(n), v_error(n), k(n), k_error(n), kappa(n);
    double squares = 0.0;
    for (std::size_t j = 0; j < n; ++j) {
        const double mix = first_layer ? 0.0 : in.value_mix[j];
        const double change = mix * (static_cast<double>(in.first_value[j]) - in.v[j]);
        v[j] = in.v[j] + change;
        v_error[j] = first_layer ? 0.0 : kU * (2 * std::fabs(change) + std::fabs(v[j]));
        const double rate = (static_cast<double>(in.a[j]) - 1) * in.k_a[j];
        k[j] = in.k[j] * (1 + rate);
        k_error[j] = kU * (std::fabs(in.k[j]) * (2 * std::fabs(rate) + std::fabs(1 + rate)) + std::fabs(k[j]));
        kappa[j] = static_cast<double>(in.k[j]) * in.k_k[j];
        squares += kappa[j] * kappa[j];
    }
    // Relatively: the product, twice under the root; half the sum's; root, reciprocal and its product.
    const double kappa_error = sum_error / 2 + 5 * kU;
    double bonus = 0.0;
    double bonus_error = 0.0;
    for (std::size_t j = 0; j < n; ++j) {
        kappa[j] /= std::fmax(std::sqrt(squares), 1e-12);
        const double term = in.r[j] * k[j] * in.r_k[j];
        bonus += term;
        bonus_error += std::fabs(in.r[j] * in.r_k[j]) * k_error[j] + (sum_error + 2 * kU) * std::fabs(term);
    }

    const HeadOutputs out = run(kernels, in, first_layer);

    Doubles y(n, 0.0), y_error(n, 0.0);
    for (std::size_t i = 0; i < n; ++i) {
        double removed_error = 0.0;
        double removed = 0.0;
        for (std::size_t l = 0; l < n; ++l) {
            removed += in.state[i * n + l] * kappa[l];
            removed_error += std::fabs(in.state[i * n + l] * kappa[l]) * (sum_error + kappa_error);
        }
        for (std::size_t j = 0; j < n; ++j) {
            double next = v[i] * k[j];
            for (std::size_t l = 0; l < n; ++l) {
                const double transition = (l == j ? in.w[j] : 0.0) - kappa[l] * (kappa[j] * in.a[j]);
                next += in.state[i * n + l] * transition;
            }
            const double kept = static_cast<double>(in.state[i * n + j]) * in.w[j];
            const double taken = removed * kappa[j] * in.a[j];
            const double written = v[i] * k[j];
            const double error =
                std::fabs(kappa[j] * in.a[j]) * removed_error + std::fabs(taken) * (kappa_error + 2 * kU) +
                std::fabs(k[j]) * v_error[i] + std::fabs(v[i]) * k_error[j] +
                kU * (std::fabs(kept) + std::fabs(kept - taken) + std::fabs(written) + std::fabs(next));
            CHECK_CLOSE(out.state[i * n + j], next, kSecondOrder * error);
            y[i] += next * in.r[j];
            y_error[i] += std::fabs(in.r[j]) * error + sum_error * std::fabs(next * in.r[j]);
        }
    }

    const Normed y_normed = normed(y, y_error, in.norm_eps);
    for (std::size_t i = 0; i < n; ++i) {
        const double scaled = y_normed.numbers[i] * in.norm_weight[i];
        const double biased = scaled + in.norm_bias[i];
        const double added = bonus * v[i];
        const double error =
            std::fabs(in.norm_weight[i]) * y_normed.tolerances[i] + std::fabs(v[i]) * bonus_error +
            std::fabs(bonus) * v_error[i] +
            kU * (std::fabs(scaled) + std::fabs(biased) + std::fabs(added) + std::fabs(biased + added));
        const double expected = (biased + added) * in.g[i];
        CHECK_CLOSE(out.y[i], expected, kSecondOrder * (error * std::fabs(in.g[i]) + kU * std::fabs(expected)));
        CHECK(out.first_value[i] == (first_layer ? in.v[i] : in.first_value[i]));
    }
}

const std::size_t kHeadSizes[] = {1, 5, 8, 16, 32, 64, 100, 256};

}  // namespace

TEST(wkv7_is_that_of_the_formula) {
    for_every_isa([](const Kernels& kernels) {
        for (const std::size_t n : kHeadSizes) {
            check_wkv7(kernels, HeadInputs(n), true);
            check_wkv7(kernels, HeadInputs(n), false);
        }
    });
}

// The divisor is then 1e-12 and not the norm, which is 0 or below it.
TEST(wkv7_removes_next_to_nothing_for_a_key_of_next_to_nothing) {
    for_every_isa([](const Kernels& kernels) {
        for (const std::size_t n : kHeadSizes) {
            for (const float key : {0.0F, 1e-15F}) {
                HeadInputs in(n);
                in.k.assign(n, key);
                check_wkv7(kernels, in, false);
            }
        }
    });
}

TEST(wkv7_spreads_nan_to_the_whole_head) {
    for_every_isa([](const Kernels& kernels) {
        for (const std::size_t n : kHeadSizes) {
            HeadInputs in(n);
            in.k[n - 1] = kNan;
            const HeadOutputs out = run(kernels, in, false);
            for (std::size_t i = 0; i < n; ++i) {
                CHECK(std::isnan(out.y[i]));
            }
            for (std::size_t i = 0; i < n * n; ++i) {
                CHECK(std::isnan(out.state[i]));
            }
        }
    });
}
