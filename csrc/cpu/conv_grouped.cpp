// Narrow groups without wasted products: a vector of L outputs is L / width groups, and every product is one of L
// weights with L values of x, lane by lane.
//
// Operand c of a pixel has in lane k the channel channel_of(c, k) of the lane's own group. With channels taken in
// pairs, an operand is the even or the odd lanes of x, doubled, which a load does on its way; for the pairs to meet all
// others of their group, x lies in a row buffer in width / 2 copies whose pairs are exchanged. Of pairs of bfloat16 a
// copy is an operand: in each lane one of the width / 2 pairs of its group. The buffer holds the rows that a row of y
// reads, of one vector, in L1. A sum is held in a register over all taps, an operand over the taps of a row. What
// conv_grouped_inplace.cpp serves needs no buffer.
#include "cpu/conv_grouped.h"

#include "cpu/conv_direct.h"
#include "cpu/conv_grouped_tile.h"

namespace FASTRES_BACKEND {
namespace {

constexpr i64 kMostTiles = 8;      // of a row of y whose rows of x the buffer holds
constexpr i64 kBuffer = 24 << 10;  // bytes of L1 for the buffer

template <class Of>
struct Layout {
    i64 width, copies, vectors, vector_floats;  // of a group; of a row; of all outputs; weights of one
    i64 stride;                                 // of the tile
    i64 tiles, part;                            // of a row of y; of a part of it, for which the buffer holds x
    i64 reach, plane, row_floats;               // rows that a row of y reaches over; pixels and floats of one
    explicit Layout(const ConvShape& g)
        : width(g.C / g.groups),
          copies(width == 1 || width == L ? 1 : width / 2),
          vectors(g.K / L),
          vector_floats(g.R * g.S * width / Of::kChannels * L),
          stride(g.S == 3 && g.dilation_w == 1 && g.stride_w <= 2 ? g.stride_w : 0),
          tiles(ceil_div(g.Q, kMost)),
          reach((g.R - 1) * g.dilation_h + 1) {
        const i64 fit = kBuffer / (reach * copies * L * i64(sizeof(float)) * kMost * g.stride_w);
        part = ceil_div(tiles, ceil_div(tiles, min_of(kMostTiles, max_of(1, fit))));
        plane = (part * kMost - 1) * g.stride_w + (g.S - 1) * g.dilation_w + 1;
        row_floats = copies * plane * L;
    }
};

template <class T, class Of>
class Worker {
  public:
    Worker(const ConvShape& g, const Layout<Of>& l, const T* x, const float* w, const float* bias, const T* residual,
           bool relu, T* y, float* buffer)
        : g_(g), l_(l), x_(x), w_(w), bias_(bias), residual_(residual), relu_(relu), y_(y), buffer_(buffer) {
        for (i64 i = 0; i < (l.reach + 1) * l.row_floats; i += L) store(buffer + i, vf{});
        for (int c = 0; c < (Of::kChannels == 2 ? l.copies : 0); ++c)
            for (int k = 0; k < L; ++k) orders_[c][k] = l.width == L ? k : pair_of(l.width, c, k);
    }

    // Rows [first, last) of the N*P rows of y, vectors [vector0, vector1), `band` rows at a time.
    void run(i64 first, i64 last, i64 vector0, i64 vector1, i64 band) {
        for (i64 r = first, end; r < last; r = end) {
            end = min_of(min_of(last, r + band), (r / g_.P + 1) * g_.P);
            expect(end, min_of(last, end + band), vector0, vector1, (end - r) * (vector1 - vector0));
            for (i64 v = vector0; v < vector1; ++v)
                for (i64 t = 0; t < l_.tiles; t += l_.part)
                    rows(r / g_.P, r % g_.P, r % g_.P + end - r, t, min_of(l_.tiles, t + l_.part), v);
        }
    }

  private:
    // A tile of each row.
    struct Cut {
        GroupedTile<T> tile;
        i64 j0, m;
    };

