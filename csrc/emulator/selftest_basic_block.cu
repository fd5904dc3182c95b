// One variant of the basic block's kernel alone, for tests that plant faults into its source. Not part of any module.
#include "cuda/basic_block_eval.cuh"

#include <cstdio>

// 0: the kernel ran; 1: it failed with `message`. bfloat16, 64 channels, one block of threads.
extern "C" __attribute__((visibility("default"))) int selftest(const void* x, std::int64_t N, std::int64_t H,
                                                               std::int64_t W, const void* weights, const void* bias,
                                                               void* out, std::int64_t seed, char* message,
                                                               std::size_t size) {
    using namespace FASTRES_BACKEND;
    BottleneckShape s{};
    s.H = static_cast<int>(H);
    s.W = static_cast<int>(W);
    s.C = s.K = 64;
    s.tiles_h = static_cast<int>(ceil_div(H, kTile));
    s.tiles_w = static_cast<int>(ceil_div(W, kTile));
    s.tiles = static_cast<int>(N) * s.tiles_h * s.tiles_w;
    s.chunks = 2 * 9 * 64 * 64 / (kChunkUnits * kVec);
    try {
        launch_with_shared("basic_block_eval", basic_block_eval_kernel<bf16, 64>, 1, 1, kBasicSharedBytes<64>, seed, s,
                           static_cast<const bf16*>(x), weights, static_cast<const float*>(bias),
                           static_cast<bf16*>(out));
        return 0;
    } catch (const std::exception& e) {
        std::snprintf(message, size, "%s", e.what());
        return 1;
    }
}
