#include <cmath>
#include <vector>

#include "reference.h"

namespace goslet::reference {
namespace {

constexpr double kKeyNormFloor = 1e-12;

}  // namespace

void wkv4(const Wkv4Channels& in) {
    for (std::size_t i = 0; i < in.n; ++i) {
        const double k = in.k[i];
        const double v = in.v[i];
        const double first = in.first[i] + k;
        const double now = std::fmax(in.pp[i], first);
        const double past = std::exp(in.pp[i] - now);
        const double present = std::exp(first - now);
        in.y[i] = static_cast<float>(in.r[i] * (past * in.aa[i] + present * v) / (past * in.bb[i] + present));
        const double decayed = static_cast<double>(in.pp[i]) + in.decay[i];
        const double top = std::fmax(decayed, k);
        const double kept = std::exp(decayed - top);
        const double added = std::exp(k - top);
        in.aa[i] = static_cast<float>(kept * in.aa[i] + added * v);
        in.bb[i] = static_cast<float>(kept * in.bb[i] + added);
        in.pp[i] = static_cast<float>(top);
    }
}

void wkv6(const Wkv6Head& head) {
    const std::size_t n = head.head_size;
    std::vector<double> y(n, 0.0);
    for (std::size_t i = 0; i < n; ++i) {
        float* row = head.state + i * n;
        for (std::size_t j = 0; j < n; ++j) {
            const double written = static_cast<double>(head.k[i]) * head.v[j];
            y[j] += head.r[i] * (head.bonus[i] * written + row[j]);
            row[j] = static_cast<float>(static_cast<double>(head.w[i]) * row[j] + written);
        }
    }
    const std::vector<double> normed = normalized(y, head.norm_eps);
    for (std::size_t j = 0; j < n; ++j) {
        const double gate = head.g == nullptr ? 1.0 : head.g[j];
        head.y[j] = static_cast<float>((normed[j] * head.norm_weight[j] + head.norm_bias[j]) * gate);
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