    // Rows [i0, i1) of an image, tiles [t0, t1) of each.
    void rows(i64 n, i64 i0, i64 i1, i64 t0, i64 t1, i64 v) {
        const i64 tiles = t1 - t0, left = g_.Q * t0 / l_.tiles;
        Cut cuts[kMostTiles];
        for (i64 t = 0; t < tiles; ++t) {
            const i64 j0 = g_.Q * (t0 + t) / l_.tiles, m = g_.Q * (t0 + t + 1) / l_.tiles - j0;
            cuts[t] = {pick(m), j0, m};
        }
        const i64 width = cuts[tiles - 1].j0 + cuts[tiles - 1].m - left, w0 = left * g_.stride_w - g_.pad_w;
        const i64 columns = (width - 1) * g_.stride_w + (g_.S - 1) * g_.dilation_w + 1;
        const float* in_rows[kMaxTaps];
        const Input in{in_rows, g_.R, g_.S, l_.copies, l_.plane * L, g_.stride_w * L, g_.dilation_w * L};
        const float* w = w_ + v * l_.vector_floats;
        const T* const x = x_ + (n * g_.H * g_.W + w0) * g_.C + v * L;
        T* y = y_ + ((n * g_.P + i0) * g_.Q) * g_.K + v * L;
        Output<T> to{y, nullptr, g_.K, bias_ ? load(bias_ + v * L) : vf{}, relu_ ? vf{} : vf{} - __builtin_inff(), 0};

        i64 h0 = i0 * g_.stride_h - g_.pad_h, filled = h0;
        for (i64 i = i0; i < i1; ++i, h0 += g_.stride_h, y += g_.Q * g_.K) {
            for (filled = max_of(filled, h0); filled < h0 + l_.reach; ++filled)
                if (filled >= 0 && filled < g_.H)
                    fill(x + filled * g_.W * g_.C, w0, columns, buffer_ + filled % l_.reach * l_.row_floats);
            for (i64 r = 0; r < g_.R; ++r) {
                const i64 h = h0 + r * g_.dilation_h;
                in_rows[r] = buffer_ + (h >= 0 && h < g_.H ? h % l_.reach : l_.reach) * l_.row_floats;
            }
            for (i64 t = 0; t < tiles; ++t) {
                const Cut& c = cuts[t];
                to.y = y + c.j0 * g_.K, to.m = int(c.m);
                if (residual_) to.residual = residual_ + (to.y - y_);
                for (i64 j = 0; j < c.m; ++j) __builtin_prefetch(to.y + j * g_.K, 1, 3);
                fetch_ahead();
                c.tile(in, (c.j0 - left) * in.step, w, to);
            }
        }
    }

    GroupedTile<T> pick(i64 m) const {
        switch (operand_of<Of>(l_.width)) {
            case Operand::kPlain:
                return tile_of<T, Of, Operand::kPlain>(l_.stride, m);
            case Operand::kPair:
                return tile_of<T, Of, Operand::kPair>(l_.stride, m);
            default:
                return tile_of<T, Of, Operand::kSplat>(l_.stride, m);
        }
    }

    // `columns` pixels from w0 on, zero outside the image.
    void fill(const T* from, i64 w0, i64 columns, float* to) const {
        const i64 first = min_of(columns, max_of(0, -w0)), last = max_of(first, min_of(columns, g_.W - w0));
        const auto all = [&](auto copies) {
            const i64 copy = l_.plane * L, C = g_.C;
            for (i64 c = 0; c < first; ++c) zeros<copies.value>(to + c * L, copy);
            for (i64 c = first; c < last; ++c) spread<copies.value>(to + c * L, copy, from + c * C);
            for (i64 c = last; c < columns; ++c) zeros<copies.value>(to + c * L, copy);
        };
        if (l_.copies == 1)
            all(Constant<1>());
        else if (l_.copies == 2)
            all(Constant<2>());
        else
            all(Constant<4>());
    }
    template <int kCopies>
    FR_INLINE static void zeros(float* to, i64 copy) {
        for (int q = 0; q < kCopies; ++q) store(to + q * copy, vf{});
    }
    template <int kCopies>
    FR_INLINE void spread(float* to, i64 copy, const T* from) const {
        if constexpr (Of::kChannels == 2) {
            const vf pairs = low_half(read<vh>(from));
            for (int q = 0; q < kCopies; ++q) store(to + q * copy, __builtin_shuffle(pairs, orders_[q]));
            return;
        }
        const vf x = load(from);
        store(to, x);
        if constexpr (kCopies >= 2) store(to + copy, exchanged<1>(x));
        if constexpr (kCopies >= 4) {
            const vf far = exchanged<2>(x);
            store(to + 2 * copy, far);
            store(to + 3 * copy, exchanged<1>(far));
        }
    }

    // What the next band reads of x: fetched while this one is worked on, a little with every tile.
    void expect(i64 first, i64 last, i64 vector0, i64 vector1, i64 rows) {
        next_ = end_ = nullptr;
        if (first >= last) return;
        const auto row = [&](i64 r, i64 reach) {
            return r / g_.P * g_.H + min_of(g_.H, max_of(0, r % g_.P * g_.stride_h - g_.pad_h + reach));
        };
        next_ = x_ + row(first, 0) * g_.W * g_.C + vector0 * L;
        end_ = x_ + row(last - 1, l_.reach) * g_.W * g_.C + vector0 * L;
        slice_ = (vector1 - vector0) * L;
        chunk_ = ceil_div((end_ - next_) / g_.C, rows * l_.tiles);
    }
    void fetch_ahead() {
        for (i64 i = 0; i < chunk_ && next_ < end_; ++i, next_ += g_.C)
            for (i64 c = 0; c < slice_; c += 64 / i64(sizeof(T))) __builtin_prefetch(next_ + c, 0, 2);
    }

