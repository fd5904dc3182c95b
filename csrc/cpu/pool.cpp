#include "cpu/pool.h"

#include <cstdint>
#include <cstdlib>
#include <list>
#include <mutex>
#include <new>

#include "cpu/parallel.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace cpu_runtime {
namespace {

constexpr std::size_t kUnit = std::size_t(2) << 20;  // a huge page of x86

struct Idle {
    void* memory;
    std::size_t bytes;
};

struct Pool {
    std::mutex mutex;
    std::list<Idle> idle;  // the longest idle first
    std::size_t in_use = 0, idle_bytes = 0, peak = 0;
};

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
    static Pool* const p = new Pool;
    return *p;
}

void* fresh(std::size_t bytes) {
    void* const p = std::aligned_alloc(kUnit, bytes);
    if (!p) throw std::bad_alloc();
    prefer_huge_pages(reinterpret_cast<std::uintptr_t>(p), bytes);
    return p;
}

}  // namespace

PoolBlock::PoolBlock(std::size_t bytes) : bytes_(bytes), held_((bytes + kUnit - 1) / kUnit * kUnit) {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    // The tightest fit that wastes at most an eighth.
    auto best = p.idle.end();
    for (auto i = p.idle.begin(); i != p.idle.end(); ++i)
        if (i->bytes >= held_ && i->bytes <= held_ + held_ / 8 && (best == p.idle.end() || i->bytes <= best->bytes))
            best = i;  // among equals the one used last, whose lines may still be in a cache
    if (best != p.idle.end()) {
        memory_ = best->memory;
        held_ = best->bytes;
        p.idle_bytes -= held_;
        p.idle.erase(best);
    } else {
        memory_ = fresh(held_);
    }
    p.in_use += held_;
    if (p.in_use > p.peak) p.peak = p.in_use;
}

PoolBlock::~PoolBlock() {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    p.in_use -= held_;
    p.idle_bytes += held_;
    p.idle.push_back({memory_, held_});
    // The sizes of a step do not peak together, so the pool may hold half as much again as was ever in use at once;
    // beyond that, what has idled longest goes.
    while (p.idle_bytes && p.in_use + p.idle_bytes > p.peak + p.peak / 2) {
        std::free(p.idle.front().memory);
        p.idle_bytes -= p.idle.front().bytes;
        p.idle.pop_front();
    }
}

PoolInfo pool_info() {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    return {p.in_use, p.idle_bytes, p.peak};
}

void pool_release() {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    for (const Idle& i : p.idle) std::free(i.memory);
    p.idle.clear();
    p.idle_bytes = 0;
    p.peak = p.in_use;
}

}  // namespace cpu_runtime
