#include <cmath>
#include <vector>

#include "reference.h"

namespace goslet::reference {

namespace {

constexpr double kDecayScale = -0.6065306597126334;  // -exp(-1/2)

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
            return x < 0.0 ? 0.0 : x * x;
        case Activation::kDecay:
            return std::exp(kDecayScale * sigmoid(x));
        case Activation::kDoubleExp:
            return std::exp(-std::exp(x));
    }
    return x;
}

}  // namespace

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

void combine(Combine how, const float* y, const float* a, const float* b, std::size_t n, float* out) {
    for (std::size_t i = 0; i < n; ++i) {
        switch (how) {
            case Combine::kSet:
                out[i] = y[i];
                break;
            case Combine::kAdd:
                out[i] += y[i];
                break;
            case Combine::kGate:
                out[i] = y[i] * a[i];
                break;
            case Combine::kGateAdd:
                out[i] = static_cast<float>(out[i] + static_cast<double>(y[i]) * a[i]);
                break;
            case Combine::kLerp:
                out[i] = static_cast<float>(a[i] + (static_cast<double>(b[i]) - a[i]) * y[i]);
                break;
        }
    }
}

void small_product(const float* x, const float* matrix, std::size_t n, float* out) {
    for (std::size_t j = 0; j < n; ++j) {
        double total = 0.0;
        for (std::size_t i = 0; i < n; ++i) {
            total += static_cast<double>(x[i]) * matrix[i * n + j];
        }
        out[j] = static_cast<float>(total);
    }
}

}  // namespace goslet::reference
