// Host side of stem_eval.cuh: which images it serves, and the persistent grid.
#include "eval_checks.h"
#include "launch_cuda.h"
#include "stem_eval.cuh"

namespace FASTRES_BACKEND {

namespace {

constexpr i64 kMaxStride = (i64{1} << 31) - 1;

constexpr Require require{"stem_eval"};

template <class T>
void start(const StemShape& s, const void* x, const void* weights, const void* bias, void* out, i64 ctx) {
    const i64 grid = least<i64>(s.tiles, multiprocessors() * kStemBlocks);
    launch_with_shared("stem_eval", stem_eval_kernel<T>, grid, 1, kStemSharedBytes, ctx, s, static_cast<const T*>(x),
                       weights, static_cast<const float*>(bias), static_cast<T*>(out));
}

}  // namespace

void stem_eval(int dtype, const void* x, i64 N, i64 H, i64 W, i64 image, i64 channel, i64 row, i64 column,
               const void* weights, const void* bias, void* out, i64 ctx) {
    require.half(dtype);
    require(N >= 0 && N < kMaxSize, "N is 0..2^20", N);
    require(H > 0 && H < kMaxSize, "H is 1..2^20", H);
    require(W > 0 && W < kMaxSize, "W is 1..2^20", W);
    require(image >= 0, "image, a stride of x, is not negative", image);
    require(channel >= 0 && channel <= kMaxStride, "channel, a stride of x, is 0..2^31", channel);
    require(row >= 0 && row <= kMaxStride, "row, a stride of x, is 0..2^31", row);
    require(column >= 0 && column <= kMaxStride, "column, a stride of x, is 0..2^31", column);
    require(reinterpret_cast<i64>(x) % 2 == 0, "x is aligned to 2 bytes", reinterpret_cast<i64>(x));
    require.aligned("weights", weights);
    require.aligned("bias", bias);
    require.aligned("out", out);
    StemShape s{};
    s.H = static_cast<int>(H);
    s.W = static_cast<int>(W);
    s.conv_h = static_cast<int>(ceil_div(H, 2));
    s.conv_w = static_cast<int>(ceil_div(W, 2));
    s.P = static_cast<int>(ceil_div(s.conv_h, 2));
    s.Q = static_cast<int>(ceil_div(s.conv_w, 2));
    s.image = image;
    s.channel = static_cast<int>(channel);
    s.row = static_cast<int>(row);
    s.column = static_cast<int>(column);
    s.tiles_h = static_cast<int>(ceil_div(s.P, kPooled));
    s.tiles_w = static_cast<int>(ceil_div(s.Q, kPooled));
    const i64 tiles = N * s.tiles_h * s.tiles_w;
    require(tiles < kMaxTiles, "there are fewer than 2^30 tiles of 7 x 7 pooled pixels", tiles);
    s.tiles = static_cast<int>(tiles);
    with_half(dtype, [&](auto t) { start<decltype(t)>(s, x, weights, bias, out, ctx); });
}

}  // namespace FASTRES_BACKEND
