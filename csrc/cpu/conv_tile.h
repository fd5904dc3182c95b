// The innermost product of a convolution: a few pixels times a panel of output channels, all sums in registers.
//
// x lies in blocks of kBlock channels, the pixels of a row one after the other ([channel block][row][pixel][kBlock]),
// weights in panels ([panel][channel block][tap][channel][kPanel]): pixels are at constant distances from each other,
// whatever the layer's sizes, and weights are read in order. In place of a float may lie a pair of bfloat16: of two
// neighbouring input channels, so that a block is 2 * kBlock of them.
#pragma once
#include "cpu/isa/rows.h"

namespace FASTRES_BACKEND {
namespace {

constexpr int kBlock = 16;                 // input channels of a pixel that lie together
constexpr int kPanel = 2 * L;              // output channels of a tile
constexpr int kPixels = L == 16 ? 14 : 6;  // 2*kPixels sums in 32 (AVX-512) or 16 registers
constexpr int kWide = kPixels / 2;         // pixels of each row, where a tile takes two
constexpr i64 kSums = kPixels * i64(kPanel);

// What lies in x and the weights, channels of it in a float's place, and its product.
struct Floats {
    static constexpr i64 kChannels = 1;
    static FR_INLINE vf add(vf a, vf b, vf sum) { return fma(a, b, sum); }
    template <class T>
    static FR_INLINE void store(T* y, vf low, vf high) {
        FASTRES_BACKEND::store(y, low), FASTRES_BACKEND::store(y + L, high);
    }
    template <class T>
    static FR_INLINE void store(T* y, vf v) {
        FASTRES_BACKEND::store(y, v);
    }
};
struct Pairs {
    static constexpr i64 kChannels = 2;
    static FR_INLINE vf add(vf a, vf b, vf sum) { return dot_pairs(a, b, sum); }
    static FR_INLINE void store(bf16* y, vf low, vf high) { store_pairs(y, low, high); }
    static FR_INLINE void store(bf16* y, vf v) { store_pairs(y, v); }
};

// What a tile fetches besides weights, a little with every kStep channels: a processor has room for some twenty lines
// on their way, and the tile's own loads wait behind a burst of them.
struct Expected {
    // Pixels of y, to be written, and of what is added to them: `left` of them, `each` at a time, `second` bytes to
    // another line of the same pixel.
    const char *y = nullptr, *residual = nullptr;
    i64 pitch = 0, left = 0, each = 1, second = 0;
    // Lines that follow each other, into L2, `further` bytes at a time: at most kMost lines.
    const char *next = nullptr, *end = nullptr;
    i64 further = 0;
    static constexpr i64 kMost = 4, kBytes = 64;

