// One block of CUDA threads on one OS thread: lock-step at barriers and warp collectives, every fault an error.
#pragma once
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <vector>

#include "fiber.h"

namespace fastres::emulator {

using Site = std::source_location;

// Access to a shared array since the last barrier, for the race check; one of each element.
struct Trace {
    std::uint64_t written_at = 0, read_at = 0;  // phase, 0 never
    int writer = -1, reader = -1;               // thread; kMany readers
};

struct SharedArray {
    std::vector<unsigned char> bytes;
    std::vector<Trace> trace;
    std::size_t element = 0;
    Site site;
};

class Machine {
  public:
    // The machine of the calling OS thread.
    static Machine& current();

    // Runs `body` once for each thread of each block, in an order drawn from `seed`. Throws std::runtime_error, with
    // kernel, block and source line, on: a barrier or warp collective that part of the threads never reach or reach
    // elsewhere, a race or an index out of range in shared memory, a misaligned access, a grid CUDA would refuse.
    void run(const char* kernel, std::int64_t grid_x, std::int64_t grid_y, int threads, std::uint64_t seed,
             const std::function<void()>& body);

    int thread() const { return thread_; }
    std::int64_t block_x() const { return block_x_; }
    std::int64_t block_y() const { return block_y_; }
    std::int64_t grid_x() const { return grid_x_; }

    void barrier(Site site);
    // Publishes 8 bytes, waits for the warp, and returns the 32 values published; `kind` names the collective.
    const std::uint64_t* exchange(const char* kind, std::uint64_t value, Site site);

    // The array behind one SHARED declaration: same `key`, same memory for every thread of the block.
    SharedArray& shared(const void* key, std::size_t element, std::size_t count, Site site);
    void on_read(SharedArray& array, std::size_t i);
    void on_write(SharedArray& array, std::size_t i);

    // Throws from inside a kernel.
    [[noreturn]] void fault(const std::string& what) const;

  private:
    enum class State { kReady, kBarrier, kWarp, kDone };
    struct Thread {
        Fiber fiber;
        State state = State::kReady;
        const char* kind = nullptr;
        Site site;
        unsigned round = 0;  // warp collectives so far: the exchange buffer is double
    };

    static void fiber_main();
    void run_block();
    void wait(State state, const char* kind, Site site);
    void shuffle(std::vector<int>& order);
    bool release();
    void check_warp(int first, int last) const;
    std::string where() const;

    const char* kernel_ = nullptr;
    const std::function<void()>* body_ = nullptr;
    std::int64_t block_x_ = 0, block_y_ = 0, grid_x_ = 0;
    int threads_ = 0, thread_ = 0;
    std::uint64_t random_ = 0, phase_ = 0;
    bool busy_ = false;
    std::string error_;
    Fiber host_;
    std::unique_ptr<Stacks> stacks_;
    std::vector<Thread> pool_;
    std::vector<int> order_;
    std::vector<std::uint64_t> mail_;  // [warps][2][32]
    std::vector<std::pair<const void*, std::unique_ptr<SharedArray>>> arrays_;
};

}  // namespace fastres::emulator
