// Batch normalisation, forward: statistics of tiles, their merge, and the pass that normalises, adds and clips.
#include "cpu/isa/rows.h"

namespace FASTRES_BACKEND {
namespace {

constexpr i64 kSamples = 8;
constexpr i64 kWork = 6;

// Sums of x - shift and of its squares over one tile: those of a few rows, and the sum of those. `shift` is indexed by
// channel, as are few and all: [2] rows, `pitch` apart.
template <class T>
void shifted_sums(const T* x, i64 C, i64 m0, i64 m1, i64 c0, i64 c1, const Acc<T>* shift, Acc<T>* few, Acc<T>* all,
                  i64 pitch) {
    using V = Vec<T>;
    const i64 next = ahead<T>(C, c1 - c0);
    for (i64 i = 0; i < 2; ++i) {
        __builtin_memset(few + c0 + i * pitch, 0, pitch * sizeof(Acc<T>));
        __builtin_memset(all + c0 + i * pitch, 0, pitch * sizeof(Acc<T>));
    }
    for (i64 r0 = m0; r0 < m1; r0 += kChunk) {
        walk(r0, min_of(r0 + kChunk, m1), c0, c1, C,
             [=](auto rows, i64 m, i64 c, auto s) __attribute__((always_inline)) {
                 const V origin = load(shift + c);
                 V a{}, q{};
                 for (int u = 0; u < rows.value; ++u) {
                     const i64 at = (m + u) * C + c;
                     fetch(x + at + next);
                     const V d = s.load(x + at) - origin;
                     a += d;
                     q = fma(d, d, q);
                 }
                 store(few + c, load(few + c) + a);
                 store(few + pitch + c, load(few + pitch + c) + q);
             });
        for (i64 i = 0; i < 2; ++i)
            for (i64 c = c0 + i * pitch; c < c1 + i * pitch; c += L) {
                store(all + c, load(all + c) + load(few + c));
                store(few + c, V{});
            }
    }
}

// Mean and M2 of one tile. The shift is the mean of a few rows spread over the tile; it stays for the whole tile, so
// that no rounding of a mean enters the squares. Where it turns out to be many standard deviations off, a one-pass
// variance loses digits: there, channel by channel, a second pass is made around the mean.
// work: kWork rows of `pitch` accumulators.
template <class T>
void tile_stats(const T* x, i64 C, i64 m0, i64 m1, i64 c0, i64 c1, Acc<T>* work, i64 pitch, Acc<T>* mean_out,
                Acc<T>* m2_out) {
    using A = Acc<T>;
    using V = Vec<T>;
    A* const shift = work - c0;  // indexed by channel
    A* const few = shift + pitch;
    A* const sum = few + 2 * pitch;
    A* const m2 = sum + 2 * pitch;
    constexpr A kFar = 16;  // squared distance of shift and mean, in variances
    const A n = A(m1 - m0);

    const i64 samples = min_of(kSamples, m1 - m0), step = (m1 - m0) / samples;
    walk(m0, m0 + 1, c0, c1, C, [=](auto, i64 m, i64 c, auto s) __attribute__((always_inline)) {
        // Relative to the first row, so that a constant channel has exactly its value as mean.
        const V first = s.load(x + m * C + c);
        V a{};
        for (i64 i = 1; i < samples; ++i) a += s.load(x + (m + i * step) * C + c) - first;
        store(shift + c, first + a / A(samples));
    });
    shifted_sums(x, C, m0, m1, c0, c1, shift, few, sum, pitch);
    auto any_far = V{} < V{};
    for (i64 c = c0; c < c1; c += L) {
        const V s = load(sum + c), delta = s / n, q = load(sum + pitch + c) - s * delta;
        const auto far = delta * s > kFar * q;
        any_far |= far;
        // Negative where it is to be computed again; a sum of squares is not.
        store(m2 + c, far ? V{} - A(1) : q);
        store(shift + c, load(shift + c) + delta);
    }
    if (__builtin_expect(any(any_far), 0)) {
        shifted_sums(x, C, m0, m1, c0, c1, shift, few, sum, pitch);
        for (i64 c = c0; c < c1; c += L) {
            const V q = load(m2 + c);
            store(m2 + c, q < V{} ? load(sum + pitch + c) : q);
        }
    }
    __builtin_memcpy(mean_out + c0, shift + c0, (c1 - c0) * sizeof(A));
    __builtin_memcpy(m2_out + c0, m2 + c0, (c1 - c0) * sizeof(A));
}

template <class T>
void stats(const T* x, i64 M, i64 C, i64 T_, Acc<T>* part, i64 ctx) {
    using A = Acc<T>;
    const Tiling tiling(M, C, T_, ctx);
    const i64 pitch = padded(tiling.width);
    const Scratch scratch(tiling.threads * kWork * pitch * sizeof(A));
    A* const work = static_cast<A*>(scratch.get());
    tiling.run([&](i64 t, i64 m0, i64 m1, i64 c0, i64 c1, int thread) {
        A *count = part + t * C, *mean = count + T_ * C, *m2 = mean + T_ * C;
        for (i64 c = c0; c < c1; ++c) count[c] = A(m1 - m0);
        if (m0 < m1) {
            tile_stats(x, C, m0, m1, c0, c1, work + thread * kWork * pitch, pitch, mean, m2);
        } else {
            for (i64 c = c0; c < c1; ++c) mean[c] = m2[c] = A(0);
        }
    });
}

template <class A>
void fill_stat(double mean, double var, const A* weight, const A* bias, double eps, A* stat, i64 C, i64 c) {
    const double invstd = 1.0 / __builtin_sqrt(var + eps);
    stat[c] = A(mean);
    stat[C + c] = A(var);
    stat[2 * C + c] = A(invstd);
    stat[3 * C + c] = A(weight ? double(weight[c]) * invstd : invstd);
    stat[4 * C + c] = bias ? bias[c] : A(0);
}

template <class A>
void finalize(const A* part, i64 T, i64 C, const A* weight, const A* bias, double eps, A* stat, i64 ctx) {
    const A *count = part, *mean = count + T * C, *m2 = mean + T * C;
    parallel_channels(T, C, ctx, [=](i64 c, auto s, int lanes) {
        vd total{}, mu{}, var{};
        for (i64 at = c; at < T * C; at += C) {
            const vd n = wide(s.load(count + at));
            total += n;
            mu += n * wide(s.load(mean + at));
        }
        mu /= total;
        for (i64 at = c; at < T * C; at += C) {
            const vd d = wide(s.load(mean + at)) - mu;
            var += wide(s.load(m2 + at)) + wide(s.load(count + at)) * (d * d);
        }
        var /= total;
        for (int i = 0; i < lanes; ++i) fill_stat(mu[i], var[i], weight, bias, eps, stat, C, c + i);
    });
}

// kResidual: 0 none, 1 added as it is, 2 normalised by its own statistics first.
template <class T, int kResidual, bool kMask>
void apply(const T* x, i64 M, i64 C, const void* stat, const T* residual, const void* rstat, Acc<T> floor, T* out,
           u8* mask, i64 ctx) {
    using A = Acc<T>;
    using V = Vec<T>;
    const Channels<A> sx(stat, 5, C), sr(rstat, 5, C);
    const A *mean = sx[0], *scale = sx[3], *bias = sx[4], *rmean = sr[0], *rscale = sr[3], *rbias = sr[4];
    const i64 pitch = mask_bytes(C);
    parallel_rows(M, C, ctx, [=](i64 m0, i64 m1) {
        walk(m0, m1, 0, C, C, [=](auto rows, i64 m, i64 c, auto s) __attribute__((always_inline)) {
            const V mu = load(mean + c), k = load(scale + c), b = load(bias + c);
            V rmu{}, rk{}, rb{};
            if constexpr (kResidual == 2) rmu = load(rmean + c), rk = load(rscale + c), rb = load(rbias + c);
            for (int u = 0; u < rows.value; ++u) {
                const i64 at = (m + u) * C + c;
                V v = fma(s.load(x + at) - mu, k, b);
                if constexpr (kResidual == 1) v += s.load(residual + at);
                if constexpr (kResidual == 2) v += fma(s.load(residual + at) - rmu, rk, rb);
                if constexpr (kMask) s.bits(mask + (m + u) * pitch + c / 8, passed(v, zero_limit(T())));
                s.store(out + at, at_least(v, V{} + floor));
            }
        });
    });
}

// f(A()) with the accumulator type of a dtype code.
template <class F>
void with_acc(int dtype, const F& f) {
    with_type(dtype, [&](auto t) { f(Acc<decltype(t)>()); });
}

}  // namespace

void bn_stats(int dtype, const void* x, i64 M, i64 C, i64 T, void* part, i64 ctx) {
    with_type(dtype, [&](auto t) {
        using X = decltype(t);
        stats(static_cast<const X*>(x), M, C, T, static_cast<Acc<X>*>(part), ctx);
    });
}

void bn_finalize(int dtype, const void* part, i64 T, i64 C, const void* weight, const void* bias, double eps,
                 void* stat, i64 ctx) {
    with_acc(dtype, [&](auto a) {
        using A = decltype(a);
        finalize(static_cast<const A*>(part), T, C, static_cast<const A*>(weight), static_cast<const A*>(bias), eps,
                 static_cast<A*>(stat), ctx);
    });
}

void bn_fold(int dtype, const void* running_mean, const void* running_var, const void* weight, const void* bias,
             double eps, i64 C, void* stat, i64) {
    with_acc(dtype, [&](auto a) {
        using A = decltype(a);
        for (i64 c = 0; c < C; ++c)
            fill_stat(double(static_cast<const A*>(running_mean)[c]), double(static_cast<const A*>(running_var)[c]),
                      static_cast<const A*>(weight), static_cast<const A*>(bias), eps, static_cast<A*>(stat), C, c);
    });
}

void bn_apply(int dtype, const void* x, i64 M, i64 C, const void* stat, const void* residual, const void* rstat,
              int relu, void* out, u8* mask, i64 ctx) {
    with_type(dtype, [&](auto t) {
        using T = decltype(t);
        // Without ReLU the floor is minus infinity: the same code, no branch.
        const Acc<T> floor = relu ? 0 : -__builtin_inff();
        const auto run = [&](auto mode) {
            with_flag(mask != nullptr, [&](auto has_mask) {
                apply<T, mode.value, has_mask.value>(static_cast<const T*>(x), M, C, stat,
                                                     static_cast<const T*>(residual), rstat, floor,
                                                     static_cast<T*>(out), mask, ctx);
            });
        };
        if (!residual)
            run(Constant<0>());
        else if (!rstat)
            run(Constant<1>());
        else
            run(Constant<2>());
    });
}

}  // namespace FASTRES_BACKEND
