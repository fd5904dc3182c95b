// Batch normalisation, backward: one pass that reduces, a merge, one pass that writes the gradients.
#include "cpu/isa/rows.h"

namespace FASTRES_BACKEND {
namespace {

// Where the gradient behind the ReLU comes from: all of it, the bits of a mask, or the sign recomputed from x.
enum Gate { kOpen, kMask, kRecompute };

// work: sum g, sum g*(x - mean) and, with kSecond, sum g*(r - rmean), `pitch` apart. y: the activation, or null.
template <class T, Gate kGate, bool kSecond>
struct Reduce {
    using A = Acc<T>;
    using V = Vec<T>;
    const T *grad, *x, *residual;
    const u8* mask;
    const A *mean, *scale, *bias, *rmean;
    A floor;
    T* y;
    i64 C;

    void tile(i64 m0, i64 m1, i64 c0, i64 c1, A* work, i64 pitch) const {
        A* const sum = work - c0;  // indexed by channel
        const i64 mask_pitch = mask_bytes(C), next = ahead<T>(C, c1 - c0);
        const Reduce k = *this;  // a local copy: stores through u8* may alias *this
        walk(m0, m1, c0, c1, C, [=](auto rows, i64 m, i64 c, auto s) __attribute__((always_inline)) {
            const V mu = load(k.mean + c);
            V rmu{}, sg{}, sx{}, sr{};
            if constexpr (kSecond) rmu = load(k.rmean + c);
            for (int u = 0; u < rows.value; ++u) {
                const i64 at = (m + u) * k.C + c;
                fetch(k.grad + at + next), fetch(k.x + at + next);
                if constexpr (kSecond) fetch(k.residual + at + next);
                V g = s.load(k.grad + at);
                const V d = s.load(k.x + at) - mu;
                if constexpr (kGate == kMask) g = keep(g, s.bits(k.mask + (m + u) * mask_pitch + c / 8));
                if (kGate == kRecompute || k.y) {
                    const V v = fma(d, load(k.scale + c), load(k.bias + c));
                    if constexpr (kGate == kRecompute) g = keep(g, passed(v, zero_limit(T())));
                    if (k.y) s.store(k.y + at, at_least(v, V{} + k.floor));
                }
                sg += g;
                sx = fma(g, d, sx);
                if constexpr (kSecond) sr = fma(g, s.load(k.residual + at) - rmu, sr);
            }
            store(sum + c, load(sum + c) + sg);
            store(sum + pitch + c, load(sum + pitch + c) + sx);
            if constexpr (kSecond) store(sum + 2 * pitch + c, load(sum + 2 * pitch + c) + sr);
        });
    }

    void run(i64 M, i64 T_, A* part, i64 ctx) const {
        constexpr int planes = kSecond ? 3 : 2;
        const Tiling tiling(M, C, T_, ctx);
        const i64 pitch = padded(tiling.width), size = planes * pitch;
        const Scratch scratch(tiling.threads * 2 * size * sizeof(A));
        tiling.run([&](i64 t, i64 m0, i64 m1, i64 c0, i64 c1, int thread) {
            // Sums of a few rows, and the sum of those: digits, as in pairwise summation.
            A *const few = static_cast<A*>(scratch.get()) + thread * 2 * size, *const all = few + size;
            __builtin_memset(few, 0, 2 * size * sizeof(A));
            for (i64 r0 = m0; r0 < m1; r0 += kChunk) {
                tile(r0, min_of(r0 + kChunk, m1), c0, c1, few, pitch);
                for (i64 i = 0; i < size; i += L) {
                    store(all + i, load(all + i) + load(few + i));
                    store(few + i, V{});
                }
            }
            for (int p = 0; p < planes; ++p)
                __builtin_memcpy(part + (p * T_ + t) * C + c0, all + p * pitch, (c1 - c0) * sizeof(A));
        });
    }
};

// kRes: 0 no gradient for the residual, 1 g itself, 2 through the residual's own BN.
template <class T, Gate kGate, int kRes>
struct Apply {
    using A = Acc<T>;
    using V = Vec<T>;
    const T *grad, *x, *residual;
    const u8* mask;
    const A *mean, *scale, *bias, *rmean;
    const A *c0, *c1, *c2, *r0, *r1, *r2;
    T *dx, *dres;
    i64 C;

