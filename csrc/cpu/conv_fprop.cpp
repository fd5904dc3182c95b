// fprop and dgrad as problems of conv_direct.h.
#include <stdexcept>

#include "cpu/conv.h"
#include "cpu/conv_direct.h"
#include "cpu/conv_grouped.h"
#include "cpu/conv_tile.h"
#include "cpu/pairs.h"

namespace FASTRES_BACKEND {
namespace {

void check(const ConvShape& g, int pairs) {
    if (g.groups > 1 && !conv_groups(g.C, g.K, g.groups, pairs)) throw std::invalid_argument("conv: unserved groups");
    if (g.R * g.S > kMaxTaps) throw std::invalid_argument("conv: R * S must be at most 121");
}

void make_flat(Direct& p) {
    p.points = p.N * p.I * p.J;
    p.N = 1;
    p.J = p.W = kPixels;
    p.I = p.H = ceil_div(p.points, kPixels);
    p.y_i = kPixels * p.y_j;
}

void need_pairs(int dtype, const float* packed) {
    if (dtype != kBF16 || !packed) throw std::invalid_argument("conv_fprop: pairs: of bfloat16, with packed weights");
    if (!pairs_unit()) throw std::runtime_error("conv_fprop: this processor has no products of pairs of bfloat16");
}

i64 floor_mod(i64 a, i64 b) { return (a % b + b) % b; }

}  // namespace

i64 pairs_unit() {
#if defined(__AVX512F__)
    return i64(cpu_runtime::pairs_unit());
#else
    return i64(cpu_runtime::PairsUnit::kModelled);
#endif
}

i64 conv_packed_floats(const ConvShape& g, int pairs) {
    check(g, pairs);
    if (grouped_serves(g, pairs)) return grouped_packed_floats(g, pairs);
    Direct p{};
    p.C = g.C, p.K = g.K, p.groups = g.groups, p.n_taps = int(g.R * g.S), p.pairs = pairs != 0;
    return packed_floats(p);
}

i64 conv_groups(i64 C, i64 K, i64 groups, int pairs) {
    if (groups == 1) return 1;
    const i64 width = C / groups;
    ConvShape g{};
    g.C = C, g.K = K, g.groups = groups;
    if (pairs && !grouped_serves(g, pairs) && (width % kPanel || width % (kBlock * Pairs::kChannels))) return 0;
    return C == K && C % kPanel == 0 && (kPanel % width == 0 || width % kPanel == 0);
}

void conv_pack(int dtype, const void* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& g, int pairs, float* packed,
               i64 ctx) {
    check(g, pairs);
    if (pairs && dtype != kF32) throw std::invalid_argument("conv_pack: pairs are made of float32");
    if (grouped_serves(g, pairs)) return grouped_pack(dtype, w, w_k, w_c, w_tap, g, pairs, packed, ctx);
    Direct p{};
    p.C = g.C, p.K = g.K, p.groups = g.groups, p.w = w, p.w_out = w_k, p.w_in = w_c, p.pairs = pairs != 0;
    for (; p.n_taps < g.R * g.S; ++p.n_taps) p.w_tap[p.n_taps] = p.n_taps * w_tap;
    pack_direct(dtype, p, packed, max_of(1, ctx));
}

void conv_fprop(int dtype, const void* x, const void* w, i64 w_k, i64 w_c, i64 w_tap, const float* packed, int pairs,
                const ConvShape& g, const float* bias, const void* residual, int relu, void* y, i64 ctx) {
    check(g, pairs);
    if (pairs) need_pairs(dtype, packed);
    if (grouped_serves(g, pairs)) return grouped_fprop(dtype, x, packed, pairs, g, bias, residual, relu != 0, y, ctx);
    Direct p{};
    p.N = g.N, p.H = g.H, p.W = g.W, p.C = g.C, p.I = g.P, p.J = g.Q, p.K = g.K;
    p.groups = g.groups, p.step_h = g.stride_h, p.step_w = g.stride_w;
    for (i64 r = 0; r < g.R; ++r)
        for (i64 s = 0; s < g.S; ++s, ++p.n_taps) {
            p.dr[p.n_taps] = r * g.dilation_h - g.pad_h;
            p.dc[p.n_taps] = s * g.dilation_w - g.pad_w;
            p.w_tap[p.n_taps] = (r * g.S + s) * w_tap;
        }
    p.w_out = w_k, p.w_in = w_c;
    p.y_j = g.K, p.y_i = g.Q * g.K, p.y_n = g.P * p.y_i;
    p.pairs = pairs != 0, p.x = x, p.w = w, p.packed = packed, p.bias = bias, p.residual = residual, p.relu = relu != 0,
    p.y = y;
    const bool whole = g.H == g.P && g.W == g.Q;
    if (p.n_taps == 1 && p.dr[0] == 0 && p.dc[0] == 0 && g.stride_h == 1 && g.stride_w == 1 && whole) make_flat(p);
    direct(dtype, p, ctx);
}

// dx[h] gets dy[i] through tap r where i*stride - pad + r*dilation = h: for the rows h = a + stride*m these are the
// taps with r*dilation = a + pad modulo the stride, and i = m + (a + pad - r*dilation) / stride.
void conv_dgrad(int dtype, const void* dy, const void* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& g, void* dx,
                i64 ctx) {
    check(g, 0);
    const i64 item = dtype == kF32 ? 4 : 2;
    for (i64 a = 0; a < min_of(g.stride_h, g.H); ++a)
        for (i64 b = 0; b < min_of(g.stride_w, g.W); ++b) {
            Direct p{};
            p.N = g.N, p.H = g.P, p.W = g.Q, p.C = g.K, p.K = g.C;
            p.I = ceil_div(g.H - a, g.stride_h), p.J = ceil_div(g.W - b, g.stride_w);
            p.step_h = p.step_w = 1;
            for (i64 r = 0; r < g.R; ++r)
                for (i64 s = 0; s < g.S; ++s) {
                    const i64 h = a + g.pad_h - r * g.dilation_h, v = b + g.pad_w - s * g.dilation_w;
                    if (floor_mod(h, g.stride_h) || floor_mod(v, g.stride_w)) continue;
                    p.dr[p.n_taps] = h / g.stride_h;
                    p.dc[p.n_taps] = v / g.stride_w;
                    p.w_tap[p.n_taps++] = (r * g.S + s) * w_tap;
                }
            p.w_out = w_c, p.w_in = w_k;
            p.y_j = g.stride_w * g.C, p.y_i = g.stride_h * g.W * g.C, p.y_n = g.H * g.W * g.C;
            p.x = dy, p.w = w;
            p.y = static_cast<char*>(dx) + (a * g.W + b) * g.C * item;
            const bool whole = g.stride_h == 1 && g.stride_w == 1 && g.H == g.P && g.W == g.Q;
            if (p.n_taps == 1 && p.dr[0] == 0 && p.dc[0] == 0 && whole) make_flat(p);
            direct(dtype, p, ctx);
        }
}

}  // namespace FASTRES_BACKEND
