// 3x3 convolutions of stride 1 by Winograd's minimal filtering, F(2x2, 3x3) and F(4x4, 3x3) (Lavin and Gray, "Fast
// Algorithms for Convolutional Neural Networks", 2016): 2.25 and 4 times fewer products.
//
// A worker takes as many output tiles as their transformed inputs fit L2, multiplies them, one transformed element
// after the other, with a panel of 32 output channels, and transforms the sums back: only x, the weights and y pass
// through memory. The weights are transformed once, in double.
#include <stdexcept>

#include "cpu/conv.h"
#include "cpu/conv_tile.h"

namespace FASTRES_BACKEND {
namespace {

// Interpolation points 0, +-a, +-b and infinity. Chosen for accuracy: with +-5/8 and +-3/2 sums are 2.0 times as far
// from float64 as direct ones, with the usual +-1 and +-2 4.6 times (docs/perf-log.md).
constexpr float kA = 0.625f, kB = 1.5f;

template <int A>
struct Points;

template <>
struct Points<4> {
    static constexpr int kOut = 2;
    FR_INLINE static void input(const vf* d, vf* v) {
        v[0] = d[0] - d[2];
        v[1] = d[1] + d[2];
        v[2] = d[2] - d[1];
        v[3] = d[3] - d[1];
    }
    FR_INLINE static void output(const vf* m, vf* y) {
        y[0] = m[0] + m[1] + m[2];
        y[1] = m[1] - m[2] + m[3];
    }
    static constexpr double filter[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
};

template <>
struct Points<6> {
    static constexpr int kOut = 4;
    static constexpr float kA2 = kA * kA, kB2 = kB * kB;
    static constexpr double kNa = 2.0 * kA2 * (double(kA2) - kB2), kNb = 2.0 * kB2 * (double(kB2) - kA2);

    FR_INLINE static void input(const vf* d, vf* v) {
        const vf a2 = vf{} + kA2, b2 = vf{} + kB2, sum = vf{} + (kA2 + kB2), product = vf{} + kA2 * kB2;
        const vf even_a = fma(-b2, d[2], d[4]), odd_a = (vf{} + kA) * fma(-b2, d[1], d[3]);
        const vf even_b = fma(-a2, d[2], d[4]), odd_b = (vf{} + kB) * fma(-a2, d[1], d[3]);
        v[0] = fma(product, d[0], fma(-sum, d[2], d[4]));
        v[1] = even_a + odd_a;
        v[2] = even_a - odd_a;
        v[3] = even_b + odd_b;
        v[4] = even_b - odd_b;
        v[5] = fma(product, d[1], fma(-sum, d[3], d[5]));
    }
    FR_INLINE static void output(const vf* m, vf* y) {
        const vf sa = m[1] + m[2], da = m[1] - m[2], sb = m[3] + m[4], db = m[3] - m[4];
        y[0] = m[0] + sa + sb;
        y[1] = fma(vf{} + kA, da, (vf{} + kB) * db);
        y[2] = fma(vf{} + kA2, sa, (vf{} + kB2) * sb);
        y[3] = fma(vf{} + kA * kA2, da, fma(vf{} + kB * kB2, db, m[5]));
    }
    static constexpr double filter[6][3] = {{1 / (double(kA2) * kB2), 0, 0}, {1 / kNa, kA / kNa, kA2 / kNa},
                                            {1 / kNa, -kA / kNa, kA2 / kNa}, {1 / kNb, kB / kNb, kB2 / kNb},
                                            {1 / kNb, -kB / kNb, kB2 / kNb}, {0, 0, 1}};
};

// Channels of the transformed weights, filled up with zeros.
i64 channels_of(i64 C) { return ceil_div(C, kStep) * kStep; }

template <int A>
struct Sizes {
    static constexpr int kAll = A * A;
    static constexpr int kOut = Points<A>::kOut;
    i64 blocks, channels, panels, tiles_h, tiles_w, tiles;
    explicit Sizes(const ConvShape& g)
        : blocks(ceil_div(g.C, kBlock)),
          channels(channels_of(g.C)),
          panels(ceil_div(g.K, kPanel)),
          tiles_h(ceil_div(g.P, kOut)),
          tiles_w(ceil_div(g.Q, kOut)),
          tiles(g.N * tiles_h * tiles_w) {}
};

// [panel][element][channel][kPanel]
template <int A>
void pack(const float* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& g, float* to, i64 threads) {
    const Sizes<A> s(g);
    const auto& G = Points<A>::filter;
    parallel(threads, s.panels, [&](i64 first, i64 last, int) {
        for (i64 p = first; p < last; ++p) {
            float* panel = to + p * s.kAll * s.channels * kPanel;
            __builtin_memset(panel, 0, s.kAll * s.channels * kPanel * sizeof(float));
            for (i64 c = 0; c < g.C; ++c)
                for (i64 k = 0; k < min_of(kPanel, g.K - p * kPanel); ++k) {
                    const float* from = w + (p * kPanel + k) * w_k + c * w_c;
                    double rows[A][3];
                    for (int i = 0; i < A; ++i)
                        for (int s3 = 0; s3 < 3; ++s3) {
                            rows[i][s3] = 0;
                            for (int r = 0; r < 3; ++r) rows[i][s3] += G[i][r] * from[(r * 3 + s3) * w_tap];
                        }
                    for (int i = 0; i < A; ++i)
                        for (int j = 0; j < A; ++j) {
                            double sum = 0;
                            for (int s3 = 0; s3 < 3; ++s3) sum += G[j][s3] * rows[i][s3];
                            panel[((i * A + j) * s.channels + c) * kPanel + k] = float(sum);
                        }
                }
        }
    });
}

template <int A, class T>
class Winograd {
  public:
    Winograd(const ConvShape& g, const T* x, const float* w, const float* bias, const T* residual, bool relu, T* y)
        : g_(g), s_(g), x_(x), w_(w), bias_(bias), residual_(residual), relu_(relu), y_(y) {}

