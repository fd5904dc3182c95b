// Batch normalisation in one launch: rows are read once and stay in shared memory while the grid agrees on the
// statistics. Registers hold none of them: the statistics need them all, and with four rows the forward kernel spilled.
#include "batch_norm.cuh"
#include "launch_cuda.h"
// Last.
#include "grid.cuh"

namespace FASTRES_BACKEND {

constexpr int kResidentBlocks = 2;  // of a multiprocessor: half its registers and shared memory each

// A thread's own pack number `slot` in shared memory: it alone writes and reads it, so no barrier stands between.
template <class T, class S>
DEVICE void park(S& store, i64 slot, const Pack<T>& p) {
#pragma unroll
    for (int i = 0; i < Pack<T>::kWords; i += 4) {
        store[(slot * Pack<T>::kWords + i) / 4 * kThreads + thread_index()] =
            Word4{{p.w[i], p.w[i + 1], p.w[i + 2], p.w[i + 3]}};
    }
}
template <class T, class S>
DEVICE Pack<T> parked(S& store, i64 slot) {
    Pack<T> p;
#pragma unroll
    for (int i = 0; i < Pack<T>::kWords; i += 4) {
        const Word4 v = store[(slot * Pack<T>::kWords + i) / 4 * kThreads + thread_index()];
#pragma unroll
        for (int j = 0; j < 4; ++j) p.w[i + j] = v.w[j];
    }
    return p;
}

// Channel groups of the finalisation go round over the blocks of the grid.
DEVICE i64 first_group() { return block_y() * grid_x() + block_x(); }

template <class T, class A, class R>
KERNEL(kResidentBlocks)
bn_one_pass_fwd_kernel(Rows s, const T* x, const float* weight, const float* bias, double eps, const T* residual,
                       const float* rstat, int relu, float* part, float* stat, T* out, u8* mask) {
    constexpr int kStep = kUnroll<T, A>;
    SHARED(float, shared, 2 * kTile);
    SHARED(double, merge, kWarps* kFinalChannels);
    DYNAMIC_SHARED(Word4, store);
    const Place at = place(s);
    const auto offset = [&](i64 i) { return (at.lo + i * s.depth) * s.C + at.c; };

    const Moments moments = moments_of<A, true>(s, at, x, [&](i64 i, const Pack<T>& row) { park(store, i, row); });
    write_moments(s, at, shared, moments, x, part);
    sync_grid();
    for (i64 group = first_group(); group * kFinalChannels < s.C; group += s.blocks * s.channel_blocks) {
        finalize_stat(merge, group * kFinalChannels, part, s.blocks, s.C, weight, bias, eps, stat);
    }
    sync_grid();

    if (at.n == 0) return;
    const Affine bn = load_affine<A>(stat, s, at);
    Affine rbn{};
    if constexpr (kHasResidualBn<R>) rbn = load_affine<A>(rstat, s, at);
    for (i64 i = 0; i < at.n; i += kStep) {
        Pack<T> rs[kStep];
#pragma unroll
        for (int u = 0; u < kStep; ++u) {
            if constexpr (kHasResidual<R>) {
                if (i + u < at.n) rs[u] = load_pack<A, true>(residual + offset(i + u), at.valid);
            }
        }
#pragma unroll
        for (int u = 0; u < kStep; ++u) {
            if (i + u < at.n) {
                const Pack<T> row = parked<T>(store, i + u);
                apply_row<A, R>(s, at, at.lo + (i + u) * s.depth, bn, row, rbn, rs[u], relu, out, mask);
            }
        }
    }
}

template <class T, class A, class M>
KERNEL(kResidentBlocks)
bn_one_pass_bwd_kernel(Rows s, const T* grad, const T* x, const float* stat, const u8* mask, int relu, int batch_stats,
                       float* part, float* dweight, float* dbias, float* coef, T* dx, T* dres, T* y) {
    SHARED(float, shared, 2 * kTile);
    SHARED(double, merge, kWarps* kFinalChannels);
    DYNAMIC_SHARED(Word4, store);
    const Place at = place(s);
    const auto offset = [&](i64 i) { return (at.lo + i * s.depth) * s.C + at.c; };

    const GradientSums sum =
        gradient_sums<A, M, NoResidual, true>(s, at, grad, x, stat, static_cast<const T*>(nullptr), nullptr, mask, relu,
                                              y, [&](i64 i, const Pack<T>& masked, const Pack<T>& row) {
                                                  park(store, 2 * i, masked);
                                                  park(store, 2 * i + 1, row);
                                              });
    put(shared, 0, sum.g);
    put(shared, 1, sum.gx);
    sync_block();
    write_sums<2>(s, at, shared, part);
    sync_grid();
    for (i64 group = first_group(); group * kFinalChannels < s.C; group += s.blocks * s.channel_blocks) {
        finalize_coef(merge, group * kFinalChannels, part, 1, s.blocks, s.M, s.C, stat, batch_stats, dweight, dbias,
                      coef);
    }
    sync_grid();

    if (at.n == 0) return;
    const Gradient to_dx = load_gradient<A>(stat, coef, s, at);
    for (i64 i = 0; i < at.n; ++i) {
        const Pack<T> masked = parked<T>(store, 2 * i);
        float g[kVec], v[kVec];
        unpack(masked, g);
        unpack(parked<T>(store, 2 * i + 1), v);
#pragma unroll
        for (int j = 0; j < kVec; ++j) v[j] = to_dx(g[j], v[j], j);
        store_pack<A>(dx + offset(i), pack<T>(v), at.valid);
        if (dres) store_pack<A>(dres + offset(i), masked, at.valid);
    }
}

namespace {

// Shared memory of a block that keeps its rows of so many tensors.
template <class T>
i64 store_bytes(const Rows& s, int tensors) {
    return s.depth ? ceil_div(s.R, s.depth) * tensors * kThreads * static_cast<i64>(sizeof(Pack<T>)) : 0;
}

}  // namespace

void bn_one_pass_fwd(int dtype, const void* x, i64 M, i64 C, const void* weight, const void* bias, double eps,
                     const void* residual, const void* rstat, int relu, i64 T, void* part, void* stat, void* out,
                     u8* mask, i64 ctx) {
    const Rows s = plan(M, C, T);
    const bool vector = C % kVec == 0 && aligned16(x, stat, residual, rstat, out);
    dispatch("bn_one_pass_fwd", dtype, vector, [&](auto t, auto access) {
        using E = decltype(t);
        using A = decltype(access);
        const auto start = [&](auto kernel) {
            launch_cooperative<kResidentBlocks>(
                "bn_one_pass_fwd", kernel, s.blocks, s.channel_blocks, store_bytes<E>(s, 1), ctx, s,
                static_cast<const E*>(x), static_cast<const float*>(weight), static_cast<const float*>(bias), eps,
                static_cast<const E*>(residual), static_cast<const float*>(rstat), relu, static_cast<float*>(part),
                static_cast<float*>(stat), static_cast<E*>(out), mask);
        };
        if (!residual) {
            start(bn_one_pass_fwd_kernel<E, A, NoResidual>);
        } else if (!rstat) {
            start(bn_one_pass_fwd_kernel<E, A, PlainResidual>);
        } else {
            start(bn_one_pass_fwd_kernel<E, A, BnResidual>);
        }
    });
}

void bn_one_pass_bwd(int dtype, const void* grad, const void* x, i64 M, i64 C, const void* stat, const u8* mask,
                     int relu, int batch_stats, i64 T, void* part, void* dweight, void* dbias, void* coef, void* dx,
                     void* dres, void* y, i64 ctx) {
    const bool recompute = (relu && !mask) || y;
    const Rows s = plan(M, C, T);
    const bool vector = C % kVec == 0 && aligned16(grad, x, stat, coef, dx, dres, y);
    dispatch("bn_one_pass_bwd", dtype, vector, [&](auto t, auto access) {
        using E = decltype(t);
        using A = decltype(access);
        const auto start = [&](auto kernel) {
            launch_cooperative<kResidentBlocks>(
                "bn_one_pass_bwd", kernel, s.blocks, s.channel_blocks, store_bytes<E>(s, 2), ctx, s,
                static_cast<const E*>(grad), static_cast<const E*>(x), static_cast<const float*>(stat), mask, relu,
                batch_stats, static_cast<float*>(part), static_cast<float*>(dweight), static_cast<float*>(dbias),
                static_cast<float*>(coef), static_cast<E*>(dx), static_cast<E*>(dres), static_cast<E*>(y));
        };
        if (recompute) {
            start(bn_one_pass_bwd_kernel<E, A, Recomputed>);
        } else {
            start(bn_one_pass_bwd_kernel<E, A, GivenMask>);
        }
    });
}

}  // namespace FASTRES_BACKEND
