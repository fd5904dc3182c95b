#include "cpu/pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <new>

#include "cpu/parallel.h"

namespace cpu_runtime {
namespace {

constexpr std::size_t kUnit = std::size_t(2) << 20;     // a huge page of x86
constexpr std::size_t kSegment = std::size_t(1) << 30;  // of address space: pages exist once they are touched

std::size_t round_up(std::size_t n) { return (n + kUnit - 1) / kUnit * kUnit; }

// The lowest gap that is large enough: what a step touched is what the next one gets.
struct Pool {
    std::mutex mutex;
    std::map<char*, std::size_t> gaps;  // neighbours are joined
    std::size_t in_use = 0, peak = 0;

    char* take(std::size_t bytes) {
        auto gap = std::find_if(gaps.begin(), gaps.end(), [&](const auto& g) { return g.second >= bytes; });
        if (gap == gaps.end()) gap = add_segment(bytes);
        char* const memory = gap->first;
        const std::size_t left = gap->second - bytes;
        gaps.erase(gap);
        if (left) gaps.emplace(memory + bytes, left);
        in_use += bytes;
        peak = std::max(peak, in_use);
        return memory;
    }

    void give(char* memory, std::size_t bytes) {
        in_use -= bytes;
        auto next = gaps.lower_bound(memory);
        if (next != gaps.end() && memory + bytes == next->first) {
            bytes += next->second;
            next = gaps.erase(next);
        }
        if (next != gaps.begin()) {
            auto before = std::prev(next);
            if (before->first + before->second == memory) {
                before->second += bytes;
                return;
            }
        }
        gaps.emplace_hint(next, memory, bytes);
    }

    std::map<char*, std::size_t>::iterator add_segment(std::size_t bytes) {
        const std::size_t size = std::max(bytes, kSegment) + kUnit;
        int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
        flags |= MAP_NORESERVE;
#endif
        void* const p = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
        char* const start = reinterpret_cast<char*>(round_up(reinterpret_cast<std::uintptr_t>(p)));
        prefer_huge_pages(reinterpret_cast<std::uintptr_t>(start), size - kUnit);
        return gaps.emplace(start, size - kUnit).first;
    }
};

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
    static Pool* const p = new Pool;
    return *p;
}

}  // namespace

PoolBlock::PoolBlock(std::size_t bytes) : bytes_(bytes), held_(round_up(std::max(bytes, std::size_t(1)))) {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    memory_ = pool().take(held_);
}

PoolBlock::~PoolBlock() {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    pool().give(memory_, held_);
}

PoolInfo pool_info() {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    return {pool().in_use, pool().peak};
}

void pool_release() {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    for (const auto& [memory, bytes] : pool().gaps) madvise(memory, bytes, MADV_DONTNEED);
    pool().peak = pool().in_use;
}

}  // namespace cpu_runtime
