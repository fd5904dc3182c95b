// 1x1 convolutions by Strassen's matrix product ("Gaussian Elimination is not Optimal", 1969): pixels, input and output
// channels in halves, 7 products of halves in place of 8; in quarters, 49 in place of 64. As in Huang et al.,
// "Strassen's Algorithm Reloaded" (2016), no matrix of sums is kept: x is added up while a strip of it is laid out in
// L2, the products of some panels while they are written to y; the weights were added up when they were packed, in
// double.
//
// x: pixels by input channels, w: input by output channels, y: pixels by output channels. The parts of pixels are those
// of an image, so that images do not meet: a NaN in one stays in it. Parts of output channels: panels in turns.
#include <stdexcept>
#include <utility>

#include "cpu/conv.h"
#include "cpu/conv_tile.h"

namespace FASTRES_BACKEND {
namespace {

// Of halves: the factors of product m, OfX * OfW, and the results. x, w and m: functions of the position.
struct OfX {
    template <int kProduct, class F>
    static FR_INLINE auto sum(F x) {
        if constexpr (kProduct == 0) return x(0, 0) + x(1, 1);
        if constexpr (kProduct == 1) return x(1, 0) + x(1, 1);
        if constexpr (kProduct == 2) return x(0, 0);
        if constexpr (kProduct == 3) return x(1, 1);
        if constexpr (kProduct == 4) return x(0, 0) + x(0, 1);
        if constexpr (kProduct == 5) return x(1, 0) - x(0, 0);
        if constexpr (kProduct == 6) return x(0, 1) - x(1, 1);
    }
};
struct OfW {
    template <int kProduct, class F>
    static FR_INLINE auto sum(F w) {
        if constexpr (kProduct == 0) return w(0, 0) + w(1, 1);
        if constexpr (kProduct == 1) return w(0, 0);
        if constexpr (kProduct == 2) return w(0, 1) - w(1, 1);
        if constexpr (kProduct == 3) return w(1, 0) - w(0, 0);
        if constexpr (kProduct == 4) return w(1, 1);
        if constexpr (kProduct == 5) return w(0, 0) + w(0, 1);
        if constexpr (kProduct == 6) return w(1, 0) + w(1, 1);
    }
};
template <int kRow, int kColumn, class F>
FR_INLINE auto result(F m) {
    if constexpr (kRow == 0 && kColumn == 0) return m(0) + m(3) - m(4) + m(6);
    if constexpr (kRow == 0 && kColumn == 1) return m(2) + m(4);
    if constexpr (kRow == 1 && kColumn == 0) return m(1) + m(3);
    if constexpr (kRow == 1 && kColumn == 1) return m(0) - m(1) + m(2) + m(5);
}

#define FR_LAMBDA __attribute__((always_inline))

// f(i) for i < kTimes as constants.
template <class F, int... I>
FR_INLINE void each(std::integer_sequence<int, I...>, F f) {
    (f(Constant<I>()), ...);
}
template <int kTimes, class F>
FR_INLINE void each(F f) {
    each(std::make_integer_sequence<int, kTimes>(), f);
}

// put(m, sum) of every product, for parts x(row, column). What is needed again is read once: put may write anywhere.
template <class Of, int kLevels, class F, class Put>
FR_INLINE void every_sum(F x, Put put) {
    decltype(x(0, 0)) half[2][2];
    const auto part = [&](int p, int q) FR_LAMBDA { return half[p][q]; };
    if constexpr (kLevels == 1) {
        each<4>([&](auto at) FR_LAMBDA { half[at.value / 2][at.value % 2] = x(at.value / 2, at.value % 2); });
        each<7>([&](auto m) FR_LAMBDA { put(m.value, Of::template sum<m.value>(part)); });
    } else {
        each<7>([&](auto m) FR_LAMBDA {
            each<4>([&](auto at) FR_LAMBDA {
                constexpr int i = at.value / 2, j = at.value % 2;
                half[i][j] = Of::template sum<m.value>([&](int p, int q) FR_LAMBDA { return x(2 * p + i, 2 * q + j); });
            });
            each<7>([&](auto n) FR_LAMBDA { put(7 * m.value + n.value, Of::template sum<n.value>(part)); });
        });
    }
}

// put(row, column, result) of every part, for products m(i).
template <int kLevels, class F, class Put>
FR_INLINE void every_result(F m, Put put) {
    decltype(m(0)) half[7];
    const auto part = [&](int h) FR_LAMBDA { return half[h]; };
    if constexpr (kLevels == 1) {
        each<7>([&](auto h) FR_LAMBDA { half[h.value] = m(h.value); });
        each<4>([&](auto of) FR_LAMBDA { put(of.value / 2, of.value % 2, result<of.value / 2, of.value % 2>(part)); });
    } else {
        each<4>([&](auto at) FR_LAMBDA {
            constexpr int i = at.value / 2, j = at.value % 2;
            each<7>([&](auto h) FR_LAMBDA {
                half[h.value] = result<i, j>([&](int n) FR_LAMBDA { return m(7 * h.value + n); });
            });
            each<4>([&](auto of) FR_LAMBDA {
                constexpr int p = of.value / 2, q = of.value % 2;
                put(2 * p + i, 2 * q + j, result<p, q>(part));
            });
        });
    }
}

template <int kLevels>
struct Split {
    static constexpr int kParts = 1 << kLevels, kProducts = kLevels == 1 ? 7 : 49;
    i64 blocks, channels;  // of a part of the input channels; the last ones are filled up with zeros
    i64 groups;            // of kParts panels
    i64 product;           // floats of one product's weights
    explicit Split(const ConvShape& g)
        : blocks(ceil_div(ceil_div(g.C, kParts), kBlock)),
          channels(blocks * kBlock),
          groups(ceil_div(g.K, kParts * kPanel)),
          product(channels * kPanel) {}
};

// [group of panels][product][channel][kPanel]
template <int kLevels>
void pack(const float* w, i64 w_k, i64 w_c, const ConvShape& g, float* to, i64 threads) {
    const Split<kLevels> s(g);
    parallel(threads, s.groups * s.channels, [&](i64 first, i64 last, int) {
        for (i64 task = first; task < last; ++task) {
            const i64 group = task / s.channels, c0 = task % s.channels;
            for (i64 i = 0; i < kPanel; ++i) {
                const auto part = [&](int p, int q) {
                    const i64 c = c0 + p * s.channels, k = (group * s.kParts + q) * kPanel + i;
                    return c < g.C && k < g.K ? double(w[k * w_k + c * w_c]) : 0.0;
                };
                every_sum<OfW, kLevels>(part, [&](int m, double sum) {
                    to[(group * s.kProducts + m) * s.product + c0 * kPanel + i] = float(sum);
                });
            }
        }
    });
}

template <int kLevels, class T>
class Strassen {
    using Sizes = Split<kLevels>;
    static constexpr int kParts = Sizes::kParts, kProducts = Sizes::kProducts;

