// The input of a convolution on the matrix unit, laid out: planes of 32 channels with the border, one for each residue
// of a pixel's row and column modulo the stride. The pixels of a tile follow each other, whatever row they are of, and
// every tap lies at a constant distance.
#pragma once
#include "cpu/conv_matrix.h"

namespace FASTRES_BACKEND {
namespace {

struct Planes {
    i64 chunks, taps, steps;
    i64 reach_h, shared;    // rows that a point reaches over; border that a row has in common with the next
    i64 pitch;              // pixels from a row to the next
    i64 rows;               // of a phase
    i64 phase, plane, low;  // pixels of a phase; elements of the phases of a chunk, of those of hi
    i64 chunk;              // elements from a chunk to the next

    Planes(const ConvShape& g, i64 rows, bool halves) : rows(rows) {
        chunks = ceil_div(g.C, kDepth), taps = g.R * g.S, steps = chunks * taps;
        reach_h = (g.R - 1) * g.dilation_h + 1;
        const i64 columns = (g.Q - 1) * g.stride_w + (g.S - 1) * g.dilation_w + 1;
        const i64 right = max_of(0, columns - g.pad_w - g.W);
        shared = g.stride_w == 1 ? min_of(right, g.pad_w) : 0;
        pitch = ceil_div(columns, g.stride_w) - shared;
        phase = rows * pitch + shared;
        // An odd number of lines: chunks would share few cache sets otherwise. A last tile may read past the last
        // pixel.
        plane = ((g.stride_h * g.stride_w * phase + kPair) | 1) * kDepth;
        low = halves ? plane : 0;
        chunk = plane + low;
    }
    i64 elements() const { return chunks * chunk; }
    static i64 rows_of(const ConvShape& g, i64 n) { return n - 1 + ceil_div((g.R - 1) * g.dilation_h + 1, g.stride_h); }
    i64 tap(const ConvShape& g, i64 r, i64 s) const {
        const i64 h = r * g.dilation_h, w = s * g.dilation_w;
        const i64 of_phase = (h % g.stride_h * g.stride_w + w % g.stride_w) * phase;
        return (of_phase + h / g.stride_h * pitch + w / g.stride_w) * kDepth;
    }
    bool used(const ConvShape& g, i64 phase_h, i64 phase_w) const {
        bool rows_used = false, columns_used = false;
        for (i64 r = 0; r < g.R; ++r) rows_used |= r * g.dilation_h % g.stride_h == phase_h;
        for (i64 s = 0; s < g.S; ++s) columns_used |= s * g.dilation_w % g.stride_w == phase_w;
        return rows_used && columns_used;
    }

    // Where x's column c lies in a row, in pixels from the row's start; -1: no tap reads it.
    i64 column(const ConvShape& g, i64 c) const {
        const i64 w = c + g.pad_w, q = w / g.stride_w;
        return q < pitch ? w % g.stride_w * phase + q : -1;
    }
    // Row h of the strip (0: what the first point reads first), in pixels.
    i64 row(const ConvShape& g, i64 h) const { return h % g.stride_h * g.stride_w * phase + h / g.stride_h * pitch; }

    void clear(u16* to, i64 pixels) const {
        for (i64 c = 0; c < chunks; ++c, to += chunk) {
            __builtin_memset(to, 0, pixels * kDepth * sizeof(u16));
            if (low) __builtin_memset(to + low, 0, pixels * kDepth * sizeof(u16));
        }
    }

    // One pixel's C channels.
    template <class T>
    FR_INLINE void lay_out(const T* x, i64 C, u16* to) const {
        for (; C >= kDepth; C -= kDepth, x += kDepth, to += chunk) lay_out(x, to);
        if (C == 0) return;
        T last[kDepth] = {};
        __builtin_memcpy(last, x, C * sizeof(T));
        lay_out(last, to);
    }

    template <class T>
    FR_INLINE void lay_out(const T* x, u16* to) const {
        for (i64 i = 0; i < kDepth; i += 2 * L, to += 2 * L)
            if constexpr (!kHalves<T>)
                __builtin_memcpy(to, x + i, 2 * L * sizeof(u16));
            else
                store_halves(to, low, load(x + i), load(x + i + L));
    }

    // Rows [h0, h1) of a strip whose row 0 is row `from` of the image x, into the planes at `to`. Rows and pixels of x
    // are so many elements apart.
    template <class T>
    void fill(const ConvShape& g, const T* x, i64 x_row, i64 x_pixel, i64 from, i64 h0, i64 h1, u16* to) const {
        for (i64 h = h0; h < h1; ++h) {
            const bool inside = from + h >= 0 && from + h < g.H;
            const T* line = x + (from + h) * x_row;
            for (i64 p = 0; p < g.stride_w; ++p) {
                if (!used(g, h % g.stride_h, p)) continue;
                u16* at = to + (row(g, h) + p * phase) * kDepth;
                if (!inside) {
                    clear(at, pitch + shared);
                    continue;
                }
                for (i64 q = 0; q < pitch + shared; ++q, at += kDepth) {
                    const i64 c = q * g.stride_w + p - g.pad_w;
                    if (c >= 0 && c < g.W)
                        lay_out(line + c * x_pixel, g.C, at);
                    else
                        clear(at, 1);
                }
            }
        }
    }
};

// A 1x1 convolution that leaves pixels out, as one of just the pixels that it reads; any other as it is.
inline ConvShape dense(const ConvShape& g) {
    if (g.R * g.S > 1 || g.pad_h || g.pad_w) return g;
    return {g.N, g.P, g.Q, g.C, g.K, g.P, g.Q, 1, 1, 1, 1, 0, 0, 1, 1, g.groups};
}

inline i64 panels_of(const ConvShape& g) { return ceil_div(g.K, kPair); }

// Of a panel.
inline i64 steps_of(const ConvShape& g) { return (g.groups > 1 ? 1 : ceil_div(g.C, kDepth)) * g.R * g.S; }

// Whether x can be read where it is.
template <class T>
bool in_place(const ConvShape& g) {
    const bool point = g.R == 1 && g.S == 1 && g.stride_h == 1 && g.stride_w == 1 && g.pad_h == 0 && g.pad_w == 0;
    return !kHalves<T> && point && g.C % kDepth == 0;
}

// The steps of a convolution that reads x where it is, or the planes.
inline void steps_to(const ConvShape& g, const Planes& planes, bool there, i64* to) {
    for (i64 c = 0; c < (g.groups > 1 ? 1 : planes.chunks); ++c)
        for (i64 r = 0; r < g.R; ++r)
            for (i64 s = 0; s < g.S; ++s) *to++ = there ? c * kDepth : c * planes.chunk + planes.tap(g, r, s);
}

}  // namespace
}  // namespace FASTRES_BACKEND
