// Convolutions tile by tile: a strip of x is laid out in blocks of channels with its border (and widened to float32, or
// as pairs of bfloat16), small enough to stay in L2; tiles of pixels then pass over the panels of the packed weights.
#include "cpu/conv_direct.h"

#include "cpu/conv.h"
#include "cpu/conv_direct_layout.h"

namespace FASTRES_BACKEND {
namespace {

// Panels that a tile of pixels passes over in a row, and the part of L2 their weights may take: few, or there is no
// time to fetch the next ones in.
constexpr i64 kGroup = 8, kGroupShare = 24;

// One pixel: its channels [c0, c0 + kBlock) of each block, the last one filled up with zeros.
template <class Of, class T>
FR_INLINE void pack_pixel(const T* x, i64 C, float* to, i64 block) {
    if constexpr (Of::kChannels == 2) {
        i64 c = 0;
        for (; c + 2 * kBlock <= C; c += 2 * kBlock, to += block)
            for (int v = 0; v < kBlock; v += L) write(to + v, read<vf>(x + c + 2 * v));
        if (c < C) {
            for (int v = 0; v < kBlock; v += L) store(to + v, vf{});
            __builtin_memcpy(to, x + c, (C - c) * sizeof(T));
        }
        return;
    }
    i64 c = 0;
    for (; c + kBlock <= C; c += kBlock, to += block)
        for (int v = 0; v < kBlock; v += L) store(to + v, load(x + c + v));
    for (int v = 0; c < C; c += L, v += L) {
        const int n = int(min_of(L, C - c));
        store(to + v, n == L ? load(x + c) : load_part(x + c, n));
        if (L < kBlock && v == 0 && c + L >= C) store(to + L, vf{});
    }
}

template <class T, class Of>
class Worker {
    using AllTiles = TilesOf<Of>;

  public:
    Worker(const Direct& p, const Layout& l, const float* w, float* strip, Row* rows, i64* taps)
        : p_(p), l_(l), w_(w), strip_(strip), rows_(rows), taps_(taps) {}

    // Rows [first, last) of the N*I rows of the grid, panels [panel0, panel1).
    void run(i64 first, i64 last, i64 panel0, i64 panel1, i64 strip_points) {
        for (i64 r = first; r < last;) {
            const i64 end = min_of(last, r + strip_points);
            fill(r, end);
            expect(end, min_of(last, end + strip_points));
            compute(end - r, panel0, panel1);
            r = end;
        }
    }

  private:
    void fill(i64 first, i64 last) {
        const i64 slot = l_.apart ? fill_apart(first, last) : fill_together(first, last);
        for (int t = 0; t < p_.n_taps; ++t) {
            const i64 c = p_.dc[t] - l_.col0, row = l_.apart ? l_.offsets.index(p_.dr[t]) * slot : p_.dr[t] - l_.row0;
            taps_[t] = row * l_.row_floats + (c % p_.step_w * l_.plane + c / p_.step_w) * kBlock;
        }
    }

    // For each row of the grid the rows of x that it reads, those of one offset together; the rows of one offset.
    i64 fill_apart(i64 first, i64 last) {
        const i64 slot = last - first, offsets = l_.offsets.n;
        set_block(slot * offsets);
        for (i64 r = first; r < last; ++r) {
            float* const to = strip_ + (r - first) * l_.row_floats;
            rows_[r - first] = row(r, to);
            for (i64 k = 0; k < offsets; ++k)
                fill_row(r / p_.I, rows_[r - first].top + l_.offsets.at[k], to + k * slot * l_.row_floats);
        }
        return slot;
    }

    i64 fill_together(i64 first, i64 last) {
        i64 all = 0;
        // The same rows are laid out for all blocks.
        for (i64 r = first, n; r < last; r += n) {
            n = min_of(last - r, p_.I - r % p_.I);
            all += (n - 1) * p_.step_h + l_.rows_of_taps;
        }
        set_block(all);
        float* to = strip_;
        for (i64 r = first, n; r < last; r += n) {
            const i64 i0 = r % p_.I;
            n = min_of(last - r, p_.I - i0);
            const i64 height = (n - 1) * p_.step_h + l_.rows_of_taps;
            for (i64 h = 0; h < height; ++h)
                if (row_used(h)) fill_row(r / p_.I, i0 * p_.step_h + l_.row0 + h, to + h * l_.row_floats);
            for (i64 i = 0; i < n; ++i) rows_[r - first + i] = row(r + i, to + i * p_.step_h * l_.row_floats);
            to += height * l_.row_floats;
        }
        return 1;
    }

