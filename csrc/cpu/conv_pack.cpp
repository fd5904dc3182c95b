// Weights as the tiles of conv_direct.cpp read them.
#include "cpu/conv_direct.h"
#include "cpu/conv_tile.h"

namespace FASTRES_BACKEND {

WeightsLayout weights_layout(const Direct& p) {
    WeightsLayout l{};
    const i64 channels = p.pairs ? Pairs::kChannels : Floats::kChannels;
    l.blocks = ceil_div(p.C, kBlock * channels);
    l.panels = ceil_div(p.K, kPanel);
    l.inputs = p.C / max_of(1, p.groups);
    l.in_blocks = ceil_div(l.inputs, kBlock * channels);
    l.last_width = int(ceil_div(ceil_div(l.inputs, channels) - (l.in_blocks - 1) * kBlock, kStep) * kStep);
    l.panel_floats = ((l.in_blocks - 1) * kBlock + l.last_width) * p.n_taps * kPanel;
    return l;
}

namespace {

template <class T>
FR_INLINE void widen(const T* from, i64 n, float* to) {
    for (; n >= L; n -= L, from += L, to += L) store(to, load(from));
    if (n) store_part(to, load_part(from, int(n)), int(n));
}

// out [channels, kPanel] = in [outs, channels], rows w_out apart.
template <class T>
FR_INLINE void transpose(const T* in, i64 w_out, i64 outs, i64 channels, float* out) {
    typedef float Four __attribute__((vector_size(16)));
    typedef std::int32_t Order __attribute__((vector_size(16)));
    i64 k = 0;
    for (; k + 4 <= outs && channels == kBlock; k += 4) {
        alignas(64) float rows[4][kBlock];
        for (int i = 0; i < 4; ++i) {
            widen(in + (k + i) * w_out, kBlock, rows[i]);
            __builtin_prefetch(in + (k + i) * w_out + 8 * kBlock);
        }
        for (int c = 0; c < kBlock; c += 4) {
            const Four a = read<Four>(rows[0] + c), b = read<Four>(rows[1] + c), d = read<Four>(rows[2] + c),
                       e = read<Four>(rows[3] + c);
            const Four ab0 = __builtin_shuffle(a, b, Order{0, 4, 1, 5}),
                       ab1 = __builtin_shuffle(a, b, Order{2, 6, 3, 7});
            const Four de0 = __builtin_shuffle(d, e, Order{0, 4, 1, 5}),
                       de1 = __builtin_shuffle(d, e, Order{2, 6, 3, 7});
            write(out + c * kPanel + k, __builtin_shuffle(ab0, de0, Order{0, 1, 4, 5}));
            write(out + (c + 1) * kPanel + k, __builtin_shuffle(ab0, de0, Order{2, 3, 6, 7}));
            write(out + (c + 2) * kPanel + k, __builtin_shuffle(ab1, de1, Order{0, 1, 4, 5}));
            write(out + (c + 3) * kPanel + k, __builtin_shuffle(ab1, de1, Order{2, 3, 6, 7}));
        }
    }
    for (; k < outs; ++k) {
        alignas(64) float row[kBlock];
        widen(in + k * w_out, channels, row);
        for (i64 c = 0; c < channels; ++c) out[c * kPanel + k] = row[c];
    }
}

// [panel][channel block][tap][channel][kPanel], channels past C or K zero.
template <class T>
void pack_weights(const Direct& p, const WeightsLayout& l, float* to, i64 threads) {
    // Taps outside, blocks inside: the rows of a channels_last weight are read from front to back.
    parallel(threads, l.panels * p.n_taps, [&](i64 first, i64 last, int) {
        for (i64 task = first; task < last; ++task) {
            const i64 k0 = task / p.n_taps * kPanel, t = task % p.n_taps, outs = min_of(kPanel, p.K - k0);
            const T* from = static_cast<const T*>(p.w) + p.w_tap[t] + k0 * p.w_out;
            for (i64 b = 0; b < l.blocks; ++b) {
                const i64 c0 = b * kBlock, width = b + 1 < l.blocks ? kBlock : l.last_width;
                const i64 channels = min_of(kBlock, p.C - c0);
                const T* in = from + c0 * p.w_in;
                float* out = to + task / p.n_taps * l.panel_floats + (c0 * p.n_taps + t * width) * kPanel;
                if (channels < width || outs < kPanel) __builtin_memset(out, 0, width * kPanel * sizeof(float));
                if (p.w_out == 1) {
                    for (i64 c = 0; c < channels; ++c) widen(in + c * p.w_in, outs, out + c * kPanel);
                } else if (p.w_in == 1) {
                    transpose(in, p.w_out, outs, channels, out);
                } else {
                    for (i64 k = 0; k < outs; ++k)
                        for (i64 c = 0; c < channels; ++c)
                            widen(in + k * p.w_out + c * p.w_in, 1, out + c * kPanel + k);
                }
            }
        }
    });
}

// The same for groups: outputs see the channels of their own group.
template <class T>
void pack_groups(const Direct& p, const WeightsLayout& l, float* to, i64 threads) {
    const i64 width = p.C / p.groups;
    parallel(threads, l.panels, [&](i64 first, i64 last, int) {
        for (i64 panel = first; panel < last; ++panel) {
            float* out = to + panel * l.panel_floats;
            for (i64 i = 0; i < kPanel; ++i) {
                const i64 k = panel * kPanel + i;
                for (i64 t = 0; t < p.n_taps; ++t)
                    for (i64 c = 0; c < width; ++c) {
                        const T* from = static_cast<const T*>(p.w) + p.w_tap[t] + k * p.w_out + c * p.w_in;
                        widen(from, 1, out + ((c / kBlock * p.n_taps + t) * kBlock + c % kBlock) * kPanel + i);
                    }
            }
        }
    });
}

// Pairs of input channels, of groups as well.
void pack_pairs(const Direct& p, const WeightsLayout& l, float* to, i64 threads) {
    parallel(threads, l.panels, [&](i64 first, i64 last, int) {
        for (i64 panel = first; panel < last; ++panel) {
            float* out = to + panel * l.panel_floats;
            __builtin_memset(out, 0, l.panel_floats * sizeof(float));
            for (i64 i = 0; i < min_of(kPanel, p.K - panel * kPanel); ++i)
                for (i64 t = 0; t < p.n_taps; ++t) {
                    const float* from = static_cast<const float*>(p.w) + p.w_tap[t] + (panel * kPanel + i) * p.w_out;
                    for (i64 c = 0; c < l.inputs; c += 2) {
                        const i64 b = c / 2 / kBlock, width = b + 1 < l.in_blocks ? kBlock : l.last_width;
                        const i64 at = (b * kBlock * p.n_taps + t * width + c / 2 % kBlock) * kPanel + i;
                        write(out + at, bf16_pair(from[c * p.w_in], c + 1 < l.inputs ? from[(c + 1) * p.w_in] : 0.0f));
                    }
                }
        }
    });
}

}  // namespace

i64 packed_floats(const Direct& p) {
    const WeightsLayout l = weights_layout(p);
    return l.panels * l.panel_floats;
}

void pack_direct(int dtype, const Direct& p, float* packed, i64 threads) {
    const WeightsLayout l = weights_layout(p);
    if (p.pairs) return pack_pairs(p, l, packed, threads);
    with_narrow(dtype, [&](auto type) {
        (p.groups > 1 ? pack_groups<decltype(type)> : pack_weights<decltype(type)>)(p, l, packed, threads);
    });
}

}  // namespace FASTRES_BACKEND
