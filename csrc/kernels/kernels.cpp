#include "kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "tables.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace goslet {

namespace {

constexpr Isa kIsas[] = {Isa::kReference,  Isa::kPortable, Isa::kAvx2,       Isa::kAvx512,
                         Isa::kAvx512Vnni, Isa::kNeon,     Isa::kNeonDotprod};

#if defined(__aarch64__)
[[maybe_unused]] bool has_dotprod() {
#if defined(__linux__)
    constexpr unsigned long kAsimdDp = 1UL << 20;  // HWCAP_ASIMDDP of the kernel's asm/hwcap.h
    return (getauxval(AT_HWCAP) & kAsimdDp) != 0;
#elif defined(__APPLE__)
    return true;  // every such Mac has them
#else
    return false;
#endif
}
#endif

#if defined(__x86_64__)
// The compilers' __builtin_cpu_supports does not know this feature everywhere. With AVX2, the system keeps its
// registers.
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

// The table of an instruction set, or null where it is not compiled in or the CPU does not run it.
const Kernels* table(Isa isa) {
    switch (isa) {
        case Isa::kReference:
            return &kReferenceKernels;
        case Isa::kPortable:
            return &kPortableKernels;
#if defined(__x86_64__)
        case Isa::kAvx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() ? &kAvx2Kernels
                                                                                                 : nullptr;
        case Isa::kAvx512:
            return table(Isa::kAvx2) != nullptr && __builtin_cpu_supports("avx512f") &&
                           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                           __builtin_cpu_supports("avx512vl")
                       ? &kAvx512Kernels
                       : nullptr;
        case Isa::kAvx512Vnni:
            return table(Isa::kAvx512) != nullptr && __builtin_cpu_supports("avx512vnni") ? &kAvx512VnniKernels
                                                                                          : nullptr;
#elif defined(__aarch64__)
        case Isa::kNeon:
            return &kNeonKernels;
#if !defined(__clang__) || __clang_major__ >= 16  // see kernels_neondot.cpp
        case Isa::kNeonDotprod:
            return has_dotprod() ? &kNeonDotprodKernels : nullptr;
#endif
#endif
        default:
            return nullptr;
    }
}

std::string names_of(const std::vector<Isa>& isas) {
    std::string names;
    for (const Isa isa : isas) {
        names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
    }
    return names;
}

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::kReference:
            return "reference";
        case Isa::kPortable:
            return "portable";
        case Isa::kAvx2:
            return "avx2";
        case Isa::kAvx512:
            return "avx512";
        case Isa::kAvx512Vnni:
            return "avx512vnni";
        case Isa::kNeon:
            return "neon";
        case Isa::kNeonDotprod:
            return "neondot";
    }
    return "unknown";
}

Isa isa_named(std::string_view name) {
    for (const Isa isa : kIsas) {
        if (name == isa_name(isa)) {
            return isa;
        }
    }
    throw std::invalid_argument("no instruction set is called '" + std::string(name) + "'; they are " +
                                names_of({std::begin(kIsas), std::end(kIsas)}));
}

std::vector<Isa> available_isas() {
    std::vector<Isa> isas;
    for (const Isa isa : kIsas) {
        if (table(isa) != nullptr) {
            isas.push_back(isa);
        }
    }
    return isas;
}

Isa chosen_isa() {
    const char* name = std::getenv("GOSLET_ISA");
    if (name == nullptr || *name == '\0') {
        return available_isas().back();
    }
    const Isa isa = isa_named(name);
    kernels_for(isa);
    return isa;
}

const Kernels& kernels_for(Isa isa) {
    const Kernels* kernels = table(isa);
    if (kernels == nullptr) {
        throw std::invalid_argument("this CPU does not run '" + std::string(isa_name(isa)) + "'; it runs " +
                                    names_of(available_isas()));
    }
    return *kernels;
}

}  // namespace goslet
