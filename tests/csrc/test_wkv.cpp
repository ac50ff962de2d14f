// The recurrences of every version, for every instruction set that runs here, against the formulas in double, which are
// not the reference kernels': those are tested here too. `wkv7` is held against equations 16 and 17 with matrices
// written out, as export/models/rwkv7.py states them. Tolerances: kernel_checks.h.
#include <algorithm>
#include <cmath>
#include <cstddef>

#include "kernel_checks.h"

namespace {

// exp in float32 is off by 2.2 u and by its argument's error, which is a rounding of the difference of two exponents of
// at most `largest`.
double exp_error(double largest) {
    return kU * (3 + 2 * largest);
}

struct Channels {
    Channels(std::size_t n, float scale)
        : r(uniform(n, 0.0F, 1.0F)),
          k(normal(n, scale)),
          v(normal(n)),
          decay(uniform(n, -4.0F, -1e-3F)),
          first(normal(n, scale)),
          aa(normal(n, 3.0F)),
          bb(uniform(n, 0.5F, 4.0F)),
          pp(normal(n, scale)) {}

    Floats r, k, v, decay, first, aa, bb, pp;
};

void check_wkv4(const Kernels& kernels, const Channels& in) {
    const std::size_t n = in.r.size();
    Output aa(in.aa), bb(in.bb), pp(in.pp), y(n);
    kernels.wkv4({n, in.r.data(), in.k.data(), in.v.data(), in.decay.data(), in.first.data(), aa.data(), bb.data(),
                  pp.data(), y.data()});
    for (const Output* const out : {&aa, &bb, &pp, &y}) {
        CHECK(out->guards_are_whole());
    }
    for (std::size_t i = 0; i < n; ++i) {
        const double first = static_cast<double>(in.first[i]) + in.k[i];
        const double now = std::fmax(in.pp[i], first);
        const double past = std::exp(in.pp[i] - now);
        const double present = std::exp(first - now);
        const double numerator = past * in.aa[i] + present * in.v[i];
        const double denominator = past * in.bb[i] + present;
        const double magnitude = past * std::fabs(in.aa[i]) + present * std::fabs(in.v[i]);
        // An exponent of -1e30 stands for nothing; where it is the past's, its share is 0 however it is rounded.
        const double exponents = std::fabs(first) + std::fmin(std::fabs(in.pp[i]), 1e3);
        const double error = exp_error(exponents) + 4 * kU;
        const double expected = in.r[i] * numerator / denominator;
        CHECK_CLOSE(y[i], expected,
                    kSecondOrder * (in.r[i] * error * (magnitude + std::fabs(numerator)) / denominator) + 1e-30);
        const double decayed = static_cast<double>(in.pp[i]) + in.decay[i];
        const double top = std::fmax(decayed, in.k[i]);
        const double kept = std::exp(decayed - top);
        const double added = std::exp(in.k[i] - top);
        const double moved = exp_error(std::fmin(std::fabs(decayed), 1e3) + std::fabs(in.k[i])) + 2 * kU;
        CHECK_CLOSE(aa[i], kept * in.aa[i] + added * in.v[i],
                    kSecondOrder * moved * (kept * std::fabs(in.aa[i]) + added * std::fabs(in.v[i])) + 1e-30);
        CHECK_CLOSE(bb[i], kept * in.bb[i] + added, kSecondOrder * moved * (kept * in.bb[i] + added) + 1e-30);
        CHECK_CLOSE(pp[i], top, kU * std::fabs(top));
    }
}

struct MatrixInputs {
    explicit MatrixInputs(std::size_t n)
        : r(normal(n)),
          w(uniform(n, 0.0F, 1.0F)),
          k(normal(n)),
          v(normal(n)),
          g(normal(n)),
          bonus(normal(n, 0.5F)),
          norm_weight(normal(n, 0.3F, 1.0F)),
          norm_bias(normal(n)),
          state(normal(n * n, 2.0F)) {}

    Floats r, w, k, v, g, bonus, norm_weight, norm_bias, state;
};

void check_wkv6(const Kernels& kernels, const MatrixInputs& in, bool gated) {
    const std::size_t n = in.r.size();
    const float eps = 64e-5F;
    Output state(in.state), y(n);
    kernels.wkv6({n, in.r.data(), in.w.data(), in.k.data(), in.v.data(), gated ? in.g.data() : nullptr, in.bonus.data(),
                  in.norm_weight.data(), in.norm_bias.data(), eps, state.data(), y.data()});
    CHECK(state.guards_are_whole());
    CHECK(y.guards_are_whole());
    Doubles seen(n, 0.0), errors(n, 0.0);
    for (std::size_t i = 0; i < n; ++i) {
        for (std::size_t j = 0; j < n; ++j) {
            const double old = in.state[i * n + j];
            const double written = static_cast<double>(in.k[i]) * in.v[j];
            const double present = in.r[i] * in.bonus[i] * written;
            seen[j] += present + in.r[i] * old;
            // Three products and the sum of n terms of the bonus, one more product; the sum of n rows and itself.
            errors[j] += kU * (2 * static_cast<double>(n) + 6) * (std::fabs(present) + std::fabs(in.r[i] * old));
            const double kept = in.w[i] * old;
            CHECK_CLOSE(state[i * n + j], kept + written,
                        kSecondOrder * kU * (std::fabs(kept) + std::fabs(written) + std::fabs(kept + written)));
        }
    }
    const Normed expected = normed(seen, errors, eps);
    for (std::size_t j = 0; j < n; ++j) {
        const double gate = gated ? in.g[j] : 1.0;
        const double scaled = expected.numbers[j] * in.norm_weight[j];
        const double result = (scaled + in.norm_bias[j]) * gate;
        const double tolerance = expected.tolerances[j] * std::fabs(in.norm_weight[j]) +
                                 2 * kU * (std::fabs(scaled) + std::fabs(in.norm_bias[j]));
        CHECK_CLOSE(y[j], result, kSecondOrder * (tolerance * std::fabs(gate) + kU * std::fabs(result)));
    }
}

const std::size_t kMatrixSizes[] = {1, 5, 8, 12, 16, 31, 32, 40, 64, 100, 256};

}  // namespace

TEST(wkv4_is_that_of_the_formula) {
    for_every_isa([](const Kernels& kernels) {
        for (const std::size_t n : {1, 7, 8, 9, 64, 100}) {
            for (const float scale : {0.5F, 5.0F, 40.0F}) {
                check_wkv4(kernels, Channels(n, scale));
            }
        }
    });
}

TEST(wkv4_begins_with_the_first_value) {
    for_every_isa([](const Kernels& kernels) {
        for (const std::size_t n : {1, 9, 64}) {
            Channels in(n, 3.0F);
            in.aa.assign(n, 0.0F);
            in.bb.assign(n, 0.0F);
            in.pp.assign(n, -1e30F);
            check_wkv4(kernels, in);
        }
    });
}

// exp(200) is no float32; with a shared exponent nothing comes near it.
TEST(wkv4_does_not_overflow) {
    for_every_isa([](const Kernels& kernels) {
        Channels in(16, 1.0F);
        in.k.assign(16, 200.0F);
        check_wkv4(kernels, in);
        in.pp.assign(16, 500.0F);
        check_wkv4(kernels, in);
    });
}

TEST(wkv6_is_that_of_the_formula) {
    for_every_isa([](const Kernels& kernels) {
        for (const std::size_t n : kMatrixSizes) {
            check_wkv6(kernels, MatrixInputs(n), false);
            check_wkv6(kernels, MatrixInputs(n), true);
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
