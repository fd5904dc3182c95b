// How conv_direct.cpp lays a strip of x out, cuts rows into tiles, and which taps a tile needs.
#pragma once
#include "cpu/conv_direct.h"
#include "cpu/conv_tile.h"

namespace FASTRES_BACKEND {
namespace {

constexpr i64 kFewPixels = 4;

// A row of the grid in a strip.
struct Row {
    const float* in;
    i64 out;  // elements from y
    i64 width;
    i64 top;  // the row of x that an offset of 0 meets
};

// Numbers in order, each once. Not the library's: its code would be compiled for this instruction set and kept for all.
struct Sorted {
    i64 at[2 * kMaxTaps + 2];
    int n;
    int index(i64 value) const {
        int i = 0;
        while (i < n && at[i] < value) ++i;
        return i;
    }
    void insert(i64 value) {
        const int i = index(value);
        if (i < n && at[i] == value) return;
        for (int j = n++; j > i; --j) at[j] = at[j - 1];
        at[i] = value;
    }
};

struct Layout : WeightsLayout {
    i64 row0, row1, col0, col1;  // the least and greatest tap offsets
    i64 rows_of_taps, plane;     // rows a point reaches over; columns of one residue modulo step_w
    i64 row_floats;
    Sorted offsets;  // of the taps' rows
    // Rows for each of the offsets by themselves: with dilation, points reach over rows that they do not read.
    bool apart;
    i64 strip;      // rows of the grid
    Sorted bounds;  // a row is cut at them, and what lies between two of them evenly
    i64 in_row;     // tiles in a row
};

inline bool meets(i64 first, i64 last, i64 size) { return last >= 0 && first < size; }

// Where the columns [j0, j1) of the grid meet x through a tap.
inline bool tap_meets(const Direct& p, int t, i64 j0, i64 j1) {
    return meets(j0 * p.step_w + p.dc[t], (j1 - 1) * p.step_w + p.dc[t], p.W);
}

// f(first, last) of the tiles of a row: columns, at most kPixels.
template <class F>
FR_INLINE void each_tile(const Sorted& bounds, F f) {
    for (int b = 1; b < bounds.n; ++b) {
        const i64 from = bounds.at[b - 1], length = bounds.at[b] - from, count = ceil_div(length, kPixels);
        for (i64 t = 0; t < count; ++t) f(from + length * t / count, from + length * (t + 1) / count);
    }
}

// Where to cut rows: at none but their ends, or where a tap begins to meet x and where it ends to.
inline Sorted bounds_of(const Direct& p) {
    Sorted ends{}, all{};
    ends.insert(0), ends.insert(p.J);
    if (p.points || p.n_taps == 1) return ends;
    all = ends;
    const auto also = [&](i64 at) {
        if (at > 0 && at < p.J) all.insert(at);
    };
    for (int t = 0; t < p.n_taps; ++t) also(ceil_div(-p.dc[t], p.step_w)), also(ceil_div(p.W - p.dc[t], p.step_w));
    const auto cost = [&](const Sorted& bounds) {
        i64 sum = 0;
        each_tile(bounds, [&](i64 j0, i64 j1) {
            for (int t = 0; t < p.n_taps; ++t)  // a tile of few pixels waits for its weights
                sum += tap_meets(p, t, j0, j1) ? max_of(kFewPixels, j1 - j0) : 0;
        });
        return sum;
    };
    return cost(all) < cost(ends) ? all : ends;
}

// mine: rows of the grid that a thread has.
inline void choose_strip(const Direct& p, i64 mine, Layout& l) {
    const i64 row_bytes = l.row_floats * l.blocks * i64(sizeof(float)), budget = l2_bytes() / 4;
    const i64 reach = max_of(0, l.rows_of_taps - p.step_h), n = l.offsets.n;
    // What the budget holds, borders of images counted as if each had its own.
    i64 strip = max_of(1, budget / max_of(1, row_bytes * p.step_h));
    if (strip < p.I)
        strip = max_of(1, strip - ceil_div(reach, p.step_h));
    else
        strip = max_of(p.I, strip * p.I / (p.I + ceil_div(reach, p.step_h)));
    l.strip = min_of(strip, mine);
    const i64 in_image = min_of(l.strip, p.I);
    l.apart = n * in_image < in_image * p.step_h + reach;
    if (l.apart) l.strip = min_of(max_of(1, budget / max_of(1, row_bytes * n)), mine);
    l.strip = ceil_div(mine, ceil_div(mine, l.strip));
}

// Rows of x that a strip takes at most.
inline i64 strip_rows(const Direct& p, const Layout& l) {
    if (l.apart) return l.strip * l.offsets.n;
    return l.strip * p.step_h + (l.strip / p.I + 2) * l.rows_of_taps;
}

inline Layout layout_of(const Direct& p) {
    Layout l{};
    static_cast<WeightsLayout&>(l) = weights_layout(p);
    l.col0 = l.col1 = p.dc[0];
    for (int t = 0; t < p.n_taps; ++t) {
        l.offsets.insert(p.dr[t]);
        l.col0 = min_of(l.col0, p.dc[t]), l.col1 = max_of(l.col1, p.dc[t]);
    }
    l.row0 = l.offsets.at[0], l.row1 = l.offsets.at[l.offsets.n - 1];
    l.rows_of_taps = l.row1 - l.row0 + 1;
    l.plane = ceil_div((p.J - 1) * p.step_w + l.col1 - l.col0 + 1, p.step_w);
    l.row_floats = l.plane * p.step_w * kBlock;
    l.bounds = bounds_of(p);
    each_tile(l.bounds, [&](i64, i64) { ++l.in_row; });
    return l;
}

// The taps that some pixel of a tile needs, written to `order`: how many; all of them mostly.
inline int needed(const Direct& p, const Layout& l, const Row& r, const Row* second, i64 j0, i64 j1, int* order) {
    const auto within = [&](const Row& row) { return row.top + l.row0 >= 0 && row.top + l.row1 < p.H; };
    const bool inside = j0 * p.step_w + l.col0 >= 0 && (j1 - 1) * p.step_w + l.col1 < p.W;
    if (p.n_taps == 1 || (inside && within(r) && (!second || within(*second)))) return p.n_taps;
    int n = 0;
    for (int t = 0; t < p.n_taps; ++t) {
        const auto in_row = [&](const Row& row) { return meets(row.top + p.dr[t], row.top + p.dr[t], p.H); };
        if ((in_row(r) || (second && in_row(*second))) && tap_meets(p, t, j0, j1)) order[n++] = t;
    }
    return n;
}

}  // namespace
}  // namespace FASTRES_BACKEND
