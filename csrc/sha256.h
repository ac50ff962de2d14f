// SHA-256 (FIPS 180-4), by which the sections of a file are checked.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace goslet {

using Sha256Digest = std::array<std::uint8_t, 32>;

Sha256Digest sha256(std::string_view bytes);
// 64 small hex digits.
std::string hex(const Sha256Digest& digest);

}  // namespace goslet
