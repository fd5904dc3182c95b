// Host side of basic_block_eval.cuh: which shapes it serves, and the persistent grid.
#include "basic_block_eval.cuh"
#include "launch_cuda.h"

namespace FASTRES_BACKEND {

namespace {

constexpr i64 kMaxSize = 1 << 20;  // of N, H, W
constexpr i64 kMaxTiles = 1 << 30;

void require(bool fits, const char* what, i64 got) {
    if (!fits) throw std::invalid_argument(std::string("basic_block_eval: ") + what + ", got " + std::to_string(got));
}

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
    require(dtype == kBF16 || dtype == kF16, "dtype code is 1 (bfloat16) or 2 (float16)", dtype);
    require(C == 64 || C == 128, "C is 64 or 128", C);
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
    s.C = s.K = static_cast<int>(C);
    s.tiles_h = static_cast<int>(ceil_div(H, kTile));
    s.tiles_w = static_cast<int>(ceil_div(W, kTile));
    const i64 tiles = N * s.tiles_h * s.tiles_w;
    require(tiles < kMaxTiles, "there are fewer than 2^30 tiles of 14 x 14 pixels", tiles);
    require(H * W * C < (i64{1} << 31), "an image has fewer than 2^31 elements", H * W * C);
    s.tiles = static_cast<int>(tiles);
    s.chunks = static_cast<int>(2 * 9 * C * C / (kChunkUnits * kVec));
    if (s.tiles == 0) return;
    if (dtype == kBF16) {
        choose<bf16>(s, x, weights, bias, out, ctx);
    } else {
        choose<f16>(s, x, weights, bias, out, ctx);
    }
}

}  // namespace FASTRES_BACKEND