    // The distance of two blocks: an odd number of lines, or the blocks of a pixel would share few cache sets.
    void set_block(i64 rows) { block_ = (rows * l_.row_floats / kBlock | 1) * kBlock; }

    Row row(i64 r, const float* in) const {
        const i64 i = r % p_.I, left = p_.points ? p_.points - i * p_.J : p_.J;
        return {in, r / p_.I * p_.y_n + i * p_.y_i, min_of(p_.J, left), i * p_.step_h};
    }

    // The part of x that the next strip reads: fetched while this one is worked on, a little with every tile.
    void expect(i64 first, i64 last) {
        next_ = end_ = nullptr;
        if (first >= last || l_.apart) return;
        const i64 W = p_.W * p_.C, all = p_.N * p_.H;
        const i64 h0 = first / p_.I * p_.H + max_of(0, first % p_.I * p_.step_h + l_.row0);
        const i64 h1 =
            (last - 1) / p_.I * p_.H + min_of(p_.H, (last - 1) % p_.I * p_.step_h + l_.row0 + l_.rows_of_taps);
        const char* x = static_cast<const char*>(p_.x);
        next_ = x + min_of(h0, all) * W * i64(sizeof(T));
        end_ = x + (p_.points ? min_of(h1 * W, p_.points * p_.C) : min_of(h1, all) * W) * i64(sizeof(T));
    }

    // Whether some tap reads this row of a strip, or this residue of the columns.
    bool row_used(i64 h) const { return used(p_.dr, l_.row0, p_.step_h, h); }
    bool phase_used(i64 phase) const { return used(p_.dc, l_.col0, p_.step_w, phase); }
    bool used(const i64* offsets, i64 least, i64 step, i64 at) const {
        if (step == 1) return true;
        for (int t = 0; t < p_.n_taps; ++t)
            if ((at - (offsets[t] - least)) % step == 0) return true;
        return false;
    }

    void fill_row(i64 image, i64 h, float* to) {
        const bool inside = h >= 0 && h < p_.H;
        const i64 W = p_.points ? min_of(p_.W, p_.points - h * p_.W) : p_.W;
        const T* from = static_cast<const T*>(p_.x) + (image * p_.H + h) * p_.W * p_.C;
        for (i64 phase = 0; phase < p_.step_w; ++phase) {
            if (!phase_used(phase)) {
                to += l_.plane * kBlock;
                continue;
            }
            for (i64 q = 0; q < l_.plane; ++q, to += kBlock) {
                const i64 c = q * p_.step_w + phase + l_.col0;
                if (inside && c >= 0 && c < W) {
                    pack_pixel<Of>(from + c * p_.C, p_.C, to, block_);
                } else {
                    for (i64 b = 0; b < l_.blocks; ++b)
                        for (int v = 0; v < kBlock; v += L) store(to + b * block_ + v, vf{});
                }
            }
        }
    }

    void compute(i64 n_rows, i64 panel0, i64 panel1) {
        TileInput in{taps_, p_.n_taps, l_.in_blocks, block_, l_.last_width};
        in.all_taps = p_.n_taps;
        const i64 panel_bytes = l_.panel_floats * i64(sizeof(float));
        const i64 fit = max_of(1, l2_bytes() / kGroupShare / panel_bytes), step = min_of(kGroup, fit);
        const bool pairs = p_.J <= kWide && !p_.points;
        const i64 passes = pairs ? ceil_div(n_rows, 2) : n_rows * l_.in_row;
        const i64 tiles = ceil_div(panel1 - panel0, step) * n_rows * l_.in_row;
        chunk_ = next_ ? ceil_div(end_ - next_, Expected::kBytes * max_of(1, tiles)) * Expected::kBytes : 0;
        const bool resident = (panel1 - panel0) * panel_bytes <= l2_bytes() / 3;
        for (i64 g0 = panel0, g1; g0 < panel1; g0 = g1) {
            g1 = min_of(panel1, g0 + step);
            coming(g1 < panel1 ? g1 : next_ && !resident ? panel0 : panel1, panel1, step, passes - !warm_, g1 - g0);
            cold_ = warm_ ? 0 : g1 - g0;
            warm_ = lines_ > 0 || (g1 == panel1 && resident);
            if (pairs) {
                for (i64 r = 0; r < n_rows; r += 2) {
                    const bool two = r + 1 < n_rows;
                    group(in, rows_[r], two ? &rows_[r + 1] : nullptr, 0, p_.J, g0, g1);
                }
                continue;
            }
            for (i64 r = 0; r < n_rows; ++r)
                each_tile(l_.bounds, [&](i64 j0, i64 j1) {
                    group(in, rows_[r], nullptr, j0, min_of(j1, rows_[r].width), g0, g1);
                });
        }
    }

