// Host side of rotated_stage.cuh: which shapes it serves, and the persistent grid.
#include "rotated_stage.cuh"

#include "launch_cuda.h"

namespace FASTRES_BACKEND {

namespace {

constexpr i64 kMaxSize = 1 << 20;  // of N, H, W, K
constexpr i64 kMaxTiles = 1 << 30;

void require(bool fits, const char* what, i64 got) {
    if (!fits) throw std::invalid_argument(std::string("rotated_stage: ") + what + ", got " + std::to_string(got));
}

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
    require(dtype == kBF16 || dtype == kF16, "dtype code is 1 (bfloat16) or 2 (float16)", dtype);
    require(mid == 64 || mid == 128, "mid is 64 or 128", mid);
    require(K > 0 && K % 64 == 0 && K < kMaxSize, "K is a multiple of 64", K);
    require(N >= 0 && N < kMaxSize, "N is 0..2^20", N);
    require(H >= 0 && H < kMaxSize, "H is 0..2^20", H);
    require(W >= 0 && W < kMaxSize, "W is 0..2^20", W);
    require(tile_h > 0 && tile_h <= 256, "tile_h is 1..256", tile_h);
    require(tile_w > 0 && tile_w <= 256 && tile_w % 8 == 0, "tile_w is a multiple of 8 up to 256", tile_w);
    require(aligned16(h), "h is aligned to 16 bytes", reinterpret_cast<i64>(h));
    require(aligned16(residual), "residual is aligned to 16 bytes", reinterpret_cast<i64>(residual));
    require(aligned16(weights), "weights is aligned to 16 bytes", reinterpret_cast<i64>(weights));
    require(aligned16(bias), "bias is aligned to 16 bytes", reinterpret_cast<i64>(bias));
    require(aligned16(out), "out is aligned to 16 bytes", reinterpret_cast<i64>(out));
    require(aligned16(next), "next is aligned to 16 bytes", reinterpret_cast<i64>(next));
    RotatedShape s{};
    s.H = static_cast<int>(H);
    s.W = static_cast<int>(W);
    s.K = static_cast<int>(K);
    s.tile_h = static_cast<int>(tile_h);
    s.tile_w = static_cast<int>(tile_w);
    s.tiles_h = static_cast<int>(ceil_div(H, tile_h));
    s.tiles_w = static_cast<int>(ceil_div(W, tile_w));
    const i64 tiles = N * s.tiles_h * s.tiles_w;
    require(tiles < kMaxTiles, "there are fewer than 2^30 tiles", tiles);
    require(H * W * most(mid, K) < (i64{1} << 31), "an image has fewer than 2^31 elements", H * W * most(mid, K));
    s.tiles = static_cast<int>(tiles);
    s.chunks = static_cast<int>((9 * mid * mid + (next ? 2 : 1) * mid * K) / (kChunkUnits * kVec));
    if (s.tiles == 0) return;
    if (dtype == kBF16) {
        choose<bf16>(s, mid, next != nullptr, h, residual, weights, bias, out, next, ctx);
    } else {
        choose<f16>(s, mid, next != nullptr, h, residual, weights, bias, out, next, ctx);
    }
}

}  // namespace FASTRES_BACKEND
