// How conv_direct.cpp lays a strip of x out, cuts rows into tiles, and which taps a tile needs.
#pragma once
#include <algorithm>
#include <vector>

#include "cpu/conv_direct.h"
#include "cpu/conv_tile.h"

namespace FASTRES_BACKEND {
namespace {

// A row of the grid in a strip.
struct Row {
    const float* in;
    i64 out;  // elements from y
    i64 width;
    i64 top;  // the row of x that an offset of 0 meets
};

struct Layout : WeightsLayout {
    i64 row0, row1, col0, col1;  // the least and greatest tap offsets
    i64 rows_of_taps, plane;     // rows a point reaches over; columns of one residue modulo step_w
    i64 row_floats;
    std::vector<i64> offsets;  // of the taps' rows, each once
    std::vector<i64> cuts;     // where tiles begin and end in a row
    // Rows for each of the offsets by themselves: with dilation, points reach over rows that they do not read.
    bool apart;
    i64 strip;  // rows of the grid
    bool borders;

    i64 slot(i64 offset) const { return std::lower_bound(offsets.begin(), offsets.end(), offset) - offsets.begin(); }
};

inline bool meets(i64 first, i64 last, i64 size) { return last >= 0 && first < size; }

// Where the columns [j0, j1) of the grid meet x through a tap.
inline bool tap_meets(const Direct& p, int t, i64 j0, i64 j1) {
    return meets(j0 * p.step_w + p.dc[t], (j1 - 1) * p.step_w + p.dc[t], p.W);
}

// Tiles of at most kPixels, each stretch between two of `bounds` cut evenly.
inline std::vector<i64> cut(const std::vector<i64>& bounds) {
    std::vector<i64> cuts{0};
    for (std::size_t b = 1; b < bounds.size(); ++b) {
        const i64 from = bounds[b - 1], length = bounds[b] - from, count = ceil_div(length, kPixels);
        for (i64 t = 1; t <= count; ++t) cuts.push_back(from + length * t / count);
    }
    return cuts;
}

inline std::vector<i64> columns(const Direct& p) {
    const std::vector<i64> even = cut({0, p.J});
    if (p.points || p.n_taps == 1) return even;
    // Or cut where a tap begins to meet x, and where it ends to.
    std::vector<i64> bounds{0, p.J};
    for (int t = 0; t < p.n_taps; ++t)
        for (const i64 at : {ceil_div(-p.dc[t], p.step_w), ceil_div(p.W - p.dc[t], p.step_w)})
            if (at > 0 && at < p.J) bounds.push_back(at);
    std::sort(bounds.begin(), bounds.end());
    bounds.erase(std::unique(bounds.begin(), bounds.end()), bounds.end());
    const std::vector<i64> other = cut(bounds);
    const auto cost = [&](const std::vector<i64>& cuts) {
        i64 sum = 0;
        for (std::size_t c = 1; c < cuts.size(); ++c)
            for (int t = 0; t < p.n_taps; ++t)  // a tile of few pixels waits for its weights
                sum += tap_meets(p, t, cuts[c - 1], cuts[c]) ? max_of(kPanel / L * 2, cuts[c] - cuts[c - 1]) : 0;
        return sum;
    };
    return cost(other) < cost(even) ? other : even;
}

// mine: rows of the grid that a thread has.
inline void choose_strip(const Direct& p, i64 mine, Layout& l) {
    const i64 row_bytes = l.row_floats * l.blocks * i64(sizeof(float)), budget = l2_bytes() / 4;
    const i64 reach = max_of(0, l.rows_of_taps - p.step_h), n = i64(l.offsets.size());
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
    if (l.apart) return l.strip * i64(l.offsets.size());
    return l.strip * p.step_h + (l.strip / p.I + 2) * l.rows_of_taps;
}

inline Layout layout_of(const Direct& p) {
    Layout l{};
    static_cast<WeightsLayout&>(l) = weights_layout(p);
    l.offsets.assign(p.dr, p.dr + p.n_taps);
    std::sort(l.offsets.begin(), l.offsets.end());
    l.offsets.erase(std::unique(l.offsets.begin(), l.offsets.end()), l.offsets.end());
    l.row0 = l.offsets.front(), l.row1 = l.offsets.back();
    l.col0 = *std::min_element(p.dc, p.dc + p.n_taps), l.col1 = *std::max_element(p.dc, p.dc + p.n_taps);
    l.rows_of_taps = l.row1 - l.row0 + 1;
    l.plane = ceil_div((p.J - 1) * p.step_w + l.col1 - l.col0 + 1, p.step_w);
    l.row_floats = l.plane * p.step_w * kBlock;
    l.cuts = columns(p);
    l.borders = p.n_taps > 1;
    return l;
}

// The taps that some pixel of a tile needs, written to `order`: how many; all of them mostly.
inline int needed(const Direct& p, const Layout& l, const Row& r, const Row* second, i64 j0, i64 j1, int* order) {
    const auto within = [&](const Row& row) { return row.top + l.row0 >= 0 && row.top + l.row1 < p.H; };
    const bool inside = j0 * p.step_w + l.col0 >= 0 && (j1 - 1) * p.step_w + l.col1 < p.W;
    if (!l.borders || (inside && within(r) && (!second || within(*second)))) return p.n_taps;
    int n = 0;
    for (int t = 0; t < p.n_taps; ++t) {
        const auto in_row = [&](const Row& row) { return meets(row.top + p.dr[t], row.top + p.dr[t], p.H); };
        if ((in_row(r) || (second && in_row(*second))) && tap_meets(p, t, j0, j1)) order[n++] = t;
    }
    return n;
}

}  // namespace
}  // namespace FASTRES_BACKEND
