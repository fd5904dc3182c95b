// Narrow groups, 3x3, with x read where it lies: in every lane the channel that its output needs, by a permutation of
// the lanes that a load brings. Laying x out (conv_grouped.cpp) makes do without permutations and serves any taps, but
// its rows, stores and copies are more than half of the time beside a tile at the peak.
//
// A tile is up to two rows of pixels of one vector of outputs, so that an operand serves up to six products. Tiles of
// all vectors follow each other, then those of the next pixels: x and y are read and written in whole lines, and the
// next ones are known. Within a tile a row of x is done before the next: pixels of many channels share few sets of L1.
#include "cpu/conv_grouped.h"
#include "cpu/conv_grouped_tile.h"

namespace FASTRES_BACKEND {
namespace {

constexpr int kRowsOfTile = L == 16 ? 2 : 1;  // sums and weights fill the registers
constexpr int kMostStride =
    L == 16 ? 2 : 1;  // two by vectors of eight: the same from L2, 0.9 times as fast from memory
constexpr int kColumns = 7, kFewColumns = 4;

#if defined(__AVX2__)
constexpr bool kShuffles = true;
#else
constexpr bool kShuffles = false;
#endif

template <class T>
struct Source {
    const T* rows[(kRowsOfTile - 1) * kMostStride + 3];  // the first column of each; null: above or below the image
    i64 pitch;                                           // from a pixel to the next
    bool left, right;                                    // whether the first and the last column lie in the image
    i64 ahead;                                           // to what the next tile reads
    const float* w;
    i64 operands, w_row;  // floats between rows of taps
    const vi* orders;     // by operand: of the lanes of x
};

template <class T>
struct Target {
    T* y;
    i64 pitch, row, ahead;  // from a pixel to the next, from a row, to what the next tile writes
    vf bias, floor;
};

template <class Of, bool kSplat, class T>
FR_INLINE vf operand_at(const T* p, i64 c, vi order) {
    if constexpr (kSplat)
        return splat(reinterpret_cast<const float*>(p) + c);
    else if constexpr (Of::kChannels == 2)
        return __builtin_shuffle(low_half(read<vh>(p)), order);
    else
        return __builtin_shuffle(load(p), order);
}

// kR rows of kM pixels at a stride of kS.
template <class T, class Of, bool kSplat, int kR, int kM, int kS>
void tile_in_place(const Source<T>& in, const Target<T>& out) {
    constexpr int kRows = (kR - 1) * kS + 3, kWidth = (kM - 1) * kS + 3;
    vf s[kR][kM];
#pragma GCC unroll unrolled(2)
    for (int r = 0; r < kR; ++r)
#pragma GCC unroll unrolled(7)
        for (int i = 0; i < kM; ++i) s[r][i] = vf{};
#pragma GCC unroll unrolled(5)
    for (int h = 0; h < kRows; ++h) {
        const T* const row = in.rows[h];
        if (!row) continue;
#pragma GCC unroll unrolled(15)
        for (int j = 0; j < kWidth; ++j) __builtin_prefetch(row + j * in.pitch + in.ahead, 0, 3);
        const float* w = in.w;
        for (i64 c = 0; c < in.operands; ++c, w += 3 * L) {
            const vi order = in.orders[c];
            vf weights[kR][3];  // of the row of taps that meets h
#pragma GCC unroll unrolled(2)
            for (int r = 0; r < kR; ++r)
#pragma GCC unroll unrolled(3)
                for (int t = 0; t < 3; ++t)
                    if (const int a = h - r * kS; a >= 0 && a <= 2) weights[r][t] = load(w + a * in.w_row + t * L);
#pragma GCC unroll unrolled(15)
            for (int j = 0; j < kWidth; ++j) {
                if ((j == 0 && !in.left) || (j == kWidth - 1 && !in.right)) continue;
                const vf v = operand_at<Of, kSplat>(row + j * in.pitch, c, order);
#pragma GCC unroll unrolled(2)
                for (int r = 0; r < kR; ++r) {
                    if (h < r * kS || h > r * kS + 2) continue;
#pragma GCC unroll unrolled(3)
                    for (int t = 0; t < 3; ++t)
                        if (j >= t && (j - t) % kS == 0 && (j - t) / kS < kM)
                            s[r][(j - t) / kS] = Of::add(v, weights[r][t], s[r][(j - t) / kS]);
                }
            }
        }
    }
#pragma GCC unroll unrolled(2)
    for (int r = 0; r < kR; ++r)
#pragma GCC unroll unrolled(7)
        for (int i = 0; i < kM; ++i) {
            T* const y = out.y + r * out.row + i * out.pitch;
            Of::store(y, at_least(s[r][i] + out.bias, out.floor));
            __builtin_prefetch(y + out.ahead, 1, 3);
        }
}

template <class T>
using InPlace = void (*)(const Source<T>&, const Target<T>&);

template <class T, class Of, int kM, int kS>
InPlace<T> in_place_of(bool splat, i64 rows) {
    if (splat)
        return rows == 1 ? tile_in_place<T, Of, true, 1, kM, kS> : tile_in_place<T, Of, true, kRowsOfTile, kM, kS>;
    return rows == 1 ? tile_in_place<T, Of, false, 1, kM, kS> : tile_in_place<T, Of, false, kRowsOfTile, kM, kS>;
}
template <class T, class Of>
InPlace<T> in_place_of(bool splat, i64 rows, i64 columns, i64 stride) {
    if (columns == kColumns)
        return stride == 1 ? in_place_of<T, Of, kColumns, 1>(splat, rows)
                           : in_place_of<T, Of, kColumns, kMostStride>(splat, rows);
    return stride == 1 ? in_place_of<T, Of, kFewColumns, 1>(splat, rows)
                       : in_place_of<T, Of, kFewColumns, kMostStride>(splat, rows);
}

template <class T, class Of>
class Worker {
  public:
    Worker(const ConvShape& g, const T* x, const float* w, const float* bias, bool relu, T* y)
        : g_(g), x_(x), w_(w), bias_(bias), floor_(relu ? vf{} : vf{} - __builtin_inff()), y_(y) {
        const i64 width = g.C / g.groups;
        const Operand kind = operand_of<Of>(width);
        operands_ = width / Of::kChannels;
        for (int c = 0; c < operands_; ++c)
            for (int k = 0; k < L; ++k)
                orders_[c][k] =
                    Of::kChannels == 2 ? pair_of(width, c, k) : int(k / width * width + channel_of(kind, c, k) % width);
        const auto cost = [&](i64 columns) { return ceil_div(g.Q, columns) * (columns + 1); };
        columns_ = g.Q < kColumns || cost(kFewColumns) < cost(kColumns) ? kFewColumns : kColumns;
        tiles_ = ceil_div(g.Q, columns_);
        groups_ = ceil_div(g.P, kRowsOfTile);
        for (int rows = 1; rows <= kRowsOfTile; ++rows)
            tile_[rows - 1] = in_place_of<T, Of>(kind == Operand::kSplat, rows, columns_, g.stride_h);
    }

