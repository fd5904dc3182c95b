// Forward convolution as an implicit GEMM on tensor cores: out[pixels, K] = patches of x [pixels, R*S*C] * w [K,
// R*S*C]^T.
//
// A block of threads computes kBM pixels x kBN channels of one group. Steps along taps and input channels arrive
// through kStages buffers of shared memory, 16 bytes a copy; what lies in the padding, beyond the last pixel or past
// the last channel is filled with zeros on the way. The columns of a product are channels 8*i + 2*j and one more, i =
// 0..3, of each 32: so a lane ends up with eight channels in a row of each of its pixels, and the epilogue goes between
// global memory and registers 16 bytes a lane.
#pragma once
#include "fragments.cuh"

namespace FASTRES_BACKEND {

constexpr int kMaxTaps = 7;  // of an axis; the validity bits of a pixel take 8 bits an axis

struct ConvShape {
    int M;                // output pixels of all images
    int H, W, C, P, Q;    // x [N, H, W, C], out [N, P, Q, K]
    int K, CI, CO, R, S;  // channels in and out of a group; taps
    int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
    int groups, column_tiles;  // tiles of the channels of a group
    int steps;                 // R * S * ceil(CI / kBK)
    i64 tiles;                 // of pixels
};

// kWarpsM x kWarpsN warps, each with 16*kRows pixels by 32*kGroups channels.
template <int kBM_, int kBN_, int kBK_, int kStages_, int kWarpsM_>
struct ConvTile {
    static constexpr int kBM = kBM_, kBN = kBN_, kBK = kBK_, kStages = kStages_, kWarpsM = kWarpsM_;
    static constexpr int kWarpsN = kWarps / kWarpsM, kRows = kBM / kWarpsM / 16, kGroups = kBN / kWarpsN / 32;
    static constexpr int kUnits = kBK / kVec;                  // Word4s of a row of either operand
    static constexpr int kRowsAtOnce = kThreads / kUnits;      // filled by one copy of each thread
    static constexpr int kStageUnits = (kBM + kBN) * kUnits;   // pixels first
    static constexpr bool kAhead = kRows * kGroups * 16 > 64;  // sums of a thread: room for operands loaded ahead
    static constexpr int kBlocksEach = kAhead ? 1 : 2;         // on a multiprocessor

    static_assert(kUnits == 4 || kUnits == 8);
    static_assert(kRows * 16 * kWarpsM == kBM && kGroups * 32 * kWarpsN == kBN && kWarpsM * kWarpsN == kWarps);
    static_assert(kBM % kRowsAtOnce == 0 && kBN % kRowsAtOnce == 0 && kRowsAtOnce % 32 == 0);

    // The Word4 of a row of pixels: the eight rows of a matrix follow each other, and lie in distinct banks.
    DEVICE static int pixel_unit(int row, int unit) {
        return row * kUnits + (unit ^ (kUnits == 8 ? row & 7 : row >> 1 & 3));
    }
    // The Word4 of a row of weights: the eight rows of a matrix are 8*i + 2*j and one more, i = 0..3.
    DEVICE static int weight_unit(int row, int unit) {
        return row * kUnits + (unit ^ (kUnits == 8 ? (row >> 3 & 3) * 2 + (row & 1) : row >> 3 & 3));
    }
};

template <class Tile>
constexpr i64 kConvShared = i64{Tile::kStages} * Tile::kStageUnits * 16;

// Bit t: coordinate x + t*d lies within [0, size).
DEVICE u32 taps_inside(int x, int d, int size, int taps) {
    u32 bits = 0;
    for (int t = 0; t < taps; ++t) bits |= static_cast<u32>(x + t * d >= 0 && x + t * d < size) << t;
    return bits;
}

// What one thread copies: of each step the same unit of every kRowsAtOnce-th row of both operands.
template <class T, class Tile, class S>
class ConvFeed {
  public:
    DEVICE ConvFeed(const ConvShape& s, S shared, const T* x, const T* w, int m0, int group, int n0)
        : s_(s), shared_(shared) {
        const int row = thread_index() / Tile::kUnits, unit = thread_index() % Tile::kUnits;
        const int pixels = s.P * s.Q, image0 = m0 / pixels;
        x_ = x + (static_cast<i64>(image0) * s.H * s.W * s.C + group * s.CI + unit * kVec);
        left_ = s.CI - unit * kVec;
        to_pixels_ = Tile::pixel_unit(row, unit);
        to_weights_ = Tile::kBM * Tile::kUnits + Tile::weight_unit(row, unit);
#pragma unroll
        for (int i = 0; i < kPixelCopies; ++i) {
            const int m = m0 + row + i * Tile::kRowsAtOnce;
            const int image = m / pixels, p = (m - image * pixels) / s.Q, q = m - image * pixels - p * s.Q;
            const int h = p * s.stride_h - s.pad_h, v = q * s.stride_w - s.pad_w;
            offset_[i] = (((image - image0) * s.H + h) * s.W + v) * s.C;
            const u32 bits = taps_inside(h, s.dilation_h, s.H, s.R) | taps_inside(v, s.dilation_w, s.W, s.S) << 8;
            inside_[i] = m < s.M ? bits : 0u;
        }
        const int pitch = s.R * s.S * s.CI;
        w_ = w + (static_cast<i64>(group * s.CO + n0 + row) * pitch + unit * kVec);
        rows_left_ = s.CO - n0 - row;
    }