    void run(i64 threads) {
        // Threads share the tiles, and the panels where each would otherwise read all of the weights for few tiles.
        i64 parts = 1;
        while (parts * 2 <= threads && threads % (parts * 2) == 0 && parts * 2 <= s_.panels &&
               s_.tiles * parts / threads < kPixels * 4)
            parts *= 2;
        const i64 shares = threads / parts, mine = ceil_div(s_.tiles, shares);
        // What a tile keeps in L2: its input, transformed, and the sums of a panel; beside them weights pass through.
        const i64 bytes = i64(s_.kAll) * (s_.blocks * kBlock + kPanel) * i64(sizeof(float));
        most_ = max_of(kPixels, l2_bytes() * 4 / 10 / bytes / kPixels * kPixels);
        most_ = ceil_div(mine, ceil_div(mine, most_));
        // An odd number of lines from one element to the next: they would share few cache sets otherwise.
        element_ = (s_.blocks * most_ | 1) * kBlock;
        sums_ = (most_ * kPanel / kBlock | 1) * kBlock;
        const i64 floats = s_.kAll * (element_ + sums_);
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
        return {tile / (s_.tiles_h * s_.tiles_w), tile / s_.tiles_w % s_.tiles_h * s_.kOut,
                tile % s_.tiles_w * s_.kOut};
    }

