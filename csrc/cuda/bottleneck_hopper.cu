// Host side of bottleneck_hopper.cuh: which shapes it serves, the map of x, and the persistent grid.
#include "bottleneck_hopper.cuh"
#include "eval_checks.h"
#include "launch_cuda.h"

namespace FASTRES_BACKEND {

namespace {

constexpr i64 kSharedLimit = 227 * 1024 - 256;  // of a block on sm_90, but for the barriers

constexpr Require require{"bottleneck_hopper"};

template <class P, bool kProjected>
void start(int dtype, const HopperShape& s, i64 N, const void* x, const void* weights, const void* bias, void* out,
           i64 ctx) {
    const i64 elements = s.C * P::kMid + 9 * P::kMid * P::kMid + (P::kMid + (kProjected ? s.C : 0)) * i64{s.K};
    const i64 bytes = hopper_shared_bytes<P>(elements);
    require(bytes <= kSharedLimit, "tile and weights take at most 232192 bytes of shared memory", bytes);
    const auto size = [](i64 v) { return static_cast<std::uint64_t>(v); };
    const TensorLayout layout{x,
                              4,
                              2,
                              {size(s.C), size(s.W), size(s.H), size(N)},
                              {0, size(s.C) * 2, size(s.W) * size(s.C) * 2, size(s.H) * size(s.W) * size(s.C) * 2},
                              {kSlice, P::kHaloW, P::kHaloPixels / P::kHaloW, 1},
                              kSwizzle64};
    const TensorMap map = tensor_map(layout);
    const i64 grid = least<i64>(s.tiles, multiprocessors());
    with_half(dtype, [&](auto t) {
        using T = decltype(t);
        launch_with_shared<kHopperThreads>("bottleneck_hopper", bottleneck_hopper_kernel<T, P, kProjected>, grid, 1,
                                           bytes, ctx, s, map, static_cast<const T*>(x), weights,
                                           static_cast<const float*>(bias), static_cast<T*>(out));
    });
}

}  // namespace

bool has_sm90a() {
#if defined(FASTRES_SM90A) || defined(FASTRES_EMULATE)
    return true;
#else
    return false;
#endif
}

void bottleneck_hopper(int dtype, const void* x, i64 N, i64 H, i64 W, i64 C, i64 mid, i64 K, int projected,
                       const void* weights, const void* bias, void* out, i64 ctx) {
    require.half(dtype);
    require(mid == 64 || (mid == 128 && !projected), "mid is 64, or 128 without a projection", mid);
    require(projected ? C == mid : C == K, "C is mid with a projection, else K", C);
    require.channels("C", C);
    require.channels("K", K);
    require.images(N, H, W);
    require.aligned("x", x);
    require.aligned("weights", weights);
    require.aligned("bias", bias);
    require.aligned("out", out);
    HopperShape s{};
    s.C = static_cast<int>(C);
    s.K = static_cast<int>(K);
    tile_images(require, s, N, H, W, most(C, K), mid == 64 ? Narrow::kTileH : Wide::kTileH,
                mid == 64 ? Narrow::kTileW : Wide::kTileW);
    if (s.tiles == 0) return;
    if (!has_sm90a()) throw std::runtime_error("bottleneck_hopper: this was not compiled for sm_90a");
    if (!is_hopper()) throw std::runtime_error("bottleneck_hopper: the GPU is not of compute capability 9.0");
    if (mid == 64) {
        projected ? start<Narrow, true>(dtype, s, N, x, weights, bias, out, ctx)
                  : start<Narrow, false>(dtype, s, N, x, weights, bias, out, ctx);
    } else {
        start<Wide, false>(dtype, s, N, x, weights, bias, out, ctx);
    }
}

}  // namespace FASTRES_BACKEND