    const ConvShape& g_;
    const Layout<Of>& l_;
    const T* x_;
    const float *w_, *bias_;
    const T* residual_;
    const bool relu_;
    T* y_;
    float* buffer_;
    vi orders_[4];  // of pairs in each copy
    const T *next_ = nullptr, *end_ = nullptr;
    i64 slice_ = 0, chunk_ = 0;
};

template <class T, class Of>
void run(const ConvShape& g, const T* x, const float* w, const float* bias, const T* residual, bool relu, T* y,
         i64 threads) {
    const Layout<Of> l(g);
    const i64 all_rows = g.N * g.P, parts = vector_parts(threads, all_rows, l.vectors), shares = threads / parts;
    const i64 row_bytes = (g.W * g.stride_h + g.Q) * ceil_div(l.vectors, parts) * L * i64(sizeof(T));
    const i64 mine = ceil_div(all_rows, shares), band = max_of(1, min_of(mine, l2_bytes() / 4 / max_of(1, row_bytes)));
    const i64 even = ceil_div(mine, ceil_div(mine, band));
    const i64 buffer_floats = (l.reach + 1) * l.row_floats;
    const Scratch buffers(threads * buffer_floats * sizeof(float));
    parallel(threads, shares * parts, [&](i64 first, i64 last, int) {
        for (i64 task = first; task < last; ++task) {
            const i64 share = task / parts, part = task % parts;
            Worker<T, Of> worker(g, l, x, w, bias, residual, relu, y,
                                 static_cast<float*>(buffers.get()) + task * buffer_floats);
            worker.run(all_rows * share / shares, all_rows * (share + 1) / shares, l.vectors * part / parts,
                       l.vectors * (part + 1) / parts, even);
        }
    });
}

// [vector][row of taps][operand][tap][L]
template <class T>
void pack(const T* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& g, float* to, i64 threads) {
    const Layout<Floats> l(g);
    const Operand kind = operand_of<Floats>(l.width);
    parallel(threads, l.vectors, [&](i64 first, i64 last, int) {
        for (i64 v = first; v < last; ++v)
            for (i64 r = 0; r < g.R; ++r)
                for (i64 c = 0; c < l.width; ++c)
                    for (i64 t = 0; t < g.S; ++t)
                        for (i64 k = 0; k < L; ++k) {
                            const i64 channel = channel_of(kind, int(c), int(k)) % l.width;
                            const T* from = w + (v * L + k) * w_k + channel * w_c + (r * g.S + t) * w_tap;
                            to[v * l.vector_floats + ((r * l.width + c) * g.S + t) * L + k] = load_part(from, 1)[0];
                        }
    });
}

// [vector][row of taps][copy, or pair of all][tap][L], pairs of bfloat16
void pack_pairs(const float* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& g, float* to, i64 threads) {
    const Layout<Pairs> l(g);
    parallel(threads, l.vectors, [&](i64 first, i64 last, int) {
        for (i64 v = first; v < last; ++v)
            for (i64 r = 0; r < g.R; ++r)
                for (i64 c = 0; c < l.width / 2; ++c)
                    for (i64 t = 0; t < g.S; ++t)
                        for (i64 k = 0; k < L; ++k) {
                            const i64 pair = pair_of(l.width, c, k) % (l.width / 2);
                            const float* from = w + (v * L + k) * w_k + 2 * pair * w_c + (r * g.S + t) * w_tap;
                            write(to + v * l.vector_floats + ((r * l.width / 2 + c) * g.S + t) * L + k,
                                  bf16_pair(from[0], from[w_c]));
                        }
    });
}

}  // namespace

bool grouped_serves(const ConvShape& g, int pairs) {
    if (g.groups <= 1 || g.C != g.K || g.C % L) return false;
    const i64 width = g.C / g.groups;
    return L % width == 0 && (!pairs || width > 1);
}

i64 grouped_packed_floats(const ConvShape& g, int pairs) {
    return g.R * g.S * g.C / g.groups * g.K / (pairs ? Pairs::kChannels : Floats::kChannels);
}

void grouped_pack(int dtype, const void* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& g, int pairs, float* packed,
                  i64 threads) {
    if (pairs) return pack_pairs(static_cast<const float*>(w), w_k, w_c, w_tap, g, packed, max_of(1, threads));
    with_narrow(dtype, [&](auto type) {
        pack(static_cast<const decltype(type)*>(w), w_k, w_c, w_tap, g, packed, max_of(1, threads));
    });
}

void grouped_fprop(int dtype, const void* x, const float* packed, int pairs, const ConvShape& g, const float* bias,
                   const void* residual, bool relu, void* y, i64 threads) {
    if (g.N * g.P * g.Q == 0) return;
    if (grouped_in_place(dtype, g, pairs, residual != nullptr))
        return grouped_in_place_fprop(x, packed, pairs, g, bias, relu, y, max_of(1, threads));
    const auto by = [&]<class T, class Of>(T, Of) {
        run<T, Of>(g, static_cast<const T*>(x), packed, bias, static_cast<const T*>(residual), relu, static_cast<T*>(y),
                   max_of(1, threads));
    };
    if (pairs) return by(bf16(), Pairs());
    with_narrow(dtype, [&](auto type) { by(type, Floats()); });
}

}  // namespace FASTRES_BACKEND
