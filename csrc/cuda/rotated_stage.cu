// Host side of rotated_stage.cuh: which shapes it serves, and the persistent grid.
#include "rotated_stage.cuh"

#include "eval_checks.h"
#include "launch_cuda.h"

namespace FASTRES_BACKEND {

namespace {

constexpr Require require{"rotated_stage"};

template <class T, int kMid, bool kNext>
void start(const RotatedShape& s, const void* h, const void* residual, const void* weights, const void* bias, void* out,
           void* next, i64 ctx) {
    require((s.tile_h + 2) * (s.tile_w + 2) <= kTileHalo<kMid>, "a tile and its halo fit into shared memory",
            (s.tile_h + 2) * (s.tile_w + 2));
    require(s.tile_h * s.tile_w <= kTilePixels<kMid>, "a tile has a pixel for each row of the products",
            s.tile_h * s.tile_w);
    launch_with_shared("rotated_stage", rotated_stage_kernel<T, kMid, kNext>, least<i64>(s.tiles, multiprocessors()), 1,
                       kRotatedShared<kMid>, ctx, s, static_cast<const T*>(h), static_cast<const T*>(residual), weights,
                       static_cast<const float*>(bias), static_cast<T*>(out), static_cast<T*>(next));
}

template <class T, class... P>
void choose(const RotatedShape& s, i64 mid, bool next, P... pointers) {
    if (mid == 64 && next) {
        start<T, 64, true>(s, pointers...);
    } else if (mid == 64) {
        start<T, 64, false>(s, pointers...);
    } else if (next) {
        start<T, 128, true>(s, pointers...);
    } else {
        start<T, 128, false>(s, pointers...);
    }
}

}  // namespace

void rotated_stage(int dtype, const void* h, const void* residual, i64 N, i64 H, i64 W, i64 mid, i64 K, i64 tile_h,
                   i64 tile_w, const void* weights, const void* bias, void* out, void* next, i64 ctx) {
    require.half(dtype);
    require(mid == 64 || mid == 128, "mid is 64 or 128", mid);
    require.channels("K", K);
    require.images(N, H, W);
    require(tile_h > 0 && tile_h <= 256, "tile_h is 1..256", tile_h);
    require(tile_w > 0 && tile_w <= 256 && tile_w % 8 == 0, "tile_w is a multiple of 8 up to 256", tile_w);
    require.aligned("h", h);
    require.aligned("residual", residual);
    require.aligned("weights", weights);
    require.aligned("bias", bias);
    require.aligned("out", out);
    require.aligned("next", next);
    RotatedShape s{};
    s.K = static_cast<int>(K);
    s.tile_h = static_cast<int>(tile_h);
    s.tile_w = static_cast<int>(tile_w);
    tile_images(require, s, N, H, W, most(mid, K), tile_h, tile_w);
    s.chunks = static_cast<int>((9 * mid * mid + (next ? 2 : 1) * mid * K) / (kChunkUnits * kVec));
    if (s.tiles == 0) return;
    with_half(dtype, [&](auto t) {
        choose<decltype(t)>(s, mid, next != nullptr, h, residual, weights, bias, out, next, ctx);
    });
}

}  // namespace FASTRES_BACKEND
