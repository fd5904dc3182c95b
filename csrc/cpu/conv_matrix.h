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

// Pixels, the steps over their channels, and the weights [panel][step].
struct Operand {
    const u16* x;      // the first pixel
    i64 pitch;         // from one pixel to the next, in elements, as all of these
    const i64* steps;  // where each step's channels lie
    i64 n_steps;
    i64 low;  // from hi to lo
    const u16* w;
    i64 panel = 0;  // from the channels that a panel reads to those of the next
};

// sums += x . w for one tile of pixels, or for two of them. beside() runs twice a step, between products that do not
// wait for it.
template <bool kTwo, bool kHalves, class Beside>
FR_INLINE void accumulate(Tiles& t, const Operand& o, const u16* x0, i64 panel, const Beside& beside) {
    const i64 second = kSide * o.pitch, bytes = o.pitch * i64(sizeof(u16));
    constexpr i64 kStep = (kHalves ? 4 : 2) * kTile;
    const u16* w = o.w + panel * o.n_steps * kStep;
    for (i64 s = 0; s < o.n_steps; ++s, w += kStep) {
        const u16* x = x0 + panel * o.panel + o.steps[s];
        t.keep_awake();
        if constexpr (kHalves) {
            t.load<4>(x + o.low, bytes);
            t.load_once<6>(w, kTileBytes);
            t.dot<0, 4, 6>();
            t.load_once<7>(w + kTile, kTileBytes);
            t.dot<1, 4, 7>();
            if constexpr (kTwo) {
                t.load<5>(x + o.low + second, bytes);
                t.dot<2, 5, 6>();
                t.dot<3, 5, 7>();
            }
        } else {
            t.load_once<6>(w, kTileBytes);
            t.load_once<7>(w + kTile, kTileBytes);
        }
        t.load<4>(x, bytes);
        t.dot<0, 4, 6>();
        t.dot<1, 4, 7>();
        beside();
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
        beside();
    }
}

// From one thread's scratch memory to the next, in bfloat16, where it needs so many.
inline i64 scratch_elements(i64 elements) { return scratch_pitch(elements * i64(sizeof(u16))) / i64(sizeof(u16)); }

// Parts of memory that will be read, fetched into L2 a little at a time.
struct Ahead {
    const char *next = nullptr, *end = nullptr;
    i64 lines = 0;  // each time
    Ahead() = default;
    // All of it in so many times.
    Ahead(const void* from, i64 bytes, i64 times)
        : next(static_cast<const char*>(from)), end(next + bytes), lines(ceil_div(bytes, 64 * max_of(1, times))) {}
    FR_INLINE void step() {
        if (next >= end) return;
        for (i64 i = 0; i < lines; ++i, next += 64) __builtin_prefetch(next, 0, 2);
    }
};

// What a task fetches meanwhile: weights to come, and of the pixels to come what is read and what is added.
struct Fetch {
    Ahead weights, x, residual;
    FR_INLINE void step() { weights.step(), x.step(), residual.step(); }
};

// Two blocks' sums.
struct alignas(64) Sums {
    float block[2][kSums];
};

// `count` pixels with the panels [g0, g1): done(sums, at, i0, i1, panel) for the pixels [i0, i1) of a block, pixel i
// of which lies at[i] elements into whatever done() writes, or nowhere (-1): what next() says of one pixel after the
// other. Pixels that lie where x is are copied to `edge`, [kPair, pitch], if a tile would read behind them; null: none
// do. ahead: what is fetched meanwhile.
//
// A block is done a little with every step of the next: its sums are in memory by then, and both run at once.
template <class T, int kOperands, class Fetcher, class Next, class Done>
FR_INLINE void blocks(Tiles& t, Sums& sums, const Operand (&o)[kOperands], i64 count, i64 g0, i64 g1, u16* edge,
                      Fetcher& ahead, Next&& next, const Done& done) {
    constexpr i64 kRow = kPair * i64(sizeof(float));
    i64 at[2][kPair];  // of two rows of blocks
    struct {
        const float* sums = nullptr;
        const i64* at = nullptr;
        i64 panel = 0, i = 0, n = 0;  // done up to i
    } last;
    const auto rest = [&](i64 most) {
        const i64 i = last.i;
        last.i = min_of(i + most, last.n);
        if (i < last.n) done(last.sums, last.at, i, last.i, last.panel);
    };
    i64 steps = 0;
    for (int i = 0; i < kOperands; ++i) steps += o[i].n_steps;
    const i64 some = max_of(8, ceil_div(kPair, 2 * max_of(1, steps)));  // fewer: the calls cost more than they hide
    const auto beside = [&] { ahead.step(), rest(some); };
    int turn = 0;
    for (i64 m = 0; m < count; m += kPair) {
        const i64 n = min_of(kPair, count - m);
        i64* const here = at[m / kPair % 2];
        for (i64 i = 0; i < n; ++i) here[i] = next();
        const u16* x[kOperands];
        for (int i = 0; i < kOperands; ++i) x[i] = o[i].x + m * o[i].pitch;
        if (edge && n % kSide) {
            __builtin_memcpy(edge, x[0], n * o[0].pitch * sizeof(u16));
            x[0] = edge;
        }
        for (i64 g = g0; g < g1; ++g, turn ^= 1) {
            t.zero<0>();
            t.zero<1>();
            t.zero<2>();
            t.zero<3>();
            const bool two = n > kSide;
            for (int i = 0; i < kOperands; ++i)
                two ? accumulate<true, kHalves<T>>(t, o[i], x[i], g, beside)
                    : accumulate<false, kHalves<T>>(t, o[i], x[i], g, beside);
            rest(kPair);
            float* out = sums.block[turn];
            t.store<0>(out, kRow);
            t.store<1>(out + kSide, kRow);
            if (two) {
                t.store<2>(out + kSide * kPair, kRow);
                t.store<3>(out + kSide * kPair + kSide, kRow);
            }
            last = {out, here, g, 0, n};
        }
    }
    rest(kPair);
}

