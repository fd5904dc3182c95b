#include "cpu/pairs.h"

#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace cpu_runtime {
namespace {

// By the maker, not by a measurement: results must not depend on the clock. AMD's processors (Zen 4 and later) have it
// at the rate of other products, Intel's at half of that or less (docs/perf-log.md).
PairsUnit ask() {
#if defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__builtin_cpu_supports("avx512f") || !__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5))
        return PairsUnit::kNone;
    char maker[13] = {};
    if (!__get_cpuid(0, &a, &b, &c, &d)) return PairsUnit::kSlow;
    std::memcpy(maker, &b, 4), std::memcpy(maker + 4, &d, 4), std::memcpy(maker + 8, &c, 4);
    return std::strcmp(maker, "AuthenticAMD") ? PairsUnit::kSlow : PairsUnit::kFull;
#else
    return PairsUnit::kNone;
#endif
}

}  // namespace

PairsUnit pairs_unit() {
    static const PairsUnit unit = ask();
    return unit;
}

}  // namespace cpu_runtime
