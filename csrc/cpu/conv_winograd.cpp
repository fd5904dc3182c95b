// 3x3 convolutions by Winograd's minimal filtering (Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks", 2016): F(2x2, 3x3), F(3x3, 3x3), F(4x4, 3x3), F(5x5, 3x3) and F(7x7, 3x3) take 2.25, 3.24, 4, 4.6 and 5.4
// times fewer products, with stride 2 F(2x2, 3x3) and F(4x4, 3x3) 1.44 and 1.78 times. With dilation d the pixels of
// one residue modulo d, in rows and columns, are an image of their own.
//
// A worker takes as many output tiles as their transformed inputs fit L2, multiplies them, one transformed element
// after the other, with a panel of 32 output channels, and transforms the sums back: only x, the weights and y pass
// through memory. The weights are transformed once, in double.
#include <stdexcept>

#include "cpu/conv.h"
#include "cpu/conv_tile.h"
#include "cpu/winograd_points.h"

namespace FASTRES_BACKEND {
namespace {

// As unrolled(); without wide vectors a tile is some hundred registers anyway, and took the compiler minutes.
constexpr int in_line(int times) {
#if defined(__AVX2__)
    return unrolled(times);
#else
    return times > 0;
#endif
}

// Channels of the transformed weights, filled up with zeros.
i64 channels_of(i64 C) { return ceil_div(C, kStep) * kStep; }

// Tiles over the rows of y, or the columns: each residue modulo the dilation has tiles of its own.
struct Lines {
    i64 step, longer, most, least;  // residues; those of one pixel more than the others; tiles of these, of the others
    Lines(i64 size, i64 out, i64 dilation)
        : step(dilation),
          longer(size % dilation),
          most(ceil_div(ceil_div(size, dilation), out)),
          least(ceil_div(size / dilation, out)) {}
    i64 tiles() const { return longer * most + (step - longer) * least; }
    // The first pixel of a tile.
    i64 start(i64 tile, i64 out) const {
        if (step == 1) return tile * out;
        if (tile < longer * most) return tile / most + tile % most * out * step;
        tile -= longer * most;
        return longer + tile / least + tile % least * out * step;
    }
};

template <int kOut, int kStride>
struct Sizes {
    static constexpr int A = Points<kOut, kStride>::kAll;
    static constexpr int kAll = A * A;
    // A filter's elements, a side. With stride 2 the last one serves kOut elements of the input.
    static constexpr int kFilter = kOut + 2;
    static constexpr int shared(int filter) { return A > kFilter && filter + 1 == kFilter ? kOut : 1; }
    i64 blocks, channels, panels;
    Lines rows, columns;
    i64 tiles_h, tiles_w, tiles;
    explicit Sizes(const ConvShape& g)
        : blocks(ceil_div(g.C, kBlock)),
          channels(channels_of(g.C)),
          panels(ceil_div(g.K, kPanel)),
          rows(g.P, kOut, g.dilation_h),
          columns(g.Q, kOut, g.dilation_w),
          tiles_h(rows.tiles()),
          tiles_w(columns.tiles()),
          tiles(g.N * tiles_h * tiles_w) {}
};

// [panel][element of the filter][channel][kPanel]
template <int kOut, int kStride>
void pack(const float* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& g, float* to, i64 threads) {
    const Sizes<kOut, kStride> s(g);
    constexpr int F = s.kFilter;
    const auto& G = Points<kOut, kStride>::filter;
    parallel(threads, s.panels, [&](i64 first, i64 last, int) {
        for (i64 p = first; p < last; ++p) {
            float* panel = to + p * F * F * s.channels * kPanel;
            __builtin_memset(panel, 0, F * F * s.channels * kPanel * sizeof(float));
            for (i64 c = 0; c < g.C; ++c)
                for (i64 k = 0; k < min_of(kPanel, g.K - p * kPanel); ++k) {
                    const float* from = w + (p * kPanel + k) * w_k + c * w_c;
                    double rows[F][3];
                    for (int i = 0; i < F; ++i)
                        for (int s3 = 0; s3 < 3; ++s3) {
                            rows[i][s3] = 0;
                            for (int r = 0; r < 3; ++r) rows[i][s3] += G[i][r] * from[(r * 3 + s3) * w_tap];
                        }
                    for (int i = 0; i < F; ++i)
                        for (int j = 0; j < F; ++j) {
                            double sum = 0;
                            for (int s3 = 0; s3 < 3; ++s3) sum += G[j][s3] * rows[i][s3];
                            panel[((i * F + j) * s.channels + c) * kPanel + k] = float(sum);
                        }
                }
        }
    });
}

template <int kOut, int kStride, class T>
class Winograd {
    using Of = Points<kOut, kStride>;
    static constexpr int A = Of::kAll;

