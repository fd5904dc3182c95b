// Epilogue of a convolution with folded BN: out = act(x + bias [+ residual]), in place if out is x.
#include "cpu/isa/rows.h"

namespace FASTRES_BACKEND {
namespace {

template <class T, bool kBias, bool kResidual>
void epilogue(const T* x, i64 M, i64 C, const Acc<T>* bias, const T* residual, Acc<T> floor, T* out, i64 ctx) {
    parallel_rows(M, C, ctx, [=](i64 m0, i64 m1) {
        walk(m0, m1, 0, C, C, [=](auto rows, i64 m, i64 c, auto s) __attribute__((always_inline)) {
            Vec<T> b{};
            if constexpr (kBias) b = load(bias + c);
            for (int u = 0; u < rows.value; ++u) {
                const i64 at = (m + u) * C + c;
                Vec<T> v = s.load(x + at);
                if constexpr (kBias) v += b;
                if constexpr (kResidual) v += s.load(residual + at);
                s.store(out + at, at_least(v, Vec<T>{} + floor));
            }
        });
    });
}

}  // namespace

void bias_act(int dtype, const void* x, i64 M, i64 C, const void* bias, const void* residual, int relu, void* out,
              i64 ctx) {
    with_type(dtype, [&](auto t) {
        using T = decltype(t);
        const Channels<Acc<T>> b(bias, 1, C);
        // Without ReLU the floor is minus infinity: the same code, no branch.
        const Acc<T> floor = relu ? 0 : -__builtin_inff();
        with_flag(bias != nullptr, [&](auto has_bias) {
            with_flag(residual != nullptr, [&](auto has_residual) {
                epilogue<T, has_bias.value, has_residual.value>(static_cast<const T*>(x), M, C, b[0],
                                                                static_cast<const T*>(residual), floor,
                                                                static_cast<T*>(out), ctx);
            });
        });
    });
}

}  // namespace FASTRES_BACKEND
