// A 3x3 convolution of an image tile that lies in shared memory, and what comes before and after it in one kernel.
#pragma once
#include "fragments.cuh"

namespace FASTRES_BACKEND {

// Word4s from pixel to pixel. One more than the channels take: eight pixels in a row, from any pixel on, lie in
// distinct banks.
template <int kMid>
constexpr int kPitch = kMid / kVec + 1;

struct TilePlace {
    int image, h0, w0;
};

template <int kRows, int kTiles>
DEVICE void clear(Sums<kRows, kTiles>& d) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) d[i][j][e] = 0;
        }
    }
}

// Eight channels of row `h` (0, 1) out of four tiles of columns: with their bias, rounded after the ReLU.
template <class T, int kTiles>
DEVICE Word4 activated(const float (&d)[kTiles][4], int first, int h, const float (&b)[kVec]) {
    float y[kVec];
    row_of<kTiles>(y, d, first, h);
#pragma unroll
    for (int j = 0; j < kVec; ++j) y[j] += b[j];
    return relu_pack<T>(y);
}

// The same with eight channels of a residual.
template <class T, int kTiles>
DEVICE Word4 activated(const float (&d)[kTiles][4], int first, int h, const float (&b)[kVec], const Word4& residual) {
    float y[kVec], r[kVec];
    row_of<kTiles>(y, d, first, h);
    unpack(Pack<T>{{residual.w[0], residual.w[1], residual.w[2], residual.w[3]}}, r);
#pragma unroll
    for (int j = 0; j < kVec; ++j) y[j] = y[j] + b[j] + r[j];
    return relu_pack<T>(y);
}

// d = the sums of the 3x3, kMid channels to kMid. `unit[i]`: the Word4 of this lane's row of product i at tap (0, 0),
// its half of 16 channels included; `row`: Word4s from a row of the image to the next. All threads take the weights,
// those of an active warp multiply.
template <class T, int kMid, int kRows, class S, class W>
DEVICE void taps(Sums<kRows, kMid / 8>& d, const int (&unit)[kRows], int row, bool active, S shared, W& weights) {
    constexpr int kTiles = kMid / 8, kParts = kMid * kMid / 4096, kSteps = 256 / kMid;  // chunks of a tap, their steps
    const int lane = thread_index() % kWarp;
    clear(d);
#pragma unroll 1
    for (int r = 0; r < 3; ++r) {
#pragma unroll 1
        for (int t = 0; t < 3; ++t) {
            const int tap = r * row + t * kPitch<kMid>;
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const int stage = weights.take() + lane;
                if (!active) continue;
#pragma unroll
                for (int k = 0; k < kSteps; ++k) {
                    u32 a[kRows][4];
#pragma unroll
                    for (int i = 0; i < kRows; ++i) {
                        load_matrix<4, false>(a[i], shared, unit[i] + tap + 2 * (part * kSteps + k));
                    }
                    step<T, kRows, kTiles>(d, a, shared, stage + k * kTiles / 2 * kFragmentUnits);
                }
            }
        }
    }
}

// relu(d + bias) as the left operand of the next product: y[k step][row][4].
template <class T, int kMid, int kRows>
DEVICE void operand_of(u32 (&y)[kMid / 16][kRows][4], const Sums<kRows, kMid / 8>& d, const float* bias) {
    const int lane = thread_index() % kWarp;
#pragma unroll
    for (int j = 0; j < kMid / 8; ++j) {
        const Word2 b = load8_or_zero(bias + 8 * j + lane % 4 * 2, true);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                y[j / 2][i][j % 2 * 2 + e] =
                    pack2<T>(relu(d[i][j][2 * e] + bits_float(b.w[0])), relu(d[i][j][2 * e + 1] + bits_float(b.w[1])));
            }
        }
    }
}

}  // namespace FASTRES_BACKEND
