// Weight gradient of a convolution: for each tap a product of dy^T and the shifted x over all pixels.
//
// A strip of rows at a time, x is packed into panels of kC channels with its zero border, dy into panels of kK
// channels, both widened to float32, so that the inner loop reads them in order, wherever the tap lies: per pixel two
// vectors of x and kK broadcasts of dy for 2*kK products.
#include "cpu/conv.h"
#include "cpu/conv_tile.h"

namespace FASTRES_BACKEND {
namespace {

constexpr int kC = 2 * L;  // channels of x in a register tile
// Channels of dy: 2*kK sums in 32 (AVX-512) or 16 registers. 5 panels of 13 cover 64 channels.
constexpr int kK = L == 16 ? 13 : 6;
constexpr int kTile = kK * kC;
constexpr i64 kPixelsAtOnce = 640;  // of a strip at least: fewer, and loading and storing the sums shows
constexpr i64 kSlabs = 16;

// acc [kK, kC] += dy [rows, Q, kK]^T x [rows, Q, kC]; x_row and x_step are floats between rows and pixels.
void multiply(const float* dy, i64 dy_row, const float* x, i64 x_row, i64 x_step, i64 rows, i64 Q, float* acc) {
    vf a[kK][2];
#pragma GCC unroll 13
    for (int k = 0; k < kK; ++k) {
        a[k][0] = load(acc + k * kC);
        a[k][1] = load(acc + k * kC + L);
    }
    for (i64 r = 0; r < rows; ++r, dy += dy_row, x += x_row) {
        const float *d = dy, *v = x;
        for (i64 q = 0; q < Q; ++q, d += kK, v += x_step) {
            const vf v0 = load(v), v1 = load(v + L);
#pragma GCC unroll 13
            for (int k = 0; k < kK; ++k) {
                const vf s = splat(d + k);
                a[k][0] = fma(s, v0, a[k][0]);
                a[k][1] = fma(s, v1, a[k][1]);
            }
        }
    }
#pragma GCC unroll 13
    for (int k = 0; k < kK; ++k) {
        store(acc + k * kC, a[k][0]);
        store(acc + k * kC + L, a[k][1]);
    }
}

// Channels [c, c + width) of pixels `step` elements apart -> [pixels, width] floats, channels past C zero.
template <int width, class T>
void pack_row(const T* from, i64 step, i64 pixels, i64 c, i64 C, float* to) {
    const i64 n = min_of(width, C - c);
    from += c;
    for (i64 i = 0; i < pixels; ++i, from += step, to += width) {
        int v = 0;
        for (; v + L <= n; v += L) store(to + v, load(from + v));
        if (v < n) {
            const vf part = load_part(from + v, int(n - v));
            if (v + L <= width) {
                store(to + v, part);
            } else {
                store_part(to + v, part, width - v);
            }
            v += L;
        }
        for (; v < width; v += L) {
            if (v + L <= width) {
                store(to + v, vf{});
            } else {
                store_part(to + v, vf{}, width - v);
            }
        }
    }
}

struct Plan {
    i64 c_panels, k_panels, taps;
    bool pointwise;      // one tap: the pixels it reads are packed next to each other
    i64 step_h, step_w;  // distance in packed x of two rows or columns of dy
    i64 reach, width;    // packed rows one row of dy reads, packed columns
    i64 rows_of(i64 rows) const { return (rows - 1) * step_h + reach; }
};

template <class T>
class Slab {
  public:
    Slab(const ConvShape& g, const Plan& plan, const T* dy, const T* x, float* xs, float* dys)
        : g_(g), plan_(plan), dy_(dy), x_(x), xs_(xs), dys_(dys) {}

    // acc [c1 - c0][k_panels][taps][kTile] += rows [first, last) of the N*P rows of dy.
    void run(i64 first, i64 last, i64 strip, i64 c0, i64 c1, float* acc) {
        for (i64 r = first; r < last;) {
            const i64 end = min_of(last, r + strip);
            pack(r, end, c0, c1);
            for (i64 c = 0; c < c1 - c0; ++c)
                for (i64 k = 0; k < plan_.k_panels; ++k)
                    for (i64 tap = 0; tap < plan_.taps; ++tap)
                        one(r, end, c, k, tap, acc + ((c * plan_.k_panels + k) * plan_.taps + tap) * kTile);
            r = end;
        }
    }

