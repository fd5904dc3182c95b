// Threads: torch's OpenMP runtime and no other.
// The core does not link an OpenMP library. backends/cpu.py finds the one torch has loaded and hands over the
// entry points that GCC-compatible runtimes (libgomp, libomp, libiomp5) share; without them one thread runs.
#pragma once
#include <cstddef>
#include <cstdint>

namespace cpu_runtime {

using i64 = std::int64_t;

// Runs body(data, first, last, thread) over a partition of [0, tasks) into contiguous ranges, one a thread.
// thread < threads always holds; the team may be smaller than asked for (nested regions).
void parallel(i64 threads, i64 tasks, void (*body)(void*, i64, i64, int), void* data);

// Entry points as addresses; parallel == 0 goes back to one thread.
void set_openmp(std::uintptr_t parallel, std::uintptr_t thread_num, std::uintptr_t num_threads);
bool has_openmp();

// Bytes of the cache that a core has to itself; 512 KiB where the system does not tell.
i64 l2_bytes();

// From one thread's part of scratch memory to the next one's: so large that, from one kernel to the next, a thread
// writes where it wrote before. It would find those lines in another core's cache otherwise.
i64 scratch_pitch(i64 bytes);

// Asks for huge pages in place of the small ones that lie wholly inside; advice, no more.
void prefer_huge_pages(std::uintptr_t address, std::size_t bytes);

[[noreturn]] void bad_dtype(int dtype);

class PoolBlock;  // pool.h

// Scratch memory aligned to a cache line, allocated before a region starts: nothing may throw inside one. What is large
// comes from the pool.
class Scratch {
  public:
    explicit Scratch(std::size_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    void* get() const { return memory_; }

  private:
    PoolBlock* block_;
    void* memory_;
};

}  // namespace cpu_runtime
