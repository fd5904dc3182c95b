#include "cpu/parallel.h"

#ifdef __linux__
#include <sys/mman.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#include "cpu/pool.h"

namespace cpu_runtime {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using OmpInt = int (*)();

GompParallel gomp_parallel = nullptr;
OmpInt omp_thread_num = nullptr;
OmpInt omp_num_threads = nullptr;

struct Region {
    i64 tasks;
    void (*body)(void*, i64, i64, int);
    void* data;
};

void member(void* p) {
    const Region& r = *static_cast<const Region*>(p);
    const i64 team = omp_num_threads(), me = omp_thread_num();
    const i64 first = r.tasks * me / team, last = r.tasks * (me + 1) / team;
    if (first < last) r.body(r.data, first, last, static_cast<int>(me));
}

}  // namespace

void parallel(i64 threads, i64 tasks, void (*body)(void*, i64, i64, int), void* data) {
    threads = std::min(threads, tasks);
    if (threads <= 1 || !gomp_parallel) {
        if (tasks > 0) body(data, 0, tasks, 0);
        return;
    }
    Region region{tasks, body, data};
    gomp_parallel(member, &region, static_cast<unsigned>(threads), 0);
}

void set_openmp(std::uintptr_t parallel, std::uintptr_t thread_num, std::uintptr_t num_threads) {
    const bool all = parallel && thread_num && num_threads;
    omp_thread_num = all ? reinterpret_cast<OmpInt>(thread_num) : nullptr;
    omp_num_threads = all ? reinterpret_cast<OmpInt>(num_threads) : nullptr;
    gomp_parallel = all ? reinterpret_cast<GompParallel>(parallel) : nullptr;
}

bool has_openmp() { return gomp_parallel != nullptr; }

i64 l2_bytes() {
    static const i64 bytes = [] {
#ifdef _SC_LEVEL2_CACHE_SIZE
        const long told = sysconf(_SC_LEVEL2_CACHE_SIZE);
        if (told > 0) return i64(told);
#endif
        return i64(512) << 10;
    }();
    return bytes;
}

i64 scratch_pitch(i64 bytes) { return (bytes + l2_bytes() - 1) / l2_bytes() * l2_bytes(); }

void prefer_huge_pages(std::uintptr_t address, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const std::uintptr_t page = 4096, first = (address + page - 1) / page * page,
                         last = (address + bytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)address, (void)bytes;
#endif
}

void bad_dtype(int dtype) {
    throw std::invalid_argument("dtype must be 0 float32, 1 bfloat16, 2 float16 or 3 float64, got " +
                                std::to_string(dtype));
}

Scratch::Scratch(std::size_t bytes) : block_(nullptr), memory_(nullptr) {
    if (bytes >= (std::size_t(2) << 20)) {
        block_ = new PoolBlock(bytes);
        memory_ = block_->get();
    } else if (bytes) {
        memory_ = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
        if (!memory_) throw std::bad_alloc();
    }
}

Scratch::~Scratch() {
    if (block_) {
        delete block_;
    } else {
        std::free(memory_);
    }
}

}  // namespace cpu_runtime
