// out = relu(x + residual) over n elements in storage order, eight to a thread and to a mask byte.
#include "vec.cuh"

namespace FASTRES_BACKEND {

namespace {

constexpr i64 kMaxBlocks = 132 * 8 * 4;  // beyond this many, threads take several turns

i64 blocks_for(i64 n) { return least(ceil_div(ceil_div(n, kVec), kThreads), kMaxBlocks); }

// Thread t takes the groups of eight t, t + stride, ...; the last group may be short.
DEVICE int group_size(i64 group, i64 n) { return static_cast<int>(least<i64>(n - group * kVec, kVec)); }

}  // namespace

template <class T, class A>
KERNEL(4)
add_relu_fwd_kernel(const T* x, const T* residual, i64 n, T* out, u8* mask) {
    const i64 groups = ceil_div(n, kVec);
    for (i64 g = block_x() * kThreads + thread_index(); g < groups; g += grid_x() * kThreads) {
        const i64 at = g * kVec;
        const int valid = group_size(g, n);
        float v[kVec], r[kVec];
        if (valid == kVec) {
            unpack(load_pack<A, true>(x + at, kVec), v);
            unpack(load_pack<A, true>(residual + at, kVec), r);
        } else {
            unpack(load_pack<Scalar, true>(x + at, valid), v);
            unpack(load_pack<Scalar, true>(residual + at, valid), r);
        }
#pragma unroll
        for (int j = 0; j < kVec; ++j) v[j] += r[j];
        const Pack<T> sum = pack<T>(v);
        const u32 bits = passed(sum);
        const Pack<T> result = keep(sum, bits);
        if (valid == kVec) {
            store_pack<A>(out + at, result, kVec);
        } else {
            store_pack<Scalar>(out + at, result, valid);
        }
        if (mask) mask[g] = static_cast<u8>(bits & (0xffu >> (kVec - valid)));
    }
}

template <class T, class A>
KERNEL(4)
add_relu_bwd_kernel(const T* grad, const u8* mask, i64 n, T* dx) {
    const i64 groups = ceil_div(n, kVec);
    for (i64 g = block_x() * kThreads + thread_index(); g < groups; g += grid_x() * kThreads) {
        const i64 at = g * kVec;
        const int valid = group_size(g, n);
        const u32 bits = mask[g];
        if (valid == kVec) {
            store_pack<A>(dx + at, keep(load_pack<A, true>(grad + at, kVec), bits), kVec);
        } else {
            store_pack<Scalar>(dx + at, keep(load_pack<Scalar, true>(grad + at, valid), bits), valid);
        }
    }
}

void add_relu_fwd(int dtype, const void* x, const void* residual, i64 n, void* out, u8* mask, i64 ctx) {
    dispatch("add_relu_fwd", dtype, aligned16(x, residual, out), [&](auto t, auto access) {
        using T = decltype(t);
        launch("add_relu_fwd", add_relu_fwd_kernel<T, decltype(access)>, blocks_for(n), 1, ctx,
               static_cast<const T*>(x), static_cast<const T*>(residual), n, static_cast<T*>(out), mask);
    });
}

void add_relu_bwd(int dtype, const void* grad, const u8* mask, i64 n, void* dx, i64 ctx) {
    dispatch("add_relu_bwd", dtype, aligned16(grad, dx), [&](auto t, auto access) {
        using T = decltype(t);
        launch("add_relu_bwd", add_relu_bwd_kernel<T, decltype(access)>, blocks_for(n), 1, ctx,
               static_cast<const T*>(grad), mask, n, static_cast<T*>(dx));
    });
}

}  // namespace FASTRES_BACKEND
