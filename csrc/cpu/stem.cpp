// The stem after its convolution: BN, ReLU and max pooling in one pass, and back.
#include "cpu/isa/rows.h"

namespace FASTRES_BACKEND {
namespace {

constexpr int kNone = 255;      // idx where no gradient passes
constexpr int kMaxTaps = 225;   // k*k, so that a tap and kNone fit a byte
constexpr i64 kStemBlock = 64;  // channels per task of stem_fwd: k normalised rows of them stay in L2
constexpr i64 kStemRows = 8;    // pooled rows per task of stem_fwd: k - stride rows are normalised twice

struct Pool {
    i64 N, H, W, C, P, Q, k, stride, pad;

    // Taps [first, last) of a window along one axis that lie inside [0, size).
    static i64 first_tap(i64 origin) { return max_of(0, -origin); }
    i64 last_tap(i64 origin, i64 size) const { return max_of(first_tap(origin), min_of(k, size - origin)); }
    // Windows [first, last) of `count` along one axis that cover position i.
    i64 first_window(i64 i) const { return max_of(0, ceil_div(max_of(0, i + pad - k + 1), stride)); }
    i64 last_window(i64 i, i64 count) const { return min_of(count, (i + pad) / stride + 1); }
};

// A size known at run time only, beside Constant<N>.
struct Variable {
    i64 value;
};

// Values are compared as integers: clipped at 0, the bits of a float are in its order, a NaN above infinity.
FR_INLINE vi ordered(vf v) {
    const vi bits = bit_cast<vi>(at_least(v, vf{})) & 0x7fffffff;
    return bits < 0x7fc00000 ? bits : vi{} + 0x7fc00000;  // NaNs are equal: the first one wins
}
FR_INLINE vl ordered(vd v) {
    const vl bits = bit_cast<vl>(at_least(v, vd{})) & 0x7fffffffffffffff;
    return bits < 0x7ff8000000000000 ? bits : vl{} + 0x7ff8000000000000;
}

template <class T>
struct Forward {
    using A = Acc<T>;
    using V = Vec<T>;
    using I = Int<T>;
    using Lane = typename Traits<T>::Lane;
    Pool p;
    const T* x;
    const A *mean, *scale, *bias;
    T* out;
    u8* idx;

    // Row h of image n, channels [c0, c1): normalised, rounded to T, clipped, as ordered bits into `row` [W, pitch].
    void normalise(i64 n, i64 h, i64 c0, i64 c1, Lane* row, i64 pitch) const {
        const Forward f = *this;
        const i64 m0 = (n * p.H + h) * p.W;
        walk(m0, m0 + p.W, c0, c1, p.C, [=](auto rows, i64 m, i64 c, auto s) __attribute__((always_inline)) {
            const V mu = load(f.mean + c), k = load(f.scale + c), b = load(f.bias + c);
            for (int u = 0; u < rows.value; ++u)
                write(row + (m + u - m0) * pitch + c - c0,
                      ordered(rounded(fma(s.load(f.x + (m + u) * f.p.C + c) - mu, k, b), T())));
        });
    }

    // Pooled rows [p0, p1) of image n, channels [c0, c1). ring: k normalised rows, row h in slot h % k.
    void strip(i64 n, i64 p0, i64 p1, i64 c0, i64 c1, Lane* ring, i64 pitch, const I* taps) const {
        i64 ready = max_of(0, p0 * p.stride - p.pad);  // rows below are normalised, or not needed any more
        for (i64 y = p0; y < p1; ++y) {
            const i64 h = y * p.stride - p.pad;
            const i64 r0 = Pool::first_tap(h), r1 = p.last_tap(h, p.H);
            for (ready = max_of(ready, h + r0); ready < h + r1; ++ready)
                normalise(n, ready, c0, c1, ring + ready % p.k * p.W * pitch, pitch);
            const Lane* row[16];
            for (i64 r = r0; r < r1; ++r) row[r] = ring + (h + r) % p.k * p.W * pitch;
            for (i64 q = 0; q < p.Q; ++q) {
                const i64 w = q * p.stride - p.pad, m = (n * p.P + y) * p.Q + q;
                const i64 s0 = Pool::first_tap(w), s1 = p.last_tap(w, p.W);
                if (p.k == 3 && (r1 - r0) * (s1 - s0) == 9)
                    pixel(row, w * pitch - c0, 0, Constant<3>(), 0, Constant<3>(), Constant<3>(), m, c0, c1, pitch,
                          taps);
                else
                    pixel(row, w * pitch - c0, r0, Variable{r1}, s0, Variable{s1}, Variable{p.k}, m, c0, c1, pitch,
                          taps);
            }
        }
    }

