// Walking an [M, C] matrix in vectors, and sharing it among threads.
#pragma once
#include "cpu/isa/vec.h"
#include "cpu/parallel.h"

namespace FASTRES_BACKEND {
namespace {

using cpu_runtime::l2_bytes;
using cpu_runtime::Scratch;
using cpu_runtime::scratch_pitch;

template <auto N>
struct Constant {
    static constexpr auto value = N;
};

constexpr i64 min_of(i64 a, i64 b) { return a < b ? a : b; }
constexpr i64 max_of(i64 a, i64 b) { return a > b ? a : b; }
constexpr i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
constexpr i64 padded(i64 C) { return ceil_div(C, 16) * 16; }
constexpr i64 mask_bytes(i64 C) { return ceil_div(C, 8); }

// Rows visited together: per-channel vectors are read once for so many rows. With four, the addresses of up to five
// streams no longer fit the registers (measured 10-20% slower on Zen 2).
constexpr int kRows = 2;

// Rows summed at once in a reduction: few, for the digits of the sum, and small enough to be read again from L2.
constexpr i64 kChunk = 32;

// f(Constant<U>, m, c, span) for the rows m..m+U-1 and the channels of span from c on, over [m0, m1) x [c0, c1).
// c0 is a multiple of L; c1 is one too, or C.
template <class F>
FR_INLINE void walk(i64 m0, i64 m1, i64 c0, i64 c1, i64 C, const F& f) {
    const i64 whole = c0 + (c1 - c0) / L * L;
    const int tail = int(c1 - whole);
    const i64 end = m1 * C;
    i64 m = m0;
    for (; m + kRows <= m1; m += kRows) {
        for (i64 c = c0; c < whole; c += L) f(Constant<kRows>(), m, c, Full());
        // Reading past the row is legal inside [m0, m1) as long as those channels belong to this task too.
        if (tail) f(Constant<kRows>(), m, whole, Tail{tail, c0 == 0 && (m + kRows - 1) * C + whole + L <= end});
    }
    for (; m < m1; ++m) {
        for (i64 c = c0; c < whole; c += L) f(Constant<1>(), m, c, Full());
        if (tail) f(Constant<1>(), m, whole, Tail{tail, c0 == 0 && m * C + whole + L <= end});
    }
}

// Reductions prefetch the rows they will reach about a page later, `ahead` elements on: with no stores to wait for, the
// hardware's own prefetching, which stops at page boundaries, does not keep memory busy. Measured 15-25% faster on
// Zen 2; passes that write gain nothing.
template <class T>
FR_INLINE i64 ahead(i64 C, i64 width) {
    return C * max_of(kRows, ceil_div(4096, width * i64(sizeof(T))));
}
FR_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// f(first, last, thread) over a partition of [0, tasks).
template <class F>
void parallel(i64 threads, i64 tasks, const F& f) {
    cpu_runtime::parallel(
        threads, tasks,
        [](void* data, i64 first, i64 last, int thread) { (*static_cast<const F*>(data))(first, last, thread); },
        const_cast<F*>(&f));
}

// Below so many elements one thread is faster: a region costs about 8 us (2 cores of Zen 2, data in cache: two threads
// draw level at 100 000 elements in bn_stats, at 150 000 in bn_apply).
constexpr i64 kSerial = 96 * 1024;

inline i64 threads_for(i64 elements, i64 ctx) { return elements < kSerial ? 1 : max_of(1, ctx); }

// Rows [0, M) in one contiguous range a thread: f(m0, m1).
template <class F>
void parallel_rows(i64 M, i64 C, i64 ctx, const F& f) {
    if (M <= 0 || C <= 0) return;
    parallel(threads_for(M * C, ctx), M, [&](i64 first, i64 last, int) { f(first, last); });
}

// Tiles of rows (part's T) times blocks of channels, so that few tiles still feed many threads.
// The split into blocks may depend on the number of threads: no sum crosses a channel.
struct Tiling {
    i64 M, C, T, R, blocks, width, threads;

    Tiling(i64 M, i64 C, i64 T, i64 ctx)
        : M(M), C(C), T(T), R(M ? ceil_div(M, T) : 0), threads(threads_for(M * C, ctx)) {
        const i64 wanted = threads > 1 ? ceil_div(4 * threads, T) : 1;
        width = max_of(64, ceil_div(ceil_div(C, wanted), 64) * 64);
        blocks = ceil_div(C, width);
    }
    i64 tasks() const { return T * blocks; }
    // f(t, m0, m1, c0, c1, thread)
    template <class F>
    void run(const F& f) const {
        parallel(threads, tasks(), [&](i64 first, i64 last, int thread) {
            for (i64 task = first; task < last; ++task) {
                const i64 t = task / blocks, b = task % blocks;
                f(t, min_of(t * R, M), min_of((t + 1) * R, M), b * width, min_of((b + 1) * width, C), thread);
            }
        });
    }
};

// Merging partial results [planes, T, C] in double: f(c, span, lanes) for vectors of channels, blocks of them on
// threads. Rows are added in ascending order of their tile whatever the number of threads.
template <class F>
void parallel_channels(i64 T, i64 C, i64 ctx, const F& f) {
    constexpr i64 kBlock = 64;
    parallel(threads_for(T * C, ctx), ceil_div(C, kBlock), [&](i64 first, i64 last, int) {
        const i64 end = min_of(last * kBlock, C);
        for (i64 c = first * kBlock; c < end; c += L) {
            if (end - c >= L)
                f(c, Full(), L);
            else
                f(c, Tail{int(end - c), false}, int(end - c));
        }
    });
}

// Per-channel parameters readable in whole vectors: the array itself, or a padded copy where C is not a multiple of L.
// Rows of [planes, C] become rows of [planes, stride].
template <class A>
class Channels {
  public:
    Channels(const void* p, i64 planes, i64 C)
        : stride_(C % L ? padded(C) : C), copy_(C % L && p ? planes * padded(C) * i64(sizeof(A)) : 0) {
        const A* from = static_cast<const A*>(p);
        data_ = from;
        if (C % L == 0 || !p) return;
        A* to = static_cast<A*>(copy_.get());
        __builtin_memset(to, 0, planes * stride_ * sizeof(A));
        for (i64 i = 0; i < planes; ++i) __builtin_memcpy(to + i * stride_, from + i * C, C * sizeof(A));
        data_ = to;
    }
    const A* operator[](i64 plane) const { return data_ ? data_ + plane * stride_ : nullptr; }

  private:
    i64 stride_;
    const A* data_;
    Scratch copy_;
};

// f(T()) with the activation type of a dtype code, for what knows no double.
template <class F>
void with_narrow(int dtype, const F& f) {
    switch (dtype) {
        case kF32:
            return f(float());
        case kBF16:
            return f(bf16());
        case kF16:
            return f(fp16());
    }
    cpu_runtime::bad_dtype(dtype);
}

// The same, double included.
template <class F>
void with_type(int dtype, const F& f) {
    if (dtype == kF64) return f(double());
    with_narrow(dtype, f);
}

template <class F>
void with_flag(bool flag, const F& f) {
    if (flag)
        f(Constant<true>());
    else
        f(Constant<false>());
}

}  // namespace
}  // namespace FASTRES_BACKEND