    FR_INLINE void step() {
        if (left > 0) {
            for (i64 i = 0; i < each; ++i, y += pitch, residual += pitch) {
                __builtin_prefetch(y, 1, 3), __builtin_prefetch(y + second, 1, 3);
                __builtin_prefetch(residual, 0, 3), __builtin_prefetch(residual + second, 0, 3);
            }
            left -= each;
        }
        if (next < end) {
#pragma GCC unroll unrolled(4)
            for (i64 i = 0; i < kMost; ++i) __builtin_prefetch(next + i * kBytes, 0, 2);
            next += further;
        }
    }
};

struct TileInput {
    const i64* taps;  // where a tap's pixel lies, in floats from the pixel of the first tap
    int n_taps;
    i64 blocks, block_size;  // channel blocks and the floats between two of them
    int last_width;          // channels in the last block, a multiple of kStep
    // Where not all taps of the weights are wanted: n_taps numbers of those that are, and how many there are in all.
    const int* order = nullptr;
    int all_taps = 0;
    // What to fetch from far meanwhile, and how many lines of it with every kStep channels.
    const float* ahead = nullptr;
    int lines = 0;
    Expected* expected = nullptr;  // of tiles that end in y or are asked to
};

constexpr int kStep = 4;   // channels between two tests of the loop
constexpr int kLine = 16;  // floats
// A tile that meets its weights for the first time fetches them so many floats ahead: the hardware alone leaves a
// stream from L3 at half of its rate.
constexpr i64 kAhead = 96 * kPanel;
constexpr int kOwnLines = kStep * kPanel / kLine;

// For the tile of `pass` among `passes` over one slab of weights: the next slab's come while this one's are used,
// evenly; its own where it is alone, or the first over weights that nobody has asked for.
FR_INLINE void fetch_evenly(TileInput& in, const float* w, i64 slab, i64 pass, i64 passes, bool cold) {
    const bool own = passes == 1 || (cold && pass == 0);
    in.ahead = own ? w + kAhead : w + slab + slab * pass / passes / kLine * kLine;
    in.lines = own ? kOwnLines : int(ceil_div(kOwnLines, passes));
}

// s [M0 + M1][2]: M0 pixels from a0 on, then M1 pixels from a1 on. kPitch: floats from one pixel to the next.
template <class Of, int M0, int M1, int kPitch, int kUnroll, bool kExpects>
FR_INLINE void accumulate(const TileInput& in, const float* a0, const float* a1, const float* w, vf (&s)[M0 + M1][2]) {
    constexpr int M = M0 + M1;
#pragma GCC unroll unrolled(14)
    for (int i = 0; i < M; ++i) s[i][0] = s[i][1] = vf{};
    const float* ahead = in.ahead;
    const i64 further = in.lines * kLine;
    for (i64 b = 0; b < in.blocks; ++b, a0 += in.block_size, a1 += in.block_size) {
        const int width = b + 1 < in.blocks ? kBlock : in.last_width;
        const float* const block = w;
        for (int n = 0; n < in.n_taps; ++n) {
            const int t = in.order ? in.order[n] : n;
            if (in.order) w = block + t * width * kPanel;
            const float *p0 = a0 + in.taps[t], *p1 = a1 + in.taps[t];
            for (int c = 0; c < width;
                 c += kUnroll, p0 += kUnroll, p1 += kUnroll, w += kUnroll * kPanel, ahead += further) {
                if constexpr (kExpects) in.expected->step();
#pragma GCC unroll unrolled(4)
                for (int u = 0; u < kUnroll; ++u) {
                    const vf w0 = load(w + u * kPanel), w1 = load(w + u * kPanel + L);
                    __builtin_prefetch(ahead + u * kPanel, 0, 2);
                    if (kPanel * sizeof(float) > 64) __builtin_prefetch(ahead + u * kPanel + L, 0, 2);
#pragma GCC unroll unrolled(14)
                    for (int i = 0; i < M; ++i) {
                        const vf v = splat(i < M0 ? p0 + i * kPitch + u : p1 + (i - M0) * kPitch + u);
                        s[i][0] = Of::add(v, w0, s[i][0]);
                        s[i][1] = Of::add(v, w1, s[i][1]);
                    }
                }
            }
        }
        if (in.order) w = block + in.all_taps * width * kPanel;
    }
}

// The sums as they are, [M0 + M1] rows of kPanel.
template <class Of, int M0, int M1, int kPitch = kBlock, int kUnroll = kStep, bool kExpects = false>
void tile(const TileInput& in, const float* a0, const float* a1, const float* w, float* sums, i64 pitch) {
    vf s[M0 + M1][2];
    accumulate<Of, M0, M1, kPitch, kUnroll, kExpects>(in, a0, a1, w, s);
#pragma GCC unroll unrolled(14)
    for (int i = 0; i < M0 + M1; ++i) {
        store(sums + i * pitch, s[i][0]);
        store(sums + i * pitch + L, s[i][1]);
    }
}

// relu(sums + bias), rounded to bfloat16 and without a sign: as integers in the same order, a NaN the greatest.
template <class Of, int M, int kPitch, int kUnroll>
void tile_kept(const TileInput& in, const float* a, const float* w, const vf (&bias)[2], u16* to, i64 pitch) {
    vf s[M][2];
    accumulate<Of, M, 0, kPitch, kUnroll, false>(in, a, a, w, s);
#pragma GCC unroll unrolled(14)
    for (int i = 0; i < M; ++i) {
        const vf low = at_least(s[i][0] + bias[0], vf{}), high = at_least(s[i][1] + bias[1], vf{});
        write(to + i * pitch, narrow_pairs(low, high) & 0x7fff);
    }
}

// Where a whole panel of outputs goes: rows of y and of the residual (or null) for the pixels of a0 and those of a1.
template <class T>
struct TileOutput {
    T *y0, *y1;
    const T *r0, *r1;
    i64 pitch;          // from one pixel to the next
    const float* bias;  // or null
    bool relu;
};

// The epilogue on the registers: y = act(sums + bias + residual).
template <class T, class Of, int M0, int M1>
void tile_to(const TileInput& in, const float* a0, const float* a1, const float* w, const TileOutput<T>& out) {
    vf s[M0 + M1][2];
    accumulate<Of, M0, M1, kBlock, kStep, true>(in, a0, a1, w, s);
    const vf none = vf{} - __builtin_inff();
    const vf floor = out.relu ? vf{} : none;
    const vf b0 = out.bias ? load(out.bias) : vf{}, b1 = out.bias ? load(out.bias + L) : vf{};
#pragma GCC unroll unrolled(14)
    for (int i = 0; i < M0 + M1; ++i) {
        T* const y = i < M0 ? out.y0 + i * out.pitch : out.y1 + (i - M0) * out.pitch;
        vf v0 = s[i][0] + b0, v1 = s[i][1] + b1;
        if (out.r0) {
            const T* const r = i < M0 ? out.r0 + i * out.pitch : out.r1 + (i - M0) * out.pitch;
            v0 += load(r), v1 += load(r + L);
        }
        Of::store(y, at_least(v0, floor), at_least(v1, floor));
    }
}

using TileFunction = void (*)(const TileInput&, const float*, const float*, const float*, float*, i64);

// tiles_of(pixels of the first row, of the second: none or as many).
template <class Of, int... M>
struct Tiles {
    static TileFunction one(i64 m) {
        static constexpr TileFunction f[] = {tile<Of, M + 1, 0>...};
        return f[m - 1];
    }
    // That fetch what is expected.
    static TileFunction expecting(i64 m) {
        static constexpr TileFunction f[] = {tile<Of, M + 1, 0, kBlock, kStep, true>...};
        return f[m - 1];
    }
    // Of pixels of kPitch channels that are not padded to a block; widths are multiples of kUnroll.
    template <int kPitch, int kUnroll>
    static TileFunction dense(i64 m) {
        static constexpr TileFunction f[] = {tile<Of, M + 1, 0, kPitch, kUnroll>...};
        return f[m - 1];
    }
    using Kept = void (*)(const TileInput&, const float*, const float*, const vf (&)[2], u16*, i64);
    template <int kPitch, int kUnroll>
    static Kept kept(i64 m) {
        static constexpr Kept f[] = {tile_kept<Of, M + 1, kPitch, kUnroll>...};
        return f[m - 1];
    }
    template <class T>
    using To = void (*)(const TileInput&, const float*, const float*, const float*, const TileOutput<T>&);
    template <class T>
    static To<T> one_to(i64 m) {
        static constexpr To<T> f[] = {tile_to<T, Of, M + 1, 0>...};
        return f[m - 1];
    }
    template <class T>
    static To<T> two_to(i64 m) {
        static constexpr To<T> f[] = {
            (M < kWide ? tile_to < T, Of, M < kWide ? M + 1 : 1, M < kWide ? M + 1 : 0 > : nullptr)...};
        return f[m - 1];
    }
    static TileFunction two(i64 m) {
        static constexpr TileFunction f[] = {
            (M < kWide ? tile < Of, M < kWide ? M + 1 : 1, M < kWide ? M + 1 : 0 > : nullptr)...};
        return f[m - 1];
    }
};
#if FASTRES_WIDTH == 16
template <class Of>
using TilesOf = Tiles<Of, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13>;
#else
template <class Of>
using TilesOf = Tiles<Of, 0, 1, 2, 3, 4, 5>;
#endif
using AllTiles = TilesOf<Floats>;

}  // namespace
}  // namespace FASTRES_BACKEND