    void run(i64 M, i64 ctx) const {
        const Apply k = *this;
        const i64 mask_pitch = mask_bytes(C);
        parallel_rows(M, C, ctx, [=](i64 m0, i64 m1) {
            walk(m0, m1, 0, k.C, k.C, [=](auto rows, i64 m, i64 c, auto s) __attribute__((always_inline)) {
                const V mu = load(k.mean + c), a = load(k.c0 + c), b = load(k.c1 + c), o = load(k.c2 + c);
                V rmu{}, ra{}, rb{}, ro{};
                if constexpr (kRes == 2)
                    rmu = load(k.rmean + c), ra = load(k.r0 + c), rb = load(k.r1 + c), ro = load(k.r2 + c);
                for (int u = 0; u < rows.value; ++u) {
                    const i64 at = (m + u) * k.C + c;
                    V g = s.load(k.grad + at);
                    const V d = s.load(k.x + at) - mu;
                    if constexpr (kGate == kMask) g = keep(g, s.bits(k.mask + (m + u) * mask_pitch + c / 8));
                    if constexpr (kGate == kRecompute)
                        g = keep(g, passed(fma(d, load(k.scale + c), load(k.bias + c)), zero_limit(T())));
                    s.store(k.dx + at, fma(a, g, fma(b, d, o)));
                    if constexpr (kRes == 1) s.store(k.dres + at, g);
                    if constexpr (kRes == 2)
                        s.store(k.dres + at, fma(ra, g, fma(rb, s.load(k.residual + at) - rmu, ro)));
                }
            });
        });
    }
};

template <class A>
void finalize(const A* part, i64 plane, i64 T, i64 M, i64 C, const A* stat, int batch_stats, A* dweight, A* dbias,
              A* coef, i64 ctx) {
    parallel_channels(T, C, ctx, [=](i64 c0, auto s, int lanes) {
        const A *g = part + c0, *gx = g + plane * T * C;
        vd sum_g{}, sum_gx{};
        for (i64 t = 0; t < T; ++t) {
            sum_g += wide(s.load(g + t * C));
            sum_gx += wide(s.load(gx + t * C));
        }
        for (int i = 0; i < lanes; ++i) {
            const i64 c = c0 + i;
            const double invstd = double(stat[2 * C + c]), scale = double(stat[3 * C + c]);
            if (dweight) dweight[c] = A(sum_gx[i] * invstd);
            if (dbias) dbias[c] = A(sum_g[i]);
            coef[c] = A(scale);
            coef[C + c] = batch_stats ? A(-scale * invstd * invstd * sum_gx[i] / double(M)) : A(0);
            coef[2 * C + c] = batch_stats ? A(-scale * sum_g[i] / double(M)) : A(0);
        }
    });
}

template <class F>
void with_gate(int relu, const void* mask, const F& f) {
    if (!relu)
        f(Constant<kOpen>());
    else if (mask)
        f(Constant<kMask>());
    else
        f(Constant<kRecompute>());
}

}  // namespace

void bn_bwd_reduce(int dtype, const void* grad, const void* x, i64 M, i64 C, const void* stat, const void* residual,
                   const void* rstat, const u8* mask, int relu, i64 T, void* part, void* y, i64 ctx) {
    with_type(dtype, [&](auto t) {
        using X = decltype(t);
        using A = Acc<X>;
        const Channels<A> sx(stat, 5, C), sr(rstat, 5, C);
        const A floor = relu ? 0 : -__builtin_inff();
        with_gate(relu, mask, [&](auto gate) {
            with_flag(rstat != nullptr, [&](auto second) {
                constexpr bool two = second.value;
                // The mask is recomputed from x alone: relu with a residual comes with a mask.
                if constexpr (!(gate.value == kRecompute && two))
                    Reduce<X, gate.value, two>{static_cast<const X*>(grad),
                                               static_cast<const X*>(x),
                                               static_cast<const X*>(residual),
                                               mask,
                                               sx[0],
                                               sx[3],
                                               sx[4],
                                               sr[0],
                                               floor,
                                               static_cast<X*>(y),
                                               C}
                        .run(M, T, static_cast<A*>(part), ctx);
            });
        });
    });
}

void bn_bwd_finalize(int dtype, const void* part, i64 plane, i64 T, i64 M, i64 C, const void* stat, int batch_stats,
                     void* dweight, void* dbias, void* coef, i64 ctx) {
    with_type(dtype, [&](auto t) {
        using A = Acc<decltype(t)>;
        finalize(static_cast<const A*>(part), plane, T, M, C, static_cast<const A*>(stat), batch_stats,
                 static_cast<A*>(dweight), static_cast<A*>(dbias), static_cast<A*>(coef), ctx);
    });
}

void bn_bwd_apply(int dtype, const void* grad, const void* x, i64 M, i64 C, const void* stat, const void* coef,
                  const void* residual, const void* rstat, const void* rcoef, const u8* mask, int relu, void* dx,
                  void* dres, i64 ctx) {
    with_type(dtype, [&](auto t) {
        using T = decltype(t);
        using A = Acc<T>;
        const Channels<A> sx(stat, 5, C), sr(rstat, 5, C), cx(coef, 3, C), cr(rcoef, 3, C);
        with_gate(relu, mask, [&](auto gate) {
            const auto run = [&](auto res) {
                Apply<T, gate.value, res.value>{static_cast<const T*>(grad),
                                                static_cast<const T*>(x),
                                                static_cast<const T*>(residual),
                                                mask,
                                                sx[0],
                                                sx[3],
                                                sx[4],
                                                sr[0],
                                                cx[0],
                                                cx[1],
                                                cx[2],
                                                cr[0],
                                                cr[1],
                                                cr[2],
                                                static_cast<T*>(dx),
                                                static_cast<T*>(dres),
                                                C}
                    .run(M, ctx);
            };
            if (!dres)
                run(Constant<0>());
            else if constexpr (gate.value == kRecompute)
                run(Constant<1>());
            else if (!rcoef)
                run(Constant<1>());
            else
                run(Constant<2>());
        });
    });
}

}  // namespace FASTRES_BACKEND
