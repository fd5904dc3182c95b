// Epilogue of a convolution whose batch normalisation was folded into it: out = act(x + bias + residual).
#include "affine.cuh"

namespace FASTRES_BACKEND {

template <class T, class A>
KERNEL(3)
bias_act_kernel(Rows s, const T* x, const float* bias, const T* residual, int relu, T* out) {
    const Place at = place(s);
    if (at.n == 0) return;
    float b[kVec] = {};
    if (bias) load_params<A>(bias + at.c, at.valid, b);

    for (i64 i = at.n; i > 0; i -= kUnroll<T, A>) {
        Pack<T> xs[kUnroll<T, A>], rs[kUnroll<T, A>];
#pragma unroll
        for (int u = 0; u < kUnroll<T, A>; ++u) {
            if (u < i) {
                const i64 offset = (at.lo + (i - 1 - u) * s.depth) * s.C + at.c;
                xs[u] = load_pack<A, true>(x + offset, at.valid);
                if (residual) rs[u] = load_pack<A, true>(residual + offset, at.valid);
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll<T, A>; ++u) {
            if (u < i) {
                const i64 offset = (at.lo + (i - 1 - u) * s.depth) * s.C + at.c;
                float v[kVec];
                unpack(xs[u], v);
#pragma unroll
                for (int j = 0; j < kVec; ++j) v[j] += b[j];
                if (residual) {
                    float r[kVec];
                    unpack(rs[u], r);
#pragma unroll
                    for (int j = 0; j < kVec; ++j) v[j] += r[j];
                }
                Pack<T> result = pack<T>(v);
                if (relu) result = keep(result, passed(result));
                store_pack<A>(out + offset, result, at.valid);
            }
        }
    }
}

void bias_act(int dtype, const void* x, i64 M, i64 C, const void* bias, const void* residual, int relu, void* out,
              i64 ctx) {
    const Rows s = plan(M, C);
    dispatch("bias_act", dtype, C % kVec == 0 && aligned16(x, bias, residual, out), [&](auto t, auto access) {
        using T = decltype(t);
        launch("bias_act", bias_act_kernel<T, decltype(access)>, s.blocks, s.channel_blocks, ctx, s,
               static_cast<const T*>(x), static_cast<const float*>(bias), static_cast<const T*>(residual), relu,
               static_cast<T*>(out));
    });
}

}  // namespace FASTRES_BACKEND