// ---- halves

// v = hi + lo, to 2^-17 of v. Where hi is not finite lo is zero, not the NaN of their difference.
FR_INLINE void split(vf v, vf& hi, vf& lo) {
    hi = rounded(v, bf16());
    const vf rest = v - hi;
    lo = bit_cast<vf>(bit_cast<vi>(rest) & (rest == rest));
}

FR_INLINE void store_halves(u16* to, i64 low, vf a, vf b) {
    vf hi[2], lo[2];
    split(a, hi[0], lo[0]);
    split(b, hi[1], lo[1]);
    write(to, narrow_pairs(hi[0], hi[1]));
    write(to + low, narrow_pairs(lo[0], lo[1]));
}

// A weight, at the place of its hi in a step.
template <class T>
FR_INLINE void pack_one(float w, u16* at) {
    vf hi, lo;
    split(vf{} + w, hi, lo);
    at[0] = u16(bit_cast<vu>(hi)[0] >> 16);
    if (kHalves<T>) at[2 * kTile] = u16(bf16_bits(lo)[0] >> 16);
}

// ---- the end of a block

// y = act(sums + bias + residual), 32 channels of each pixel.
template <class T>
struct Finish {
    T* y;
    const T* residual;
    const float* bias;
    vf floor;  // of the activation
    i64 K;

    Finish(T* y, const T* residual, const float* bias, bool relu, i64 K)
        : y(y), residual(residual), bias(bias), floor(relu ? vf{} : vf{} - __builtin_inff()), K(K) {}

    // Its own function: the loops that call it need their registers.
    __attribute__((noinline)) void operator()(const float* sums, const i64* at, i64 i0, i64 i1, i64 panel) const {
        const i64 k0 = panel * kPair, outs = K - k0;
        if (outs < kPair)
            part(sums, at, i0, i1, k0, outs);
        else
            residual ? whole<true>(sums, at, i0, i1, k0) : whole<false>(sums, at, i0, i1, k0);
    }

  private:
    template <bool kResidual>
    FR_INLINE void whole(const float* sums, const i64* at, i64 i0, i64 i1, i64 k0) const {
        constexpr int kVectors = int(kPair) / L;
        const vf least = floor;
        vf b[kVectors];
        for (int v = 0; v < kVectors; ++v) b[v] = bias ? load(bias + k0 + v * L) : vf{};
        T* const to = y + k0;
        const T* const from = residual + k0;
        for (i64 i = i0; i < i1; ++i) {
            const i64 pixel = at[i];
            if (pixel < 0) continue;
            for (int v = 0; v < kVectors; v += 2) {
                const float* s = sums + i * kPair + v * L;
                vf first = load(s) + b[v], second = load(s + L) + b[v + 1];
                if (kResidual) first += load(from + pixel + v * L), second += load(from + pixel + v * L + L);
                first = at_least(first, least), second = at_least(second, least);
                if constexpr (!kHalves<T>) {
                    store_pairs(to + pixel + v * L, first, second);
                } else {
                    store(to + pixel + v * L, first);
                    store(to + pixel + v * L + L, second);
                }
            }
        }
    }

    void part(const float* sums, const i64* at, i64 i0, i64 i1, i64 k0, i64 outs) const {
        for (i64 i = i0; i < i1; ++i) {
            if (at[i] < 0) continue;
            const float* s = sums + i * kPair;
            i64 k = 0;
            for (; k + L <= outs; k += L) lanes(s + k, at[i], k0 + k, Full());
            if (k < outs) lanes(s + k, at[i], k0 + k, Tail{int(outs - k), false});
        }
    }

    template <class Span>
    FR_INLINE void lanes(const float* sums, i64 at, i64 k, Span span) const {
        vf v = load(sums);
        if (bias) v += span.load(bias + k);
        if (residual) v += span.load(residual + at + k);
        span.store(y + at + k, at_least(v, floor));
    }
};

}  // namespace
}  // namespace FASTRES_BACKEND
