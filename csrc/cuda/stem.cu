// Max pooling of relu(bn(x)), and its backward joined with that of the batch normalisation.
#include "affine.cuh"

namespace FASTRES_BACKEND {

constexpr u32 kNoTap = 255;  // no gradient passes: the winner was <= 0
constexpr int kTaps = 3;     // taps of a window's row in flight

struct Pool {
    i64 N, H, W, P, Q, k, stride, pad;
};

// A row number of [N, h, w, C] taken apart.
struct Pixel {
    i64 n, h, w;
};
DEVICE Pixel pixel(i64 row, i64 h, i64 w) {
    const i64 line = row / w;
    return {line / h, line % h, row - line * w};
}

// Eight winning taps, one byte each.
template <class A>
DEVICE Word2 load_taps(const u8* p, int valid) {
    if constexpr (kIsVector<A>) {
        return load8(p);
    } else {
        Word2 taps{};
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            const u32 tap = j < valid ? p[j] : kNoTap;
            taps.w[j / 4] |= tap << (8 * (j % 4));
        }
        return taps;
    }
}
DEVICE u32 tap_of(const Word2& taps, int j) { return taps.w[j / 4] >> (8 * (j % 4)) & 0xffu; }

template <class A>
DEVICE void store_taps(u8* p, const u32 (&tap)[kVec], int valid) {
    if constexpr (kIsVector<A>) {
        Word2 taps{};
#pragma unroll
        for (int j = 0; j < kVec; ++j) taps.w[j / 4] |= tap[j] << (8 * (j % 4));
        store8(p, taps);
    } else {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            if (j < valid) p[j] = static_cast<u8>(tap[j]);
        }
    }
}

template <class T, class A>
KERNEL(2)
stem_fwd_kernel(Rows s, Pool g, const T* x, const float* stat, T* out, u8* idx) {
    const Place at = place(s);
    if (at.n == 0) return;
    const Affine bn = load_affine<A>(stat, s, at);
    for (i64 i = 0; i < at.n; ++i) {
        const i64 row = at.lo + i * s.depth;
        const Pixel o = pixel(row, g.P, g.Q);
        const i64 h0 = o.h * g.stride - g.pad, w0 = o.w * g.stride - g.pad;
        float best[kVec];
        u32 tap[kVec];
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            best[j] = bits_float(0xff800000u);  // -inf
            tap[j] = 0;
        }
        for (i64 r = 0; r < g.k; ++r) {
            const i64 h = h0 + r;
            if (h < 0 || h >= g.H) continue;
            const T* const line = x + (o.n * g.H + h) * g.W * s.C + at.c;
            for (i64 q = 0; q < g.k; q += kTaps) {
                Pack<T> raw[kTaps];
                bool inside[kTaps];
#pragma unroll
                for (int u = 0; u < kTaps; ++u) {
                    const i64 w = w0 + q + u;
                    inside[u] = q + u < g.k && w >= 0 && w < g.W;
                    if (inside[u]) raw[u] = load_pack<A, false>(line + w * s.C, at.valid);
                }
#pragma unroll
                for (int u = 0; u < kTaps; ++u) {
                    if (inside[u]) {
                        float v[kVec];
                        unpack(raw[u], v);
#pragma unroll
                        for (int j = 0; j < kVec; ++j) v[j] = bn(v[j], j);
                        unpack(pack<T>(v), v);
                        const u32 code = static_cast<u32>(r * g.k + q) + u;
#pragma unroll
                        for (int j = 0; j < kVec; ++j) {
                            const bool wins = v[j] > best[j] || (v[j] != v[j] && best[j] == best[j]);
                            best[j] = wins ? v[j] : best[j];
                            tap[j] = wins ? code : tap[j];
                        }
                    }
                }
            }
        }
        const u32 bits = passed(best);
        store_pack<A>(out + row * s.C + at.c, keep(pack<T>(best), bits), at.valid);
        if (idx) {
#pragma unroll
            for (int j = 0; j < kVec; ++j) tap[j] = (bits >> j & 1) ? tap[j] : kNoTap;
            store_taps<A>(idx + row * s.C + at.c, tap, at.valid);
        }
    }
}

