// Blocks of CUDA threads on one OS thread: lock-step at barriers and warp collectives, every fault an error.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

#include "counters.h"
#include "fiber.h"

namespace fastres::emulator {

using Site = std::source_location;
std::string at(const Site& site);  // "file:line"

constexpr unsigned char kPoison = 0xff;  // of memory never written: NaN in every floating type, -1 in every integer

// Access to a shared array since the last barrier, for the race check; one of each element.
struct Trace {
    std::uint64_t written_at = 0, read_at = 0;      // phase, 0 never
    int writer = -1, reader = -1;                   // thread; kMany readers
    std::uint32_t write_clock = 0, read_clock = 0;  // of the thread then, see Order
    bool by_copy = false;                           // written by the asynchronous proxy
};

struct SharedArray {
    std::vector<unsigned char> bytes;
    std::vector<Trace> trace;
    std::size_t element = 0;
    Site site;
};

// Size of a launch. shared_bytes: dynamic shared memory of a block.
struct Grid {
    std::int64_t x, y;
    int threads;
    std::size_t shared_bytes = 0;
    int blocks_per_multiprocessor = 0;  // cooperative launch: what the kernel's registers allow; 0: an ordinary one
};

class Copies;
class Hopper;

class Machine {
  public:
    static constexpr int kSlotBytes = 32;  // that a lane can publish at once

    Machine();
    ~Machine();

    // The machine of the calling OS thread.
    static Machine& current();

    // Runs `body` once for each thread of each block, in an order drawn from `seed`: block after block, or all blocks
    // interleaved where the launch is cooperative. Throws std::runtime_error, with kernel, block and source line, on: a
    // barrier or warp collective that part of the threads never reach or reach elsewhere, a race or an index out of
    // range in shared memory, a misaligned access, a launch that `chip()` would refuse.
    void run(const char* kernel, const Grid& grid, std::uint64_t seed, const std::function<void()>& body);

    int thread() const { return thread_; }
    std::int64_t block_x() const { return block_->x; }
    std::int64_t block_y() const { return block_->y; }
    std::int64_t grid_x() const { return grid_.x; }

    void barrier(Site site);
    // All threads of all blocks of a cooperative launch.
    void grid_barrier(Site site);
    // Publishes 8 bytes, waits for the warp, and returns the 32 values published; `kind` names the collective.
    const std::uint64_t* exchange(const char* kind, std::uint64_t value, Site site);
    // The same for up to kSlotBytes: lane i's begin at i * kSlotBytes.
    const unsigned char* exchange_wide(const char* kind, const void* bytes, std::size_t size, Site site);

    // The running thread's asynchronous copies.
    Copies& copies();
    // Number of the running thread among all that live at once.
    int fiber() const { return block_->first + thread_; }

    Meter meter;

    // The array behind one SHARED declaration: same `key`, same memory for every thread of the block.
    SharedArray& shared(const void* key, std::size_t element, std::size_t count, Site site);
    // The block's dynamic shared memory, in elements of this size.
    SharedArray& dynamic_shared(std::size_t element, Site site);
    void on_read(SharedArray& array, std::size_t i);
    void on_write(SharedArray& array, std::size_t i);

    // The running thread sleeps until `ready`; what wakes it is another thread or an asynchronous copy.
    void wait_until(const std::function<bool()>& ready, const char* kind, Site site);
    // Barriers in shared memory, bulk copies and warpgroup products of the running block.
    Hopper& hopper() { return *block_->hopper; }
    int threads() const { return grid_.threads; }
    std::uint64_t phase() const { return block_->phase; }

    // Throws from inside a kernel.
    [[noreturn]] void fault(const std::string& what) const;

  private:
    enum class State { kReady, kBarrier, kWarp, kGrid, kCondition, kDone };
    struct Thread {
        Fiber fiber;
        State state = State::kReady;
        const char* kind = nullptr;
        Site site;
        unsigned round = 0;  // warp collectives so far: the exchange buffer is double
        const std::function<bool()>* ready = nullptr;
    };
    struct Block {
        std::int64_t x = 0, y = 0;
        Thread* threads = nullptr;
        int first = 0;  // its first stack
        std::uint64_t phase = 1;
        bool stuck = false;               // every thread has returned or waits for the grid
        std::vector<std::uint64_t> mail;  // [warps][2][32]
        std::vector<unsigned char> wide;  // [warps][2][32][kSlotBytes]
        std::vector<std::pair<const void*, std::unique_ptr<SharedArray>>> arrays;
        std::shared_ptr<Hopper> hopper;
    };

    static void fiber_main();
    // The element's trace. Throws where there is no such element, or another thread's write to it may still be coming.
    Trace& traced(SharedArray& array, std::size_t i, const char* access);
    void check_launch(const char* kernel, const Grid& grid) const;
    void prepare(std::size_t blocks);
    void begin(Block& block, std::uint64_t number);
    void run_blocks();
    bool step(Block& block);
    void wait(State state, const char* kind, Site site);
    template <class T>
    void shuffle(std::vector<T>& order);
    bool release();
    bool release_grid();
    void check_warp(int first, int last) const;
    std::string where() const;

    const char* kernel_ = nullptr;
    const std::function<void()>* body_ = nullptr;
    Grid grid_{};
    int thread_ = 0;
    std::uint64_t random_ = 0;
    bool busy_ = false;
    std::string error_;
    Fiber host_;
    std::unique_ptr<Stacks> stacks_;
    std::vector<Thread> pool_;
    std::vector<Copies> copies_;  // of each thread in the pool
    std::vector<int> order_;
    std::vector<Block> blocks_;  // those that run at once
    Block* block_ = nullptr;
};

}  // namespace fastres::emulator
