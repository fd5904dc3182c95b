// The stem of an evaluation (stem_rows.h) on the matrix unit, of images of up to four channels.
//
// A pixel is laid out as four channels: S of them follow each other in a row of the input, the next output's window
// starts stride_w pixels further, and a filter row is one step of 4 * S channels, read where it is.
#include <stdexcept>

#include "cpu/conv_matrix.h"
#include "cpu/matrix_unit.h"
#include "cpu/stem_rows.h"

namespace FASTRES_BACKEND {
namespace {

constexpr i64 kColors = 4;

template <class T>
class Worker {
    using Kept = std::conditional_t<kHalves<T>, i32, i16>;

  public:
    Worker(const ConvShape& g, const PoolShape& pool, const T* x, const u16* w, const float* bias, T* y)
        : g_(g),
          x_(x),
          w_(w),
          panels_(ceil_div(g.K, kPair)),
          width_(panels_ * kPair),
          pixels_(ceil_div(g.Q, kSide) * kSide),
          pooled_(g, pool, bias, y, width_, pixels_) {
        const i64 reach = max_of(g.W + g.pad_w, (pixels_ - 1) * g.stride_w + g.S);
        row_ = ceil_div(reach * kColors, kDepth) * kDepth;
        low_ = (kMostRows + 1) * row_;
    }

    // The ring, then an input row for each slot and one of zeros, hi and lo.
    i64 scratch_floats() const {
        const i64 floats = pooled_.ring_floats() + low_ * (kHalves<T> ? 2 : 1) / 2;
        return scratch_pitch(floats * i64(sizeof(float))) / i64(sizeof(float));
    }

    void run(i64 first, i64 last, float* ring) {
        u16* rows = reinterpret_cast<u16*>(ring + pooled_.ring_floats());
        __builtin_memset(rows, 0, low_ * (kHalves<T> ? 2 : 1) * sizeof(u16));
        Tiles tiles(int(kColors * g_.S));
        Sums sums;
        pooled_.run(
            first, last, reinterpret_cast<Kept*>(ring),
            [&](i64 n, i64 h) { lay_out(x_ + (n * g_.H + h) * g_.W * g_.C, rows + h % kMostRows * row_); },
            [&](i64 top, Kept* out) { convolve(tiles, sums, top, rows, out); });
    }

  private:
    // Pixels of C values as pixels of kColors.
    FR_INLINE void spread(const u16* from, i64 pixels, u16* to) const {
        i64 p = 0;
        if (g_.C == 3) {
            typedef u16 Line __attribute__((vector_size(64)));
            constexpr i64 kPixels = 32 / kColors;
            constexpr Line kTo = {0,  1,  2,  32, 3,  4,  5,  32, 6,  7,  8,  32, 9,  10, 11, 32,
                                  12, 13, 14, 32, 15, 16, 17, 32, 18, 19, 20, 32, 21, 22, 23, 32};
            for (; p * 3 + 32 <= pixels * 3; p += kPixels)
                write(to + p * kColors, __builtin_shuffle(read<Line>(from + p * 3), Line{}, kTo));
        }
        for (; p < pixels; ++p)
            for (i64 i = 0; i < g_.C; ++i) to[p * kColors + i] = from[p * g_.C + i];
    }

    void lay_out(const T* x, u16* to) const {
        to += g_.pad_w * kColors;
        if constexpr (!kHalves<T>) {
            spread(reinterpret_cast<const u16*>(x), g_.W, to);
        } else {
            constexpr i64 kMost = kColors * 2 * L;
            for (i64 c = 0; c < g_.W; c += 2 * L, to += 2 * L * kColors) {
                const i64 n = min_of(2 * L, g_.W - c);
                T in[kMost] = {};
                u16 out[2 * kMost];
                __builtin_memcpy(in, x + c * g_.C, n * g_.C * sizeof(T));
                for (i64 i = 0; i < n * g_.C; i += 2 * L) store_halves(out + i, kMost, load(in + i), load(in + i + L));
                spread(out, n, to);
                spread(out + kMost, n, to + low_);
            }
        }
    }

