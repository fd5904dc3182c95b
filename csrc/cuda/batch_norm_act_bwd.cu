// Batch normalisation, backward: masked sums in one pass, coefficients in float64, gradients in a second pass.
#include "batch_norm.cuh"

namespace FASTRES_BACKEND {

// part [2 or 3, T, C]
template <class T, class A, class M, class R>
KERNEL(2)
bn_bwd_reduce_kernel(Rows s, const T* grad, const T* x, const float* stat, const T* residual, const float* rstat,
                     const u8* mask, int relu, float* part, T* y) {
    constexpr int kPlanes = kHasResidualBn<R> ? 3 : 2;
    SHARED(float, shared, kPlanes* kTile);
    const Place at = place(s);
    const GradientSums sum = gradient_sums<A, M, R, false>(s, at, grad, x, stat, residual, rstat, mask, relu, y,
                                                           [](i64, const Pack<T>&, const Pack<T>&) {});
    put(shared, 0, sum.g);
    put(shared, 1, sum.gx);
    if constexpr (kHasResidualBn<R>) put(shared, 2, sum.gr);
    sync_block();
    write_sums<kPlanes>(s, at, shared, part);
}

KERNEL(2)
bn_bwd_finalize_kernel(const float* part, i64 plane, i64 T, i64 M, i64 C, const float* stat, int batch_stats,
                       float* dweight, float* dbias, float* coef) {
    SHARED(double, shared, kWarps* kFinalChannels);
    finalize_coef(shared, block_x() * kFinalChannels, part, plane, T, M, C, stat, batch_stats, dweight, dbias, coef);
}

template <class T, class A, class M, class R>
KERNEL(2)
bn_bwd_apply_kernel(Rows s, const T* grad, const T* x, const float* stat, const float* coef, const T* residual,
                    const float* rstat, const float* rcoef, const u8* mask, int relu, T* dx, T* dres) {
    const Place at = place(s);
    if (at.n == 0) return;
    const Gradient to_dx = load_gradient<A>(stat, coef, s, at);
    Gradient to_dres{};
    if constexpr (kHasResidualBn<R>) to_dres = load_gradient<A>(rstat, rcoef, s, at);
    Affine bn{};
    if constexpr (kRecomputes<M>) bn = load_affine<A>(stat, s, at);

    for (i64 i = at.n; i > 0; i -= kUnroll<T, A>) {
        Pack<T> gs[kUnroll<T, A>], xs[kUnroll<T, A>], rs[kUnroll<T, A>];
        u32 bits[kUnroll<T, A>];
#pragma unroll
        for (int u = 0; u < kUnroll<T, A>; ++u) {
            if (u < i) {
                const i64 row = at.lo + (i - 1 - u) * s.depth, offset = row * s.C + at.c;
                gs[u] = load_pack<A, true>(grad + offset, at.valid);
                xs[u] = load_pack<A, true>(x + offset, at.valid);
                if constexpr (kHasResidualBn<R>) rs[u] = load_pack<A, true>(residual + offset, at.valid);
                bits[u] = relu && !kRecomputes<M> ? mask[row * s.groups + at.group] : 0xffu;
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll<T, A>; ++u) {
            if (u < i) {
                const i64 offset = (at.lo + (i - 1 - u) * s.depth) * s.C + at.c;
                float g[kVec], v[kVec];
                unpack(xs[u], v);
                if constexpr (kRecomputes<M>) {
                    Pack<T> act;
                    bits[u] = relu_bits(bn, v, act);
                }
                const Pack<T> masked = keep(gs[u], bits[u]);
                unpack(masked, g);
#pragma unroll
                for (int j = 0; j < kVec; ++j) v[j] = to_dx(g[j], v[j], j);
                store_pack<A>(dx + offset, pack<T>(v), at.valid);
                if constexpr (kHasResidualBn<R>) {
                    unpack(rs[u], v);
#pragma unroll
                    for (int j = 0; j < kVec; ++j) v[j] = to_dres(g[j], v[j], j);
                    store_pack<A>(dres + offset, pack<T>(v), at.valid);
                } else {
                    if (dres) store_pack<A>(dres + offset, masked, at.valid);
                }
            }
        }
    }
}

void bn_bwd_reduce(int dtype, const void* grad, const void* x, i64 M, i64 C, const void* stat, const void* residual,
                   const void* rstat, const u8* mask, int relu, i64 T, void* part, void* y, i64 ctx) {
    const bool recompute = recomputes("bn_bwd_reduce", relu, mask, residual) || y;
    if (y && residual) throw std::invalid_argument("bn_bwd_reduce: y is recomputed without a residual only, got both");
    const Rows s = plan(M, C, T);
    const bool vector = C % kVec == 0 && aligned16(grad, x, stat, residual, rstat, y);
    dispatch("bn_bwd_reduce", dtype, vector, [&](auto t, auto access) {
        using E = decltype(t);
        using A = decltype(access);
        const auto start = [&](auto kernel) {
            launch("bn_bwd_reduce", kernel, s.blocks, s.channel_blocks, ctx, s, static_cast<const E*>(grad),
                   static_cast<const E*>(x), static_cast<const float*>(stat), static_cast<const E*>(residual),
                   static_cast<const float*>(rstat), mask, relu, static_cast<float*>(part), static_cast<E*>(y));
        };
        // rstat first: with M = 0 the mask is null and part still has three planes to write.
        if (rstat) {
            start(bn_bwd_reduce_kernel<E, A, GivenMask, BnResidual>);
        } else if (recompute) {
            start(bn_bwd_reduce_kernel<E, A, Recomputed, NoResidual>);
        } else {
            start(bn_bwd_reduce_kernel<E, A, GivenMask, NoResidual>);
        }
    });
}

void bn_bwd_finalize(int dtype, const void* part, i64 plane, i64 T, i64 M, i64 C, const void* stat, int batch_stats,
                     void* dweight, void* dbias, void* coef, i64 ctx) {
    require_float("bn_bwd_finalize", dtype);
    launch("bn_bwd_finalize", bn_bwd_finalize_kernel, ceil_div(C, kFinalChannels), 1, ctx,
           static_cast<const float*>(part), plane, T, M, C, static_cast<const float*>(stat), batch_stats,
           static_cast<float*>(dweight), static_cast<float*>(dbias), static_cast<float*>(coef));
}

void bn_bwd_apply(int dtype, const void* grad, const void* x, i64 M, i64 C, const void* stat, const void* coef,
                  const void* residual, const void* rstat, const void* rcoef, const u8* mask, int relu, void* dx,
                  void* dres, i64 ctx) {
    const bool recompute = recomputes("bn_bwd_apply", relu, mask, residual);
    const Rows s = plan(M, C);
    const bool vector = C % kVec == 0 && aligned16(grad, x, stat, coef, residual, rstat, rcoef, dx, dres);
    dispatch("bn_bwd_apply", dtype, vector, [&](auto t, auto access) {
        using E = decltype(t);
        using A = decltype(access);
        const auto start = [&](auto kernel) {
            launch("bn_bwd_apply", kernel, s.blocks, s.channel_blocks, ctx, s, static_cast<const E*>(grad),
                   static_cast<const E*>(x), static_cast<const float*>(stat), static_cast<const float*>(coef),
                   static_cast<const E*>(residual), static_cast<const float*>(rstat), static_cast<const float*>(rcoef),
                   mask, relu, static_cast<E*>(dx), static_cast<E*>(dres));
        };
        if (recompute) {
            start(bn_bwd_apply_kernel<E, A, Recomputed, NoResidual>);
        } else if (rcoef && dres) {
            start(bn_bwd_apply_kernel<E, A, GivenMask, BnResidual>);
        } else {
            start(bn_bwd_apply_kernel<E, A, GivenMask, NoResidual>);
        }
    });
}

}  // namespace FASTRES_BACKEND