    // The next step, into the buffer `stage`.
    DEVICE void issue(int stage) {
        const int base = stage * Tile::kStageUnits;
        const bool there = c_ < left_;
        const int shift = (r_ * s_.dilation_h * s_.W + t_ * s_.dilation_w) * s_.C + c_;
#pragma unroll
        for (int i = 0; i < kPixelCopies; ++i) {
            const bool valid = there && (inside_[i] >> r_ & inside_[i] >> (8 + t_) & 1);
            copy_async16_or_zero(shared_, base + to_pixels_ + i * Tile::kRowsAtOnce * Tile::kUnits,
                                 x_ + (offset_[i] + shift), valid);
        }
        const T* const w = w_ + ((r_ * s_.S + t_) * s_.CI + c_);
#pragma unroll
        for (int i = 0; i < kWeightCopies; ++i) {
            copy_async16_or_zero(shared_, base + to_weights_ + i * Tile::kRowsAtOnce * Tile::kUnits,
                                 w + static_cast<i64>(i * Tile::kRowsAtOnce) * (s_.R * s_.S * s_.CI),
                                 there && i * Tile::kRowsAtOnce < rows_left_);
        }
        c_ += Tile::kBK;
        if (c_ >= s_.CI) {
            c_ = 0;
            if (++t_ == s_.S) {
                t_ = 0;
                ++r_;
            }
        }
    }

  private:
    static constexpr int kPixelCopies = Tile::kBM / Tile::kRowsAtOnce, kWeightCopies = Tile::kBN / Tile::kRowsAtOnce;

    const ConvShape& s_;
    S shared_;
    const T* x_;  // of the first image of the tile, at the channels of this thread
    const T* w_;
    int left_, rows_left_;  // channels of the group from this thread's on; rows of weights
    int to_pixels_, to_weights_;
    int offset_[kPixelCopies];
    u32 inside_[kPixelCopies];   // taps of a pixel within the image: rows, and columns from bit 8 on
    int r_ = 0, t_ = 0, c_ = 0;  // the next step
};

// One step: the products of the buffer that begins at Word4 `stage`.
template <class T, class Tile, class S>
DEVICE void multiply(Sums<Tile::kRows, 4 * Tile::kGroups>& d, S shared, int stage, int warp, int lane) {
    constexpr int kSteps = Tile::kBK / 16, kBuffers = Tile::kAhead ? 2 : 1;
    const int row = lane % 8, matrix = lane / 8;
    const int pixels = stage + Tile::pixel_unit(warp % Tile::kWarpsM * 16 * Tile::kRows + lane % 16, lane / 16);
    const int channel = warp / Tile::kWarpsM * 32 * Tile::kGroups + row / 2 * 8 + row % 2 + matrix / 2 * 2;
    const int weights = stage + Tile::kBM * Tile::kUnits + Tile::weight_unit(channel, matrix % 2);
    u32 a[kBuffers][Tile::kRows][4], b[kBuffers][2 * Tile::kGroups][4];
    // Units 2*k and 2*k + 1 of the rows: both placements are an exclusive or in the lowest bits.
    const auto load = [&](int k) {
        const int buffer = k % kBuffers;
#pragma unroll
        for (int i = 0; i < Tile::kRows; ++i) {
            load_matrix<4, false>(a[buffer][i], shared, (pixels ^ 2 * k) + i * 16 * Tile::kUnits);
        }
#pragma unroll
        for (int j = 0; j < 2 * Tile::kGroups; ++j) {
            load_matrix<4, false>(b[buffer][j], shared, (weights ^ 2 * k) + (j / 2 * 32 + j % 2 * 4) * Tile::kUnits);
        }
    };
    if constexpr (Tile::kAhead) load(0);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
        if (!Tile::kAhead || k + 1 < kSteps) load(Tile::kAhead ? k + 1 : k);
        const int buffer = k % kBuffers;
#pragma unroll
        for (int j = 0; j < 2 * Tile::kGroups; ++j) {
#pragma unroll
            for (int i = 0; i < Tile::kRows; ++i) {
                multiply_add<T>(d[i][2 * j], a[buffer][i], b[buffer][j][0], b[buffer][j][1]);
                multiply_add<T>(d[i][2 * j + 1], a[buffer][i], b[buffer][j][2], b[buffer][j][3]);
            }
        }
    }
}

