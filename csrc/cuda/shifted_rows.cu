// A question to the hardware, not a kernel of any op: may a product's operand begin at any row of a tile in shared
// memory? A 3x3 convolution on a resident tile needs that, a tap being a shift by whole pixels. `make gpu-check` asks
// it.
#include "arch_hopper.cuh"
#include "launch_cuda.h"

namespace FASTRES_BACKEND {

constexpr int kTileRows = 80, kTileColumns = 64, kProductRows = 64;
constexpr int kRowUnits = kTileColumns * 2 / 16;  // 16-byte units of a row

// out [64, 64] = rows shift.. of x [80, 64], as x times the identity. planar: the tile is rearranged to one plane of
// all rows for each 8 columns, without swizzle; else it stays as the tensor copy laid it, 128-byte rows swizzled.
KERNEL(1)
shifted_rows_kernel(TENSOR_MAP x, TENSOR_MAP identity, int shift, int planar, float* out) {
    constexpr u32 kTileBytes = kTileRows * kTileColumns * 2, kIdentityBytes = kProductRows * kTileColumns * 2;
    constexpr u32 kPlane = kTileRows * 16, kPattern = 1024;
    SHARED(std::uint64_t, bars, 1);
    DYNAMIC_SHARED(Word4, store);
    const i64 tile = (kPattern - shared_address(store, 0) % kPattern) % kPattern / 16;
    const i64 right = tile + kTileBytes / 16, planes = right + kIdentityBytes / 16;
    if (thread_index() == 0) {
        barrier_init(bars, 0, 1);
        fence_barrier_init();
    }
    sync_block();
    if (thread_index() == 0) {
        const int origin[2] = {0, 0};
        barrier_arrive_expect(bars, 0, kTileBytes + kIdentityBytes);
        load_tensor(store, tile, x, origin, bars, 0);
        load_tensor(store, right, identity, origin, bars, 0);
    }
    barrier_wait(bars, 0, 0);
    if (planar) {
        for (int i = thread_index(); i < kTileRows * kRowUnits; i += kThreads) {
            const int row = i / kRowUnits, unit = i % kRowUnits;
            const Word4 v = store[tile + row * kRowUnits + (unit ^ row % 8)];
            store[planes + unit * kTileRows + row] = v;
        }
        fence_async();
        sync_block();
    }
    if (thread_index() >= 4 * kWarp) return;
    float d[kProductRows / 2];
#pragma unroll
    for (int i = 0; i < kProductRows / 2; ++i) d[i] = 0;
    const u32 left = planar ? shared_address(store, planes) + static_cast<u32>(shift) * 16
                            : shared_address(store, tile) + static_cast<u32>(shift) * kRowUnits * 16;
    const u32 ones = shared_address(store, right);
    warpgroup_fence();
#pragma unroll
    for (u32 k = 0; k < kTileColumns / 16; ++k) {
        const std::uint64_t a = planar ? matrix_descriptor(left + 2 * k * kPlane, kPlane, 128, kNoSwizzle)
                                       : matrix_descriptor(left + 32 * k, 16, kPattern, kSwizzle128);
        warpgroup_multiply<bf16, kProductRows, false, false>(
            d, a, matrix_descriptor(ones + 32 * k, 16, kPattern, kSwizzle128), true);
    }
    warpgroup_commit();
    warpgroup_wait<0>();
    const int lane = thread_index() % kWarp, row = thread_index() / kWarp * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < kProductRows / 2; ++i) {
        out[(row + i % 4 / 2 * 8) * kProductRows + i / 4 * 8 + lane % 4 * 2 + i % 2] = d[i];
    }
}

void shifted_rows(const void* x, const void* identity, i64 shift, int planar, void* out, i64 ctx) {
    if (shift < 0 || shift > kTileRows - kProductRows) {
        throw std::invalid_argument("shifted_rows: shift must be 0.." + std::to_string(kTileRows - kProductRows) +
                                    ", got " + std::to_string(shift));
    }
    const auto map = [](const void* base, u32 rows) {
        return tensor_map({base, 2, 2, {kTileColumns, rows}, {0, kTileColumns * 2}, {kTileColumns, rows}, kSwizzle128});
    };
    constexpr i64 kStore = 1024 + (2 * kTileRows + kProductRows) * kTileColumns * 2;
    // One block: cooperative only for its dynamic shared memory.
    launch_cooperative<1>("shifted_rows", shifted_rows_kernel, 1, 1, kStore, ctx, map(x, kTileRows),
                          map(identity, kProductRows), static_cast<int>(shift), planar, static_cast<float*>(out));
}

}  // namespace FASTRES_BACKEND
