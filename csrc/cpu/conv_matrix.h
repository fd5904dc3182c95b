// Products on the matrix unit: 32 pixels times 32 output channels, sums in four tiles.
//
// Operands are bfloat16. Activations of bfloat16 go in as they are; float32 and float16 as a sum of two, x = hi + lo
// and w = hi + lo, by three products, lo.hi + hi.hi + hi.lo: what is left out is 2^-16 of a product.
#pragma once
#include "cpu/conv.h"
#include "cpu/isa/rows.h"
#include "cpu/isa/tiles.h"

namespace FASTRES_BACKEND {
namespace {

constexpr i64 kDepth = 32;             // input channels of a step
constexpr i64 kSide = 16;              // pixels, or output channels, of a tile
constexpr i64 kPair = 2 * kSide;       // of a block
constexpr i64 kTile = kSide * kDepth;  // bfloat16 of a tile
constexpr i64 kSums = kPair * kPair;

template <class T>
constexpr bool kHalves = true;  // hi and lo
template <>
constexpr bool kHalves<bf16> = false;

template <class T>
constexpr i64 kStepWeights = (kHalves<T> ? 4 : 2) * kTile;  // bfloat16 of the weights of a step and a panel

// Pixels and the steps over their channels, with the weights of one panel.
struct Operand {
    const u16* x;      // the first pixel
    i64 pitch;         // from one pixel to the next, in elements, as all of these
    const i64* steps;  // where each step's channels lie
    i64 n_steps;
    i64 low;  // from hi to lo
    const u16* w;
};

// Weights that far ahead are fetched where a pass reads them for the first time.
constexpr i64 kWeightsAhead = 16 * kTile;

// sums += x . w for one tile of pixels, or for two of them.
template <bool kTwo, bool kHalves>
FR_INLINE void accumulate(Tiles& t, const Operand& o, bool fetch) {
    const i64 second = kSide * o.pitch, bytes = o.pitch * i64(sizeof(u16));
    const u16* w = o.w;
    constexpr i64 kStep = (kHalves ? 4 : 2) * kTile;
    for (i64 s = 0; s < o.n_steps; ++s, w += kStep) {
        const u16* x = o.x + o.steps[s];
        if (fetch)
            for (i64 i = 0; i < kStep; i += kTileBytes / 2) __builtin_prefetch(w + kWeightsAhead + i, 0, 2);
        if constexpr (kHalves) {
            t.load<4>(x + o.low, bytes);
            t.load<6>(w, kTileBytes);
            t.dot<0, 4, 6>();
            t.load<7>(w + kTile, kTileBytes);
            t.dot<1, 4, 7>();
            if constexpr (kTwo) {
                t.load<5>(x + o.low + second, bytes);
                t.dot<2, 5, 6>();
                t.dot<3, 5, 7>();
            }
        } else {
            t.load<6>(w, kTileBytes);
            t.load<7>(w + kTile, kTileBytes);
        }
        t.load<4>(x, bytes);
        t.dot<0, 4, 6>();
        t.dot<1, 4, 7>();
        if constexpr (kTwo) {
            t.load<5>(x + second, bytes);
            t.dot<2, 5, 6>();
            t.dot<3, 5, 7>();
        }
        if constexpr (kHalves) {
            t.load<6>(w + 2 * kTile, kTileBytes);
            t.dot<0, 4, 6>();
            t.load<7>(w + 3 * kTile, kTileBytes);
            t.dot<1, 4, 7>();
            if constexpr (kTwo) {
                t.dot<2, 5, 6>();
                t.dot<3, 5, 7>();
            }
        }
    }
}

// out [kPair, kPair] = the products of one or two operands, summed; rows of a second tile only if two.
template <bool kHalves>
FR_INLINE void products(Tiles& t, const Operand* operands, int count, bool two, bool fetch, float* out) {
    t.zero<0>();
    t.zero<1>();
    t.zero<2>();
    t.zero<3>();
    for (int i = 0; i < count; ++i)
        two ? accumulate<true, kHalves>(t, operands[i], fetch) : accumulate<false, kHalves>(t, operands[i], fetch);
    constexpr i64 kRow = kPair * i64(sizeof(float));
    t.store<0>(out, kRow);
    t.store<1>(out + kSide, kRow);
    if (!two) return;
    t.store<2>(out + kSide * kPair, kRow);
    t.store<3>(out + kSide * kPair + kSide, kRow);
}

// ---- halves

// v = hi + lo, to 2^-17 of v. Where hi is not finite lo is zero, not the NaN of their difference.
FR_INLINE void split(vf v, vf& hi, vf& lo) {
    hi = rounded(v, bf16());
    const vf rest = v - hi;
    lo = bit_cast<vf>(bit_cast<vi>(rest) & (rest == rest));
}

// Two vectors' worth of bfloat16 side by side: one instruction where there are tiles. It takes denormals for zero, as
// the products would.
FR_INLINE void store_narrow(u16* to, vf a, vf b) {
#if defined(__AVX512BF16__)
    write(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
#else
    store(reinterpret_cast<bf16*>(to), a);
    store(reinterpret_cast<bf16*>(to + L), b);
#endif
}

}  // namespace
}  // namespace FASTRES_BACKEND