  public:
    Winograd(const ConvShape& g, const T* x, const float* w, const float* bias, const T* residual, bool relu, T* y)
        : g_(g), s_(g), x_(x), w_(w), bias_(bias), residual_(residual), relu_(relu), y_(y) {}

    void run(i64 threads) {
        // Threads share the tiles; and the panels, where each would otherwise have too few tiles or wait longer for all
        // of the weights than it takes to transform more of the input.
        const auto cost = [&](i64 parts) {
            return 4 * i64(s_.kAll) * s_.tiles * parts / threads + i64(s_.kFilter * s_.kFilter) * g_.K / parts;
        };
        i64 parts = 1;
        while (parts * 2 <= threads && threads % (parts * 2) == 0 && parts * 2 <= s_.panels &&
               (2 * s_.tiles * parts / threads < 3 * kPixels || cost(2 * parts) < cost(parts)))
            parts *= 2;
        const i64 shares = threads / parts, mine = ceil_div(s_.tiles, shares);
        // What a tile keeps in L2: its input, transformed, and the sums of a panel; beside them weights pass through.
        const i64 bytes = i64(s_.kAll) * (s_.blocks * kBlock + kPanel) * i64(sizeof(float));
        most_ = max_of(kPixels, l2_bytes() * 4 / 10 / bytes / kPixels * kPixels);
        most_ = ceil_div(mine, ceil_div(mine, most_));
        // An odd number of lines from one element to the next: they would share few cache sets otherwise.
        element_ = (s_.blocks * most_ | 1) * kBlock;
        sums_ = (most_ * kPanel / kBlock | 1) * kBlock;
        const i64 floats = scratch_pitch(s_.kAll * (element_ + sums_) * i64(sizeof(float))) / i64(sizeof(float));
        const Scratch scratch(threads * floats * sizeof(float));
        parallel(threads, shares * parts, [&](i64 first, i64 last, int) {
            for (i64 task = first; task < last; ++task) {
                const i64 share = task / parts, part = task % parts;
                float* v = static_cast<float*>(scratch.get()) + task * floats;
                const i64 end = s_.tiles * (share + 1) / shares;
                for (i64 t = s_.tiles * share / shares; t < end; t += most_) {
                    const i64 count = min_of(most_, end - t);
                    transform(t, count, v);
                    const i64 p0 = s_.panels * part / parts;
                    for (i64 p = p0; p < s_.panels * (part + 1) / parts; ++p) {
                        multiply(count, p, p == p0, v, v + s_.kAll * element_);
                        restore(t, count, p, v + s_.kAll * element_);
                    }
                }
            }
        });
    }

  private:
    struct Place {
        i64 n, i, j;  // image; row and column of the first output
    };
    Place place(i64 tile) const {
        return {tile / (s_.tiles_h * s_.tiles_w), s_.rows.start(tile / s_.tiles_w % s_.tiles_h, kOut),
                s_.columns.start(tile % s_.tiles_w, kOut)};
    }

