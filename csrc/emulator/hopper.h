// Asynchronous hardware of sm_90: barriers in shared memory, bulk copies and warpgroup products of one block.
//
// Everything asynchronous happens as late as it may: a load lands when no thread can go on otherwise, a store and a
// product read shared memory when they are waited for. What is read too early is NaN or an error.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace fastres::emulator {

// Who knows of whose accesses without a block barrier in between: vector clocks, handed on by barriers in shared
// memory. One number more than threads: the last is the asynchronous proxy's.
class Order {
  public:
    using Clocks = std::vector<std::uint32_t>;

    explicit Order(int threads) : proxy_(threads) {}

    bool active() const { return !clock_.empty(); }
    void activate();
    int proxy() const { return proxy_; }
    std::uint32_t clock(int thread) const { return active() ? clock_[static_cast<std::size_t>(thread)] : 0; }
    bool knows(int thread, int other, std::uint32_t at) const;

    // What `thread` knows and has done up to here; it goes on with the next tick.
    Clocks release(int thread);
    void acquire(int thread, const Clocks& clocks);
    static void join(Clocks& into, const Clocks& from);

    // Readers of an element that no single clock describes. `first`: the reader so far, -1: already many.
    void read_by_many(const void* element, int first, std::uint32_t at, int thread);
    bool knows_readers(int thread, const void* element) const;

    // fence.proxy.async: what the thread wrote so far is seen by the asynchronous proxy.
    void fence(int thread);
    bool fenced(int thread, std::uint32_t at) const;

  private:
    int proxy_;
    Clocks clock_, fence_;
    std::vector<Clocks> known_;
    std::unordered_map<const void*, Clocks> readers_;
};

constexpr std::size_t kChunk = 16;  // bytes: element of the dynamic memory that asynchronous hardware touches
// Where the dynamic memory begins in the shared window: aligned to 16 bytes and no more, as behind static arrays.
constexpr std::uint32_t kSharedBase = 1024 + 208;

class Hopper {
  public:
    explicit Hopper(int threads);

    Order order;

    // ---- barriers: element `i` of a shared array of 8-byte words
    void init(Machine& m, SharedArray& array, std::size_t i, std::uint32_t count);
    void arrive(Machine& m, SharedArray& array, std::size_t i, std::uint32_t bytes);
    void wait(Machine& m, SharedArray& array, std::size_t i, std::uint32_t parity, Site site);

    // `count` threads meet at `id`, again and again.
    void meet(Machine& m, int id, std::uint32_t count, const char* kind, Site site);

    // ---- loads: the chunks are taken from the threads at once; `fill` writes them when they land
    struct Load {
        SharedArray* target;
        std::vector<std::size_t> chunks;
        std::function<void(unsigned char* bytes)> fill;  // of the whole target array
        SharedArray* barrier;
        std::size_t at;
    };
    void issue(Machine& m, Load load);
    bool land_one(Machine& m, std::uint64_t random);

    // ---- stores and products: groups of a thread, run in order when they are waited for
    enum Kind { kStores, kProducts };
    void enqueue(int thread, Kind kind, std::function<void()> run);
    void commit(int thread, Kind kind);
    void wait_groups(int thread, Kind kind, std::size_t left);
    // The accumulators of a product, NaN for the thread until the last product on them is done.
    std::shared_ptr<std::vector<float>> accumulators(int thread, float* d, std::size_t n);
    void done_with(int thread, float* d);
    bool& products_fenced(int thread) { return threads_[static_cast<std::size_t>(thread)].fenced; }

    // Read by the asynchronous proxy on behalf of the running thread.
    void on_async_read(Machine& m, SharedArray& array, std::size_t chunk);

    void on_return(Machine& m);

  private:
    struct Barrier {
        std::uint32_t expected = 0, pending = 0;
        std::int64_t bytes = 0;
        std::uint64_t completed = 0;  // phases
        Order::Clocks gathered, released;
    };
    struct Queue {
        std::vector<std::function<void()>> open;
        std::vector<std::vector<std::function<void()>>> groups;
    };
    struct Accumulators {
        float* d;
        std::shared_ptr<std::vector<float>> values;
        int products;
    };
    struct Thread {
        Queue queues[2];
        std::vector<Accumulators> accumulators;
        bool fenced = false;
    };
    struct Flight {
        Load load;
        std::uint32_t clock;
    };
    Barrier& find(Machine& m, SharedArray& array, std::size_t i, const char* what);
    static void advance(Barrier& b);

    std::unordered_map<const void*, Barrier> barriers_;  // by the trace of their word
    std::unordered_map<int, Barrier> meetings_;
    std::vector<Flight> flights_;
    std::vector<Thread> threads_;
};

}  // namespace fastres::emulator
