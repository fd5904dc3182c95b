// What a launch would cost the memory system: bytes moved, wavefronts lost to bank conflicts.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <source_location>
#include <tuple>
#include <unordered_set>
#include <vector>

namespace fastres::emulator {

// Since they were last reset. Only accesses made through the accessors of arch.cuh are seen.
struct Counters {
    std::int64_t loaded = 0, stored = 0;            // bytes between global memory and the multiprocessors
    std::int64_t loaded_once = 0, stored_once = 0;  // the same, each 32-byte sector counted once: what DRAM must move
    std::int64_t wavefronts = 0;                    // of accesses to shared memory
    std::int64_t conflicts[4] = {};                 // wavefronts above the least possible, by kind of access
};

// Of matrices, of 16 bytes a lane (load, store), of 4 bytes (load).
enum class Access { kMatrix, kLoad, kStore, kWord };

// Collects what one launch after the other does, while it is switched on.
class Meter {
  public:
    bool on = false;
    Counters counters;

    void reset();
    void load(const void* p, std::size_t bytes);
    void store(const void* p, std::size_t bytes);
    // Eight rows of 16 bytes, or 32 words, that one wavefront serves if they fall into distinct banks; `bytes` are
    // shared addresses.
    void rows(const std::uint64_t* bytes, int n, Access kind);
    // A lane's access. The n-th time each lane of a warp passes `site` counts as one instruction of the warp.
    void lane(int thread, std::uint64_t byte, Access kind, const std::source_location& site);
    // A block has ended: instructions that part of a warp executed are settled.
    void settle();

  private:
    struct Instruction {
        std::uint32_t present = 0;
        std::array<std::uint64_t, 32> bytes{};
    };
    struct Stream {
        std::array<std::size_t, 32> passed{};
        std::vector<Instruction> open;
        std::size_t first = 0;
    };
    void close(const Instruction& instruction, Access kind);
    static std::int64_t touch(std::unordered_set<std::uintptr_t>& sectors, const void* p, std::size_t bytes);

    std::unordered_set<std::uintptr_t> loaded_, stored_;
    // warp, file, line, column, kind
    std::map<std::tuple<int, const char*, unsigned, unsigned, int>, Stream> streams_;
};

}  // namespace fastres::emulator
