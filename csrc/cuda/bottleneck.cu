// Where the two branches of a residual block meet again in backward: out = a + (mask ? grad : 0).
#include "rows.cuh"

namespace FASTRES_BACKEND {

template <class T, class A>
KERNEL(4)
mask_add_kernel(Rows s, const T* a, const T* grad, const u8* mask, T* out) {
    const Place at = place(s);
    for (i64 i = at.n; i > 0; i -= kUnroll<T, A>) {
        Pack<T> as[kUnroll<T, A>], gs[kUnroll<T, A>];
        u32 bits[kUnroll<T, A>];
#pragma unroll
        for (int u = 0; u < kUnroll<T, A>; ++u) {
            if (u < i) {
                const i64 row = at.lo + (i - 1 - u) * s.depth, offset = row * s.C + at.c;
                as[u] = load_pack<A, true>(a + offset, at.valid);
                gs[u] = load_pack<A, true>(grad + offset, at.valid);
                bits[u] = mask[row * s.groups + at.group];
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll<T, A>; ++u) {
            if (u < i) {
                float v[kVec], g[kVec];
                unpack(as[u], v);
                unpack(keep(gs[u], bits[u]), g);
#pragma unroll
                for (int j = 0; j < kVec; ++j) v[j] += g[j];
                store_pack<A>(out + (at.lo + (i - 1 - u) * s.depth) * s.C + at.c, pack<T>(v), at.valid);
            }
        }
    }
}

void mask_add(int dtype, const void* a, const void* grad, const u8* mask, i64 M, i64 C, void* out, i64 ctx) {
    const Rows s = plan(M, C);
    dispatch("mask_add", dtype, C % kVec == 0 && aligned16(a, grad, out), [&](auto t, auto access) {
        using T = decltype(t);
        launch("mask_add", mask_add_kernel<T, decltype(access)>, s.blocks, s.channel_blocks, ctx, s,
               static_cast<const T*>(a), static_cast<const T*>(grad), mask, static_cast<T*>(out));
    });
}

}  // namespace FASTRES_BACKEND
