// Host side of bottleneck_eval.cuh: which shapes it serves, and the persistent grid.
#include "bottleneck_eval.cuh"
#include "launch_cuda.h"

namespace FASTRES_BACKEND {

namespace {

constexpr i64 kMaxSize = 1 << 20;  // of N, H, W, C, K
constexpr i64 kMaxTiles = 1 << 30;

void require(bool fits, const char* what, i64 got) {
    if (!fits) throw std::invalid_argument(std::string("bottleneck_eval: ") + what + ", got " + std::to_string(got));
}

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
    require(dtype == kBF16 || dtype == kF16, "dtype code is 1 (bfloat16) or 2 (float16)", dtype);
    require(mid == 64 || mid == 128, "mid is 64 or 128", mid);
    require(projected || C == K, "C is K without a projection", C);
    require(!projected || mid == 128 || C == 64, "C is 64 with a projection and mid 64", C);
    require(C > 0 && C % 64 == 0 && C < kMaxSize, "C is a multiple of 64", C);
    require(K > 0 && K % 64 == 0 && K < kMaxSize, "K is a multiple of 64", K);
    require(N >= 0 && N < kMaxSize, "N is 0..2^20", N);
    require(H >= 0 && H < kMaxSize, "H is 0..2^20", H);
    require(W >= 0 && W < kMaxSize, "W is 0..2^20", W);
    require(aligned16(x), "x is aligned to 16 bytes", reinterpret_cast<i64>(x));
    require(aligned16(weights), "weights is aligned to 16 bytes", reinterpret_cast<i64>(weights));
    require(aligned16(bias), "bias is aligned to 16 bytes", reinterpret_cast<i64>(bias));
    require(aligned16(out), "out is aligned to 16 bytes", reinterpret_cast<i64>(out));
    BottleneckShape s{};
    s.H = static_cast<int>(H);
    s.W = static_cast<int>(W);
    s.C = static_cast<int>(C);
    s.K = static_cast<int>(K);
    s.tiles_h = static_cast<int>(ceil_div(H, kTile));
    s.tiles_w = static_cast<int>(ceil_div(W, kTile));
    const i64 tiles = N * s.tiles_h * s.tiles_w;
    require(tiles < kMaxTiles, "there are fewer than 2^30 tiles of 14 x 14 pixels", tiles);
    require(H * W * most(C, K) < (i64{1} << 31), "an image has fewer than 2^31 elements", H * W * most(C, K));
    s.tiles = static_cast<int>(tiles);
    s.chunks = static_cast<int>((C * mid + 9 * mid * mid + mid * K + (projected ? ceil_div(C, mid) * mid * K : 0)) /
                                (kChunkUnits * kVec));
    if (s.tiles == 0) return;
    if (dtype == kBF16) {
        choose<bf16>(s, mid, projected, x, weights, bias, out, ctx);
    } else {
        choose<f16>(s, mid, projected, x, weights, bias, out, ctx);
    }
}

}  // namespace FASTRES_BACKEND
