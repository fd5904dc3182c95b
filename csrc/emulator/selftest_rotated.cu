// One variant of the rotated unit alone, for tests that plant faults into its source. Not part of any module.
#include "cuda/rotated_stage.cuh"

#include <cstdio>

// 0: the kernel ran; 1: it failed with `message`. bfloat16, 64 channels inside, one block of threads.
extern "C" __attribute__((visibility("default"))) int selftest(int N, int H, int W, int K, int tile_h, int tile_w,
                                                               const void* h, const void* residual, const void* weights,
                                                               const void* bias, void* out, void* next,
                                                               std::int64_t seed, char* message, std::size_t size) {
    using namespace FASTRES_BACKEND;
    RotatedShape s{
        H, W, K, tile_h, tile_w, static_cast<int>(ceil_div(H, tile_h)), static_cast<int>(ceil_div(W, tile_w)), 0, 0};
    s.tiles = N * s.tiles_h * s.tiles_w;
    s.chunks = (9 * 64 * 64 + 2 * 64 * K) / (kChunkUnits * kVec);
    try {
        launch_with_shared("rotated_stage", rotated_stage_kernel<bf16, 64, true>, 1, 1, kRotatedShared<64>, seed, s,
                           static_cast<const bf16*>(h), static_cast<const bf16*>(residual), weights,
                           static_cast<const float*>(bias), static_cast<bf16*>(out), static_cast<bf16*>(next));
        return 0;
    } catch (const std::exception& e) {
        std::snprintf(message, size, "%s", e.what());
        return 1;
    }
}
