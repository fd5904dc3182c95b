// One tile of the forward convolution alone, for tests that plant faults into its source. Not part of any module.
#include "cuda/conv_fprop.cuh"

#include <cstdio>

// 0: the kernel ran; 1: it failed with `message`. bfloat16, 3x3 with padding 1; part [3, tiles of 64, K]. counts:
// wavefronts that accesses to shared memory lose to conflicts, bytes loaded.
extern "C" __attribute__((visibility("default"))) int selftest(const void* x, int N, int H, int W, int C, const void* w,
                                                               int K, const void* bias, void* part, void* out,
                                                               std::int64_t seed, char* message, std::size_t size,
                                                               std::int64_t* counts) {
    using namespace FASTRES_BACKEND;
    using Tile = ConvTile<64, 128, 64, 3, 2>;
    ConvShape s{};
    s.M = N * H * W;
    s.H = s.P = H, s.W = s.Q = W, s.C = s.CI = C, s.K = s.CO = K;
    s.R = s.S = 3, s.groups = 1;
    s.stride_h = s.stride_w = s.pad_h = s.pad_w = s.dilation_h = s.dilation_w = 1;
    s.column_tiles = static_cast<int>(ceil_div(K, Tile::kBN));
    s.steps = static_cast<int>(9 * ceil_div(C, Tile::kBK));
    s.tiles = ceil_div(s.M, Tile::kBM);
    auto& meter = fastres::emulator::Machine::current().meter;
    meter.on = true;
    try {
        launch_with_shared("conv_fprop", conv_fprop_kernel<bf16, 64, 128, 64, 3, 2>, s.tiles * s.column_tiles, 1,
                           kConvShared<Tile>, seed, s, static_cast<const bf16*>(x), static_cast<const bf16*>(w),
                           static_cast<const float*>(bias), static_cast<const bf16*>(nullptr), 0,
                           static_cast<float*>(part), static_cast<bf16*>(out));
        const auto& lost = meter.counters.conflicts;
        counts[0] = lost[0] + lost[1] + lost[2];
        counts[1] = meter.counters.loaded;
        return 0;
    } catch (const std::exception& e) {
        std::snprintf(message, size, "%s", e.what());
        return 1;
    }
}
