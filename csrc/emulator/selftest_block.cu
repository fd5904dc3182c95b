// One variant of the bottleneck kernel alone, for tests that plant faults into its source. Not part of any module.
#include "cuda/bottleneck_eval.cuh"

#include <cstdio>

// 0: the kernel ran; 1: it failed with `message`. bfloat16, 64 channels inside, C in and out.
extern "C" __attribute__((visibility("default"))) int selftest(const void* x, int N, int H, int W, int C,
                                                               const void* weights, const void* bias, void* out,
                                                               std::int64_t seed, char* message, std::size_t size) {
    using namespace FASTRES_BACKEND;
    BottleneckShape s{H, W, C, C, static_cast<int>(ceil_div(H, kTile)), static_cast<int>(ceil_div(W, kTile)), 0, 0};
    s.tiles = N * s.tiles_h * s.tiles_w;
    s.chunks = (2 * C * 64 + 9 * 64 * 64) / (kChunkUnits * kVec);
    try {
        launch_with_shared("bottleneck_eval", bottleneck_eval_kernel<bf16, 64, false>, 2, 1, kSharedBytes<64>, seed, s,
                           static_cast<const bf16*>(x), weights, static_cast<const float*>(bias),
                           static_cast<bf16*>(out));
        return 0;
    } catch (const std::exception& e) {
        std::snprintf(message, size, "%s", e.what());
        return 1;
    }
}