    // Groups of rows [first, last) of all images, vectors [vector0, vector1).
    void run(i64 first, i64 last, i64 vector0, i64 vector1) const {
        Source<T> in{{}, g_.C, false, false, 0, nullptr, operands_, operands_ * 3 * L, orders_};
        Target<T> out{nullptr, g_.K, g_.Q * g_.K, 0, {}, floor_};
        for (i64 group = first; group < last; ++group) {
            const i64 image = group / groups_, i0 = group % groups_ * kRowsOfTile;
            const i64 rows = min_of(kRowsOfTile, g_.P - i0);
            for (i64 t = 0; t < tiles_; ++t) {
                const i64 j0 = column(t), w0 = j0 * g_.stride_w - g_.pad_w;
                in.left = w0 >= 0, in.right = w0 + (columns_ - 1) * g_.stride_w + 2 < g_.W;
                for (i64 h = 0; h < (rows - 1) * g_.stride_h + 3; ++h) {
                    const i64 at = i0 * g_.stride_h - g_.pad_h + h;
                    const bool inside = at >= 0 && at < g_.H;
                    in.rows[h] = inside ? x_ + ((image * g_.H + at) * g_.W + w0) * g_.C + vector0 * L : nullptr;
                }
                out.y = y_ + ((image * g_.P + i0) * g_.Q + j0) * g_.K + vector0 * L;
                for (i64 v = vector0; v < vector1; ++v, out.y += L) {
                    in.ahead = out.ahead = L;
                    if (v + 1 == vector1) {
                        // Of the next tile, or of the next group of rows.
                        const bool more = t + 1 < tiles_;
                        const i64 down = more ? 0 : kRowsOfTile, right = (more ? column(t + 1) : 0) - j0;
                        const i64 back = (vector1 - 1 - vector0) * L;
                        in.ahead = (down * g_.stride_h * g_.W + right * g_.stride_w) * g_.C - back;
                        out.ahead = (down * g_.Q + right) * g_.K - back;
                    }
                    in.w = w_ + v * 9 * operands_ * L;
                    if (bias_) out.bias = load(bias_ + v * L);
                    tile_[rows - 1](in, out);
                    for (const T*& row : in.rows)
                        if (row) row += L;
                }
            }
        }
    }

  private:
    // The last tile meets some pixels again, where they do not come out even.
    i64 column(i64 t) const { return min_of(t * columns_, g_.Q - columns_); }

    const ConvShape& g_;
    const T* x_;
    const float *w_, *bias_;
    const vf floor_;
    T* y_;
    vi orders_[L];
    i64 operands_, columns_, tiles_, groups_;
    InPlace<T> tile_[kRowsOfTile];
};

template <class T, class Of>
void run(const ConvShape& g, const T* x, const float* w, const float* bias, bool relu, T* y, i64 threads) {
    const i64 groups = g.N * ceil_div(g.P, kRowsOfTile), vectors = g.K / L;
    const i64 parts = vector_parts(threads, groups, vectors), shares = threads / parts;
    const Worker<T, Of> worker(g, x, w, bias, relu, y);
    parallel(threads, shares * parts, [&](i64 first, i64 last, int) {
        for (i64 task = first; task < last; ++task) {
            const i64 share = task / parts, part = task % parts;
            worker.run(groups * share / shares, groups * (share + 1) / shares, vectors * part / parts,
                       vectors * (part + 1) / parts);
        }
    });
}

}  // namespace

bool grouped_in_place(int dtype, const ConvShape& g, int pairs, bool residual) {
    return kShuffles && (pairs || dtype == kF32) && !residual && g.R == 3 && g.S == 3 && g.dilation_h == 1 &&
           g.dilation_w == 1 && g.stride_h == g.stride_w && g.stride_h <= kMostStride && g.pad_h <= 1 && g.pad_w <= 1 &&
           g.Q >= kFewColumns;
}

void grouped_in_place_fprop(const void* x, const float* packed, int pairs, const ConvShape& g, const float* bias,
                            bool relu, void* y, i64 threads) {
    if constexpr (kShuffles) {
        if (pairs)
            run<bf16, Pairs>(g, static_cast<const bf16*>(x), packed, bias, relu, static_cast<bf16*>(y), threads);
        else
            run<float, Floats>(g, static_cast<const float*>(x), packed, bias, relu, static_cast<float*>(y), threads);
    }
}

}  // namespace FASTRES_BACKEND
