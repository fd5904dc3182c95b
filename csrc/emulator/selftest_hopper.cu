// sm_90's asynchronous hardware on the emulator, sound and with planted faults, for tests/test_emulator_hopper.py.
#include "../cuda/arch_hopper.cuh"

#include <cstdio>
#include <cstring>

namespace FASTRES_BACKEND {

namespace {

// What a kernel does wrong.
enum Flaw : int {
    kNone,
    kNoWait,           // reads what was loaded at once
    kOneThreadWaits,   // the others read without having heard of it
    kTooManyBytes,     // announces more than come
    kNoEmptyWait,      // loads into a stage that others still read
    kNoProxyFence,     // products of what threads wrote, unfenced
    kNoProductFence,   // no warpgroup_fence
    kNoProductWait,    // reads accumulators in flight
    kOverwrites,       // writes the operands of a product in flight
    kUninitialised,    // a barrier that nobody initialised
    kUnannouncedInit,  // no block barrier behind the init
    kExtraArrival,
    kLanesDiffer,  // descriptors of one warp
};

struct At {
    int c[kMaxRank];
};

i64 aligned(i64 i, u32 address, u32 to) { return i + ((to - address % to) % to) / 16; }

// One box, from an address that is a multiple of 1024, chunk by chunk to out.
template <int kRank>
KERNEL(1)
load_box(TENSOR_MAP map, At at, i64 chunks, int flaw, Word4* out) {
    SHARED(std::uint64_t, bars, 1);
    DYNAMIC_SHARED(Word4, store);
    const i64 first = aligned(0, shared_address(store, 0), 1024);
    if (thread_index() == 0 && flaw != kUninitialised) {
        barrier_init(bars, 0, 1);
        fence_barrier_init();
    }
    if (flaw != kUnannouncedInit) sync_block();
    if (thread_index() == 0) {
        int c[kRank];
        for (int d = 0; d < kRank; ++d) c[d] = at.c[d];
        const i64 bytes = 16 * chunks;
        barrier_arrive_expect(bars, 0, static_cast<u32>(bytes + (flaw == kTooManyBytes ? 16 : 0)));
        load_tensor(store, first, map, c, bars, 0);
        if (flaw == kExtraArrival) barrier_arrive(bars, 0);
    }
    if (flaw != kNoWait && (flaw != kOneThreadWaits || thread_index() == 0)) barrier_wait(bars, 0, 0);
    for (i64 i = thread_index(); i < chunks; i += kThreads) out[i] = store[first + i];
}

// Five steps through two stages of 256 chunks: out = sum of the steps, thread by thread. Thread 0 also produces.
KERNEL(1)
pipeline(const float* in, int flaw, float* out) {
    constexpr int kSteps = 5, kStages = 2;
    SHARED(std::uint64_t, full, kStages);
    SHARED(std::uint64_t, empty, kStages);
    DYNAMIC_SHARED(Word4, store);
    if (thread_index() == 0) {
        for (int s = 0; s < kStages; ++s) {
            barrier_init(full, s, 1);
            barrier_init(empty, s, kThreads);
        }
        fence_barrier_init();
    }
    sync_block();
    const auto produce = [&](int step) {
        const int stage = step % kStages;
        if (step >= kStages && flaw != kNoEmptyWait) {
            barrier_wait(empty, stage, static_cast<u32>(step / kStages - 1) & 1);
        }
        barrier_arrive_expect(full, stage, 16 * kThreads);
        load_bulk(store, stage * kThreads, in + i64{4} * step * kThreads, 16 * kThreads, full, stage);
    };
    const bool producer = thread_index() == 0;
    if (producer) {
        for (int step = 0; step < kStages; ++step) produce(step);
    }
    float sum = 0;
    for (int step = 0; step < kSteps; ++step) {
        const int stage = step % kStages;
        barrier_wait(full, stage, static_cast<u32>(step / kStages) & 1);
        // Everybody reads the chunk of somebody else.
        const Word4 v = store[stage * kThreads + (thread_index() + 7) % kThreads];
        for (int j = 0; j < 4; ++j) sum += bits_float(v.w[j]);
        barrier_arrive(empty, stage);
        if (producer && step + kStages < kSteps) produce(step + kStages);
    }
    out[thread_index()] = sum;
}

struct Descriptors {
    u32 a, a_leading, a_stride, b, b_leading, b_stride;  // bytes
    int swizzle, base_offset, steps;
    u32 a_step, b_step;  // from one 16 of K to the next
};

// The image as it is comes to address 0 modulo 1024; d [64, N] from `steps` products over it.
template <class T, int N, bool kTransposeA, bool kTransposeB>
KERNEL(1)
products(const Word4* image, i64 chunks, Descriptors p, int flaw, float* out) {
    DYNAMIC_SHARED(Word4, store);
    const i64 first = aligned(0, shared_address(store, 0), 1024);
    for (i64 i = thread_index(); i < chunks; i += kThreads) store[first + i] = image[i];
    if (flaw != kNoProxyFence) fence_async();
    sync_block();
    if (thread_index() >= 128) return;
    float d[N / 2];
    for (float& v : d) v = 1;
    const u32 base = shared_address(store, first);
    if (flaw != kNoProductFence) warpgroup_fence();
    for (int k = 0; k < p.steps; ++k) {
        const u32 odd = flaw == kLanesDiffer && thread_index() == 5 ? 16 : 0;
        const auto step = static_cast<u32>(k);
        const auto offset = static_cast<u32>(p.base_offset);
        warpgroup_multiply<T, N, kTransposeA, kTransposeB>(
            d, matrix_descriptor(base + p.a + odd + step * p.a_step, p.a_leading, p.a_stride, p.swizzle, offset),
            matrix_descriptor(base + p.b + step * p.b_step, p.b_leading, p.b_stride, p.swizzle), k > 0);
    }
    warpgroup_commit();
    if (flaw == kOverwrites && thread_index() == 0) store[first + p.a / 16] = Word4{};
    if (flaw != kNoProductWait) warpgroup_wait<0>();
    const int lane = thread_index() % kWarp, row = thread_index() / kWarp * 16 + lane / 4;
    for (int j = 0; j < N / 8; ++j) {
        for (int e = 0; e < 4; ++e) {
            out[(row + e / 2 * 8) * N + 8 * j + lane % 4 * 2 + e % 2] = d[4 * j + e];
        }
    }
    if (flaw == kNoProductWait) warpgroup_wait<0>();
}

// The box goes through shared memory and back to another tensor; threads add one in between.
KERNEL(1)
there_and_back(TENSOR_MAP from, TENSOR_MAP to, int flaw) {
    SHARED(std::uint64_t, bars, 1);
    DYNAMIC_SHARED(Word4, store);
    const i64 first = aligned(0, shared_address(store, 0), 1024);
    const int corner[2] = {-4, 2};
    if (thread_index() == 0) {
        barrier_init(bars, 0, 1);
        fence_barrier_init();
    }
    sync_block();
    if (thread_index() == 0) {
        barrier_arrive_expect(bars, 0, 64 * 16);
        load_tensor(store, first, from, corner, bars, 0);
    }
    barrier_wait(bars, 0, 0);
    if (thread_index() < 64) {
        Word4 v = store[first + thread_index()];
        for (u32& w : v.w) w = float_bits(bits_float(w) + 1);
        store[first + thread_index()] = v;
    }
    if (flaw != kNoProxyFence) fence_async();
    sync_block();
    if (thread_index() == 0) {
        store_tensor(to, corner, store, first);
        store_commit();
        if (flaw != kNoWait) store_wait<0>();
    }
}

template <class F>
int guarded(char* message, std::size_t size, F f) {
    try {
        f();
        return 0;
    } catch (const std::exception& e) {
        std::snprintf(message, size, "%s", e.what());
        return 1;
    }
}

TensorLayout layout(const void* base, int rank, int element, const i64* dims, const i64* strides, const i64* box,
                    int swizzle) {
    TensorLayout t{base, rank, static_cast<u32>(element), {}, {}, {}, swizzle};
    for (int d = 0; d < rank && d < kMaxRank; ++d) {
        t.dims[d] = static_cast<std::uint64_t>(dims[d]);
        t.strides[d] = static_cast<std::uint64_t>(strides[d]);
        t.box[d] = static_cast<u32>(box[d]);
    }
    return t;
}

constexpr i64 kStore = 100 * 1024;

}  // namespace

}  // namespace FASTRES_BACKEND

