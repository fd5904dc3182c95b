// Winograd's minimal filtering in one dimension: m outputs of a filter of 3 taps, with products as few as points of
// interpolation. The same transforms along rows and columns make F(m x m, 3 x 3).
//
// Points are chosen for accuracy; sums then are so many times as far from float64 as direct ones (256 channels,
// docs/perf-log.md): F(2): 0.7, F(3): 1.1, F(4): 2.0, F(5): 3.9, F(7): 22, with stride 2 F(2): 0.7, F(4): 0.9.
#pragma once
#include "cpu/isa/rows.h"

namespace FASTRES_BACKEND {
namespace {

// kAll inputs d become as many elements v; sums m of products become outputs y; `filter` makes a filter's elements.

// Two points and infinity, a filter of two taps.
struct TwoTaps2 {
    FR_INLINE static void input(const vf* d, vf* v) {
        v[0] = d[0] - d[1];
        v[1] = d[1];
        v[2] = d[2] - d[1];
    }
    FR_INLINE static void output(const vf* m, vf* y) {
        y[0] = m[0] + m[1];
        y[1] = m[1] + m[2];
    }
    static constexpr double filter[3][2] = {{1, 0}, {1, 1}, {0, 1}};
};

// Points +-a, +-b and infinity serve three outputs of three taps as well as four of two.
constexpr float kFiveA = 0.375f, kFiveB = 1.25f;
constexpr double kFiveNa = 2.0 * kFiveA * (double(kFiveA) * kFiveA - kFiveB * kFiveB),
                 kFiveNb = 2.0 * kFiveB * (double(kFiveB) * kFiveB - kFiveA * kFiveA);

FR_INLINE void five_input(const vf* d, vf* v) {
    const vf a = vf{} + kFiveA, b = vf{} + kFiveB, a2 = a * a, b2 = b * b;
    const vf odd_a = fma(-b2, d[1], d[3]), even_a = a * fma(-b2, d[0], d[2]);
    const vf odd_b = fma(-a2, d[1], d[3]), even_b = b * fma(-a2, d[0], d[2]);
    v[0] = odd_a + even_a;
    v[1] = odd_a - even_a;
    v[2] = odd_b + even_b;
    v[3] = odd_b - even_b;
    v[4] = fma(a2 * b2, d[0], fma(-(a2 + b2), d[2], d[4]));
}
template <int kOut>
FR_INLINE void five_output(const vf* m, vf* y) {
    const vf a = vf{} + kFiveA, b = vf{} + kFiveB;
    const vf sa = m[0] + m[1], da = m[0] - m[1], sb = m[2] + m[3], db = m[2] - m[3];
    y[0] = sa + sb;
    y[1] = fma(a, da, b * db);
    y[2] = fma(a * a, sa, b * b * sb);
    if constexpr (kOut == 4) y[3] = fma(a * a * a, da, b * b * b * db);
    y[kOut - 1] += m[4];
}

struct TwoTaps4 {
    FR_INLINE static void input(const vf* d, vf* v) { five_input(d, v); }
    FR_INLINE static void output(const vf* m, vf* y) { five_output<4>(m, y); }
    static constexpr double filter[5][2] = {{1 / kFiveNa, kFiveA / kFiveNa},
                                            {-1 / kFiveNa, kFiveA / kFiveNa},
                                            {1 / kFiveNb, kFiveB / kFiveNb},
                                            {-1 / kFiveNb, kFiveB / kFiveNb},
                                            {0, 1}};
};

template <int kOut, int kStride>
struct Points;

template <>
struct Points<2, 1> {
    static constexpr int kAll = 4;
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
struct Points<3, 1> {
    static constexpr int kAll = 5;
    FR_INLINE static void input(const vf* d, vf* v) { five_input(d, v); }
    FR_INLINE static void output(const vf* m, vf* y) { five_output<3>(m, y); }
    static constexpr double kA2 = double(kFiveA) * kFiveA, kB2 = double(kFiveB) * kFiveB;
    static constexpr double filter[5][3] = {{1 / kFiveNa, kFiveA / kFiveNa, kA2 / kFiveNa},
                                            {-1 / kFiveNa, kFiveA / kFiveNa, -kA2 / kFiveNa},
                                            {1 / kFiveNb, kFiveB / kFiveNb, kB2 / kFiveNb},
                                            {-1 / kFiveNb, kFiveB / kFiveNb, -kB2 / kFiveNb},
                                            {0, 0, 1}};
};

// Points 0, +-a, +-b and infinity; with the usual +-1 and +-2 sums are 4.6 times as far.
template <>
struct Points<4, 1> {
    static constexpr int kAll = 6;
    static constexpr float kA = 0.625f, kB = 1.5f, kA2 = kA * kA, kB2 = kB * kB;
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

// kPairs pairs of points +-p and infinity, for 2 * kPairs - 1 outputs.
template <int kPairs>
struct SquaresOf {
    // Coefficients of the product of (z - p^2) over all pairs but `but`, the lowest first; the highest is 1.
    double of[kPairs];
    constexpr SquaresOf(const float (&points)[kPairs], int but) : of{} {
        double all[kPairs + 1] = {1};
        int degree = 0;
        for (int i = 0; i < kPairs; ++i) {
            if (i == but) continue;
            ++degree;
            const double square = double(points[i]) * points[i];
            for (int k = degree; k > 0; --k) all[k] = all[k - 1] - all[k] * square;
            all[0] *= -square;
        }
        for (int k = 0; k < kPairs; ++k) of[k] = all[k];
    }
};

template <int kPairs, class List>
struct OfPairs {
    static constexpr int kOut = 2 * kPairs - 1, kAll = kOut + 2;