// part [2, T, C]
template <class T, class A>
KERNEL(2)
stem_bwd_reduce_kernel(Rows s, Pool g, const T* grad, const u8* idx, const T* x, const float* stat, float* part) {
    SHARED(float, shared, 2 * kTile);
    const Place at = place(s);
    float sum_g[kVec] = {}, sum_gx[kVec] = {}, mean[kVec] = {};
    if (at.n > 0) load_params<A>(stat + kMean * s.C + at.c, at.valid, mean);
    const u32 k = static_cast<u32>(g.k);
    for (i64 i = 0; i < at.n; ++i) {
        const i64 row = at.lo + i * s.depth;
        const Pixel o = pixel(row, g.P, g.Q);
        const i64 h0 = o.h * g.stride - g.pad, w0 = o.w * g.stride - g.pad;
        const T* const image = x + o.n * g.H * g.W * s.C + at.c;
        const Word2 taps = load_taps<A>(idx + row * s.C + at.c, at.valid);
        float v[kVec];
        unpack(load_pack<A, false>(grad + row * s.C + at.c, at.valid), v);
        // All winners are fetched before the first is used: they are scattered over the window.
        Pack<T> winner{};
        u32 bits = 0;
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            const u32 tap = tap_of(taps, j);
            const u32 r = tap / k;
            const i64 h = h0 + r, w = w0 + (tap - r * k);
            if (tap != kNoTap && h >= 0 && h < g.H && w >= 0 && w < g.W) {
                bits |= 1u << j;
                const u32 raw = element_bits(image + (h * g.W + w) * s.C + j);
                if constexpr (sizeof(T) == 2) {
                    winner.w[j / 2] |= raw << (16 * (j % 2));
                } else {
                    winner.w[j] = raw;
                }
            }
        }
        float value[kVec];
        unpack(winner, value);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            const float passing = (bits >> j & 1) ? v[j] : 0.0f;
            sum_g[j] += passing;
            sum_gx[j] = (bits >> j & 1) ? fused(passing, value[j] - mean[j], sum_gx[j]) : sum_gx[j];
        }
    }
    put(shared, 0, sum_g);
    put(shared, 1, sum_gx);
    sync_block();
    write_sums<2>(s, at, shared, part);
}

// The first window that holds padded coordinate h.
DEVICE int first_window(int h, int k, int stride) { return h < k ? 0 : (h - k) / stride + 1; }

// A pixel gathers from the windows that hold it: no scatter, every element written once.
template <class T, class A>
KERNEL(2)
stem_bwd_apply_kernel(Rows s, Pool g, const T* grad, const u8* idx, const T* x, const float* stat, const float* coef,
                      T* dx) {
    const Place at = place(s);
    if (at.n == 0) return;
    const Gradient to_dx = load_gradient<A>(stat, coef, s, at);
    const int k = static_cast<int>(g.k), stride = static_cast<int>(g.stride), pad = static_cast<int>(g.pad);
    for (i64 i = at.n - 1; i >= 0; --i) {
        const i64 row = at.lo + i * s.depth;
        const Pixel in = pixel(row, g.H, g.W);
        const Pack<T> raw = load_pack<A, true>(x + row * s.C + at.c, at.valid);
        // In padded coordinates window p begins at p * stride.
        const int h = static_cast<int>(in.h) + pad, w = static_cast<int>(in.w) + pad;
        const int p_first = first_window(h, k, stride), p_last = least(h / stride, static_cast<int>(g.P) - 1);
        const int q_first = first_window(w, k, stride), q_last = least(w / stride, static_cast<int>(g.Q) - 1);
        float sum[kVec] = {};
        // Descending windows are ascending taps. Several are in flight: in 16 bit four, all that hold a pixel if
        // k <= 2*stride; in float32 two, since with four sm_100 spilled.
        constexpr int kFlight = sizeof(T) == 2 ? 4 : 2;
        for (int p = p_last; p >= p_first; p -= kFlight / 2) {
            for (int q = q_last; q >= q_first; q -= 2) {
                Word2 taps[kFlight];
                Pack<T> passing[kFlight];
#pragma unroll
                for (int u = 0; u < kFlight; ++u) {
                    if (p - u / 2 < p_first || q - u % 2 < q_first) continue;
                    const i64 offset = ((in.n * g.P + p - u / 2) * g.Q + q - u % 2) * s.C + at.c;
                    taps[u] = load_taps<A>(idx + offset, at.valid);
                    passing[u] = load_pack<A, false>(grad + offset, at.valid);
                }
#pragma unroll
                for (int u = 0; u < kFlight; ++u) {
                    if (p - u / 2 < p_first || q - u % 2 < q_first) continue;
                    const u32 code = static_cast<u32>((h - (p - u / 2) * stride) * k + w - (q - u % 2) * stride);
                    float v[kVec];
                    unpack(passing[u], v);
#pragma unroll
                    for (int j = 0; j < kVec; ++j) sum[j] += tap_of(taps[u], j) == code ? v[j] : 0.0f;
                }
            }
        }
        float v[kVec];
        unpack(raw, v);
#pragma unroll
        for (int j = 0; j < kVec; ++j) v[j] = to_dx(sum[j], v[j], j);
        store_pack<A>(dx + row * s.C + at.c, pack<T>(v), at.valid);
    }
}

