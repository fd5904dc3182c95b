// The stem in evaluation: max pooling (3x3, stride 2, padding 1) of relu(conv(x) + b), conv 7x7 with stride 2 and
// padding 3 from 3 channels to 64, one kernel.
//
// A block of threads takes tiles of 7 x 7 pooled pixels, that is 15 x 15 of the convolution, one after the other. Their
// part of the image lies in shared memory as rows of (column, channel): there the 7 x 3 elements that a row of the
// filter meets follow each other, at six elements a pixel of the convolution, so they are the left operand as they lie
// (no im2col). 24 are read, the last three masked: weights of zero would let a NaN pass. The weights stay in shared
// memory. What the convolution gives is pooled there.
#pragma once
#include "bottleneck_eval.cuh"

namespace FASTRES_BACKEND {

constexpr int kPooled = 7;              // 56 = 8 * 7
constexpr int kConv = 2 * kPooled + 1;  // a side of the tile of the convolution
constexpr int kPatch = 2 * kConv + 5;   // of the image
constexpr int kStemOutputs = 64, kStemTiles = kStemOutputs / 8;
constexpr int kFilter = 7, kColours = 3;
constexpr int kRowGroups = 3;  // of eight elements along k, in a row of the filter
constexpr int kStemSteps = (kFilter * kRowGroups + 1) / 2;
constexpr int kPatchWords = (2 * kColours * (kConv - 1) + kRowGroups * 8) / 2;  // of a row
// Word4s of a pixel. Stores to it wait once for a bank. With eight, and the halves of every other pixel changed over,
// none does; but then nvcc 13.0 spills, in one form of it on sm_80 and sm_90a, in another on sm_100.
constexpr int kConvPitch = kStemOutputs / kVec + 1;
constexpr int kConvUnits = kConv * kConv * kConvPitch;
constexpr int kStemUnits = kStemSteps * kStemOutputs / 16 * kFragmentUnits;  // of weights
constexpr i64 kStemSharedBytes = (kConvUnits + kStemUnits) * i64{16};
constexpr int kStemBlocks = 2;  // on a multiprocessor

static_assert(kWarps * kRowsPerWarp >= kConv && kConv <= 16);

struct StemShape {
    int H, W;                     // x
    int conv_h, conv_w, P, Q;     // the convolution, out [N, P, Q, 64]
    i64 image;                    // elements from one image of x to the next,
    int channel, row, column;     // channel, row and column
    int tiles_h, tiles_w, tiles;  // of an image, of all
};

struct PooledPlace {
    int image, p0, q0;
};

DEVICE PooledPlace place_of(const StemShape& s, int tile) {
    const int row = tile / s.tiles_w;
    PooledPlace at;
    at.image = row / s.tiles_h;
    at.q0 = (tile - row * s.tiles_w) * kPooled;
    at.p0 = (row - at.image * s.tiles_h) * kPooled;
    return at;
}

// The tile's part of the image, two elements a word, zero outside. Seen by all after a barrier.
template <class T, class S>
DEVICE void load_patch(const StemShape& s, const T* x, const PooledPlace& at, S& patch) {
    x += at.image * s.image;
    // Pooled pixel p begins at row 2p - 1 of the convolution, that at row 2 * (2p - 1) - 3 of the image.
    const int h0 = 4 * at.p0 - 5, w0 = 4 * at.q0 - 5;
#pragma unroll 2
    for (int i = thread_index(); i < kPatch * kPatchWords; i += kThreads) {
        const int row = i / kPatchWords, pair = i - row * kPatchWords, h = h0 + row;
        u32 word = 0;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int element = 2 * pair + e, column = element / kColours, colour = element - column * kColours;
            const int w = w0 + column;
            const bool there = column < kPatch && h >= 0 && h < s.H && w >= 0 && w < s.W;
            const i64 offset = static_cast<i64>(h) * s.row + static_cast<i64>(w) * s.column + colour * s.channel;
            word |= load2_or_zero(x + offset, there) << (16 * e);
        }
        patch[i] = word;
    }
}

