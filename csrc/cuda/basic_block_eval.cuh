// A whole basic block in evaluation: relu(conv2(relu(conv1(x) + b1)) + b2 + x), two 3x3 of stride 1, one kernel.
//
// Tiles, and the stream of weights, are those of bottleneck_eval.cuh: 14 x 14 output pixels, conv1 on 16 x 16, x on
// 18 x 18. x comes by asynchronous copies; what conv1 gives waits in registers until every warp has read its x, and
// then takes its place. So little shared memory is needed that two blocks share a multiprocessor, and one computes
// while the other waits for its x. In both convolutions a tap is a constant offset.
#pragma once
#include "bottleneck_eval.cuh"

namespace FASTRES_BACKEND {

constexpr int kImage = kHalo + 2;  // a side of the tile of x
constexpr int kImagePixels = kImage * kImage;

template <int kMid>
constexpr i64 kBasicSharedBytes = (kImagePixels * kPitch<kMid> + kStages * kChunkUnits) * i64{16};

// x [N, H, W, kMid] of the tile and two pixels around, zero outside of the image, into the first kImagePixels *
// kPitch of shared memory. Seen by all after a barrier.
template <class T, int kMid, class S>
DEVICE void load_image(const BottleneckShape& s, const T* x, const TilePlace& at, S shared) {
    constexpr int kUnits = kMid / kVec;
    const int thread = afresh(thread_index()), unit = thread % kUnits;
    x += static_cast<i64>(at.image) * s.H * s.W * kMid + unit * kVec;
#pragma unroll 2
    for (int pixel = thread / kUnits; pixel < kImagePixels; pixel += kThreads / kUnits) {
        const int row = pixel / kImage, h = at.h0 - 2 + row, w = at.w0 - 2 + pixel - row * kImage;
        const bool there = h >= 0 && h < s.H && w >= 0 && w < s.W;
        copy_async16_or_zero(shared, pixel * kPitch<kMid> + unit, at_pixel(x, there ? h * s.W + w : 0, kMid, 0), there);
    }
    copy_async_commit();
    copy_async_wait<0>();
}

// The 3x3 over pixels in shared memory, kWidth in a row: kRowsPerWarp rows of outputs, of which `pixel` is this lane's
// first tap.
template <class T, int kMid, int kWidth, class S, class W>
DEVICE void conv3x3(Sums<kRowsPerWarp, kMid / 8>& d, int pixel, bool active, S shared, W& weights) {
    int unit[kRowsPerWarp];
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i) {
        unit[i] = (pixel + i * kWidth) * kPitch<kMid> + thread_index() % kWarp / 16;
    }
    taps<T, kMid>(d, unit, kWidth * kPitch<kMid>, active, shared, weights);
}

// conv1 on the halo, in the place of x; zero outside of the image.
template <class T, int kMid, class S, class W>
DEVICE void first_conv(const BottleneckShape& s, const float* bias, const TilePlace& at, S shared, W& weights) {
    const int thread = afresh(thread_index()), warp = thread / kWarp, lane = thread % kWarp;
    const int row = kRowsPerWarp * warp;
    Sums<kRowsPerWarp, kMid / 8> d;
    conv3x3<T, kMid, kImage>(d, row * kImage + lane % 16, at.h0 - 1 + row < s.H, shared, weights);
    sync_block();  // x has been read
#pragma unroll
    for (int group = 0; group < kMid / 32; ++group) {
        float b[kVec];
        load_bias(b, bias + 32 * group + lane % 4 * kVec);
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i) {
            const PixelPair pixel = pixels(s, at.h0 - 1 + row + i, at.w0 - 1, kHalo, lane);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                Word4 packed = activated<T, kMid / 8>(d[i], 4 * group, e, b);
                if (pixel.p[e] < 0) packed = Word4{{0, 0, 0, 0}};  // padding is zero after the bias
                const int place = (row + i) * kHalo + lane / 4 + 8 * e;
                store_shared16(shared, place * kPitch<kMid> + 4 * group + lane % 4, packed);
            }
        }
    }
}

// conv2, shortcut and output.
template <class T, int kMid, class S, class W>
DEVICE void second_conv(const BottleneckShape& s, const T* x, const float* bias, const TilePlace& at, S shared,
                        W& weights, T* out) {
    const int thread = afresh(thread_index()), warp = thread / kWarp, lane = thread % kWarp;
    const int row = kRowsPerWarp * warp;
    const bool active = has_output(s, at, warp);
    Sums<kRowsPerWarp, kMid / 8> d;
    // A product has 16 rows, the tile 14 columns: the last two lanes' rows repeat the 14th and are dropped.
    conv3x3<T, kMid, kHalo>(d, row * kHalo + least(lane % 16, kTile - 1), active, shared, weights);
    if (!active) return;
    x = image_of<32>(s, x, at, kMid, lane);
    out = image_of<32>(s, out, at, kMid, lane);
    PixelPair pixel[kRowsPerWarp];
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i) pixel[i] = pixels(s, at.h0 + row + i, at.w0, kTile, lane);
#pragma unroll
    for (int group = 0; group < kMid / 32; ++group) {
        Word4 residual[kRowsPerWarp][2];  // from L2: in shared memory x is gone
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i) load_pixels(residual[i], x, pixel[i], kMid, 32 * group);
        float b[kVec];
        load_bias(b, bias + 32 * group + lane % 4 * kVec);
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const Word4 packed = activated<T, kMid / 8>(d[i], 4 * group, e, b, residual[i][e]);
                if (pixel[i].p[e] >= 0) store16(at_pixel(out, pixel[i].p[e], kMid, 32 * group), packed);
            }
        }
    }
}

// bias: b1 [kMid], b2 [kMid].
template <class T, int kMid>
KERNEL(kFits128Registers ? kBlocksEach<kMid> : 1)
basic_block_eval_kernel(BottleneckShape s, const T* x, const void* packed, const float* bias, T* out) {
    DYNAMIC_SHARED(Word4, shared);
    const int first = static_cast<int>(block_x()), stride = static_cast<int>(grid_x());
    Stream<kStages, decltype(shared)> weights(shared, kImagePixels * kPitch<kMid>, packed, s.chunks);
    for (int tile = first; tile < s.tiles; tile += stride) {
        sync_block();  // what conv1 gave for the tile before has been read
        load_image<T, kMid>(s, x, place_of(s, tile), shared);
        first_conv<T, kMid>(s, bias, place_of(s, afresh(tile)), shared, weights);
        second_conv<T, kMid>(s, x, bias + kMid, place_of(s, afresh(tile)), shared, weights, out);
    }
    weights.finish();
}

}  // namespace FASTRES_BACKEND