  private:
    // f(image, first row in it, rows, rows of dy before, packed rows of x before).
    template <class F>
    void images(i64 first, i64 last, const F& f) const {
        for (i64 r = first, n, above = 0; r < last; r += n) {
            n = min_of(last - r, g_.P - r % g_.P);
            f(r / g_.P, r % g_.P, n, r - first, above);
            above += plan_.rows_of(n);
        }
    }

    void pack(i64 first, i64 last, i64 c0, i64 c1) {
        x_panel_ = 0;
        images(first, last, [&](i64, i64, i64 n, i64, i64) { x_panel_ += plan_.rows_of(n) * plan_.width * kC; });
        dy_panel_ = (last - first) * g_.Q * kK;
        images(first, last, [&](i64 image, i64 p0, i64 n, i64, i64 above) {
            for (i64 h = 0; h < plan_.rows_of(n); ++h) {
                const i64 at = plan_.pointwise ? (p0 + h) * g_.stride_h - g_.pad_h : p0 * g_.stride_h + h - g_.pad_h;
                pack_x(image, at, c0, c1, xs_ + (above + h) * plan_.width * kC);
            }
        });
        for (i64 r = first; r < last; ++r)
            for (i64 k = 0; k < plan_.k_panels; ++k)
                pack_row<kK>(dy_ + r * g_.Q * g_.K, g_.K, g_.Q, k * kK, g_.K,
                             dys_ + k * dy_panel_ + (r - first) * g_.Q * kK);
    }

    void pack_x(i64 image, i64 h, i64 c0, i64 c1, float* to) {
        const bool inside = h >= 0 && h < g_.H;
        const i64 step = plan_.pointwise ? g_.stride_w : 1;
        // Columns [left, right) of the packed row lie inside the image.
        const i64 left = min_of(ceil_div(g_.pad_w, step), plan_.width);
        const i64 right = max_of(left, min_of(plan_.width, ceil_div(g_.W + g_.pad_w, step)));
        const T* from = x_ + ((image * g_.H + h) * g_.W + left * step - g_.pad_w) * g_.C;
        for (i64 c = c0; c < c1; ++c, to += x_panel_) {
            if (!inside) {
                __builtin_memset(to, 0, plan_.width * kC * sizeof(float));
                continue;
            }
            __builtin_memset(to, 0, left * kC * sizeof(float));
            __builtin_memset(to + right * kC, 0, (plan_.width - right) * kC * sizeof(float));
            pack_row<kC>(from, step * g_.C, right - left, c * kC, g_.C, to + left * kC);
        }
    }

    void one(i64 first, i64 last, i64 c, i64 k, i64 tap, float* acc) const {
        const i64 r = tap / g_.S * g_.dilation_h, s = tap % g_.S * g_.dilation_w;
        const float *dy = dys_ + k * dy_panel_, *x = xs_ + c * x_panel_ + (r * plan_.width + s) * kC;
        if (plan_.pointwise) return multiply(dy, 0, x, 0, kC, 1, (last - first) * g_.Q, acc);
        images(first, last, [&](i64, i64, i64 n, i64 before, i64 above) {
            multiply(dy + before * g_.Q * kK, g_.Q * kK, x + above * plan_.width * kC, plan_.step_h * plan_.width * kC,
                     plan_.step_w * kC, n, g_.Q, acc);
        });
    }

