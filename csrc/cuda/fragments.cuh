// Tiles of tensor-core operands: packed weights that stream through shared memory, and rows of pixels in registers.
#pragma once
#include "vec.cuh"

namespace FASTRES_BACKEND {

// ---- weights, packed in the order in which they are multiplied (fastres/backends/fragments.py)
//
// A fragment is B[16][16] of one product, as 32 lanes x 16 bytes: a lane's two registers of the left eight columns,
// then those of the right. A chunk is what one stage of the pipeline holds.

constexpr int kFragmentUnits = 32;  // Word4s
constexpr int kChunkFragments = 16;
constexpr int kChunkUnits = kChunkFragments * kFragmentUnits;

// A cyclic stream of chunks through kStages buffers, each chunk copied by all threads of the block. It runs ahead of
// what is taken: whoever made it must finish() it.
template <int kStages, class S>
class Stream {
  public:
    // `base`: its place in `shared`, in Word4s. `chunks`: of one round.
    DEVICE Stream(S shared, int base, const void* source, int chunks)
        : shared_(shared), base_(base), source_(static_cast<const Word4*>(source)), chunks_(chunks) {
#pragma unroll
        for (int i = 0; i < kStages - 1; ++i) issue(i);
    }

    // The next chunk, for every thread of the block: its first Word4. The one taken before is given up, and what was
    // written to shared memory before is seen by all.
    DEVICE int take() {
        copy_async_wait<kStages - 2>();
        sync_block();
        const int stage = stage_;
        issue(stage == 0 ? kStages - 1 : stage - 1);  // the one given up
        stage_ = stage + 1 == kStages ? 0 : stage + 1;
        return base_ + stage * kChunkUnits;
    }

    DEVICE void finish() { copy_async_wait<0>(); }

  private:
    DEVICE void issue(int stage) {
#pragma unroll
        for (int first = 0; first < kChunkUnits; first += kThreads) {
            const int i = first + afresh(thread_index());
            copy_async16(shared_, base_ + stage * kChunkUnits + i, source_ + next_ * kChunkUnits + i);
        }
        copy_async_commit();
        next_ = next_ + 1 == chunks_ ? 0 : next_ + 1;
    }

    S shared_;
    int base_;
    const Word4* source_;
    int chunks_, next_ = 0, stage_ = 0;
};

// ---- products: kRows tiles of 16 rows by kTiles tiles of 8 columns

template <int kRows, int kTiles>
using Sums = float[kRows][kTiles][4];

// One step of 16 along k: `fragment` is the Word4 where this lane's share of the fragments of all columns begins.
template <class T, int kRows, int kTiles, class S>
DEVICE void step(Sums<kRows, kTiles>& d, const u32 (&a)[kRows][4], S shared, int fragment) {
#pragma unroll
    for (int f = 0; f < kTiles / 2; ++f) {
        const Word4 b = load_shared16(shared, fragment + f * kFragmentUnits);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            multiply_add<T>(d[i][2 * f], a[i], b.w[0], b.w[1]);
            multiply_add<T>(d[i][2 * f + 1], a[i], b.w[2], b.w[3]);
        }
    }
}

// ---- rows of pixels: 32 channels by four lanes, 16 bytes each (16 channels, 8 bytes each, for an operand). The
// packing of the weights accounts for the order in which these channels become columns or steps along k, so that no
// lane needs its neighbour's.

// Rows `lane / 4` and 8 more of a 16-row tile: pixels of the image, or -1 for one that is not there.
struct PixelPair {
    int p[2];
};

// Channels [channel, channel + 8) of a pixel, in an image of so many channels.
template <class T>
DEVICE T* at_pixel(T* image, int pixel, int channels, int channel) {
    return image + (static_cast<i64>(pixel) * channels + channel);
}

// Zeros where no pixel is. `image` is that of this lane, eight channels of each 32.
template <class T>
DEVICE void load_pixels(Word4 (&v)[2], const T* image, const PixelPair& at, int channels, int channel) {
#pragma unroll
    for (int h = 0; h < 2; ++h) v[h] = load16_or_zero(at_pixel(image, at.p[h], channels, channel), at.p[h] >= 0);
}

// The left operand for 16 channels; zeros where no pixel or no such channel is. `image` is that of this lane, four
// channels of each 16.
template <class T>
DEVICE void load_operand(u32 (&a)[4], const T* image, const PixelPair& at, int channels, int channel) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const bool there = at.p[h] >= 0 && channel < channels;
        const Word2 v = load8_or_zero(at_pixel(image, at.p[h], channels, channel), there);
        a[h] = v.w[0];
        a[2 + h] = v.w[1];
    }
}

// Eight channels of row `h` (0, 1) out of four tiles of columns.
template <int kTiles>
DEVICE void row_of(float (&v)[kVec], const float (&d)[kTiles][4], int first, int h) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        v[2 * j] = d[first + j][2 * h];
        v[2 * j + 1] = d[first + j][2 * h + 1];
    }
}

// Eight channels. Loaded where they are needed: not before, as there are no registers to keep them.
DEVICE void load_bias(float (&b)[kVec], const float* bias) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Word4 v = load16_or_zero(bias + 4 * half, true);
#pragma unroll
        for (int j = 0; j < 4; ++j) b[4 * half + j] = bits_float(v.w[j]);
    }
}

// A NaN passes, as in PyTorch.
DEVICE float relu(float v) { return v <= 0.0f ? 0.0f : v; }

// Rounded to T, after a ReLU.
template <class T>
DEVICE Word4 relu_pack(float (&v)[kVec]) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) v[j] = relu(v[j]);
    const Pack<T> p = pack<T>(v);
    return {{p.w[0], p.w[1], p.w[2], p.w[3]}};
}

template <class T>
DEVICE u32 pack2(float lo, float hi) {
    if constexpr (std::is_same_v<T, bf16>) {
        return pack_bf16(lo, hi);
    } else {
        return pack_f16(lo, hi);
    }
}

}  // namespace FASTRES_BACKEND
