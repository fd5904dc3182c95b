// A whole bottleneck in evaluation: relu(conv3(relu(conv2(relu(conv1(x) + b1)) + b2)) + b3 + shortcut), one kernel.
//
// A block of threads takes tiles of 14 x 14 output pixels, one after the other. conv1 is computed on the tile and a
// halo of one pixel, 16 x 16, and stays in shared memory; there a tap of the 3x3 is a constant offset. What conv2 gives
// stays in registers, where it is already laid out as conv3's left operand. x, the residual and the output go between
// global memory and registers 16 bytes a lane. All weights come through one stream of chunks, read again from L2 for
// every tile; the stream runs on from tile to tile.
#pragma once
#include "taps.cuh"

namespace FASTRES_BACKEND {

constexpr int kTile = 14, kHalo = kTile + 2;  // 56 = 4 * 14, 28 = 2 * 14
constexpr int kHaloPixels = kHalo * kHalo;
constexpr int kRowsPerWarp = 2;  // of pixels: a row of the halo is the 16 rows of one product
constexpr int kStages = 3;

static_assert(kHaloPixels == kWarps * kRowsPerWarp * 16);

struct BottleneckShape {
    int H, W, C, K;               // x [N, H, W, C], out [N, H, W, K]
    int tiles_h, tiles_w, tiles;  // of an image, of all
    int chunks;                   // of weights
};

template <int kMid>
constexpr int kBlocksEach = kMid == 64 ? 2 : 1;  // on a multiprocessor

template <int kMid>
constexpr i64 kSharedBytes = (kHaloPixels * kPitch<kMid> + kStages * kChunkUnits) * i64{16};

DEVICE TilePlace place_of(const BottleneckShape& s, int tile) {
    const int row = tile / s.tiles_w;
    TilePlace at;
    at.image = row / s.tiles_h;
    at.w0 = (tile - row * s.tiles_w) * kTile;
    at.h0 = (row - at.image * s.tiles_h) * kTile;
    return at;
}

// Whether this warp has a row of the output.
DEVICE bool has_output(const BottleneckShape& s, const TilePlace& at, int warp) {
    const int row = kRowsPerWarp * warp;
    return row < kTile && at.h0 + row < s.H;
}

// Image `at.image` of so many channels, at this lane's share of each kBlock of them.
template <int kBlock, class T>
DEVICE T* image_of(const BottleneckShape& s, T* t, const TilePlace& at, int channels, int lane) {
    return t + (static_cast<i64>(at.image) * s.H * s.W * channels + lane % 4 * (kBlock / 4));
}

// The pixels of this lane in row `h` of the image, columns w0 + lane/4 and 8 more; `columns` of them count.
DEVICE PixelPair pixels(const BottleneckShape& s, int h, int w0, int columns, int lane) {
    PixelPair pair;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int column = lane / 4 + 8 * e, w = w0 + column;
        const bool there = h >= 0 && h < s.H && w >= 0 && w < s.W && column < columns;
        pair.p[e] = there ? h * s.W + w : -1;
    }
    return pair;
}

// conv1 on the halo, into the first kHaloPixels * kPitch of shared memory; zero outside of the image.
template <class T, int kMid, class S, class W>
DEVICE void conv1(const BottleneckShape& s, const T* x, const float* bias, const TilePlace& at, S shared, W& weights) {
    constexpr int kTiles = kMid / 8, kSteps = 256 / kMid;  // of 16 channels in a chunk
    const int thread = afresh(thread_index()), warp = thread / kWarp, lane = thread % kWarp;
    PixelPair from[kRowsPerWarp];
    u32 ahead[kRowsPerWarp][4];
    x = image_of<16>(s, x, at, s.C, lane);
    Sums<kRowsPerWarp, kTiles> d;
    clear(d);
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i) {
        from[i] = pixels(s, at.h0 - 1 + kRowsPerWarp * warp + i, at.w0 - 1, kHalo, lane);
        load_operand(ahead[i], x, from[i], s.C, 0);
    }
#pragma unroll 1
    for (int c = 0; c < s.C;) {
        const int stage = weights.take() + lane;
#pragma unroll 1  // unrolled, more steps of x are loaded ahead than there are registers for
        for (int k = 0; k < kSteps; ++k) {
            c += 16;
            u32 a[kRowsPerWarp][4];
#pragma unroll
            for (int i = 0; i < kRowsPerWarp; ++i) {
#pragma unroll
                for (int e = 0; e < 4; ++e) a[i][e] = ahead[i][e];
                load_operand(ahead[i], x, from[i], s.C, c);
            }
            step<T, kRowsPerWarp, kTiles>(d, a, shared, stage + k * kTiles / 2 * kFragmentUnits);
        }
    }
#pragma unroll
    for (int group = 0; group < kMid / 32; ++group) {
        float b[kVec];
        load_bias(b, bias + 32 * group + lane % 4 * kVec);
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                Word4 packed = activated<T, kTiles>(d[i], 4 * group, e, b);
                if (from[i].p[e] < 0) packed = Word4{{0, 0, 0, 0}};  // padding is zero after the bias
                const int pixel = (kRowsPerWarp * warp + i) * kHalo + lane / 4 + 8 * e;
                store_shared16(shared, pixel * kPitch<kMid> + 4 * group + lane % 4, packed);
            }
        }
    }
}