    void transform(i64 first, i64 count, float* v) const {
        for (i64 t = 0; t < count; ++t) {
            const Place at = place(first + t);
            const i64 h0 = at.i * kStride - g_.pad_h, w0 = at.j * kStride - g_.pad_w;
            const T* pixels[A][A];
            for (int i = 0; i < A; ++i)
                for (int j = 0; j < A; ++j) {
                    const i64 h = h0 + i * g_.dilation_h, w = w0 + j * g_.dilation_w;
                    const bool inside = h >= 0 && h < g_.H && w >= 0 && w < g_.W;
                    pixels[i][j] = inside ? x_ + ((at.n * g_.H + h) * g_.W + w) * g_.C : nullptr;
                }
            for (i64 b = 0; b < s_.blocks; ++b)
                for (int half = 0; half < kBlock; half += L) {
                    const i64 c = b * kBlock + half;
                    float* to = v + (b * most_ + t) * kBlock + half;
                    if (c + L <= g_.C)
                        one(pixels, c, to, Full());
                    else
                        one(pixels, c, to, Tail{int(max_of(0, g_.C - c)), false});
                }
        }
    }

    template <class Span>
    FR_INLINE void one(const T* const (&pixels)[A][A], i64 c, float* to, Span span) const {
        vf columns[A][A];
#pragma GCC unroll in_line(9)
        for (int j = 0; j < A; ++j) {
            vf d[A], r[A];
#pragma GCC unroll in_line(9)
            for (int i = 0; i < A; ++i) d[i] = pixels[i][j] ? span.load(pixels[i][j] + c) : vf{};
            Of::input(d, r);
#pragma GCC unroll in_line(9)
            for (int i = 0; i < A; ++i) columns[i][j] = r[i];
        }
#pragma GCC unroll in_line(9)
        for (int i = 0; i < A; ++i) {
            vf r[A];
            Of::input(columns[i], r);
#pragma GCC unroll in_line(9)
            for (int j = 0; j < A; ++j) store(to + (i * A + j) * element_, r[j]);
        }
    }

    void multiply(i64 count, i64 panel, bool cold, const float* v, float* sums) const {
        static const i64 none[1] = {0};
        const int last = int(s_.channels - (s_.blocks - 1) * kBlock);
        TileInput in{none, 1, s_.blocks, most_ * kBlock, last};
        const i64 groups = ceil_div(count, kPixels), slab = s_.channels * kPanel;
        const float* w = w_ + panel * s_.kFilter * s_.kFilter * slab;
        for (int i = 0; i < s_.kFilter; ++i)
            for (int j = 0; j < s_.kFilter; ++j, w += slab, cold = false) {
                const int columns = s_.shared(j);
                const i64 passes = groups * s_.shared(i) * columns;
                for (i64 pass = 0; pass < passes; ++pass) {
                    fetch_evenly(in, w, slab, pass, passes, cold);
                    const i64 part = pass / groups, g = pass % groups;
                    const i64 e = (i + part / columns) * A + j + part % columns;
                    const i64 t0 = count * g / groups, t1 = count * (g + 1) / groups;
                    const float* a = v + e * element_ + t0 * kBlock;
                    AllTiles::one(t1 - t0)(in, a, a, w, sums + e * sums_ + t0 * kPanel, kPanel);
                }
            }
    }

    void restore(i64 first, i64 count, i64 panel, const float* sums) const {
        const i64 k0 = panel * kPanel;
        for (i64 t = 0; t < count; ++t) {
            const Place at = place(first + t);
            const int rows = int(min_of(kOut, ceil_div(g_.P - at.i, g_.dilation_h))),
                      columns = int(min_of(kOut, ceil_div(g_.Q - at.j, g_.dilation_w)));
            const i64 out = ((at.n * g_.P + at.i) * g_.Q + at.j) * g_.K;
            for (i64 k = k0; k < min_of(g_.K, k0 + kPanel); k += L) {
                const float* m = sums + t * kPanel + k - k0;
                if (k + L <= g_.K)
                    back(m, out + k, k, rows, columns, Full());
                else
                    back(m, out + k, k, rows, columns, Tail{int(g_.K - k), false});
            }
        }
    }

