// Weight gradient of a convolution: for each tap a product of dy^T and the shifted x over all pixels.
//
// x is packed into panels of kC channels with its zero border, dy into panels of kK channels, so that the inner loop
// reads both in order, wherever the tap lies: per pixel two vectors of x and kK broadcasts of dy for 2*kK products.
#include "cpu/conv.h"
#include "cpu/isa/rows.h"

namespace FASTRES_BACKEND {
namespace {

constexpr int kC = 2 * L;             // channels of x in a register tile
constexpr int kK = L == 16 ? 12 : 6;  // channels of dy: 2*kK accumulators of 16 (AVX2) or 32 registers
constexpr int kTile = kK * kC;
constexpr i64 kPanelBytes = 12 * 1024;  // of an x panel that stays in L1 while taps and dy panels pass over it

FR_INLINE vf splat(float v) {
#if defined(__AVX512F__)
    return (vf)_mm512_set1_ps(v);
#elif defined(__AVX2__) && FASTRES_WIDTH == 8
    return (vf)_mm256_set1_ps(v);
#else
    vf r;
    for (int i = 0; i < L; ++i) r[i] = v;
    return r;
#endif
}

// acc [kK, kC] += dy [rows, Q, kK]^T x [rows, Q, kC]; x_row and x_step are floats between rows and pixels.
void multiply(const float* dy, i64 dy_row, const float* x, i64 x_row, i64 x_step, i64 rows, i64 Q, float* acc) {
    vf a[kK][2];
    for (int k = 0; k < kK; ++k) {
        a[k][0] = load(acc + k * kC);
        a[k][1] = load(acc + k * kC + L);
    }
    for (i64 r = 0; r < rows; ++r, dy += dy_row, x += x_row) {
        const float *d = dy, *v = x;
        for (i64 q = 0; q < Q; ++q, d += kK, v += x_step) {
            const vf v0 = load(v), v1 = load(v + L);
#pragma GCC unroll 12
            for (int k = 0; k < kK; ++k) {
                const vf s = splat(d[k]);
                a[k][0] = fma(s, v0, a[k][0]);
                a[k][1] = fma(s, v1, a[k][1]);
            }
        }
    }
    for (int k = 0; k < kK; ++k) {
        store(acc + k * kC, a[k][0]);
        store(acc + k * kC + L, a[k][1]);
    }
}

// One row of `panels` panels: [pixels, C] -> [panel][pixels, width], channels past C zero.
template <int width>
void pack_row(const float* from, i64 pixels, i64 C, float* to, i64 panel_stride) {
    for (i64 c = 0; c < C; c += width, to += panel_stride) {
        const i64 n = min_of(width, C - c);
        for (i64 i = 0; i < pixels; ++i) {
            float* out = to + i * width;
            const float* in = from + i * C + c;
            if (n == width) {
                __builtin_memcpy(out, in, width * sizeof(float));
            } else {
                __builtin_memset(out, 0, width * sizeof(float));
                __builtin_memcpy(out, in, n * sizeof(float));
            }
        }
    }
}

}  // namespace

void conv_wgrad(const float* dy, const float* x, const ConvShape& g, float* dw, i64 ctx) {
    if (g.K == 0 || g.C == 0) return;
    const i64 c_panels = ceil_div(g.C, kC), k_panels = ceil_div(g.K, kK), taps = g.R * g.S;
    // Rows and columns of x that some tap touches, border included.
    const i64 height = (g.P - 1) * g.stride_h + (g.R - 1) * g.dilation_h + 1;
    const i64 width = (g.Q - 1) * g.stride_w + (g.S - 1) * g.dilation_w + 1;
    const i64 x_panel = g.N * height * width * kC, dy_panel = g.N * g.P * g.Q * kK;
    const Scratch x_memory(c_panels * x_panel * sizeof(float)), dy_memory(k_panels * dy_panel * sizeof(float)),
        acc_memory(c_panels * k_panels * taps * kTile * sizeof(float));
    float* const xs = static_cast<float*>(x_memory.get());
    float* const dys = static_cast<float*>(dy_memory.get());
    float* const accs = static_cast<float*>(acc_memory.get());

    parallel(ctx, g.N * height, [&](i64 first, i64 last, int) {
        for (i64 row = first; row < last; ++row) {
            const i64 n = row / height, h = row % height - g.pad_h;
            float* to = xs + row * width * kC;
            // Columns [left, right) of the panel row lie inside the image.
            const i64 left = min_of(g.pad_w, width), right = max_of(left, min_of(width, g.W + g.pad_w));
            const bool inside = h >= 0 && h < g.H;
            for (i64 p = 0; p < c_panels; ++p) {
                float* panel = to + p * x_panel;
                if (!inside) {
                    __builtin_memset(panel, 0, width * kC * sizeof(float));
                } else {
                    __builtin_memset(panel, 0, left * kC * sizeof(float));
                    __builtin_memset(panel + right * kC, 0, (width - right) * kC * sizeof(float));
                }
            }
            if (inside) pack_row<kC>(x + (n * g.H + h) * g.W * g.C, right - left, g.C, to + left * kC, x_panel);
        }
    });
    parallel(ctx, g.N * g.P, [&](i64 first, i64 last, int) {
        for (i64 row = first; row < last; ++row)
            pack_row<kK>(dy + row * g.Q * g.K, g.Q, g.K, dys + row * g.Q * kK, dy_panel);
    });

    const i64 rows = max_of(1, min_of(g.P, kPanelBytes / i64(sizeof(float)) / (kC * width * g.stride_h)));
    // dy panels of one task: enough tasks for all threads, enough panels to reuse an x panel.
    const i64 group = max_of(1, min_of(k_panels, k_panels * c_panels / max_of(1, 4 * ctx)));
    const i64 groups = ceil_div(k_panels, group);
    parallel(ctx, c_panels * groups, [&](i64 first, i64 last, int) {
        for (i64 task = first; task < last; ++task) {
            const i64 cp = task / groups, k0 = task % groups * group, k1 = min_of(k0 + group, k_panels);
            float* const acc = accs + (cp * k_panels + k0) * taps * kTile;
            __builtin_memset(acc, 0, (k1 - k0) * taps * kTile * sizeof(float));
            for (i64 n = 0; n < g.N; ++n) {
                for (i64 p = 0; p < g.P; p += rows) {
                    for (i64 kp = k0; kp < k1; ++kp) {
                        const float* d = dys + kp * dy_panel + (n * g.P + p) * g.Q * kK;
                        for (i64 tap = 0; tap < taps; ++tap) {
                            const i64 r = tap / g.S * g.dilation_h, s = tap % g.S * g.dilation_w;
                            const float* v = xs + cp * x_panel + ((n * height + p * g.stride_h + r) * width + s) * kC;
                            multiply(d, g.Q * kK, v, g.stride_h * width * kC, g.stride_w * kC, min_of(rows, g.P - p),
                                     g.Q, acc + ((kp - k0) * taps + tap) * kTile);
                        }
                    }
                }
            }
        }
    });
    parallel(ctx, g.K, [&](i64 first, i64 last, int) {
        for (i64 k = first; k < last; ++k)
            for (i64 tap = 0; tap < taps; ++tap)
                for (i64 cp = 0; cp < c_panels; ++cp)
                    __builtin_memcpy(dw + (k * taps + tap) * g.C + cp * kC,
                                     accs + ((cp * k_panels + k / kK) * taps + tap) * kTile + k % kK * kC,
                                     min_of(kC, g.C - cp * kC) * sizeof(float));
    });
}

}  // namespace FASTRES_BACKEND