#define EXPORT extern "C" __attribute__((visibility("default")))
using namespace FASTRES_BACKEND;

EXPORT int hopper_load(const void* base, int rank, int element, const i64* dims, const i64* strides, const i64* box,
                       int swizzle, const int* at, i64 chunks, int flaw, void* out, i64 seed, char* message,
                       std::size_t size) {
    return guarded(message, size, [&] {
        const TensorMap map = tensor_map(layout(base, rank, element, dims, strides, box, swizzle));
        At from{};
        std::copy(at, at + rank, from.c);
        void (*const kernels[])(TensorMap, At, i64, int, Word4*) = {load_box<1>, load_box<2>, load_box<3>, load_box<4>,
                                                                    load_box<5>};
        launch_cooperative<1>("load_box", kernels[rank - 1], 1, 1, kStore, seed, map, from, chunks, flaw,
                              static_cast<Word4*>(out));
    });
}

EXPORT int hopper_pipeline(const float* in, int flaw, float* out, i64 seed, char* message, std::size_t size) {
    return guarded(message, size,
                   [&] { launch_cooperative<1>("pipeline", pipeline, 1, 1, kStore, seed, in, flaw, out); });
}

EXPORT int hopper_products(int half, int narrow, int transpose_a, int transpose_b, const void* image, i64 chunks,
                           const u32* fields, const int* modes, int flaw, float* out, i64 seed, char* message,
                           std::size_t size) {
    return guarded(message, size, [&] {
        const Descriptors p{fields[0], fields[1], fields[2], fields[3], fields[4], fields[5],
                            modes[0],  modes[1],  modes[2],  fields[6], fields[7]};
        const auto start = [&](auto kernel) {
            launch_cooperative<1>("products", kernel, 1, 1, kStore, seed, static_cast<const Word4*>(image), chunks, p,
                                  flaw, out);
        };
        const auto with = [&](auto t) {
            using T = decltype(t);
            if (narrow) return start(products<T, 8, false, false>);
            if (transpose_a && transpose_b) return start(products<T, 64, true, true>);
            if (transpose_a) return start(products<T, 64, true, false>);
            transpose_b ? start(products<T, 64, false, true>) : start(products<T, 64, false, false>);
        };
        half ? with(f16{}) : with(bf16{});
    });
}

EXPORT int hopper_there_and_back(const float* from, float* to, i64 rows, i64 columns, int flaw, i64 seed, char* message,
                                 std::size_t size) {
    return guarded(message, size, [&] {
        const i64 dims[] = {columns, rows}, strides[] = {0, 4 * columns}, box[] = {32, 8};
        const TensorMap a = tensor_map(layout(from, 2, 4, dims, strides, box, kSwizzle128));
        const TensorMap b = tensor_map(layout(to, 2, 4, dims, strides, box, kSwizzle128));
        launch_cooperative<1>("there_and_back", there_and_back, 1, 1, kStore, seed, a, b, flaw);
    });
}
