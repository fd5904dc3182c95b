// Kernels with planted faults, and sound ones, for tests/test_emulator.py. Not part of any module.
#include "../cuda/arch.cuh"
#include "chip.h"

#include <cstdio>
#include <cstring>

namespace FASTRES_BACKEND {

namespace {

DEVICE float warp_sum(float v) {
    for (int lane_mask = kWarp / 2; lane_mask; lane_mask /= 2) v += shuffle_xor(v, lane_mask);
    return v;
}

// out[block] = sum of 256 inputs: shuffles, shared memory, one barrier.
KERNEL(1)
block_sum(const float* in, float* out) {
    SHARED(float, part, kWarps);
    const float sum = warp_sum(in[block_x() * kThreads + thread_index()]);
    if (thread_index() % kWarp == 0) part[thread_index() / kWarp] = sum;
    sync_block();
    if (thread_index()) return;
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += part[w];
    out[block_x()] = total;
}

KERNEL(1)
no_barrier(const float* in, float* out) {
    SHARED(float, part, kWarps);
    const float sum = warp_sum(in[thread_index()]);
    if (thread_index() % kWarp == 0) part[thread_index() / kWarp] = sum;
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += part[w];
    out[thread_index()] = total;
}

// The array is used twice; the second round may overwrite what a slow thread still reads.
KERNEL(1)
no_second_barrier(const float* in, float* out) {
    SHARED(float, value, kThreads);
    float sum = 0;
    for (int round = 1; round <= 2; ++round) {
        value[thread_index()] = in[thread_index()] * static_cast<float>(round);
        sync_block();
        sum += value[(thread_index() + 1) % kThreads];
    }
    out[thread_index()] = sum;
}

KERNEL(1)
half_warp_shuffle(const float* in, float* out) {
    float v = in[thread_index()];
    if (thread_index() % kWarp < kWarp / 2) v = shuffle_xor(v, 1);
    out[thread_index()] = v;
}

KERNEL(1)
half_warp_ballot(const float*, float* out) {
    if (thread_index() % kWarp == 7) return;
    out[thread_index()] = static_cast<float>(ballot(true));
}

KERNEL(1)
half_block_barrier(const float*, float* out) {
    if (thread_index() < kThreads / 2) sync_block();
    out[thread_index()] = 1;
}

KERNEL(1)
two_barriers(const float*, float* out) {
    if (thread_index() < kThreads / 2) {
        sync_block();
    } else {
        out[thread_index()] = 1;
        sync_block();
    }
}

// One warp has gone on to a barrier while another waits at a shuffle: legal, and both arrive.
KERNEL(1)
uneven_warps(const float* in, float* out) {
    float v = in[thread_index()];
    for (int i = 0; i < thread_index() / kWarp; ++i) v += shuffle_xor(v, 1 + i);
    sync_block();
    out[thread_index()] = v;
}

KERNEL(1)
unwritten(const float*, float* out) {
    SHARED(float, value, kThreads);
    if (thread_index() % 2) value[thread_index()] = 1;
    out[thread_index()] = value[thread_index()];
}

KERNEL(1)
out_of_range(const float*, float* out) {
    SHARED(float, value, kThreads);
    value[thread_index() + 1] = 1;
    out[thread_index()] = value[thread_index() + 1];
}

KERNEL(1)
too_much_shared(const float*, float* out) {
    SHARED(double, value, 6200);
    value[thread_index()] = 1;
    out[thread_index()] = static_cast<float>(value[thread_index()]);
}

KERNEL(1)
misaligned(const float* in, float* out) { out[thread_index()] = bits_float(load16(in + thread_index()).w[0]); }

KERNEL(1)
votes(const float* in, float* out) { out[thread_index()] = bits_float(ballot(in[thread_index()] > 0)); }

// Order of execution: a global counter, which no sound kernel has.
KERNEL(1)
turns(const float*, float* out) {
    out[block_x() * kThreads + thread_index()] = out[grid_x() * kThreads];
    out[grid_x() * kThreads] += 1;
}

// 2 x 256 words in, 256 out: 16-bit conversions, a float for each code and a code for each float.
KERNEL(1)
round_trip(const float* in, float* out) {
    const u32 bf = pack_bf16(in[thread_index()], 0), half = pack_f16(0, in[thread_index()]);
    float lo, hi;
    unpack_f16(half, lo, hi);
    out[thread_index()] = bits_float(bf << 16);
    out[thread_index() + kThreads] = hi;
}

KERNEL(1)
nothing(const float*, float*) {}

// ---- cooperative grids: out [blocks + blocks] partial sums, then in every block's place the sum of all

DEVICE void total_of_all(float* out) {
    if (thread_index()) return;
    float total = 0;
    for (i64 b = 0; b < grid_x(); ++b) total += out[b];
    out[grid_x() + block_x()] = total;
}

KERNEL(2)
grid_sum(const float* in, float* out) {
    if (thread_index() == 0) out[block_x()] = in[block_x()];
    sync_grid();
    total_of_all(out);
}

KERNEL(2)
no_grid_barrier(const float* in, float* out) {
    if (thread_index() == 0) out[block_x()] = in[block_x()];
    sync_block();
    total_of_all(out);
}

KERNEL(2)
one_block_leaves(const float*, float*) {
    if (block_x() == 2) return;
    sync_grid();
}

KERNEL(2)
half_block_at_grid_barrier(const float*, float*) {
    if (thread_index() < kThreads / 2) {
        sync_grid();
    } else {
        sync_block();
    }
}

KERNEL(2)
two_grid_barriers(const float*, float*) {
    if (block_x() == 0) {
        sync_grid();
    } else {
        sync_grid();
    }
}

// Thread t writes the last word but t of the dynamic memory, and reads its neighbour's.
KERNEL(2)
dynamic_memory(const float* in, float* out) {
    DYNAMIC_SHARED(float, value);
    const int last = static_cast<int>(in[0]) - 1;
    value[last - thread_index()] = static_cast<float>(thread_index());
    sync_block();
    out[thread_index()] = value[last - (thread_index() + 1) % kThreads];
}

KERNEL(2)
dynamic_memory_race(const float* in, float* out) {
    DYNAMIC_SHARED(float, value);
    value[thread_index()] = in[0];
    out[thread_index()] = value[(thread_index() + 1) % kThreads];
}

struct Test {
    const char* name;
    void (*kernel)(const float*, float*);
    i64 grid_x, grid_y;
    i64 shared_bytes = -1;  // cooperative where given
};

constexpr Test kTests[] = {
    {"block_sum", block_sum, 5, 1},
    {"no_barrier", no_barrier, 1, 1},
    {"no_second_barrier", no_second_barrier, 1, 1},
    {"half_warp_shuffle", half_warp_shuffle, 1, 1},
    {"half_warp_ballot", half_warp_ballot, 1, 1},
    {"half_block_barrier", half_block_barrier, 1, 1},
    {"two_barriers", two_barriers, 1, 1},
    {"uneven_warps", uneven_warps, 1, 1},
    {"unwritten", unwritten, 1, 1},
    {"out_of_range", out_of_range, 1, 1},
    {"too_much_shared", too_much_shared, 1, 1},
    {"misaligned", misaligned, 1, 1},
    {"votes", votes, 1, 1},
    {"turns", turns, 7, 1},
    {"round_trip", round_trip, 1, 1},
    {"grid_too_wide", nothing, i64{1} << 31, 1},
    {"grid_too_high", nothing, 1, 65536},
    {"empty_grid", out_of_range, 0, 1},
    {"grid_sum", grid_sum, 8, 1, 0},
    {"no_grid_barrier", no_grid_barrier, 8, 1, 0},
    {"one_block_leaves", one_block_leaves, 8, 1, 0},
    {"half_block_at_grid_barrier", half_block_at_grid_barrier, 2, 1, 0},
    {"two_grid_barriers", two_grid_barriers, 2, 1, 0},
    {"grid_barrier_in_an_ordinary_launch", grid_sum, 1, 1},
    {"nine_blocks", grid_sum, 9, 1, 0},
    {"five_large_blocks", grid_sum, 5, 1, 120 * 1024},
    {"four_large_blocks", grid_sum, 4, 1, 120 * 1024},
    {"block_too_large", grid_sum, 1, 1, 227 * 1024 + 1},
    {"dynamic_memory", dynamic_memory, 1, 1, 100 * 1024},
    {"dynamic_memory_race", dynamic_memory_race, 1, 1, 4 * kThreads},
    {"dynamic_memory_too_small", dynamic_memory, 1, 1, 4 * kThreads},
};

}  // namespace

}  // namespace FASTRES_BACKEND

// 0: the kernel ran; 1: it failed with `message`; 2: no such kernel.
extern "C" __attribute__((visibility("default"))) int selftest(const char* name, const float* in, float* out,
                                                               std::int64_t seed, char* message, std::size_t size) {
    using namespace FASTRES_BACKEND;
    for (const Test& test : kTests) {
        if (std::strcmp(test.name, name) != 0) continue;
        try {
            if (test.shared_bytes < 0) {
                launch(test.name, test.kernel, test.grid_x, test.grid_y, seed, in, out);
            } else {
                launch_cooperative<2>(test.name, test.kernel, test.grid_x, test.grid_y, test.shared_bytes, seed, in,
                                      out);
            }
            return 0;
        } catch (const std::exception& e) {
            std::snprintf(message, size, "%s", e.what());
            return 1;
        }
    }
    return 2;
}

extern "C" __attribute__((visibility("default"))) int selftest_chip(const char* name, int multiprocessors) {
    try {
        fastres::emulator::set_chip(name, multiprocessors);
        return 0;
    } catch (const std::invalid_argument&) {
        return 1;
    }
}
