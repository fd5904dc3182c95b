// The tile of conv_grouped.cpp: a few pixels of one vector of outputs, all sums in registers. And what operands are,
// for conv_grouped_inplace.cpp as well.
#pragma once
#include "cpu/conv_tile.h"

namespace FASTRES_BACKEND {
namespace {

constexpr int kMost = L == 16 ? 14 : 10;  // pixels of a tile

// As it lies in a copy: groups of one channel, or any of pairs of bfloat16. Even or odd lanes, doubled: groups of fewer
// than L. One for all lanes: groups of L.
enum class Operand { kPlain, kPair, kSplat };

template <class Of>
Operand operand_of(i64 width) {
    if (width == L) return Operand::kSplat;
    return width == 1 || Of::kChannels == 2 ? Operand::kPlain : Operand::kPair;
}
// Of the lanes of x, for output lane k.
int channel_of(Operand kind, int c, int k) {
    return kind == Operand::kPlain ? k : kind == Operand::kSplat ? c : ((k / 2) ^ (c / 2)) * 2 + c % 2;
}

// Of the pairs of bfloat16 of L channels, for output lane k in copy c; of L channels pair c, for all.
int pair_of(i64 width, i64 c, i64 k) { return int(width == L ? c : k / width * (width / 2) + (k % (width / 2) ^ c)); }

// Threads share rows, or vectors of outputs where those come out more evenly: into how many parts.
inline i64 vector_parts(i64 threads, i64 rows, i64 vectors) {
    i64 parts = 1, least = 0;
    for (i64 of = 1; of <= min_of(threads, vectors); ++of) {
        if (threads % of) continue;
        const i64 work = ceil_div(vectors, of) * ceil_div(rows, threads / of);
        if (of == 1 || work * 33 < least * 32) least = work, parts = of;
    }
    return parts;
}

template <int kOdd>
FR_INLINE vf doubled(const float* p) {
#if defined(__AVX512F__)
    // Not the intrinsic: GCC loads once for both, and then the shuffles take the turns of products.
    __m512 v;
    if (kOdd)
        asm("vmovshdup %1, %0" : "=v"(v) : "m"(*reinterpret_cast<const __m512*>(p)));
    else
        asm("vmovsldup %1, %0" : "=v"(v) : "m"(*reinterpret_cast<const __m512*>(p)));
    return (vf)v;
#elif defined(__AVX2__) && FASTRES_WIDTH == 8
    __m256 v;
    if (kOdd)
        asm("vmovshdup %1, %0" : "=x"(v) : "m"(*reinterpret_cast<const __m256*>(p)));
    else
        asm("vmovsldup %1, %0" : "=x"(v) : "m"(*reinterpret_cast<const __m256*>(p)));
    return (vf)v;
#else
    vf v;
    for (int i = 0; i < L; ++i) v[i] = p[i / 2 * 2 + kOdd];
    return v;
#endif
}

// Pairs of lanes exchanged with those at a distance of kPairs, a power of two.
template <int kPairs>
FR_INLINE vf exchanged(vf v) {
    vi order;
    for (int i = 0; i < L; ++i) order[i] = i ^ (kPairs * 2);
    return __builtin_shuffle(v, order);
}

struct Input {
    const float* const* rows;  // the first pixel of each row of taps
    i64 R, S, copies;          // copies, or where there is one operands of kSplat
    i64 copy, step, dilation;  // floats between copies of a row, pixels of a row, taps
};

template <class T>
struct Output {
    T* y;
    const T* residual;  // or null
    i64 pitch;          // from one pixel to the next
    vf bias, floor;
    int m;  // pixels that exist
};

template <Operand kKind, int kAt>
FR_INLINE vf operand(const float* p) {
    if constexpr (kKind == Operand::kPair)
        return doubled<kAt>(p);
    else if constexpr (kKind == Operand::kPlain)
        return load(p);
    else
        return splat(p + kAt);
}

// Operand kAt of the pixels at p, with all taps of a row: those of kStride apart that a pixel meets.
template <class Of, Operand kKind, int kAt, int M, int kStride>
FR_INLINE void three_taps(const float* p, const float* w, vf (&s)[M]) {
    const vf w0 = load(w), w1 = load(w + L), w2 = load(w + 2 * L);
#pragma GCC unroll unrolled(32)
    for (int j = 0; j < (M - 1) * kStride + 3; ++j) {
        const vf v = operand<kKind, kAt>(p + j * L);
        if (j % kStride == 0 && j / kStride < M) s[j / kStride] = Of::add(v, w0, s[j / kStride]);
        if (j >= 1 && (j - 1) % kStride == 0 && (j - 1) / kStride < M)
            s[(j - 1) / kStride] = Of::add(v, w1, s[(j - 1) / kStride]);
        if (j >= 2 && (j - 2) % kStride == 0) s[(j - 2) / kStride] = Of::add(v, w2, s[(j - 2) / kStride]);
    }
}
template <class Of, Operand kKind, int kAt, int M>
FR_INLINE void one_tap(const float* p, i64 step, const float* w, vf (&s)[M]) {
    const vf weight = load(w);
#pragma GCC unroll unrolled(14)
    for (int i = 0; i < M; ++i, p += step) s[i] = Of::add(operand<kKind, kAt>(p), weight, s[i]);
}

// kStride: of three taps that follow each other, or 0 for any others.
template <class T, class Of, Operand kKind, int kStride, int M>
void grouped_tile(const Input& in, i64 at, const float* w, const Output<T>& out) {
    vf s[M];
#pragma GCC unroll unrolled(14)
    for (int i = 0; i < M; ++i) s[i] = vf{};
    for (i64 r = 0; r < in.R; ++r) {
        const float* p = in.rows[r] + at;
        const auto taps = [&]<int kAt>(Constant<kAt>) __attribute__((always_inline)) {
            if constexpr (kStride) {
                three_taps<Of, kKind, kAt, M, kStride>(p, w, s);
            } else {
                for (i64 t = 0; t < in.S; ++t) one_tap<Of, kKind, kAt, M>(p + t * in.dilation, in.step, w + t * L, s);
            }
            w += in.S * L;
        };
        if constexpr (kKind == Operand::kPlain) {
            for (i64 q = 0; q < in.copies; ++q, p += in.copy) taps(Constant<0>());
        } else if constexpr (kKind == Operand::kPair) {
            for (i64 q = 0; q < in.copies; ++q, p += in.copy) taps(Constant<0>()), taps(Constant<1>());
        } else {
            for (int c = 0; c < L / Of::kChannels; c += 2, p += 2) taps(Constant<0>()), taps(Constant<1>());
        }
    }
#pragma GCC unroll unrolled(14)
    for (int i = 0; i < M; ++i) {
        if (i >= out.m) break;
        vf v = s[i] + out.bias;
        if (out.residual) v += load(out.residual + i * out.pitch);
        Of::store(out.y + i * out.pitch, at_least(v, out.floor));
    }
}

template <class T>
using GroupedTile = void (*)(const Input&, i64, const float*, const Output<T>&);

// The tile of at least m pixels.
template <class T, class Of, Operand kKind, int kStride>
GroupedTile<T> tile_of(i64 m) {
    if (m <= 2) return grouped_tile<T, Of, kKind, kStride, 2>;
    if (m <= 4) return grouped_tile<T, Of, kKind, kStride, 4>;
    if (m <= 7) return grouped_tile<T, Of, kKind, kStride, 7>;
#if FASTRES_WIDTH == 16
    if (m <= 9) return grouped_tile<T, Of, kKind, kStride, 9>;
    if (m <= 11) return grouped_tile<T, Of, kKind, kStride, 11>;
#endif
    return grouped_tile<T, Of, kKind, kStride, kMost>;
}
template <class T, class Of, Operand kKind>
GroupedTile<T> tile_of(i64 stride, i64 m) {
    return stride == 1   ? tile_of<T, Of, kKind, 1>(m)
           : stride == 2 ? tile_of<T, Of, kKind, 2>(m)
                         : tile_of<T, Of, kKind, 0>(m);
}

}  // namespace
}  // namespace FASTRES_BACKEND