    void transform(i64 first, i64 count, float* v) const {
        for (i64 t = 0; t < count; ++t) {
            const Place at = place(first + t);
            const i64 h0 = at.i - g_.pad_h, w0 = at.j - g_.pad_w;
            const T* pixels[A][A];
            for (int i = 0; i < A; ++i)
                for (int j = 0; j < A; ++j) {
                    const i64 h = h0 + i, w = w0 + j;
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
#pragma GCC unroll 6
        for (int j = 0; j < A; ++j) {
            vf d[A], r[A];
#pragma GCC unroll 6
            for (int i = 0; i < A; ++i) d[i] = pixels[i][j] ? span.load(pixels[i][j] + c) : vf{};
            Points<A>::input(d, r);
#pragma GCC unroll 6
            for (int i = 0; i < A; ++i) columns[i][j] = r[i];
        }
#pragma GCC unroll 6
        for (int i = 0; i < A; ++i) {
            vf r[A];
            Points<A>::input(columns[i], r);
#pragma GCC unroll 6
            for (int j = 0; j < A; ++j) store(to + (i * A + j) * element_, r[j]);
        }
    }

    void multiply(i64 count, i64 panel, bool cold, const float* v, float* sums) const {
        static const i64 none[1] = {0};
        const int last = int(s_.channels - (s_.blocks - 1) * kBlock);
        TileInput in{none, 1, s_.blocks, most_ * kBlock, last};
        const i64 groups = ceil_div(count, kPixels), slab = s_.channels * kPanel;
        for (int e = 0; e < s_.kAll; ++e) {
            const float* w = w_ + (panel * s_.kAll + e) * slab;
            for (i64 g = 0; g < groups; ++g) {
                // The next element's weights come while this one's are used, evenly.
                const bool own = groups == 1 || (cold && e == 0 && g == 0);
                in.ahead = own ? w + kAhead : w + slab + slab * g / groups / kLine * kLine;
                in.lines = own ? kOwnLines : int(ceil_div(kOwnLines, groups));
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
            const int rows = int(min_of(s_.kOut, g_.P - at.i)), columns = int(min_of(s_.kOut, g_.Q - at.j));
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
        constexpr int kOut = Points<A>::kOut;
        const vf bias = bias_ ? span.load(bias_ + k) : vf{};
        vf half[kOut][A];
#pragma GCC unroll 6
        for (int j = 0; j < A; ++j) {
            vf d[A], r[kOut];
#pragma GCC unroll 6
            for (int i = 0; i < A; ++i) d[i] = load(m + (i * A + j) * sums_);
            Points<A>::output(d, r);
#pragma GCC unroll 4
            for (int i = 0; i < kOut; ++i) half[i][j] = r[i];
        }
#pragma GCC unroll 4
        for (int i = 0; i < kOut; ++i) {
            if (i >= rows) break;
            vf r[kOut];
            Points<A>::output(half[i], r);
#pragma GCC unroll 4
            for (int j = 0; j < kOut; ++j) {
                if (j >= columns) break;
                const i64 at = out + (i * g_.Q + j) * g_.K;
                vf value = r[j] + bias;
                if (residual_) value += span.load(residual_ + at);
                if (relu_) value = at_least(value, vf{});
                span.store(y_ + at, value);
            }
        }
    }

    const ConvShape& g_;
    const Sizes<A> s_;
    const T* x_;
    const float *w_, *bias_;
    const T* residual_;
    const bool relu_;
    T* y_;
    i64 most_ = 0, element_ = 0, sums_ = 0;
};

void check(const ConvShape& g, i64 out) {
    const bool usual =
        g.R == 3 && g.S == 3 && g.stride_h == 1 && g.stride_w == 1 && g.dilation_h == 1 && g.dilation_w == 1;
    if (!usual) throw std::invalid_argument("winograd: expected 3x3 taps of stride 1 and dilation 1");
    if (out != 2 && out != 4) throw std::invalid_argument("winograd: out must be 2 or 4");
}

}  // namespace

i64 winograd_packed_floats(const ConvShape& g, i64 out) {
    check(g, out);
    return ceil_div(g.K, kPanel) * (out + 2) * (out + 2) * channels_of(g.C) * kPanel;
}

void winograd_pack(const float* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& g, i64 out, float* packed, i64 ctx) {
    check(g, out);
    const auto to = out == 2 ? pack<4> : pack<6>;
    to(w, w_k, w_c, w_tap, g, packed, max_of(1, ctx));
}

void winograd_fprop(int dtype, const void* x, const float* packed, const ConvShape& g, i64 out, const float* bias,
                    const void* residual, int relu, void* y, i64 ctx) {
    check(g, out);
    if (g.N * g.P * g.Q == 0 || g.K == 0) return;
    with_narrow(dtype, [&](auto type) {
        using T = decltype(type);
        const auto run = [&](auto tile) {
            Winograd<decltype(tile)::value, T>(g, static_cast<const T*>(x), packed, bias,
                                               static_cast<const T*>(residual), relu != 0, static_cast<T*>(y))
                .run(max_of(1, ctx));
        };
        if (out == 2)
            run(Constant<4>());
        else
            run(Constant<6>());
    });
}

}  // namespace FASTRES_BACKEND
