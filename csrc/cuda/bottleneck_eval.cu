// Host side of bottleneck_eval.cuh: which shapes it serves, and the persistent grid.
#include "bottleneck_eval.cuh"
#include "eval_checks.h"
#include "launch_cuda.h"

namespace FASTRES_BACKEND {

namespace {

constexpr Require require{"bottleneck_eval"};

template <class T, int kMid, bool kProjected>
void start(const BottleneckShape& s, const void* x, const void* weights, const void* bias, void* out, i64 ctx) {
    const i64 grid = least<i64>(s.tiles, multiprocessors() * kBlocksEach<kMid>);
    launch_with_shared("bottleneck_eval", bottleneck_eval_kernel<T, kMid, kProjected>, grid, 1, kSharedBytes<kMid>, ctx,
                       s, static_cast<const T*>(x), weights, static_cast<const float*>(bias), static_cast<T*>(out));
}

template <class T>
void choose(const BottleneckShape& s, i64 mid, int projected, const void* x, const void* weights, const void* bias,
            void* out, i64 ctx) {
    if (mid == 64 && projected) {
        start<T, 64, true>(s, x, weights, bias, out, ctx);
    } else if (mid == 64) {
        start<T, 64, false>(s, x, weights, bias, out, ctx);
    } else if (projected) {
        start<T, 128, true>(s, x, weights, bias, out, ctx);
    } else {
        start<T, 128, false>(s, x, weights, bias, out, ctx);
    }
}

}  // namespace

void bottleneck_eval(int dtype, const void* x, i64 N, i64 H, i64 W, i64 C, i64 mid, i64 K, int projected,
                     const void* weights, const void* bias, void* out, i64 ctx) {
    require.half(dtype);
    require(mid == 64 || mid == 128, "mid is 64 or 128", mid);
    require(projected || C == K, "C is K without a projection", C);
    require(!projected || mid == 128 || C == 64, "C is 64 with a projection and mid 64", C);
    require.channels("C", C);
    require.channels("K", K);
    require.images(N, H, W);
    require.aligned("x", x);
    require.aligned("weights", weights);
    require.aligned("bias", bias);
    require.aligned("out", out);
    BottleneckShape s{};
    s.C = static_cast<int>(C);
    s.K = static_cast<int>(K);
    tile_images(require, s, N, H, W, most(C, K), kTile, kTile);
    s.chunks = static_cast<int>((C * mid + 9 * mid * mid + mid * K + (projected ? ceil_div(C, mid) * mid * K : 0)) /
                                (kChunkUnits * kVec));
    if (s.tiles == 0) return;
    with_half(dtype, [&](auto t) { choose<decltype(t)>(s, mid, projected, x, weights, bias, out, ctx); });
}

}  // namespace FASTRES_BACKEND