    // A polynomial in the square of the point on every other of d.
    template <int kBut>
    static FR_INLINE vf polynomial(const vf* d) {
        constexpr SquaresOf<kPairs> c(List::points, kBut);
        constexpr int kDegree = kBut < 0 ? kPairs : kPairs - 1;
        vf sum = d[2 * kDegree];
#pragma GCC unroll unrolled(4)
        for (int k = kDegree - 1; k >= 0; --k) sum = fma(vf{} + float(c.of[k]), d[2 * k], sum);
        return sum;
    }
    template <int kPair>
    static FR_INLINE void pair(const vf* d, vf* v) {
        const vf odd = polynomial<kPair>(d + 1), even = (vf{} + List::points[kPair]) * polynomial<kPair>(d);
        v[2 * kPair] = odd + even;
        v[2 * kPair + 1] = odd - even;
        if constexpr (kPair + 1 < kPairs) pair<kPair + 1>(d, v);
    }
    static FR_INLINE void input(const vf* d, vf* v) {
        pair<0>(d, v);
        v[2 * kPairs] = polynomial<-1>(d);
    }
    static FR_INLINE void output(const vf* m, vf* y) {
        vf sum[kPairs], difference[kPairs];
#pragma GCC unroll unrolled(4)
        for (int j = 0; j < kPairs; ++j) sum[j] = m[2 * j] + m[2 * j + 1], difference[j] = m[2 * j] - m[2 * j + 1];
#pragma GCC unroll unrolled(7)
        for (int k = 0; k < kOut; ++k) {
            vf total = k + 1 == kOut ? m[2 * kPairs] : vf{};
#pragma GCC unroll unrolled(4)
            for (int j = 0; j < kPairs; ++j) {
                float power = 1.0f;
                for (int i = 0; i < k; ++i) power *= List::points[j];
                const vf of = k % 2 ? difference[j] : sum[j];
                total = j == 0 && k + 1 < kOut ? (vf{} + power) * of : fma(vf{} + power, of, total);
            }
            y[k] = total;
        }
    }
    struct Filter {
        double of[kAll][3];
        constexpr const double (&operator[](int i) const)[3] { return of[i]; }
    };
    static constexpr Filter make() {
        Filter f{};
        for (int j = 0; j < kPairs; ++j) {
            const double p = List::points[j];
            double n = 2.0 * p;
            for (int i = 0; i < kPairs; ++i)
                if (i != j) n *= p * p - double(List::points[i]) * List::points[i];
            const double powers[3] = {1.0, p, p * p};
            for (int t = 0; t < 3; ++t) {
                f.of[2 * j][t] = powers[t] / n;
                f.of[2 * j + 1][t] = (t == 1 ? powers[t] : -powers[t]) / n;
            }
        }
        f.of[2 * kPairs][2] = 1;
        return f;
    }
    static constexpr Filter filter = make();
};

// 15 pixels in three tiles, of the 14 that images often have; 7 pixels and multiples of them in tiles of 7, whose
// errors are those of 16-bit activations at most (cpu_winograd.py).
struct ThreePairs {
    static constexpr float points[3] = {0.25f, 0.875f, 1.75f};
};
struct FourPairs {
    static constexpr float points[4] = {0.25f, 0.625f, 1.125f, 2.0f};
};
template <>
struct Points<5, 1> : OfPairs<3, ThreePairs> {};
template <>
struct Points<7, 1> : OfPairs<4, FourPairs> {};

// Stride 2: y_i = w0 x_2i + w2 x_2i+2 + w1 x_2i+1. The even samples meet a filter of two taps; the odd ones, multiplied
// as they are, share one element of the filter.
template <int kOut, class Even>
struct Strided {
    static constexpr int kAll = 2 * kOut + 1;
    FR_INLINE static void input(const vf* d, vf* v) {
        vf even[kOut + 1];
#pragma GCC unroll unrolled(5)
        for (int i = 0; i <= kOut; ++i) even[i] = d[2 * i];
        Even::input(even, v);
#pragma GCC unroll unrolled(4)
        for (int i = 0; i < kOut; ++i) v[kOut + 1 + i] = d[2 * i + 1];
    }
    FR_INLINE static void output(const vf* m, vf* y) {
        Even::output(m, y);
#pragma GCC unroll unrolled(4)
        for (int i = 0; i < kOut; ++i) y[i] += m[kOut + 1 + i];
    }
    struct Filter {
        double of[kOut + 2][3];
        constexpr const double (&operator[](int i) const)[3] { return of[i]; }
    };
    static constexpr Filter filter = [] {
        Filter f{};
        for (int i = 0; i <= kOut; ++i) f.of[i][0] = Even::filter[i][0], f.of[i][2] = Even::filter[i][1];
        f.of[kOut + 1][1] = 1;
        return f;
    }();
};
template <>
struct Points<2, 2> : Strided<2, TwoTaps2> {};
template <>
struct Points<4, 2> : Strided<4, TwoTaps4> {};

}  // namespace
}  // namespace FASTRES_BACKEND