  public:
    Strassen(const ConvShape& g, const T* x, const float* w, const float* bias, const T* residual, bool relu, T* y)
        : g_(g),
          s_(g),
          x_(x),
          w_(w),
          bias_(bias),
          residual_(residual),
          floor_(relu ? vf{} : vf{} - __builtin_inff()),
          y_(y),
          image_(g.P * g.Q),
          part_(ceil_div(image_, kParts)),
          all_(g.N * part_) {}

    void run(i64 threads) {
        // Threads share pixels, and panels where each would have few or where weights are the larger traffic.
        i64 shared = 1;
        const auto cost = [&](i64 n) { return 2 * kParts * all_ * g_.C * n / threads + g_.C * g_.K / n; };
        while (shared * 2 <= threads && threads % (shared * 2) == 0 && shared * 2 <= s_.groups &&
               (all_ * shared / threads < kPixels || cost(2 * shared) < cost(shared)))
            shared *= 2;
        const i64 shares = threads / shared, mine = ceil_div(all_, shares);
        // What pixels that meet keep in L2: sums of their channels and the products of some panels.
        const i64 bytes = kProducts * (s_.channels + kPanel) * i64(sizeof(float));
        most_ = max_of(kPixels, l2_bytes() * 3 / 10 / bytes / kPixels * kPixels);
        most_ = ceil_div(mine, ceil_div(mine, most_));
        // An odd number of lines from one block to the next: they would share few cache sets otherwise.
        block_ = (most_ | 1) * kBlock;
        product_ = (most_ * kPanel / kBlock | 1) * kBlock;
        const i64 floats =
            scratch_pitch(kProducts * (s_.blocks * block_ + product_) * i64(sizeof(float))) / i64(sizeof(float));
        const Scratch scratch(threads * floats * sizeof(float)), places(threads * most_ * sizeof(Place));
        parallel(threads, shares * shared, [&](i64 first, i64 last, int) {
            for (i64 task = first; task < last; ++task) {
                const i64 share = task / shared, part = task % shared;
                float* const sums = static_cast<float*>(scratch.get()) + task * floats;
                float* const products = sums + kProducts * s_.blocks * block_;
                Place* const place = static_cast<Place*>(places.get()) + task * most_;
                const i64 end = all_ * (share + 1) / shares;
                const i64 g0 = s_.groups * part / shared, g1 = s_.groups * (part + 1) / shared;
                for (i64 at = all_ * share / shares, n; at < end; at += n) {
                    n = min_of(most_, end - at);
                    for (i64 i = 0; i < n; ++i)
                        for (int p = 0; p < kParts; ++p) place[i].x[p] = pixel(place[i].y[p] = meeting(at + i, p));
                    add_up(place, n, sums);
                    Coming coming(*this, at + n, min_of(most_, end - at - n),
                                  kProducts * (g1 - g0) * ceil_div(n, kPixels));
                    for (i64 g = g0; g < g1; ++g) multiply(place, n, g, g == g0, sums, products, coming);
                }
            }
        });
    }