    // The weights of the panels from g on are to be fetched during some passes over a group of panels.
    void coming(i64 g, i64 end, i64 step, i64 passes, i64 panels) {
        ahead_ = w_ + g * l_.panel_floats;
        ahead_end_ = w_ + min_of(end, g + step) * l_.panel_floats;
        const i64 steps = l_.panel_floats / (kStep * kPanel) * passes * panels;
        lines_ =
            steps && ahead_ < ahead_end_ ? int(min_of(kOwnLines, ceil_div((ahead_end_ - ahead_) / kLine, steps))) : 0;
    }

    void fetch(TileInput& in, const float* w) {
        if (cold_ > 0 || lines_ == 0) {
            in.ahead = w + kAhead;
            in.lines = kOwnLines;
            --cold_;
            return;
        }
        in.ahead = ahead_;
        in.lines = lines_;
        ahead_ += l_.panel_floats / (kStep * kPanel) * in.lines * kLine;
    }

    void group(TileInput& in, const Row& r, const Row* second, i64 j0, i64 j1, i64 g0, i64 g1) {
        const i64 m = j1 - j0;
        in.n_taps = needed(p_, l_, r, second, j0, j1, order_);
        in.order = in.n_taps < p_.n_taps ? order_ : nullptr;
        const i64 steps = l_.panel_floats / (kStep * kPanel);
        const char* const next = end_ - next_ < chunk_ ? end_ : next_ + chunk_;
        expected_.next = next_, expected_.end = next_ = next;
        expected_.further =
            Expected::kBytes * min_of(Expected::kMost, ceil_div(chunk_ / Expected::kBytes, steps * (g1 - g0)));
        expected_.each = ceil_div(2 * m, steps);
        in.expected = &expected_;
        const i64 y0 = r.out + j0 * p_.y_j, y1 = second ? second->out : 0;
        for (i64 g = g0; g < g1; ++g) {
            // The lines that will be written, and what is added, on their way while the sums are made.
            expect_output(y0 + g * kPanel, second && y1 == y0 + m * p_.y_j ? 2 * m : m);
            const float* w = w_ + g * l_.panel_floats;
            fetch(in, w);
            const i64 reads = g * kPanel / l_.inputs * l_.inputs;  // the panel's first channel
            const i64 block = p_.groups > 1 ? reads / (kBlock * Of::kChannels) * block_ : 0;
            const float *a0 = r.in + j0 * kBlock + block, *a1 = second ? second->in + block : a0;
            const i64 k = g * kPanel;
            if (k + kPanel <= p_.K) {
                T* const y = static_cast<T*>(p_.y) + k;
                const T* const res = p_.residual ? static_cast<const T*>(p_.residual) + k : nullptr;
                const TileOutput<T> out{y + y0,
                                        y + y1,
                                        res ? res + y0 : nullptr,
                                        res ? res + y1 : nullptr,
                                        p_.y_j,
                                        p_.bias ? p_.bias + k : nullptr,
                                        p_.relu};
                (second ? AllTiles::template two_to<T>(m) : AllTiles::template one_to<T>(m))(in, a0, a1, w, out);
                continue;
            }
            alignas(64) float sums[kSums];
            (second ? AllTiles::two(m) : AllTiles::one(m))(in, a0, a1, w, sums, kPanel);
            write(sums, y0, m, k);
            if (second) write(sums + m * kPanel, y1, m, k);
        }
    }

    void expect_output(i64 at, i64 m) {
        const T* const y = static_cast<const T*>(p_.y) + at;
        expected_.y = reinterpret_cast<const char*>(y);
        expected_.residual = reinterpret_cast<const char*>(p_.residual ? static_cast<const T*>(p_.residual) + at : y);
        expected_.pitch = p_.y_j * i64(sizeof(T)), expected_.left = m;
        expected_.second = max_of(0, kPanel * i64(sizeof(T)) - Expected::kBytes);
    }