    void convolve(Tiles& t, Sums& sums, i64 top, const u16* rows, Kept* out) const {
        i64 steps[kMostRows];
        for (i64 r = 0; r < g_.R; ++r) {
            const i64 h = top + r;
            steps[r] = (h >= 0 && h < g_.H ? h % kMostRows : kMostRows) * row_;
        }
        const Operand o[1] = {{rows, g_.stride_w * kColors, steps, g_.R, low_, w_}};
        i64 at = -width_;
        Ahead nothing;
        blocks<T, 1>(
            t, sums, o, g_.Q, 0, panels_, nullptr, nothing, [&] { return at += width_; },
            [&](const float* block, const i64* pixels, i64 i0, i64 i1, i64 panel) {
                keep(block + i0 * kPair, i1 - i0, panel, out + pixels[i0] + panel * kPair);
            });
    }

    // A block into the ring, whose pixels follow each other.
    __attribute__((noinline)) void keep(const float* block, i64 n, i64 panel, Kept* to) const {
        constexpr int kVectors = int(kPair) / L;
        vf bias[kVectors];
        for (int v = 0; v < kVectors; ++v) bias[v] = pooled_.bias(panel * kPair + v * L);
        for (i64 i = 0; i < n; ++i, block += kPair, to += width_)
            for (int v = 0; v < kVectors; v += 2) {
                const vf a = at_least(load(block + v * L) + bias[v], vf{});
                const vf b = at_least(load(block + v * L + L) + bias[v + 1], vf{});
                if constexpr (kHalves<T>) {
                    write(to + v * L, bit_cast<vi>(a) & 0x7fffffff);
                    write(to + v * L + L, bit_cast<vi>(b) & 0x7fffffff);
                } else {
                    write(to + v * L, narrow_pairs(a, b) & 0x7fff);
                }
            }
    }

    const ConvShape& g_;
    const T* x_;
    const u16* w_;
    const i64 panels_, width_, pixels_;
    const PooledRows<T, Kept> pooled_;
    i64 row_, low_;
};

void check(const ConvShape& g) {
    if (g.C > kColors || g.S * kColors > kDepth || g.R >= kMostRows || g.dilation_h != 1 || g.dilation_w != 1 ||
        g.groups > 1)
        throw std::invalid_argument("matrix_stem: expected up to 4 channels, 8 columns and 15 rows, no dilation");
    if (!matrix_unit()) throw std::runtime_error("matrix_stem: this processor has no matrix unit");
}

// [panel][row][hi, lo][tile of 16 outputs][pair of channels][output][2]
template <class T>
void pack(const float* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& g, u16* to) {
    __builtin_memset(to, 0, ceil_div(g.K, kPair) * g.R * kStepWeights<T> * sizeof(u16));
    for (i64 k = 0; k < g.K; ++k)
        for (i64 t = 0; t < g.R * g.S; ++t)
            for (i64 c = 0; c < g.C; ++c) {
                const i64 i = t % g.S * kColors + c, k0 = k % kPair;
                u16* at = to + (k / kPair * g.R + t / g.S) * kStepWeights<T> + k0 / kSide * kTile +
                          (i / 2 * kSide + k0 % kSide) * 2 + i % 2;
                pack_one<T>(w[k * w_k + c * w_c + t * w_tap], at);
            }
}

}  // namespace

i64 matrix_stem_packed_floats(int dtype, const ConvShape& g) {
    check(g);
    return ceil_div(g.K, kPair) * g.R * (dtype == kBF16 ? kStepWeights<bf16> : kStepWeights<float>) / 2;
}

void matrix_stem_pack(int dtype, const float* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& g, float* packed) {
    check(g);
    (dtype == kBF16 ? pack<bf16> : pack<float>)(w, w_k, w_c, w_tap, g, reinterpret_cast<u16*>(packed));
}

void matrix_stem(int dtype, const void* x, const float* packed, const ConvShape& g, const PoolShape& pool,
                 const float* bias, void* y, i64 ctx) {
    check(g);
    if (g.N * pool.P * pool.Q == 0 || g.K == 0) return;
    const i64 threads = max_of(1, ctx);
    with_narrow(dtype, [&](auto type) {
        using T = decltype(type);
        Worker<T> proto(g, pool, static_cast<const T*>(x), reinterpret_cast<const u16*>(packed), bias,
                        static_cast<T*>(y));
        const Scratch scratch(threads * proto.scratch_floats() * sizeof(float));
        parallel(threads, g.N * pool.P, [&](i64 first, i64 last, int thread) {
            Worker<T> worker = proto;
            worker.run(first, last, static_cast<float*>(scratch.get()) + thread * worker.scratch_floats());
        });
    });
}

}  // namespace FASTRES_BACKEND
