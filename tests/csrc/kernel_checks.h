// What the tests of kernels share: random numbers, outputs between guards, and the error bounds of norms.
//
// Tolerances are first-order error bounds of float32 arithmetic, u = 2^-24 being the largest relative error of one
// rounding; a sum of n terms in any order is within n·u·Σ|term|. kSecondOrder stands for the products of errors.
#pragma once

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

using goslet::Isa;
using goslet::Kernels;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

constexpr double kU = 1.0 / (1 << 24);
constexpr double kSecondOrder = 1.01;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
const std::size_t kSizes[] = {1, 5, 7, 8, 9, 31, 32, 33, 64, 100, 768};

std::mt19937 generator(7);

[[maybe_unused]] Floats normal(std::size_t n, float scale = 1.0F, float mean = 0.0F) {
    std::normal_distribution<float> distribution(mean, scale);
    Floats numbers(n);
    for (float& number : numbers) {
        number = distribution(generator);
    }
    return numbers;
}

[[maybe_unused]] Floats uniform(std::size_t n, float low, float high) {
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

[[maybe_unused]] Normed normed(const Doubles& x, const Doubles& errors, double eps) {
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

}  // namespace