  private:
    // Pixels that meet: where they lie in x and their numbers in y; null and < 0: none.
    struct Place {
        const T* x[kParts];
        i64 y[kParts];
    };
    // One of kParts output pixels that meet; < 0: none, where they do not come out even.
    i64 meeting(i64 at, int part) const {
        const i64 pixel = at % part_ + part * part_;
        return pixel < image_ ? at / part_ * image_ + pixel : -1;
    }
    const T* pixel(i64 at) const {
        if (at < 0) return nullptr;
        const i64 q = at % g_.Q, p = at / g_.Q % g_.P, n = at / image_;
        return x_ + ((n * g_.H + p * g_.stride_h) * g_.W + q * g_.stride_w) * g_.C;
    }

    void add_up(const Place* place, i64 n, float* to) const {
        const i64 next = s_.blocks * block_;
        const bool even = kParts * s_.channels == g_.C && part_ * kParts == image_;
        for (i64 i = 0; i < n; ++i)
            for (i64 b = 0; b < s_.blocks; ++b)
                for (int v = 0; v < kBlock; v += L) {
                    const T* const* const x = place[i].x;
                    const i64 c = b * kBlock + v;
                    const auto put = [&](int m, vf sum)
                                         FR_LAMBDA { store(to + b * block_ + i * kBlock + v + m * next, sum); };
                    if (even)
                        every_sum<OfX, kLevels>(
                            [&](int p, int q) FR_LAMBDA { return load(x[p] + c + q * s_.channels); }, put);
                    else
                        every_sum<OfX, kLevels>([&](int p, int q) { return some(x[p], c + q * s_.channels); }, put);
                }
    }
    vf some(const T* pixel, i64 c) const {
        if (!pixel || c >= g_.C) return vf{};
        return c + L <= g_.C ? load(pixel + c) : load_part(pixel + c, int(g_.C - c));
    }

    // The pixels of the next strip, fetched a little with every tile.
    class Coming {
      public:
        Coming(const Strassen& of, i64 first, i64 n, i64 tiles) {
            if (n <= 0 || of.g_.stride_h != 1 || of.g_.stride_w != 1) return;
            const i64 pixel = of.g_.C * i64(sizeof(T)), all = of.g_.N * of.image_;
            for (int p = 0; p < kParts; ++p) {
                const i64 at = of.meeting(first, p);
                if (at < 0) continue;
                range_[p] = reinterpret_cast<const char*>(of.x_) + at * pixel;
                left_[p] = min_of(n, all - at) * pixel;
            }
            chunk_ = ceil_div(kParts * n * pixel, Expected::kBytes * tiles) * Expected::kBytes;
        }
        void next(Expected& e, i64 steps) {
            while (part_ + 1 < kParts && left_[part_] == 0) ++part_;
            const i64 bytes = min_of(chunk_, left_[part_]);
            e.next = range_[part_], e.end = range_[part_] += bytes;
            left_[part_] -= bytes;
            e.further = Expected::kBytes * min_of(Expected::kMost, ceil_div(ceil_div(bytes, Expected::kBytes), steps));
        }

      private:
        const char* range_[kParts] = {};
        i64 left_[kParts] = {}, chunk_ = 0;
        int part_ = 0;
    };

    // What the end of a tile will need: some pixels' part of y in one panel.
    void expect(Expected& e, int part, const Place& first, i64 n, i64 group, i64 steps) const {
        const i64 k = (group * kParts + part % kParts) * kPanel, from = first.y[part / kParts];
        e.left = from < 0 || k + kPanel > g_.K ? 0 : min_of(n, g_.N * image_ - from);
        if (!e.left) return;
        e.y = reinterpret_cast<const char*>(y_ + from * g_.K + k);
        e.residual = residual_ ? reinterpret_cast<const char*>(residual_ + from * g_.K + k) : e.y;
        e.pitch = g_.K * i64(sizeof(T));
        e.second = max_of(0, kPanel * i64(sizeof(T)) - Expected::kBytes);
        e.each = ceil_div(n, steps);
    }

