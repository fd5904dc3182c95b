// out = relu(x + residual), and its gradient from the bits of the mask. Storage order: no rows, no channels.
#include "cpu/isa/rows.h"

namespace FASTRES_BACKEND {
namespace {

// f(i, span) over elements [first, last); first is a multiple of L.
template <class F>
FR_INLINE void walk_flat(i64 first, i64 last, const F& f) {
    i64 i = first;
#pragma GCC unroll 4
    for (; i + L <= last; i += L) f(i, Full());
    if (i < last) f(i, Tail{int(last - i), false});
}

// Ranges of whole mask words: f(first, last).
template <class F>
void parallel_flat(i64 n, i64 ctx, const F& f) {
    constexpr i64 kWord = 1024;
    parallel(threads_for(n, ctx), ceil_div(n, kWord),
             [&](i64 first, i64 last, int) { f(first * kWord, min_of(last * kWord, n)); });
}

template <class T>
void fwd(const T* x, const T* residual, i64 n, T* out, u8* mask, i64 ctx) {
    parallel_flat(n, ctx, [=](i64 first, i64 last) {
        walk_flat(first, last, [=](i64 i, auto s) __attribute__((always_inline)) {
            const Vec<T> v = s.load(x + i) + s.load(residual + i);
            if (mask) s.bits(mask + i / 8, passed(v, zero_limit(T())));
            s.store(out + i, at_least(v, Vec<T>{}));
        });
    });
}

template <class T>
void bwd(const T* grad, const u8* mask, i64 n, T* dx, i64 ctx) {
    parallel_flat(n, ctx, [=](i64 first, i64 last) {
        walk_flat(first, last, [=](i64 i, auto s) __attribute__((always_inline)) {
            s.store(dx + i, keep(s.load(grad + i), s.bits(mask + i / 8)));
        });
    });
}

}  // namespace

void add_relu_fwd(int dtype, const void* x, const void* residual, i64 n, void* out, u8* mask, i64 ctx) {
    with_type(dtype, [&](auto t) {
        using T = decltype(t);
        fwd(static_cast<const T*>(x), static_cast<const T*>(residual), n, static_cast<T*>(out), mask, ctx);
    });
}

void add_relu_bwd(int dtype, const void* grad, const u8* mask, i64 n, void* dx, i64 ctx) {
    with_type(dtype, [&](auto t) {
        using T = decltype(t);
        bwd(static_cast<const T*>(grad), mask, n, static_cast<T*>(dx), ctx);
    });
}

}  // namespace FASTRES_BACKEND