    // The last panel, of fewer channels.
    void write(const float* sums, i64 out, i64 m, i64 k0) {
        T* y = static_cast<T*>(p_.y) + out;
        const T* r = p_.residual ? static_cast<const T*>(p_.residual) + out : nullptr;
        for (i64 i = 0; i < m; ++i, sums += kPanel, y += p_.y_j, r += r ? p_.y_j : 0) {
            const i64 k1 = min_of(k0 + kPanel, p_.K);  // further panels may be another thread's
            i64 k = k0;
            for (; k + L <= k1; k += L) write_part(sums + k - k0, y, r, k, Full());
            if (k < k1) write_part(sums + k - k0, y, r, k, Tail{int(k1 - k), false});
        }
    }

    template <class Span>
    FR_INLINE void write_part(const float* sums, T* y, const T* r, i64 k, Span span) {
        vf v = load(sums);
        if (p_.bias) v += span.load(p_.bias + k);
        if (r) v += span.load(r + k);
        if (p_.relu) v = at_least(v, vf{});
        span.store(y + k, v);
    }

    const Direct& p_;
    const Layout& l_;
    const float* const w_;
    float* const strip_;
    Row* const rows_;
    i64* const taps_;
    int order_[kMaxTaps];
    i64 block_ = 0, chunk_ = 0, cold_ = 0;
    bool warm_ = false;
    const float *ahead_ = nullptr, *ahead_end_ = nullptr;
    int lines_ = 0;
    Expected expected_;
    const char *next_ = nullptr, *end_ = nullptr;
};

// y where no tap reaches.
template <class T>
void fill_zero(const Direct& p, i64 threads) {
    parallel(threads, p.N * p.I, [&](i64 first, i64 last, int) {
        for (i64 row = first; row < last; ++row) {
            T* y = static_cast<T*>(p.y) + row / p.I * p.y_n + row % p.I * p.y_i;
            for (i64 j = 0; j < p.J; ++j) __builtin_memset(y + j * p.y_j, 0, p.K * sizeof(T));
        }
    });
}

template <class T, class Of>
void run(int dtype, const Direct& p, i64 threads) {
    if (p.n_taps == 0) return fill_zero<T>(p, threads);
    Layout l = layout_of(p);
    const Scratch weights(p.packed ? 0 : l.panels * l.panel_floats * sizeof(float));
    const float* w = p.packed;
    if (!w) {
        pack_direct(dtype, p, static_cast<float*>(weights.get()), threads);
        w = static_cast<const float*>(weights.get());
    }

    // Threads share the rows, and the panels where the weights are the larger traffic.
    const i64 all_rows = p.N * p.I;
    i64 row_parts = threads, panel_parts = 1;
    const i64 x_bytes = p.N * p.H * p.W * p.C, w_bytes = l.panels * l.panel_floats;
    double least = -1;
    for (i64 parts = 1; parts <= threads; ++parts) {
        if (threads % parts || parts > l.panels) continue;
        const i64 rows = threads / parts;
        const double work = double(ceil_div(l.panels, parts)) * double(ceil_div(all_rows, rows));
        const double cost = work * p.J * kPanel * p.n_taps * double(l.inputs) / Of::kChannels +
                            32.0 * double(x_bytes) * parts + 8.0 * double(w_bytes) * rows;
        if (least < 0 || cost < least) least = cost, row_parts = rows, panel_parts = parts;
    }

    choose_strip(p, ceil_div(all_rows, row_parts), l);
    const i64 strip_floats =
        scratch_pitch((strip_rows(p, l) * l.row_floats + kBlock) * l.blocks * i64(sizeof(float))) / i64(sizeof(float));
    const Scratch strips(threads * strip_floats * sizeof(float)), rows(threads * l.strip * sizeof(Row));

    parallel(threads, row_parts * panel_parts, [&](i64 first, i64 last, int) {
        for (i64 task = first; task < last; ++task) {
            i64 taps[kMaxTaps];
            const i64 r = task / panel_parts, g = task % panel_parts;
            Worker<T, Of> worker(p, l, w, static_cast<float*>(strips.get()) + task * strip_floats,
                                 static_cast<Row*>(rows.get()) + task * l.strip, taps);
            worker.run(all_rows * r / row_parts, all_rows * (r + 1) / row_parts, l.panels * g / panel_parts,
                       l.panels * (g + 1) / panel_parts, l.strip);
        }
    });
}

}  // namespace

void direct(int dtype, const Direct& p, i64 threads) {
    if (p.N * p.I * p.J == 0 || p.K == 0) return;
    if (p.pairs) return run<bf16, Pairs>(dtype, p, max_of(1, threads));
    with_narrow(dtype, [&](auto type) { run<decltype(type), Floats>(dtype, p, max_of(1, threads)); });
}

}  // namespace FASTRES_BACKEND
