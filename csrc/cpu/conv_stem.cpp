// The stem of an evaluation (stem_rows.h) on images of three channels with a horizontal stride of 2. And the mean over
// images before the classifier.
//
// S pixels of three channels are 3*S values that follow each other in x, and the next output's window starts 6 values
// further: a filter row is one dense step, and nothing is padded to blocks of channels. 6 values are 3 pairs.
#include <stdexcept>

#include "cpu/conv_tile.h"
#include "cpu/stem_rows.h"

namespace FASTRES_BACKEND {
namespace {

constexpr int kColors = 3, kStepW = 2;

void check(const ConvShape& g) {
    if (g.C != kColors || g.stride_w != kStepW || g.dilation_h != 1 || g.dilation_w != 1 || g.R >= kMostRows)
        throw std::invalid_argument("stem_conv: expected 3 channels, a stride_w of 2, no dilation, fewer than 16 rows");
}

// Of a filter row. The last pair may be half a zero, which must not meet the next pixel: it might be a NaN. So a row of
// pairs is laid out twice, the second time with what follows a window as zero.
i64 row_steps(const ConvShape& g, i64 channels) { return ceil_div(g.S * kColors, channels); }
i64 panel_floats(const ConvShape& g, i64 channels) { return g.R * row_steps(g, channels) * kPanel; }

template <class T, class Of>
class StemWorker {
    static constexpr i64 kChannels = Of::kChannels;
    static constexpr bool kPairs = kChannels == 2;
    using Kept = std::conditional_t<kPairs, i16, float>;  // in the ring

  public:
    StemWorker(const ConvShape& g, const PoolShape& pool, const T* x, const float* w, const float* bias, T* y)
        : g_(g),
          x_(x),
          w_(w),
          panels_(ceil_div(g.K, kPanel)),
          width_(panels_ * kPanel),
          pooled_(g, pool, bias, y, width_, g.Q) {
        const i64 values = (max_of(g.W, (g.Q - 1) * kStepW + g.S - g.pad_w) + g.pad_w) * kColors + kChannels - 1;
        row_floats_ = max_of(1, ceil_div(values, kBlock * kChannels)) * kBlock;
        slot_floats_ = (kPairs ? 2 : 1) * row_floats_;
    }

    // A padded input row for each slot, one of zeros, the taps and the ring.
    i64 scratch_floats() const { return (kMostRows + 1) * slot_floats_ + taps_floats() + pooled_.ring_floats(); }

    // Pooled rows [first, last) of all images.
    void run(i64 first, i64 last, float* rows) const {
        const float* zeros = rows + kMostRows * slot_floats_;
        float* const end = rows + (kMostRows + 1) * slot_floats_;
        __builtin_memset(rows, 0, (kMostRows + 1) * slot_floats_ * sizeof(float));
        pooled_.run(
            first, last, reinterpret_cast<Kept*>(end + taps_floats()),
            [&](i64 n, i64 h) { lay_out(x_ + (n * g_.H + h) * g_.W * kColors, rows + h % kMostRows * slot_floats_); },
            [&](i64 top, Kept* out) { convolve(top, rows, zeros, reinterpret_cast<i64*>(end), out); });
    }

  private:
    void lay_out(const T* from, float* to) const {
        i64 i = 0;
        const i64 n = g_.W * kColors;
        if constexpr (kChannels == 2) {
            __builtin_memcpy(reinterpret_cast<char*>(to) + g_.pad_w * kColors * sizeof(T), from, n * sizeof(T));
            for (i64 at = steps() - 1; at < row_floats_; at += kPitch)  // even channels lie in the lower half
                write(to + row_floats_ + at, read<u32>(to + at) & 0xffffu);
            return;
        }
        to += g_.pad_w * kColors;
        for (; i + L <= n; i += L) store(to + i, load(from + i));
        if (i < n) store_part(to + i, load_part(from + i, int(n - i)), int(n - i));
    }

    static constexpr int kPitch = kStepW * kColors / int(kChannels), kUnroll = kPairs ? 1 : kColors;
    i64 steps() const { return row_steps(g_, kChannels); }
    i64 taps_floats() const { return ceil_div(g_.R * (kPairs ? steps() : 1) * i64(sizeof(i64)), 64) * kBlock; }