    // One pooled pixel from the taps [r0, r1) x [s0, s1); a whole 3 x 3 window comes with sizes known to the compiler.
    template <class Size>
    FR_INLINE void pixel(const Lane* const* row, i64 base, i64 r0, Size r1, i64 s0, Size s1, Size k, i64 m, i64 c0,
                         i64 c1, i64 pitch, const I* taps) const {
        T* const to = out + m * p.C;
        u8* const code = idx ? idx + m * p.C : nullptr;
        const auto block = [=](i64 c, auto span) __attribute__((always_inline)) {
            I best{}, winner = I{} + kNone;  // what does not exceed 0 passes no gradient
            for (i64 r = r0; r < r1.value; ++r)
                for (i64 s = s0; s < s1.value; ++s) {
                    const I v = read<I>(row[r] + base + s * pitch + c);
                    winner = v > best ? taps[r * k.value + s] : winner;
                    best = v > best ? v : best;
                }
            span.store(to + c, bit_cast<V>(best));
            if (code) span.bytes(code + c, narrow(winner));
        };
        i64 c = c0;
        for (; c + L <= c1; c += L) block(c, Full());
        if (c < c1) block(c, Tail{int(c1 - c), false});
    }

    void run(i64 ctx) const {
        const i64 strips = ceil_div(p.P, kStemRows), blocks = ceil_div(p.C, kStemBlock);
        const i64 pitch = padded(min_of(p.C, kStemBlock));
        const i64 threads = threads_for(p.N * p.H * p.W * p.C, ctx);
        const i64 ring = p.k * p.W * pitch;
        const Scratch rings(threads * ring * sizeof(Lane)), table(p.k * p.k * sizeof(I));
        I* const taps = static_cast<I*>(table.get());
        for (i64 tap = 0; tap < p.k * p.k; ++tap) taps[tap] = I{} + Lane(tap);
        parallel(threads, p.N * strips * blocks, [&](i64 first, i64 last, int thread) {
            for (i64 task = first; task < last; ++task) {
                const i64 b = task % blocks, part = task / blocks % strips, n = task / blocks / strips;
                strip(n, part * kStemRows, min_of((part + 1) * kStemRows, p.P), b * kStemBlock,
                      min_of((b + 1) * kStemBlock, p.C), static_cast<Lane*>(rings.get()) + thread * ring, pitch, taps);
            }
        });
    }
};

// A pixel seen through a window: where its row of channels starts, and which tap it is.
struct Seen {
    i64 at;
    int tap;
};

// A row of channels: f(c, span, count), with usual counts known to the compiler. What is read is not written by
// anyone, so a tail may read on: `last` is the greatest offset relative to the end of its buffer.
template <int... kUsual, class F>
FR_INLINE void channels(i64 c0, i64 c1, i64 last, i64 count, const F& f) {
    const auto run = [&](auto n) __attribute__((always_inline)) {
        i64 c = c0;
        for (; c + L <= c1; c += L) f(c, Full(), n);
        if (c < c1) f(c, Tail{int(c1 - c), last + c + L <= 0}, n);
    };
    if (!((count == kUsual && (run(Constant<i64(kUsual)>()), true)) || ...)) run(Variable{count});
}

template <class T>
void reduce(const Pool& p, const T* grad, const u8* idx, const T* x, const Acc<T>* mean, i64 T_, Acc<T>* part,
            i64 ctx) {
    using A = Acc<T>;
    using V = Vec<T>;
    const i64 M = p.N * p.P * p.Q;
    const Tiling tiling(M, p.C, T_, ctx);
    const i64 pitch = padded(tiling.width);
    const Scratch scratch(tiling.threads * 2 * pitch * sizeof(A));
    tiling.run([&](i64 t, i64 m0, i64 m1, i64 c0, i64 c1, int thread) {
        A* const work = static_cast<A*>(scratch.get()) + thread * 2 * pitch;
        __builtin_memset(work, 0, 2 * pitch * sizeof(A));
        A *const sum_g = work - c0, *const sum_gx = sum_g + pitch;
        for (i64 m = m0; m < m1; ++m) {
            const i64 q = m % p.Q, y = m / p.Q % p.P, n = m / p.Q / p.P;
            const i64 h = y * p.stride - p.pad, w = q * p.stride - p.pad;
            Seen seen[kMaxTaps];
            int taps = 0;
            for (i64 r = Pool::first_tap(h); r < p.last_tap(h, p.H); ++r)
                for (i64 s = Pool::first_tap(w); s < p.last_tap(w, p.W); ++s)
                    seen[taps++] = {((n * p.H + h + r) * p.W + w + s) * p.C, int(r * p.k + s)};
            const i64 at = m * p.C;
            const i64 last = taps ? max_of(at - M * p.C, seen[taps - 1].at - p.N * p.H * p.W * p.C) : at - M * p.C;
            const Seen* const by = seen;
            channels<9>(c0, c1, last, taps, [=](i64 c, auto span, auto count) __attribute__((always_inline)) {
                const V mu = load(mean + c);
                const Int<T> code = widen(span.bytes(idx + at + c), V{});
                const V g = code == kNone ? V{} : span.load(grad + at + c);
                V chosen = mu;
                for (i64 i = 0; i < count.value; ++i) chosen = code == by[i].tap ? span.load(x + by[i].at + c) : chosen;
                store(sum_g + c, load(sum_g + c) + g);
                store(sum_gx + c, fma(g, chosen - mu, load(sum_gx + c)));
            });
        }
        for (i64 plane = 0; plane < 2; ++plane)
            __builtin_memcpy(part + (plane * T_ + t) * p.C + c0, work + plane * pitch, (c1 - c0) * sizeof(A));
    });
}

template <class T>
void apply(const Pool& p, const T* grad, const u8* idx, const T* x, const Acc<T>* mean, const Channels<Acc<T>>& coef,
           T* dx, i64 ctx) {
    using V = Vec<T>;
    const i64 M = p.N * p.P * p.Q, pixels = p.N * p.H * p.W;
    const Acc<T>*c0 = coef[0], *c1 = coef[1], *c2 = coef[2];
    parallel(threads_for(pixels * p.C, ctx), p.N * p.H, [&](i64 first, i64 last_row, int) {
        for (i64 row = first; row < last_row; ++row) {
            const i64 n = row / p.H, h = row % p.H;
            for (i64 w = 0; w < p.W; ++w) {
                // The windows over this pixel in ascending order: a fixed order of summation.
                Seen seen[kMaxTaps];
                int windows = 0;
                for (i64 y = p.first_window(h); y < p.last_window(h, p.P); ++y)
                    for (i64 q = p.first_window(w); q < p.last_window(w, p.Q); ++q)
                        seen[windows++] = {((n * p.P + y) * p.Q + q) * p.C,
                                           int((h + p.pad - y * p.stride) * p.k + w + p.pad - q * p.stride)};
                const i64 at = (row * p.W + w) * p.C;
                const i64 last = max_of(at - pixels * p.C, windows ? seen[windows - 1].at - M * p.C : -M * p.C);
                const Seen* const by = seen;
                channels<1, 2, 4>(0, p.C, last, windows,
                                  [=](i64 c, auto span, auto count) __attribute__((always_inline)) {
                                      V g{};
                                      for (i64 i = 0; i < count.value; ++i) {
                                          const Int<T> code = widen(span.bytes(idx + by[i].at + c), V{});
                                          g += code == by[i].tap ? span.load(grad + by[i].at + c) : V{};
                                      }
                                      const V d = span.load(x + at + c) - load(mean + c);
                                      span.store(dx + at + c, fma(load(c0 + c), g, fma(load(c1 + c), d, load(c2 + c))));
                                  });
            }
        }
    });
}

}  // namespace

void stem_fwd(int dtype, const void* x, i64 N, i64 H, i64 W, i64 C, const void* stat, i64 P, i64 Q, i64 k, i64 stride,
              i64 pad, void* out, u8* idx, i64 ctx) {
    with_type(dtype, [&](auto t) {
        using T = decltype(t);
        const Channels<Acc<T>> s(stat, 5, C);
        if (N * P * Q * C > 0)
            Forward<T>{{N, H, W, C, P, Q, k, stride, pad},
                       static_cast<const T*>(x),
                       s[0],
                       s[3],
                       s[4],
                       static_cast<T*>(out),
                       idx}
                .run(ctx);
    });
}

void stem_bwd_reduce(int dtype, const void* grad, const u8* idx, const void* x, i64 N, i64 H, i64 W, i64 C,
                     const void* stat, i64 P, i64 Q, i64 k, i64 stride, i64 pad, i64 T, void* part, i64 ctx) {
    with_type(dtype, [&](auto t) {
        using X = decltype(t);
        const Channels<Acc<X>> s(stat, 5, C);
        reduce(Pool{N, H, W, C, P, Q, k, stride, pad}, static_cast<const X*>(grad), idx, static_cast<const X*>(x), s[0],
               T, static_cast<Acc<X>*>(part), ctx);
    });
}

void stem_bwd_apply(int dtype, const void* grad, const u8* idx, const void* x, i64 N, i64 H, i64 W, i64 C,
                    const void* stat, const void* coef, i64 P, i64 Q, i64 k, i64 stride, i64 pad, void* dx, i64 ctx) {
    with_type(dtype, [&](auto t) {
        using T = decltype(t);
        const Channels<Acc<T>> s(stat, 5, C), c(coef, 3, C);
        apply(Pool{N, H, W, C, P, Q, k, stride, pad}, static_cast<const T*>(grad), idx, static_cast<const T*>(x), s[0],
              c, static_cast<T*>(dx), ctx);
    });
}

}  // namespace FASTRES_BACKEND
