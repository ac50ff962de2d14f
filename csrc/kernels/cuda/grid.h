// How a kernel is started, on a GPU or in the host's model of one.
#pragma once

#include <cstdint>

namespace goslet::cuda {

constexpr int kWarp = 32;

struct Grid {
    std::int64_t n_blocks;
    int n_threads;         // of each block
    int shared_bytes = 0;  // that they share, besides what the kernel declares
};

}  // namespace goslet::cuda