// The pixels of a lane: row `h` (0, 1) of product i, behind the first one of its warp.
DEVICE int conv_row(int i, int h, int lane) { return 16 * i + 8 * h + lane / 4; }

// act(d + bias + residual) to memory, and into d what was written, without the ReLU. `rows`: pixels of this warp from
// `m` on; `channels`: of the group from this lane's first one, `k`, on.
template <class T, class Tile>
DEVICE void store_tile(Sums<Tile::kRows, 4 * Tile::kGroups>& d, const float* bias, const T* residual, int relu, T* out,
                       int K, i64 m, int rows, int k, int channels, int lane) {
#pragma unroll
    for (int g = 0; g < Tile::kGroups; ++g) {
        const bool there = 32 * g < channels;
        const i64 first = m * K + k + 32 * g;
        Word4 joins[Tile::kRows][2];
        if (residual) {
#pragma unroll
            for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const int row = conv_row(i, h, lane);
                    joins[i][h] = load16_or_zero(residual + (first + static_cast<i64>(row) * K), there && row < rows);
                }
            }
        }
        float b[kVec] = {};
        if (bias && there) {
#pragma unroll
            for (int j = 0; j < kVec; ++j) b[j] = bias[k + 32 * g + j];  // of any alignment
        }
#pragma unroll
        for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = conv_row(i, h, lane);
                float v[kVec];
                row_of<4 * Tile::kGroups>(v, d[i], 4 * g, h);
#pragma unroll
                for (int j = 0; j < kVec; ++j) v[j] += b[j];
                if (residual) {
                    const Word4& w = joins[i][h];
                    float r[kVec];
                    unpack(Pack<T>{{w.w[0], w.w[1], w.w[2], w.w[3]}}, r);
#pragma unroll
                    for (int j = 0; j < kVec; ++j) v[j] += r[j];
                }
                Pack<T> result = pack<T>(v);
                unpack(result, v);
#pragma unroll
                for (int j = 0; j < kVec; ++j) d[i][4 * g + j / 2][2 * h + j % 2] = v[j];
                if (relu) result = keep(result, passed(v));
                if (there && row < rows) {
                    store16(out + (first + static_cast<i64>(row) * K),
                            {{result.w[0], result.w[1], result.w[2], result.w[3]}});
                }
            }
        }
    }
}

// Sum over the lanes that hold the same channels, for each of them.
DEVICE float sum_rows(float v) {
    v += shuffle_xor(v, 4);
    v += shuffle_xor(v, 8);
    return v + shuffle_xor(v, 16);
}

// Mean and M2 of each channel over the pixels of a warp, to `moments` [2][kWarpsM][kBN].
template <class Tile, class S>
DEVICE void warp_moments(const Sums<Tile::kRows, 4 * Tile::kGroups>& d, int rows, S& moments, int warp, int lane) {
    const float share = rows > 0 ? 1.0f / static_cast<float>(least(rows, 16 * Tile::kRows)) : 0.0f;
    const int first = warp % Tile::kWarpsM * Tile::kBN + warp / Tile::kWarpsM * 32 * Tile::kGroups + lane % 4 * kVec;
#pragma unroll
    for (int g = 0; g < Tile::kGroups; ++g) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            float sum = 0, squares = 0;
#pragma unroll
            for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    sum += conv_row(i, h, lane) < rows ? d[i][4 * g + j / 2][2 * h + j % 2] : 0.0f;
                }
            }
            const float mean = sum_rows(sum) * share;
