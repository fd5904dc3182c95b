// Batch normalisation, forward: per-tile statistics, their merge, and one pass normalise + residual + ReLU.
#include "batch_norm.cuh"

namespace FASTRES_BACKEND {

// part [3, T, C]
template <class T, class A>
KERNEL(2)
bn_stats_kernel(Rows s, const T* x, float* part) {
    SHARED(float, shared, 2 * kTile);
    const Place at = place(s);
    const Moments moments = moments_of<A, false>(s, at, x, [](i64, const Pack<T>&) {});
    write_moments(s, at, shared, moments, x, part);
}

KERNEL(2)
bn_finalize_kernel(const float* part, i64 T, i64 C, const float* weight, const float* bias, double eps, float* stat) {
    SHARED(double, shared, kWarps* kFinalChannels);
    finalize_stat(shared, block_x() * kFinalChannels, part, T, C, weight, bias, eps, stat);
}

KERNEL(2)
bn_fold_kernel(const float* mean, const float* variance, const float* weight, const float* bias, double eps, i64 C,
               float* stat) {
    const i64 c = block_x() * kThreads + thread_index();
    if (c < C) write_stat(mean[c], variance[c], weight, bias, eps, c, C, stat);
}

template <class T, class A, class R>
KERNEL(2)
bn_apply_kernel(Rows s, const T* x, const float* stat, const T* residual, const float* rstat, int relu, T* out,
                u8* mask) {
    const Place at = place(s);
    if (at.n == 0) return;
    const Affine bn = load_affine<A>(stat, s, at);
    Affine rbn{};
    if constexpr (kHasResidualBn<R>) rbn = load_affine<A>(rstat, s, at);

    for (i64 i = at.n; i > 0; i -= kUnroll<T, A>) {
        Pack<T> xs[kUnroll<T, A>], rs[kUnroll<T, A>];
#pragma unroll
        for (int u = 0; u < kUnroll<T, A>; ++u) {
            if (u < i) {
                const i64 offset = (at.lo + (i - 1 - u) * s.depth) * s.C + at.c;
                xs[u] = load_pack<A, true>(x + offset, at.valid);
                if constexpr (kHasResidual<R>) rs[u] = load_pack<A, true>(residual + offset, at.valid);
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll<T, A>; ++u) {
            if (u < i) {
                const i64 row = at.lo + (i - 1 - u) * s.depth;
                apply_row<A, R>(s, at, row, bn, xs[u], rbn, rs[u], relu, out, mask);
            }
        }
    }
}

void bn_stats(int dtype, const void* x, i64 M, i64 C, i64 T, void* part, i64 ctx) {
    const Rows s = plan(M, C, T);
    dispatch("bn_stats", dtype, C % kVec == 0 && aligned16(x), [&](auto t, auto access) {
        using E = decltype(t);
        launch("bn_stats", bn_stats_kernel<E, decltype(access)>, s.blocks, s.channel_blocks, ctx, s,
               static_cast<const E*>(x), static_cast<float*>(part));
    });
}

void bn_finalize(int dtype, const void* part, i64 T, i64 C, const void* weight, const void* bias, double eps,
                 void* stat, i64 ctx) {
    require_float("bn_finalize", dtype);
    launch("bn_finalize", bn_finalize_kernel, ceil_div(C, kFinalChannels), 1, ctx, static_cast<const float*>(part), T,
           C, static_cast<const float*>(weight), static_cast<const float*>(bias), eps, static_cast<float*>(stat));
}

void bn_fold(int dtype, const void* running_mean, const void* running_var, const void* weight, const void* bias,
             double eps, i64 C, void* stat, i64 ctx) {
    require_float("bn_fold", dtype);
    launch("bn_fold", bn_fold_kernel, ceil_div(C, kThreads), 1, ctx, static_cast<const float*>(running_mean),
           static_cast<const float*>(running_var), static_cast<const float*>(weight), static_cast<const float*>(bias),
           eps, C, static_cast<float*>(stat));
}

void bn_apply(int dtype, const void* x, i64 M, i64 C, const void* stat, const void* residual, const void* rstat,
              int relu, void* out, u8* mask, i64 ctx) {
    const Rows s = plan(M, C);
    const bool vector = C % kVec == 0 && aligned16(x, stat, residual, rstat, out);
    dispatch("bn_apply", dtype, vector, [&](auto t, auto access) {
        using E = decltype(t);
        using A = decltype(access);
        const auto start = [&](auto kernel) {
            launch("bn_apply", kernel, s.blocks, s.channel_blocks, ctx, s, static_cast<const E*>(x),
                   static_cast<const float*>(stat), static_cast<const E*>(residual), static_cast<const float*>(rstat),
                   relu, static_cast<E*>(out), mask);
        };
        if (!residual) {
            start(bn_apply_kernel<E, A, NoResidual>);
        } else if (!rstat) {
            start(bn_apply_kernel<E, A, PlainResidual>);
        } else {
            start(bn_apply_kernel<E, A, BnResidual>);
        }
    });
}

}  // namespace FASTRES_BACKEND