// The convolution of the tile, with bias and ReLU, into the first kConvUnits of shared memory; zero outside of its
// image, which no maximum of what a ReLU gave can notice. `weights`: where they begin.
template <class T, class S, class P>
DEVICE void stem_conv(const StemShape& s, const float* bias, const PooledPlace& at, P& patch, S shared, int weights) {
    const int thread = afresh(thread_index()), warp = thread / kWarp, lane = thread % kWarp;
    // Of the last group in a filter's row, elements 16..23: three do not belong to it.
    const u32 mask = lane % 4 < 2 ? 0xffffffffu : lane % 4 == 2 ? 0xffffu : 0u;
    int first[kRowsPerWarp][2];
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            // A product has 16 rows, and the warps have 16: the last of each repeats the 15th and is dropped.
            const int row = least(kRowsPerWarp * warp + i, kConv - 1), column = least(lane / 4 + 8 * e, kConv - 1);
            first[i][e] = 2 * row * kPatchWords + kColours * column + lane % 4;
        }
    }
    Sums<kRowsPerWarp, kStemTiles> d;
    clear(d);
#pragma unroll
    for (int step16 = 0; step16 < kStemSteps; ++step16) {
        u32 a[kRowsPerWarp][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int group = 2 * step16 + half, r = group / kRowGroups, part = group % kRowGroups;
#pragma unroll
            for (int i = 0; i < kRowsPerWarp; ++i) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    u32 word = 0;
                    if (r < kFilter) word = load_shared4(patch, first[i][e] + r * kPatchWords + 4 * part);
                    a[i][2 * half + e] = part == kRowGroups - 1 ? word & mask : word;
                }
            }
        }
        step<T, kRowsPerWarp, kStemTiles>(d, a, shared, weights + step16 * kStemTiles / 2 * kFragmentUnits + lane);
    }
#pragma unroll
    for (int group = 0; group < kStemOutputs / 32; ++group) {
        float b[kVec];
        load_bias(b, bias + 32 * group + lane % 4 * kVec);
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int row = kRowsPerWarp * warp + i, column = lane / 4 + 8 * e;
                const int h = 2 * at.p0 - 1 + row, w = 2 * at.q0 - 1 + column;
                float y[kVec];
                row_of<kStemTiles>(y, d[i], 4 * group, e);
#pragma unroll
                for (int j = 0; j < kVec; ++j) y[j] += b[j];
                Word4 packed = relu_pack<T>(y);
                if (h < 0 || h >= s.conv_h || w < 0 || w >= s.conv_w) packed = Word4{{0, 0, 0, 0}};
                if (row < kConv && column < kConv) {
                    store_shared16(shared, (row * kConv + column) * kConvPitch + 4 * group + lane % 4, packed);
                }
            }
        }
    }
}

template <class T, class S>
DEVICE void stem_pool(const StemShape& s, const PooledPlace& at, S shared, T* out) {
    constexpr int kUnits = kStemOutputs / kVec;
    for (int i = thread_index(); i < kPooled * kPooled * kUnits; i += kThreads) {
        const int pixel = i / kUnits, unit = i % kUnits, p = pixel / kPooled, q = pixel - p * kPooled;
        if (at.p0 + p >= s.P || at.q0 + q >= s.Q) continue;
        Word4 best{{0, 0, 0, 0}};
#pragma unroll
        for (int r = 0; r < 3; ++r) {
#pragma unroll
            for (int t = 0; t < 3; ++t) {
                const Word4 v = load_shared16(shared, ((2 * p + r) * kConv + 2 * q + t) * kConvPitch + unit);
                // What a ReLU gave is ordered as the numbers that its bits are, a NaN above all.
#pragma unroll
                for (int j = 0; j < 4; ++j) best.w[j] = larger_halves(best.w[j], v.w[j]);
            }
        }
        const i64 place = (static_cast<i64>(at.image) * s.P + at.p0 + p) * s.Q + at.q0 + q;
        store16(out + place * kStemOutputs + unit * kVec, best);
    }
}

template <class T>
KERNEL(kFits128Registers ? kStemBlocks : 1)
stem_eval_kernel(StemShape s, const T* x, const void* packed, const float* bias, T* out) {
    SHARED(u32, patch, kPatch * kPatchWords);
    DYNAMIC_SHARED(Word4, shared);
    const Word4* const source = static_cast<const Word4*>(packed);
    for (int i = thread_index(); i < kStemUnits; i += kThreads) copy_async16(shared, kConvUnits + i, source + i);
    copy_async_commit();
    copy_async_wait<0>();
    for (int tile = static_cast<int>(block_x()); tile < s.tiles; tile += static_cast<int>(grid_x())) {
        load_patch(s, x, place_of(s, tile), patch);
        sync_block();
        stem_conv<T>(s, bias, place_of(s, afresh(tile)), patch, shared, kConvUnits);
        sync_block();
        stem_pool(s, place_of(s, afresh(tile)), shared, out);
    }
}

}  // namespace FASTRES_BACKEND