    template <class Span>
    FR_INLINE void back(const float* m, i64 out, i64 k, int rows, int columns, Span span) const {
        const vf bias = bias_ ? span.load(bias_ + k) : vf{};
        vf half[kOut][A];
#pragma GCC unroll in_line(9)
        for (int j = 0; j < A; ++j) {
            vf d[A], r[kOut];
#pragma GCC unroll in_line(9)
            for (int i = 0; i < A; ++i) d[i] = load(m + (i * A + j) * sums_);
            Of::output(d, r);
#pragma GCC unroll in_line(7)
            for (int i = 0; i < kOut; ++i) half[i][j] = r[i];
        }
#pragma GCC unroll in_line(7)
        for (int i = 0; i < kOut; ++i) {
            if (i >= rows) break;
            vf r[kOut];
            Of::output(half[i], r);
#pragma GCC unroll in_line(7)
            for (int j = 0; j < kOut; ++j) {
                if (j >= columns) break;
                const i64 at = out + (i * g_.dilation_h * g_.Q + j * g_.dilation_w) * g_.K;
                vf value = r[j] + bias;
                if (residual_) value += span.load(residual_ + at);
                if (relu_) value = at_least(value, vf{});
                span.store(y_ + at, value);
            }
        }
    }

    const ConvShape& g_;
    const Sizes<kOut, kStride> s_;
    const T* x_;
    const float *w_, *bias_;
    const T* residual_;
    const bool relu_;
    T* y_;
    i64 most_ = 0, element_ = 0, sums_ = 0;
};

// f(out, stride) as constants.
template <class F>
void with_points(const ConvShape& g, i64 out, F f) {
    const bool usual = g.R == 3 && g.S == 3 && g.stride_h == g.stride_w && g.dilation_h > 0 && g.dilation_w > 0;
    if (!usual || g.stride_h < 1 || g.stride_h > 2)
        throw std::invalid_argument("winograd: expected 3x3 taps of stride 1 or 2");
    if (g.stride_h == 2 && (g.dilation_h > 1 || g.dilation_w > 1))
        throw std::invalid_argument("winograd: expected dilation 1 with stride 2");
    const bool strided = g.stride_h == 2;
    if (out == 2 && !strided) return f(Constant<2>(), Constant<1>());
    if (out == 3 && !strided) return f(Constant<3>(), Constant<1>());
    if (out == 4 && !strided) return f(Constant<4>(), Constant<1>());
    if (out == 5 && !strided) return f(Constant<5>(), Constant<1>());
    if (out == 7 && !strided) return f(Constant<7>(), Constant<1>());
    if (out == 2) return f(Constant<2>(), Constant<2>());
    if (out == 4) return f(Constant<4>(), Constant<2>());
    throw std::invalid_argument("winograd: out must be 2, 3, 4, 5 or 7, with stride 2 2 or 4");
}

}  // namespace

i64 winograd_packed_floats(const ConvShape& g, i64 out) {
    with_points(g, out, [](auto, auto) {});
    return ceil_div(g.K, kPanel) * (out + 2) * (out + 2) * channels_of(g.C) * kPanel;
}

void winograd_pack(const float* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& g, i64 out, float* packed, i64 ctx) {
    with_points(g, out, [&](auto side, auto stride) {
        pack<side.value, stride.value>(w, w_k, w_c, w_tap, g, packed, max_of(1, ctx));
    });
}

void winograd_fprop(int dtype, const void* x, const float* packed, const ConvShape& g, i64 out, const float* bias,
                    const void* residual, int relu, void* y, i64 ctx) {
    with_points(g, out, [&](auto side, auto stride) {
        if (g.N * g.P * g.Q == 0 || g.K == 0) return;
        with_narrow(dtype, [&](auto type) {
            using T = decltype(type);
            Winograd<side.value, stride.value, T>(g, static_cast<const T*>(x), packed, bias,
                                                  static_cast<const T*>(residual), relu != 0, static_cast<T*>(y))
                .run(max_of(1, ctx));
        });
    });
}

}  // namespace FASTRES_BACKEND
