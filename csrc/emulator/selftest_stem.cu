// One variant of the stem's kernel alone, for tests that plant faults into its source. Not part of any module.
#include "cuda/stem_eval.cuh"

#include <cstdio>

// 0: the kernel ran; 1: it failed with `message`. bfloat16, x [N, 3, H, W] in channels_last, one block of threads.
extern "C" __attribute__((visibility("default"))) int selftest(const void* x, std::int64_t N, std::int64_t H,
                                                               std::int64_t W, const void* weights, const void* bias,
                                                               void* out, std::int64_t seed, char* message,
                                                               std::size_t size) {
    using namespace FASTRES_BACKEND;
    StemShape s{};
    s.H = static_cast<int>(H);
    s.W = static_cast<int>(W);
    s.conv_h = (s.H + 1) / 2;
    s.conv_w = (s.W + 1) / 2;
    s.P = (s.conv_h + 1) / 2;
    s.Q = (s.conv_w + 1) / 2;
    s.image = 3 * H * W;
    s.channel = 1;
    s.row = 3 * s.W;
    s.column = 3;
    s.tiles_h = static_cast<int>(ceil_div(s.P, kPooled));
    s.tiles_w = static_cast<int>(ceil_div(s.Q, kPooled));
    s.tiles = static_cast<int>(N) * s.tiles_h * s.tiles_w;
    try {
        launch_with_shared("stem_eval", stem_eval_kernel<bf16>, 1, 1, kStemSharedBytes, seed, s,
                           static_cast<const bf16*>(x), weights, static_cast<const float*>(bias),
                           static_cast<bf16*>(out));
        return 0;
    } catch (const std::exception& e) {
        std::snprintf(message, size, "%s", e.what());
        return 1;
    }
}
