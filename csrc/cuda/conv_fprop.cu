// Host side of conv_fprop.cuh: its tiles, what it serves; and the merge of its statistics.
#include "conv_fprop.cuh"
#include "eval_checks.h"
#include "launch_cuda.h"

namespace FASTRES_BACKEND {

namespace {

constexpr i64 kLimit = i64{1} << 31;

constexpr Require require{"conv_fprop"};

struct ConvCall {
    ConvShape s;
    const void *x, *w, *bias, *residual;
    int relu;
    void *part, *out;
    i64 ctx;
};

template <class T, int kBM, int kBN, int kBK, int kStages, int kWarpsM>
void start(ConvCall& call) {
    ConvShape& s = call.s;
    s.column_tiles = static_cast<int>(ceil_div(s.CO, kBN));
    s.steps = static_cast<int>(s.R * s.S * ceil_div(s.CI, kBK));
    s.tiles = ceil_div(s.M, kBM);
    const i64 image = static_cast<i64>(s.H) * s.W * s.C;
    const i64 span = (kBM / (static_cast<i64>(s.P) * s.Q) + 2) * image +
                     (s.pad_h + static_cast<i64>(s.R) * s.dilation_h) * s.W * s.C;
    require(span < kLimit, "what a tile spans of x has fewer than 2^31 elements", span);
    require(s.M + i64{kBM} < kLimit, "out has fewer than 2^31 pixels", s.M);
    launch_with_shared("conv_fprop", conv_fprop_kernel<T, kBM, kBN, kBK, kStages, kWarpsM>,
                       s.tiles * s.column_tiles * s.groups, 1, kConvShared<ConvTile<kBM, kBN, kBK, kStages, kWarpsM>>,
                       call.ctx, s, static_cast<const T*>(call.x), static_cast<const T*>(call.w),
                       static_cast<const float*>(call.bias), static_cast<const T*>(call.residual), call.relu,
                       static_cast<float*>(call.part), static_cast<T*>(call.out));
}

// The rows of fastres/backends/cuda_conv.py: TILES, in order.
template <class T>
void choose(int tile, ConvCall& call) {
    switch (tile) {
        case 0:
            return start<T, 128, 128, 32, 4, 2>(call);
        case 1:
            return start<T, 256, 128, 32, 3, 4>(call);
        case 2:
            return start<T, 128, 64, 64, 3, 4>(call);
        case 3:
            return start<T, 256, 64, 32, 4, 4>(call);
        case 4:
            return start<T, 64, 128, 64, 3, 2>(call);
        case 5:
            return start<T, 128, 32, 64, 3, 8>(call);
        default:
            require(false, "tile is 0..5", tile);
    }
}

}  // namespace

void conv_fprop(int dtype, const void* x, i64 N, i64 H, i64 W, i64 C, const void* w, i64 K, i64 R, i64 S, i64 stride_h,
                i64 stride_w, i64 pad_h, i64 pad_w, i64 dilation_h, i64 dilation_w, i64 groups, const void* bias,
                const void* residual, int relu, void* part, void* out, int tile, i64 ctx) {
    require.half(dtype);
    for (const i64 size : {N, H, W, C, K, pad_h, pad_w}) require(size >= 0 && size < kLimit, "sizes are 0..2^31", size);
    for (const i64 size : {R, S}) require(size >= 1 && size <= kMaxTaps, "filters have 1..7 taps an axis", size);
    for (const i64 size : {stride_h, stride_w, dilation_h, dilation_w, groups}) {
        require(size >= 1 && size < (1 << 20), "stride, dilation and groups are 1..2^20", size);
    }
    require(C > 0 && C % (kVec * groups) == 0, "C is a multiple of 8 for each group", C);
    require(K > 0 && K % (kVec * groups) == 0, "K is a multiple of 8 for each group", K);
    require(K * R * S * (C / groups) < kLimit, "w has fewer than 2^31 elements", K * R * S * (C / groups));
    require(!part || (!relu && !residual), "statistics are those of an output without ReLU and residual", relu);
    require.aligned("x", x);
    require.aligned("w", w);
    require.aligned("residual", residual);
    require.aligned("out", out);
    const i64 P = (H + 2 * pad_h - dilation_h * (R - 1) - 1) / stride_h + 1;
    const i64 Q = (W + 2 * pad_w - dilation_w * (S - 1) - 1) / stride_w + 1;
    require(H + 2 * pad_h > dilation_h * (R - 1) && W + 2 * pad_w > dilation_w * (S - 1), "the filter fits", H);
    require(N * P * Q < kLimit, "out has fewer than 2^31 pixels", N * P * Q);
    if (N == 0) return;
    ConvCall call{};
    ConvShape& s = call.s;
    const auto narrow = [](i64 size) { return static_cast<int>(size); };
    s.M = narrow(N * P * Q);
    s.H = narrow(H), s.W = narrow(W), s.C = narrow(C), s.P = narrow(P), s.Q = narrow(Q);
    s.K = narrow(K), s.CI = narrow(C / groups), s.CO = narrow(K / groups), s.R = narrow(R), s.S = narrow(S);
    s.stride_h = narrow(stride_h), s.stride_w = narrow(stride_w), s.pad_h = narrow(pad_h), s.pad_w = narrow(pad_w);
    s.dilation_h = narrow(dilation_h), s.dilation_w = narrow(dilation_w), s.groups = narrow(groups);
    call.x = x, call.w = w, call.bias = bias, call.residual = residual, call.relu = relu;
    call.part = part, call.out = out, call.ctx = ctx;
    with_half(dtype, [&](auto t) { choose<decltype(t)>(tile, call); });
}

// Tiles [g*R, (g+1)*R) of part [3, T, C] into row g of out [3, G, C], in ascending order, in float64.
KERNEL(2)
merge_moments_kernel(const float* part, i64 T, i64 C, i64 G, i64 R, float* out) {
    const i64 i = block_x() * kThreads + thread_index();
    if (i >= G * C) return;
    const i64 g = i / C, c = i - g * C, lo = g * R, hi = least(lo + R, T);
    double count = 0, sum = 0, squares = 0;
#pragma unroll 4
    for (i64 t = lo; t < hi; ++t) {
        const double n = part[t * C + c];
        count += n;
        sum += n * part[(T + t) * C + c];
    }
    const double mean = sum / count;
#pragma unroll 4
    for (i64 t = lo; t < hi; ++t) {
        const double off = part[(T + t) * C + c] - mean;
        squares += part[(2 * T + t) * C + c] + part[t * C + c] * off * off;
    }
    out[i] = static_cast<float>(count);
    out[G * C + i] = static_cast<float>(mean);
    out[2 * G * C + i] = static_cast<float>(squares);
}

void merge_moments(const void* part, i64 T, i64 C, i64 G, void* out, i64 ctx) {
    if (C == 0 || G == 0) return;
    launch("merge_moments", merge_moments_kernel, ceil_div(G * C, kThreads), 1, ctx, static_cast<const float*>(part), T,
           C, G, ceil_div(T, G), static_cast<float*>(out));
}

}  // namespace FASTRES_BACKEND