    // n meetings, to a group of panels of y.
    void multiply(const Place* place, i64 n, i64 group, bool cold, const float* sums, float* products,
                  Coming& coming) const {
        static const i64 none[1] = {0};
        TileInput in{none, 1, s_.blocks, block_, kBlock};
        Expected expected;
        in.expected = &expected;
        const i64 tiles = ceil_div(n, kPixels), steps = s_.channels / kStep;
        const float* w = w_ + group * kProducts * s_.product;
        for (int m = 0; m < kProducts; ++m, w += s_.product, cold = false)
            for (i64 t = 0; t < tiles; ++t) {
                const i64 i0 = n * t / tiles, i1 = n * (t + 1) / tiles;
                fetch_evenly(in, w, s_.product, t, tiles, cold);
                coming.next(expected, steps);
                const int part = m - (kProducts - kParts * kParts);
                if (part >= 0) expect(expected, part, place[i0], i1 - i0, group, steps);
                const float* a = sums + m * s_.blocks * block_ + i0 * kBlock;
                float* const to = products + i0 * kPanel;
                AllTiles::expecting(i1 - i0)(in, a, a, w, to + m * product_, kPanel);
                if (m + 1 == kProducts) restore(place + i0, i1 - i0, group, to);
            }
    }

    void restore(const Place* place, i64 n, i64 group, const float* products) const {
        for (i64 i = 0; i < n; ++i)
            for (int v = 0; v < kPanel; v += L) {
                const float* const from = products + i * kPanel + v;
                every_result<kLevels>([&](int m) FR_LAMBDA { return load(from + m * product_); },
                                      [&](int p, int q, vf sum) FR_LAMBDA {
                                          const i64 at = place[i].y[p], k = (group * kParts + q) * kPanel + v;
                                          if (at >= 0) finish(at, k, sum);
                                      });
            }
    }
    FR_INLINE void finish(i64 at, i64 k, vf sum) const {
        if (k + L <= g_.K)
            write(at * g_.K + k, k, sum, Full());
        else if (k < g_.K)
            write(at * g_.K + k, k, sum, Tail{int(g_.K - k), false});
    }
    template <class Span>
    FR_INLINE void write(i64 at, i64 k, vf sum, Span span) const {
        if (bias_) sum += span.load(bias_ + k);
        if (residual_) sum += span.load(residual_ + at);
        span.store(y_ + at, at_least(sum, floor_));
    }

    const ConvShape& g_;
    const Sizes s_;
    const T* x_;
    const float *w_, *bias_;
    const T* residual_;
    const vf floor_;
    T* y_;
    const i64 image_, part_, all_;  // output pixels of an image, of a part of it; meetings
    i64 most_ = 0, block_ = 0, product_ = 0;
};

// f(levels) as a constant.
template <class F>
void with_levels(const ConvShape& g, i64 levels, F f) {
    if (g.R != 1 || g.S != 1 || g.groups != 1 || g.pad_h || g.pad_w)
        throw std::invalid_argument("strassen: expected 1x1 taps, one group and no padding");
    if (levels == 1) return f(Constant<1>());
    if (levels == 2) return f(Constant<2>());
    throw std::invalid_argument("strassen: levels must be 1 or 2");
}

}  // namespace

i64 strassen_packed_floats(const ConvShape& g, i64 levels) {
    i64 floats = 0;
    with_levels(g, levels, [&](auto n) {
        const Split<n.value> s(g);
        floats = s.groups * s.kProducts * s.product;
    });
    return floats;
}

void strassen_pack(const float* w, i64 w_k, i64 w_c, const ConvShape& g, i64 levels, float* packed, i64 ctx) {
    with_levels(g, levels, [&](auto n) { pack<n.value>(w, w_k, w_c, g, packed, max_of(1, ctx)); });
}

void strassen_fprop(int dtype, const void* x, const float* packed, const ConvShape& g, i64 levels, const float* bias,
                    const void* residual, int relu, void* y, i64 ctx) {
    with_levels(g, levels, [&](auto n) {
        if (g.N * g.P * g.Q == 0 || g.K == 0) return;
        with_narrow(dtype, [&](auto type) {
            using T = decltype(type);
            Strassen<n.value, T>(g, static_cast<const T*>(x), packed, bias, static_cast<const T*>(residual), relu != 0,
                                 static_cast<T*>(y))
                .run(max_of(1, ctx));
        });
    });
}

}  // namespace FASTRES_BACKEND
