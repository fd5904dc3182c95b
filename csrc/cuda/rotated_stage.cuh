// The rotated unit of a stage of bottlenecks, in evaluation: from one block's 3x3 to the next block's first 1x1.
//
//     out = relu(conv3(relu(conv2(h) + b2)) + b3 + residual),  next = relu(conv1'(out) + b1')
//
// The halo lies on the narrow tensor h, so that no product is computed twice, and out meets conv1' in registers. A
// block of threads takes tiles of tile_h x tile_w output pixels, one after the other. h with a halo of one pixel lies
// in shared memory, where a tap of the 3x3 is a constant offset; it is copied there while the tile before is in conv3
// and conv1'. What a product gives is laid out in registers as the next one's left operand. The residual and out go
// between global memory and registers 16 bytes a lane. All weights come through one stream of chunks, read again from
// L2 for every tile; the stream runs on from tile to tile.
#pragma once
#include "taps.cuh"

namespace FASTRES_BACKEND {

constexpr int kRotatedStages = 3;

// Of 16 pixels each, a warp's share of a tile.
template <int kMid>
constexpr int kRowTiles = kMid == 64 ? 2 : 1;

template <int kMid>
constexpr int kTilePixels = kWarps * kRowTiles<kMid> * 16;  // at most

// At most: what 8 x 32 and 4 x 32 pixels need, or 32 x 8.
template <int kMid>
constexpr int kTileHalo = kMid == 64 ? 10 * 34 : 6 * 34;

template <int kMid>
constexpr i64 kRotatedShared = (kTileHalo<kMid> * kPitch<kMid> + kRotatedStages * kChunkUnits) * i64{16};

struct RotatedShape {
    int H, W, K;                  // h and next [N, H, W, kMid], residual and out [N, H, W, K]
    int tile_h, tile_w;           // tile_w a multiple of 8: eight rows of a matrix are eight pixels in a row
    int tiles_h, tiles_w, tiles;  // of an image, of all
    int chunks;                   // of weights
};

DEVICE TilePlace place_of(const RotatedShape& s, int tile) {
    const int row = tile / s.tiles_w;
    TilePlace at;
    at.image = row / s.tiles_h;
    at.w0 = (tile - row * s.tiles_w) * s.tile_w;
    at.h0 = (row - at.image * s.tiles_h) * s.tile_h;
    return at;
}

// Image `at.image` of so many channels.
template <class T>
DEVICE T* image_at(const RotatedShape& s, T* t, const TilePlace& at, int channels) {
    return t + static_cast<i64>(at.image) * s.H * s.W * channels;
}

// The first pixel of this warp in the tile.
template <int kMid>
DEVICE int first_pixel() {
    return afresh(thread_index()) / kWarp * (kRowTiles<kMid> * 16);
}

// Whether this warp has a row of the output.
template <int kMid>
DEVICE bool has_output(const RotatedShape& s, const TilePlace& at) {
    const int row = first_pixel<kMid>() / s.tile_w;
    return row < s.tile_h && at.h0 + row < s.H;
}

// The pixels of this lane in product `i`: lane/4 and 8 more.
template <int kMid>
DEVICE PixelPair pixels(const RotatedShape& s, const TilePlace& at, int i) {
    PixelPair pair;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int p = first_pixel<kMid>() + 16 * i + 8 * e + thread_index() % kWarp / 4, row = p / s.tile_w;
        const int h = at.h0 + row, w = at.w0 + p - row * s.tile_w;
        pair.p[e] = row < s.tile_h && h < s.H && w < s.W ? h * s.W + w : -1;
    }
    return pair;
}

// Word4s of the halo tile in shared memory that come from global memory.
template <int kMid>
DEVICE int halo_units(const RotatedShape& s) {
    return (s.tile_h + 2) * (s.tile_w + 2) * (kMid / kVec);
}

// Word4s [first, last) of h at a tile with its halo, zeros outside of the image; to be committed and waited for.
template <int kMid, class T, class S>
DEVICE void load_halo(const RotatedShape& s, const T* h, int tile, S shared, int first, int last) {
    constexpr int kUnits = kMid / kVec;
    const TilePlace at = place_of(s, tile);
    h = image_at(s, h, at, kMid);
#pragma unroll 1
    for (int i = first + afresh(thread_index()); i < last; i += kThreads) {
        const int pixel = i / kUnits, unit = i % kUnits, row = pixel / (s.tile_w + 2);
        const int y = at.h0 - 1 + row, x = at.w0 - 1 + pixel - row * (s.tile_w + 2);
        const bool there = y >= 0 && y < s.H && x >= 0 && x < s.W;
        copy_async16_or_zero(shared, pixel * kPitch<kMid> + unit,
                             at_pixel(h, there ? y * s.W + x : 0, kMid, unit * kVec), there);
    }
}

// conv2 from shared memory into registers, the left operand of conv3.
template <class T, int kMid, class S, class W>
DEVICE void middle(const RotatedShape& s, const float* bias, const TilePlace& at, S shared, W& weights,
                   u32 (&y2)[kMid / 16][kRowTiles<kMid>][4]) {
    constexpr int kRows = kRowTiles<kMid>;
    const int lane = thread_index() % kWarp, width = s.tile_w + 2;
    int unit[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        int p = first_pixel<kMid>() + 16 * i + lane % 16;
        if (p >= s.tile_h * s.tile_w) p = lane % 8;  // of no tile: any pixels, in distinct banks
        const int row = p / s.tile_w;
        unit[i] = (row * width + p - row * s.tile_w) * kPitch<kMid> + lane / 16;
    }
    Sums<kRows, kMid / 8> d;
    taps<T, kMid>(d, unit, width * kPitch<kMid>, has_output<kMid>(s, at), shared, weights);
    operand_of<T, kMid>(y2, d, bias);
}

