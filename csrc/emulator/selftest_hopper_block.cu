// One variant of the bottleneck for sm_90 alone, for tests that plant faults into its source. Not part of any module.
#include "cuda/bottleneck_hopper.cuh"

#include <cstdio>

// 0: the kernel ran, as two blocks; 1: it failed with `message`. bfloat16, 64 channels inside, C in and out.
extern "C" __attribute__((visibility("default"))) int selftest(const void* x, int N, int H, int W, int C,
                                                               const void* weights, const void* bias, void* out,
                                                               std::int64_t seed, char* message, std::size_t size) {
    using namespace FASTRES_BACKEND;
    using P = Narrow;
    HopperShape s{H, W, C, C, static_cast<int>(ceil_div(H, P::kTileH)), static_cast<int>(ceil_div(W, P::kTileW)), 0};
    s.tiles = N * s.tiles_h * s.tiles_w;
    const auto size_of = [](int v) { return static_cast<std::uint64_t>(v); };
    try {
        const TensorMap map = tensor_map({x,
                                          4,
                                          2,
                                          {size_of(C), size_of(W), size_of(H), size_of(N)},
                                          {0, size_of(2 * C), size_of(2 * C * W), size_of(2 * C * W * H)},
                                          {kSlice, P::kHaloW, P::kHaloPixels / P::kHaloW, 1},
                                          kSwizzle64});
        launch_with_shared<kHopperThreads>("bottleneck_hopper", bottleneck_hopper_kernel<bf16, P, false>, 2, 1,
                                           hopper_shared_bytes<P>(2 * C * 64 + 9 * 64 * 64), seed, s, map,
                                           static_cast<const bf16*>(x), weights, static_cast<const float*>(bias),
                                           static_cast<bf16*>(out));
        return 0;
    } catch (const std::exception& e) {
        std::snprintf(message, size, "%s", e.what());
        return 1;
    }
}