    void convolve(i64 top, const float* rows, const float* zeros, i64* taps, Kept* out) const {
        int n = 0;
        for (i64 r = 0; r < g_.R; ++r) {
            const i64 h = top + r;
            const i64 row = (h >= 0 && h < g_.H ? rows + h % kMostRows * slot_floats_ : zeros) - rows;
            if (!kPairs) {
                taps[n++] = row;
                continue;
            }
            for (i64 s = 0; s < steps(); ++s) taps[n++] = row + s;
            if (g_.S * kColors % 2) taps[n - 1] += row_floats_;
        }
        const TileInput in{taps, n, 1, 0, int(kPairs ? 1 : steps())};
        const i64 count = ceil_div(g_.Q, kPixels);
        for (i64 t = 0; t < count; ++t) {
            const i64 q0 = g_.Q * t / count, m = g_.Q * (t + 1) / count - q0;
            const float* a = rows + q0 * kPitch;
            for (i64 panel = 0; panel < panels_; ++panel) {
                Kept* const to = out + q0 * width_ + panel * kPanel;
                const float* w = w_ + panel * panel_floats(g_, kChannels);
                if constexpr (kPairs) {
                    const vf bias[] = {pooled_.bias(panel * kPanel), pooled_.bias(panel * kPanel + L)};
                    TilesOf<Of>::template kept<kPitch, kUnroll>(m)(in, a, w, bias, reinterpret_cast<u16*>(to), width_);
                } else {
                    TilesOf<Of>::template dense<kPitch, kUnroll>(m)(in, a, a, w, to, width_);
                }
            }
        }
    }

    const ConvShape& g_;
    const T* x_;
    const float* w_;
    const i64 panels_, width_;
    i64 row_floats_, slot_floats_;
    const PooledRows<T, Kept> pooled_;
};

}  // namespace

i64 stem_packed_floats(const ConvShape& g, int pairs) {
    check(g);
    return ceil_div(g.K, kPanel) * panel_floats(g, pairs ? Pairs::kChannels : Floats::kChannels);
}

// [panel][row of taps][value of the row, or two][kPanel]
void stem_pack(const float* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& g, int pairs, float* packed) {
    check(g);
    const i64 channels = pairs ? Pairs::kChannels : Floats::kChannels, values = g.S * kColors;
    for (i64 p = 0; p < ceil_div(g.K, kPanel); ++p)
        for (i64 r = 0; r < g.R; ++r)
            for (i64 v = 0; v < row_steps(g, channels) * channels; v += channels)
                for (i64 i = 0; i < kPanel; ++i, ++packed) {
                    const i64 k = p * kPanel + i;
                    const auto weight = [&](i64 at) {
                        const i64 tap = r * g.S + at / kColors;
                        return k < g.K && at < values ? w[k * w_k + at % kColors * w_c + tap * w_tap] : 0.0f;
                    };
                    if (pairs)
                        write(packed, bf16_pair(weight(v), weight(v + 1)));
                    else
                        *packed = weight(v);
                }
}

void stem_conv(int dtype, const void* x, const float* packed, int pairs, const ConvShape& g, const PoolShape& pool,
               const float* bias, void* y, i64 ctx) {
    check(g);
    if (pairs && dtype != kBF16) throw std::invalid_argument("stem_conv: pairs: of bfloat16");
    if (pairs && !pairs_unit()) throw std::runtime_error("stem_conv: this processor has no products of pairs");
    if (g.N * pool.P * pool.Q == 0 || g.K == 0) return;
    const i64 threads = max_of(1, ctx), tasks = g.N * pool.P;
    const auto run = [&]<class T, class Of>(T, Of) {
        const StemWorker<T, Of> worker(g, pool, static_cast<const T*>(x), packed, bias, static_cast<T*>(y));
        const Scratch scratch(threads * worker.scratch_floats() * sizeof(float));
        parallel(threads, tasks, [&](i64 first, i64 last, int thread) {
            worker.run(first, last, static_cast<float*>(scratch.get()) + thread * worker.scratch_floats());
        });
    };
    if (pairs) return run(bf16(), Pairs());
    with_narrow(dtype, [&](auto type) { run(type, Floats()); });
}

void global_mean(int dtype, const void* x, i64 N, i64 M, i64 C, void* y, i64 ctx) {
    if (N * C == 0) return;
    constexpr i64 kSpan = 64;
    const i64 spans = ceil_div(C, kSpan);
    with_narrow(dtype, [&](auto type) {
        using T = decltype(type);
        parallel(threads_for(N * M * C, ctx), N * spans, [&](i64 first, i64 last, int) {
            for (i64 task = first; task < last; ++task) {
                const i64 n = task / spans, c0 = task % spans * kSpan;
                const T* from = static_cast<const T*>(x) + n * M * C;
                T* to = static_cast<T*>(y) + n * C;
                const auto one = [&](i64 c, auto span) {
                    vf sum{};
                    for (i64 m = 0; m < M; ++m) sum += span.load(from + m * C + c);
                    span.store(to + c, sum / (vf{} + float(M)));
                };
                i64 c = c0;
                for (; c + L <= min_of(C, c0 + kSpan); c += L) one(c, Full());
                if (c < min_of(C, c0 + kSpan)) one(c, Tail{int(C - c), false});
            }
        });
    });
}

}  // namespace FASTRES_BACKEND
