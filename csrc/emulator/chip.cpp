#include "chip.h"

#include <algorithm>
#include <stdexcept>

namespace fastres::emulator {

namespace {

constexpr std::size_t kKiB = 1024;
constexpr std::size_t kReserved = kKiB;  // the system's share of each block's shared memory
constexpr int kMultiprocessors = 4, kMaxMultiprocessors = 32;

// CUDA programming guide, "Technical specifications per compute capability".
constexpr Chip kChips[] = {
    {"sm_80", 2048, 163 * kKiB, 164 * kKiB, kMultiprocessors},
    {"sm_89", 1536, 99 * kKiB, 100 * kKiB, kMultiprocessors},
    {"sm_90a", 2048, 227 * kKiB, 228 * kKiB, kMultiprocessors},
    {"sm_100", 2048, 227 * kKiB, 228 * kKiB, kMultiprocessors},
};

Chip& current() {
    static Chip chip = kChips[2];
    return chip;
}

}  // namespace

int Chip::resident_blocks(int threads, std::size_t shared_bytes) const {
    const auto by_memory = static_cast<int>(shared_per_multiprocessor / (shared_bytes + kReserved));
    return std::min(threads_per_multiprocessor / threads, by_memory);
}

const Chip& chip() { return current(); }

void set_chip(const std::string& name, int multiprocessors) {
    if (multiprocessors < 1 || multiprocessors > kMaxMultiprocessors) {
        throw std::invalid_argument("multiprocessors: expected 1.." + std::to_string(kMaxMultiprocessors) + ", got " +
                                    std::to_string(multiprocessors));
    }
    for (const Chip& known : kChips) {
        if (name != known.name) continue;
        current() = known;
        current().multiprocessors = multiprocessors;
        return;
    }
    throw std::invalid_argument("chip: expected sm_80, sm_89, sm_90a or sm_100, got \"" + name + "\"");
}

}  // namespace fastres::emulator