    const ConvShape& g_;
    const Plan& plan_;
    const T *const dy_, *const x_;
    float *const xs_, *const dys_;
    i64 x_panel_ = 0, dy_panel_ = 0;
};

template <class T>
void run(const T* dy, const T* x, const ConvShape& g, float* dw, i64 threads) {
    Plan plan;
    plan.c_panels = ceil_div(g.C, kC), plan.k_panels = ceil_div(g.K, kK), plan.taps = g.R * g.S;
    plan.pointwise = plan.taps == 1;
    plan.step_h = plan.pointwise ? 1 : g.stride_h;
    plan.step_w = plan.pointwise ? 1 : g.stride_w;
    plan.reach = (g.R - 1) * g.dilation_h + 1;
    plan.width = (g.Q - 1) * plan.step_w + (g.S - 1) * g.dilation_w + 1;

    // Slabs of rows with sums of their own where these are small next to the activations. Their number depends on the
    // sizes alone, and so do the bits of the result.
    const i64 all = g.N * g.P, sums = plan.c_panels * plan.k_panels * plan.taps * kTile;
    const i64 slabs = max_of(1, min_of(min_of(kSlabs, all), (g.N * g.H * g.W * g.C + all * g.Q * g.K) / (4 * sums)));
    const i64 parts = min_of(plan.c_panels, ceil_div(threads, slabs)), c_most = ceil_div(plan.c_panels, parts);
    const i64 slab_rows = ceil_div(all, slabs);
    // Floats of one row of dy, packed, with its part of x; as many rows as half of L2 holds.
    const i64 row = g.Q * plan.k_panels * kK + plan.step_h * plan.width * c_most * kC;
    const i64 fit = max_of(l2_bytes() / 2 / i64(sizeof(float)) / row, ceil_div(kPixelsAtOnce, g.Q));
    const i64 strip = ceil_div(slab_rows, ceil_div(slab_rows, min_of(fit, slab_rows)));
    const i64 x_floats = (strip * plan.step_h + (strip / g.P + 2) * plan.reach) * plan.width * c_most * kC;
    const i64 dy_floats = strip * g.Q * plan.k_panels * kK;
    const Scratch acc_memory(slabs * sums * sizeof(float)),
        packed(slabs * parts * (x_floats + dy_floats) * sizeof(float));
    float* const accs = static_cast<float*>(acc_memory.get());
    const i64 per_c = plan.k_panels * plan.taps * kTile;

    parallel(threads, slabs * parts, [&](i64 first, i64 last, int) {
        for (i64 task = first; task < last; ++task) {
            const i64 slab = task / parts, part = task % parts;
            const i64 c0 = plan.c_panels * part / parts, c1 = plan.c_panels * (part + 1) / parts;
            float* const acc = accs + slab * sums + c0 * per_c;
            // One buffer a range of tasks: they run one after the other.
            float* const xs = static_cast<float*>(packed.get()) + first * (x_floats + dy_floats);
            __builtin_memset(acc, 0, (c1 - c0) * per_c * sizeof(float));
            Slab<T>(g, plan, dy, x, xs, xs + x_floats)
                .run(all * slab / slabs, all * (slab + 1) / slabs, strip, c0, c1, acc);
        }
    });
    parallel(threads, g.K * plan.taps, [&](i64 first, i64 last, int) {
        for (i64 row = first; row < last; ++row) {
            const i64 k = row / plan.taps, tap = row % plan.taps;
            for (i64 c = 0; c < plan.c_panels; ++c) {
                const float* in = accs + c * per_c + (k / kK * plan.taps + tap) * kTile + k % kK * kC;
                vf a0 = load(in), a1 = load(in + L);
                for (i64 s = 1; s < slabs; ++s) a0 += load(in + s * sums), a1 += load(in + s * sums + L);
                float* to = dw + row * g.C + c * kC;
                const int n = int(min_of(kC, g.C - c * kC));
                if (n >= L) {
                    store(to, a0);
                } else {
                    store_part(to, a0, n);
                }
                if (n == kC) {
                    store(to + L, a1);
                } else if (n > L) {
                    store_part(to + L, a1, n - L);
                }
            }
        }
    });
}

}  // namespace

void conv_wgrad(int dtype, const void* dy, const void* x, const ConvShape& g, float* dw, i64 ctx) {
    if (g.K == 0 || g.C == 0) return;
    if (g.N * g.P * g.Q == 0) {
        __builtin_memset(dw, 0, g.K * g.R * g.S * g.C * sizeof(float));
        return;
    }
    const i64 threads = max_of(1, ctx);
    switch (dtype) {
        case kF32:
            return run(static_cast<const float*>(dy), static_cast<const float*>(x), g, dw, threads);
        case kBF16:
            return run(static_cast<const bf16*>(dy), static_cast<const bf16*>(x), g, dw, threads);
        case kF16:
            return run(static_cast<const fp16*>(dy), static_cast<const fp16*>(x), g, dw, threads);
        default:
            cpu_runtime::bad_dtype(dtype);
    }
}

}  // namespace FASTRES_BACKEND