// conv2 from shared memory into registers: y2[k step][row][4], the left operand of conv3.
template <class T, int kMid, class S, class W>
DEVICE void conv2(const BottleneckShape& s, const float* bias, const TilePlace& at, S shared, W& weights,
                  u32 (&y2)[kMid / 16][kRowsPerWarp][4]) {
    const int thread = afresh(thread_index()), warp = thread / kWarp, lane = thread % kWarp;
    // A product has 16 rows, the tile 14 columns: the last two lanes' rows repeat the 14th and are dropped.
    const int pixel = kRowsPerWarp * warp * kHalo + least(lane % 16, kTile - 1);
    int unit[kRowsPerWarp];
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i) unit[i] = (pixel + i * kHalo) * kPitch<kMid> + lane / 16;
    Sums<kRowsPerWarp, kMid / 8> d;
    taps<T, kMid>(d, unit, kHalo * kPitch<kMid>, has_output(s, at, warp), shared, weights);
    operand_of<T, kMid>(y2, d, bias);
}

// conv3, shortcut and output, 32 channels at a time.
template <class T, int kMid, bool kProjected, class S, class W>
DEVICE void conv3(const BottleneckShape& s, const T* x, const float* bias, const TilePlace& at, S shared, W& weights,
                  const u32 (&y2)[kMid / 16][kRowsPerWarp][4], T* out) {
    constexpr int kSteps = kMid / 16;
    // With 128 channels inside, conv3's part of 32 channels fills a chunk; the projection's follow in chunks of their
    // own, each of 128 channels of x, the last one filled up with zeros.
    constexpr bool kApart = kProjected && kMid == 128;
    constexpr int kFragments = 2 * kSteps * (kProjected && !kApart ? 2 : 1);
    constexpr int kGroups = kChunkFragments / kFragments;  // of 32 channels in a chunk
    static_assert(kGroups * kFragments == kChunkFragments);
    const int thread = afresh(thread_index()), warp = thread / kWarp, lane = thread % kWarp;
    const bool active = has_output(s, at, warp);
    PixelPair pixel[kRowsPerWarp];
    x = image_of<kProjected ? 16 : 32>(s, x, at, s.C, lane);
    out = image_of<32>(s, out, at, s.K, lane);
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i) pixel[i] = pixels(s, at.h0 + kRowsPerWarp * warp + i, at.w0, kTile, lane);
#pragma unroll 1
    for (int channel = 0; channel < s.K;) {
        const int stage = weights.take() + lane;
        if (!active) {
            channel += 32 * kGroups;
            if constexpr (kApart) {
                for (int c = 0; c < s.C; c += kMid) weights.take();
            }
            continue;
        }
#pragma unroll 1
        for (int group = 0; group < kGroups; ++group, channel += 32) {
            Word4 residual[kRowsPerWarp][2];
            if constexpr (!kProjected) {
#pragma unroll
                for (int i = 0; i < kRowsPerWarp; ++i) load_pixels(residual[i], x, pixel[i], s.C, channel);
            }
            Sums<kRowsPerWarp, 4> z;
            clear(z);
            const int first = stage + group * kFragments * kFragmentUnits;
#pragma unroll
            for (int k = 0; k < kSteps; ++k) {
                step<T, kRowsPerWarp, 4>(z, y2[k], shared, first + 2 * k * kFragmentUnits);
            }
            if constexpr (kApart) {
#pragma unroll 1
                for (int c = 0; c < s.C; c += kMid) {
                    const int beside = weights.take() + lane;
#pragma unroll 1
                    for (int k = 0; k < kSteps; ++k) {  // x from L1
                        u32 a[kRowsPerWarp][4];
#pragma unroll
                        for (int i = 0; i < kRowsPerWarp; ++i) load_operand(a[i], x, pixel[i], s.C, c + 16 * k);
                        step<T, kRowsPerWarp, 4>(z, a, shared, beside + 2 * k * kFragmentUnits);
                    }
                }
            } else if constexpr (kProjected) {
#pragma unroll 1
                for (int k = 0; k < kSteps; ++k) {  // x from L1
                    u32 a[kRowsPerWarp][4];
#pragma unroll
                    for (int i = 0; i < kRowsPerWarp; ++i) load_operand(a[i], x, pixel[i], s.C, 16 * k);
                    step<T, kRowsPerWarp, 4>(z, a, shared, first + 2 * (kSteps + k) * kFragmentUnits);
                }
            }
            float b[kVec];
            load_bias(b, bias + channel + lane % 4 * kVec);
#pragma unroll
            for (int i = 0; i < kRowsPerWarp; ++i) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    Word4 packed;
                    if constexpr (kProjected) {
                        packed = activated<T, 4>(z[i], 0, e, b);
                    } else {
                        packed = activated<T, 4>(z[i], 0, e, b, residual[i][e]);
                    }
                    if (pixel[i].p[e] >= 0) store16(at_pixel(out, pixel[i].p[e], s.K, channel), packed);
                }
            }
        }
    }
}

// bias: b1 [kMid], b2 [kMid], b3 [K], the projection's added to b3.
template <class T, int kMid, bool kProjected>
KERNEL(kFits128Registers ? kBlocksEach<kMid> : 1)
bottleneck_eval_kernel(BottleneckShape s, const T* x, const void* packed, const float* bias, T* out) {
    DYNAMIC_SHARED(Word4, shared);
    const int first = static_cast<int>(block_x()), stride = static_cast<int>(grid_x());
    Stream<kStages, decltype(shared)> weights(shared, kHaloPixels * kPitch<kMid>, packed, s.chunks);
    for (int tile = first; tile < s.tiles; tile += stride) {
        conv1<T, kMid>(s, x, bias, place_of(s, tile), shared, weights);
        u32 y2[kMid / 16][kRowsPerWarp][4];
        conv2<T, kMid>(s, bias + kMid, place_of(s, afresh(tile)), shared, weights, y2);
        conv3<T, kMid, kProjected>(s, x, bias + 2 * kMid, place_of(s, afresh(tile)), shared, weights, y2, out);
    }
    weights.finish();
}

}  // namespace FASTRES_BACKEND
