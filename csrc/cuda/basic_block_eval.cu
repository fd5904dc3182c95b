// Host side of basic_block_eval.cuh: which shapes it serves, and the persistent grid.
#include "basic_block_eval.cuh"
#include "eval_checks.h"
#include "launch_cuda.h"

namespace FASTRES_BACKEND {

namespace {

constexpr Require require{"basic_block_eval"};

template <class T, int kMid>
void start(const BottleneckShape& s, const void* x, const void* weights, const void* bias, void* out, i64 ctx) {
    const i64 grid = least<i64>(s.tiles, multiprocessors() * kBlocksEach<kMid>);
    launch_with_shared("basic_block_eval", basic_block_eval_kernel<T, kMid>, grid, 1, kBasicSharedBytes<kMid>, ctx, s,
                       static_cast<const T*>(x), weights, static_cast<const float*>(bias), static_cast<T*>(out));
}

template <class T>
void choose(const BottleneckShape& s, const void* x, const void* weights, const void* bias, void* out, i64 ctx) {
    if (s.C == 64) {
        start<T, 64>(s, x, weights, bias, out, ctx);
    } else {
        start<T, 128>(s, x, weights, bias, out, ctx);
    }
}

}  // namespace

void basic_block_eval(int dtype, const void* x, i64 N, i64 H, i64 W, i64 C, const void* weights, const void* bias,
                      void* out, i64 ctx) {
    require.half(dtype);
    require(C == 64 || C == 128, "C is 64 or 128", C);
    require.images(N, H, W);
    require.aligned("x", x);
    require.aligned("weights", weights);
    require.aligned("bias", bias);
    require.aligned("out", out);
    BottleneckShape s{};
    s.C = s.K = static_cast<int>(C);
    tile_images(require, s, N, H, W, C, kTile, kTile);
    s.chunks = static_cast<int>(2 * 9 * C * C / (kChunkUnits * kVec));
    if (s.tiles == 0) return;
    with_half(dtype, [&](auto t) { choose<decltype(t)>(s, x, weights, bias, out, ctx); });
}

}  // namespace FASTRES_BACKEND
