#include <cmath>
#include <vector>

#include "reference.h"

namespace goslet::reference {

namespace {

constexpr double kDecayScale = -0.6065306597126334;  // -exp(-1/2)
constexpr double kKeyNormFloor = 1e-12;

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
            return x < 0.0 ? 0.0 : x * x;
        case Activation::kDecay:
            return std::exp(kDecayScale * sigmoid(x));
    }
    return x;
}

// Numbers with mean 0 and variance 1, but for eps; the variance is the biased one.
std::vector<double> normalized(const std::vector<double>& x, double eps) {
    const double n = static_cast<double>(x.size());
    double mean = 0.0;
    for (const double number : x) {
        mean += number / n;
    }
    double variance = 0.0;
    for (const double number : x) {
        variance += (number - mean) * (number - mean) / n;
    }
    std::vector<double> out;
    for (const double number : x) {
        out.push_back((number - mean) / std::sqrt(variance + eps));
    }
    return out;
}

}  // namespace

void layer_norm(const float* x, const float* weight, const float* bias, float eps, std::size_t n, float* out) {
    const std::vector<double> normed = normalized(std::vector<double>(x, x + n), eps);
    for (std::size_t i = 0; i < n; ++i) {
        out[i] = static_cast<float>(normed[i] * weight[i] + bias[i]);
    }
}

void lerp(const float* x, const float* previous, const float* mix, std::size_t n, float* out) {
    for (std::size_t i = 0; i < n; ++i) {
        out[i] = static_cast<float>(x[i] + (static_cast<double>(previous[i]) - x[i]) * mix[i]);
    }
}

void activate(Activation activation, const float* bias, std::size_t n, float* y) {
    for (std::size_t i = 0; i < n; ++i) {
        const double x = bias == nullptr ? y[i] : static_cast<double>(y[i]) + bias[i];
        y[i] = static_cast<float>(activated(activation, x));
    }
}

void add(const float* y, std::size_t n, float* out) {
    for (std::size_t i = 0; i < n; ++i) {
        out[i] += y[i];
    }
}

void wkv7(const Wkv7Head& head) {
    const std::size_t n = head.head_size;
    std::vector<double> v(n), k(n), kappa(n), y(n);

    double squares = 0.0;
    for (std::size_t j = 0; j < n; ++j) {
        v[j] = head.v[j];
        if (head.value_mix == nullptr) {
            head.first_value[j] = head.v[j];
        } else {
            v[j] += (static_cast<double>(head.first_value[j]) - head.v[j]) * head.value_mix[j];
        }
        k[j] = head.k[j] * (1.0 + (head.a[j] - 1.0) * head.k_a[j]);
        kappa[j] = static_cast<double>(head.k[j]) * head.k_k[j];
        squares += kappa[j] * kappa[j];
    }
    const double norm = std::sqrt(squares);
    double bonus = 0.0;
    for (std::size_t j = 0; j < n; ++j) {
        kappa[j] /= norm < kKeyNormFloor ? kKeyNormFloor : norm;
        bonus += head.r[j] * k[j] * head.r_k[j];
    }

    for (std::size_t i = 0; i < n; ++i) {
        float* row = head.state + i * n;
        double removed = 0.0;
        for (std::size_t j = 0; j < n; ++j) {
            removed += row[j] * kappa[j];
        }
        y[i] = 0.0;
        for (std::size_t j = 0; j < n; ++j) {
            const double updated =
                static_cast<double>(row[j]) * head.w[j] - removed * (kappa[j] * head.a[j]) + v[i] * k[j];
            y[i] += updated * head.r[j];
            row[j] = static_cast<float>(updated);
        }
    }

    const std::vector<double> normed = normalized(y, head.norm_eps);
    for (std::size_t i = 0; i < n; ++i) {
        const double gated = (normed[i] * head.norm_weight[i] + head.norm_bias[i] + bonus * v[i]) * head.g[i];
        head.y[i] = static_cast<float>(gated);
    }
}

}  // namespace goslet::reference