// Eight channels of a residual for each pixel of this lane; zeros where no pixel or no such channel is.
template <int kRows, class T>
DEVICE void load_residual(Word4 (&r)[kRows][2], const T* residual, const PixelPair (&pixel)[kRows], int channels,
                          int channel) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int p = pixel[i].p[e];
            r[i][e] = load16_or_zero(at_pixel(residual, p, channels, channel), p >= 0 && channel < channels);
        }
    }
}

// conv3, residual and out, 32 channels at a time (their residual loaded one time before), each time with the part of
// conv1' that these channels are. Meanwhile the halo of tile `later` comes in, if there is one.
template <class T, int kMid, bool kNext, class S, class W>
DEVICE void expand(const RotatedShape& s, const T* h, const T* residual, const float* bias, const TilePlace& at,
                   int later, S shared, W& weights, const u32 (&y2)[kMid / 16][kRowTiles<kMid>][4], T* out, T* next) {
    constexpr int kRows = kRowTiles<kMid>, kSteps = kMid / 16, kTiles = kMid / 8;
    constexpr int kPart = kMid / 8;  // fragments of conv3 for 32 channels, and of conv1' from as many
    constexpr int kParts = kChunkFragments / kPart;
    constexpr int kGroups = kNext ? 1 : kParts;  // of 32 channels in a chunk
    const int lane = thread_index() % kWarp;
    const bool active = has_output<kMid>(s, at);
    PixelPair pixel[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) pixel[i] = pixels<kMid>(s, at, i);
    residual = image_at(s, residual, at, s.K) + lane % 4 * kVec;
    out = image_at(s, out, at, s.K) + lane % 4 * kVec;
    const int units = later < s.tiles ? halo_units<kMid>(s) : 0;
    const int share = static_cast<int>(ceil_div(ceil_div(units, s.K / (32 * kGroups)), kThreads)) * kThreads;
    int loaded = 0;
    Word4 ahead[kRows][2];
    load_residual(ahead, residual, pixel, s.K, 0);
    Sums<kRows, kTiles> d;
    if constexpr (kNext) clear(d);
#pragma unroll 1
    for (int channel = 0; channel < s.K;) {
        int stage = weights.take() + lane;
        if (loaded < units) {  // conv2 is done in all warps: the halo's place is free
            load_halo<kMid>(s, h, later, shared, loaded, least(loaded + share, units));
            loaded += share;
        }
#pragma unroll 1
        for (int group = 0; group < kGroups; ++group, channel += 32) {
            u32 a[2][kRows][4];
            if (active) {
                Word4 r[kRows][2];
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    r[i][0] = ahead[i][0];
                    r[i][1] = ahead[i][1];
                }
                load_residual(ahead, residual, pixel, s.K, channel + 32);
                Sums<kRows, 4> z;
                clear(z);
#pragma unroll
                for (int k = 0; k < kSteps; ++k) {
                    step<T, kRows, 4>(z, y2[k], shared, stage + (group * kPart + 2 * k) * kFragmentUnits);
                }
                float b[kVec];
                load_bias(b, bias + channel + lane % 4 * kVec);
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const Word4 packed = activated<T, 4>(z[i], 0, e, b, r[i][e]);
                        if (pixel[i].p[e] >= 0) store16(at_pixel(out, pixel[i].p[e], s.K, channel), packed);
#pragma unroll
                        for (int j = 0; j < 4; ++j) a[j / 2][i][j % 2 * 2 + e] = packed.w[j];
                    }
                }
            }
            if constexpr (kNext) {
                stage = kParts == 1 ? weights.take() + lane : stage + kPart * kFragmentUnits;
                if (active) {
#pragma unroll
                    for (int k = 0; k < 2; ++k) {
                        step<T, kRows, kTiles>(d, a[k], shared, stage + k * kTiles / 2 * kFragmentUnits);
                    }
                }
            }
        }
    }
    if constexpr (kNext) {
        next = image_at(s, next, at, kMid) + lane % 4 * kVec;
#pragma unroll
        for (int group = 0; group < kMid / 32; ++group) {
            float b[kVec];
            load_bias(b, bias + s.K + 32 * group + lane % 4 * kVec);
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const Word4 packed = activated<T, kTiles>(d[i], 4 * group, e, b);
                    if (pixel[i].p[e] >= 0) store16(at_pixel(next, pixel[i].p[e], kMid, 32 * group), packed);
                }
            }
        }
    }
}

// bias: b2 [kMid], b3 [K], b1' [kMid].
template <class T, int kMid, bool kNext>
KERNEL(1)
rotated_stage_kernel(RotatedShape s, const T* h, const T* residual, const void* packed, const float* bias, T* out,
                     T* next) {
    DYNAMIC_SHARED(Word4, shared);
    const int first = static_cast<int>(block_x()), stride = static_cast<int>(grid_x());
    load_halo<kMid>(s, h, first, shared, 0, halo_units<kMid>(s));
    Stream<kRotatedStages, decltype(shared)> weights(shared, kTileHalo<kMid> * kPitch<kMid>, packed, s.chunks);
    for (int tile = first; tile < s.tiles; tile += stride) {
        copy_async_commit();   // what the last chunk left of the halo
        copy_async_wait<0>();  // the stream's next barrier shows it to all
        u32 y2[kMid / 16][kRowTiles<kMid>][4];
        middle<T, kMid>(s, bias, place_of(s, tile), shared, weights, y2);
        expand<T, kMid, kNext>(s, h, residual, bias + kMid, place_of(s, afresh(tile)), tile + stride, shared, weights,
                               y2, out, next);
    }
    weights.finish();
}

}  // namespace FASTRES_BACKEND
