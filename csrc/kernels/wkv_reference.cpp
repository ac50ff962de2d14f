#include <cmath>
#include <vector>

#include "recurrence.h"
#include "reference.h"

namespace goslet::reference {
namespace {

constexpr double kKeyNormFloor = 1e-12;

}  // namespace

void wkv4(const Wkv4Channels& in) {
    for (std::size_t i = 0; i < in.n; ++i) {
        recurrence::Wkv4State<double> state{in.aa[i], in.bb[i], in.pp[i]};
        const double mean = recurrence::wkv4<double>(in.k[i], in.v[i], in.decay[i], in.first[i], state);
        in.y[i] = static_cast<float>(in.r[i] * mean);
        in.aa[i] = static_cast<float>(state.aa);
        in.bb[i] = static_cast<float>(state.bb);
        in.pp[i] = static_cast<float>(state.pp);
    }
}

void wkv6(const Wkv6Head& head) {
    const std::size_t n = head.head_size;
    std::vector<double> y(n, 0.0);
    for (std::size_t i = 0; i < n; ++i) {
        float* row = head.state + i * n;
        for (std::size_t j = 0; j < n; ++j) {
            double state = row[j];
            y[j] += recurrence::wkv6<double>(head.r[i], head.k[i], head.v[j], head.w[i], head.bonus[i], state);
            row[j] = static_cast<float>(state);
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
            double state = row[j];
            y[i] += recurrence::wkv7<double>(head.r[j], head.w[j], k[j], v[i], kappa[j] * head.a[j], removed, state);
            row[j] = static_cast<float>(state);
        }
    }

    const std::vector<double> normed = normalized(y, head.norm_eps);
    for (std::size_t i = 0; i < n; ++i) {
        const double gated = (normed[i] * head.norm_weight[i] + head.norm_bias[i] + bonus * v[i]) * head.g[i];
        head.y[i] = static_cast<float>(gated);
    }
}

}  // namespace goslet::reference