#pragma unroll
            for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const float off = d[i][4 * g + j / 2][2 * h + j % 2] - mean;
                    squares += conv_row(i, h, lane) < rows ? off * off : 0.0f;
                }
            }
            squares = sum_rows(squares);
            if (lane < 4) {
                moments[first + 32 * g + j] = mean;
                moments[Tile::kWarpsM * Tile::kBN + first + 32 * g + j] = squares;
            }
        }
    }
}

// Count, mean and M2 of a channel of the tile, from those of its warps in ascending order: rows `tile` of part [3, T,
// K].
template <class Tile, class S>
DEVICE void write_moments(S& moments, int rows, i64 tile, i64 T, i64 K, i64 k, float* part) {
    const int column = thread_index();
    const auto of_warp = [&](int w) { return most(0, least(rows - w * 16 * Tile::kRows, 16 * Tile::kRows)); };
    const float count = static_cast<float>(least(rows, Tile::kBM));
    float mean = 0, squares = 0;
#pragma unroll
    for (int w = 0; w < Tile::kWarpsM; ++w) {
        mean += static_cast<float>(of_warp(w)) * moments[w * Tile::kBN + column];
    }
    mean /= count;
#pragma unroll
    for (int w = 0; w < Tile::kWarpsM; ++w) {
        const float off = moments[w * Tile::kBN + column] - mean;
        squares += moments[(Tile::kWarpsM + w) * Tile::kBN + column] + static_cast<float>(of_warp(w)) * off * off;
    }
    part[tile * K + k] = count;
    part[(T + tile) * K + k] = mean;
    part[(2 * T + tile) * K + k] = squares;
}

// part: float [3, s.tiles, K], or null; then relu is 0 and residual null.
template <class T, int kBM, int kBN, int kBK, int kStages, int kWarpsM>
KERNEL((ConvTile<kBM, kBN, kBK, kStages, kWarpsM>::kBlocksEach))
conv_fprop_kernel(ConvShape s, const T* x, const T* w, const float* bias, const T* residual, int relu, float* part,
                  T* out) {
    using Tile = ConvTile<kBM, kBN, kBK, kStages, kWarpsM>;
    DYNAMIC_SHARED(Word4, shared);
    SHARED(float, moments, 2 * kWarpsM * kBN);
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    const i64 columns = static_cast<i64>(s.column_tiles) * s.groups;
    const i64 tile = block_x() / columns;
    const int column = static_cast<int>(block_x() - tile * columns), group = column / s.column_tiles;
    const int m0 = static_cast<int>(tile) * kBM, n0 = (column - group * s.column_tiles) * kBN;

    Sums<Tile::kRows, 4 * Tile::kGroups> d;
#pragma unroll
    for (int i = 0; i < Tile::kRows; ++i) {
#pragma unroll
        for (int j = 0; j < 4 * Tile::kGroups; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) d[i][j][e] = 0;
        }
    }
    {
        ConvFeed<T, Tile, decltype(shared)> feed(s, shared, x, w, m0, group, n0);
#pragma unroll
        for (int i = 0; i < kStages - 1; ++i) {
            if (i < s.steps) feed.issue(i);
            copy_async_commit();
        }
        int stage = 0, free = kStages - 1;
#pragma unroll 1
        for (int step = 0; step < s.steps; ++step) {
            copy_async_wait<kStages - 2>();
            sync_block();
            if (step + kStages - 1 < s.steps) feed.issue(free);
            copy_async_commit();  // an empty group keeps count of the steps
            multiply<T, Tile>(d, shared, stage * Tile::kStageUnits, warp, lane);
            free = stage;
            stage = stage + 1 == kStages ? 0 : stage + 1;
        }
    }

    const int first_row = warp % kWarpsM * 16 * Tile::kRows;
    const int first_channel = n0 + warp / kWarpsM * 32 * Tile::kGroups + lane % 4 * kVec;
    const int rows = s.M - m0 - first_row;
    store_tile<T, Tile>(d, bias, residual, relu, out, s.K, static_cast<i64>(m0) + first_row, rows,
                        group * s.CO + first_channel, s.CO - first_channel, lane);
    if (part) {
        warp_moments<Tile>(d, rows, moments, warp, lane);
        sync_block();
        const int k = n0 + thread_index();
        if (thread_index() < kBN && k < s.CO) {
            write_moments<Tile>(moments, s.M - m0, tile, s.tiles, s.K, static_cast<i64>(group) * s.CO + k, part);
        }
    }
}

}  // namespace FASTRES_BACKEND