namespace {

// 16-byte access to the activations, 8-byte access to the taps.
template <class... P>
bool vector_legal(i64 C, const u8* idx, const P*... p) {
    return C % kVec == 0 && reinterpret_cast<std::uintptr_t>(idx) % 8 == 0 && aligned16(p...);
}

}  // namespace

void stem_fwd(int dtype, const void* x, i64 N, i64 H, i64 W, i64 C, const void* stat, i64 P, i64 Q, i64 k, i64 stride,
              i64 pad, void* out, u8* idx, i64 ctx) {
    const Rows s = plan(N * P * Q, C);
    const Pool g{N, H, W, P, Q, k, stride, pad};
    dispatch("stem_fwd", dtype, vector_legal(C, idx, x, stat, out), [&](auto t, auto access) {
        using T = decltype(t);
        launch("stem_fwd", stem_fwd_kernel<T, decltype(access)>, s.blocks, s.channel_blocks, ctx, s, g,
               static_cast<const T*>(x), static_cast<const float*>(stat), static_cast<T*>(out), idx);
    });
}

void stem_bwd_reduce(int dtype, const void* grad, const u8* idx, const void* x, i64 N, i64 H, i64 W, i64 C,
                     const void* stat, i64 P, i64 Q, i64 k, i64 stride, i64 pad, i64 T, void* part, i64 ctx) {
    const Rows s = plan(N * P * Q, C, T);
    const Pool g{N, H, W, P, Q, k, stride, pad};
    dispatch("stem_bwd_reduce", dtype, vector_legal(C, idx, grad, x, stat), [&](auto t, auto access) {
        using E = decltype(t);
        launch("stem_bwd_reduce", stem_bwd_reduce_kernel<E, decltype(access)>, s.blocks, s.channel_blocks, ctx, s, g,
               static_cast<const E*>(grad), idx, static_cast<const E*>(x), static_cast<const float*>(stat),
               static_cast<float*>(part));
    });
}

void stem_bwd_apply(int dtype, const void* grad, const u8* idx, const void* x, i64 N, i64 H, i64 W, i64 C,
                    const void* stat, const void* coef, i64 P, i64 Q, i64 k, i64 stride, i64 pad, void* dx, i64 ctx) {
    const Rows s = plan(N * H * W, C);
    const Pool g{N, H, W, P, Q, k, stride, pad};
    dispatch("stem_bwd_apply", dtype, vector_legal(C, idx, grad, x, stat, coef, dx), [&](auto t, auto access) {
        using T = decltype(t);
        launch("stem_bwd_apply", stem_bwd_apply_kernel<T, decltype(access)>, s.blocks, s.channel_blocks, ctx, s, g,
               static_cast<const T*>(grad), idx, static_cast<const T*>(x), static_cast<const float*>(stat),
               static_cast<const float*>(coef), static_cast<T*>(dx));
    });
}

}  // namespace FASTRES_BACKEND
