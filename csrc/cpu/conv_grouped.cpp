// Narrow groups without wasted products: a vector of L outputs is L / width groups, and every product is one of L
// weights with L values of x, lane by lane.
//
// Operand c of a pixel has in lane k the channel channel_of(c, k) of the lane's own group. With channels taken in
// pairs, an operand is the even or the odd lanes of x, doubled, which a load does on its way; for the pairs to meet all
// others of their group, x lies in a row buffer in width / 2 copies whose pairs are exchanged. The buffer holds the
// rows that a row of y reads, of one vector, in L1. A sum is held in a register over all taps, an operand over the taps
// of a row.
#include "cpu/conv_grouped.h"

#include "cpu/conv_direct.h"
#include "cpu/isa/rows.h"

namespace FASTRES_BACKEND {
namespace {

constexpr i64 kMostTiles = 8;             // of a row of y whose rows of x the buffer holds
constexpr i64 kBuffer = 24 << 10;         // bytes of L1 for the buffer
constexpr int kMost = L == 16 ? 14 : 10;  // pixels of a tile

enum class Operand { kPlain, kPair, kSplat };  // of groups of one channel, of fewer than L, of L

Operand operand_of(i64 width) { return width == 1 ? Operand::kPlain : width == L ? Operand::kSplat : Operand::kPair; }
// Of the lanes of x, for output lane k.
int channel_of(Operand kind, int c, int k) {
    return kind == Operand::kPlain ? k : kind == Operand::kSplat ? c : ((k / 2) ^ (c / 2)) * 2 + c % 2;
}

template <int kOdd>
FR_INLINE vf doubled(const float* p) {
#if defined(__AVX512F__)
    // Not the intrinsic: GCC loads once for both, and then the shuffles take the turns of products.
    __m512 v;
    if (kOdd)
        asm("vmovshdup %1, %0" : "=v"(v) : "m"(*reinterpret_cast<const __m512*>(p)));
    else
        asm("vmovsldup %1, %0" : "=v"(v) : "m"(*reinterpret_cast<const __m512*>(p)));
    return (vf)v;
#elif defined(__AVX2__) && FASTRES_WIDTH == 8
    __m256 v;
    if (kOdd)
        asm("vmovshdup %1, %0" : "=x"(v) : "m"(*reinterpret_cast<const __m256*>(p)));
    else
        asm("vmovsldup %1, %0" : "=x"(v) : "m"(*reinterpret_cast<const __m256*>(p)));
    return (vf)v;
#else
    vf v;
    for (int i = 0; i < L; ++i) v[i] = p[i / 2 * 2 + kOdd];
    return v;
#endif
}

// Pairs of lanes exchanged with those at a distance of kPairs, a power of two.
template <int kPairs>
FR_INLINE vf exchanged(vf v) {
    vi order;
    for (int i = 0; i < L; ++i) order[i] = i ^ (kPairs * 2);
    return __builtin_shuffle(v, order);
}

struct Input {
    const float* const* rows;  // the first pixel of each row of taps
    i64 R, S, copies;
    i64 copy, step, dilation;  // floats between copies of a row, pixels of a row, taps
};

template <class T>
struct Output {
    T* y;
    const T* residual;  // or null
    i64 pitch;          // from one pixel to the next
    vf bias, floor;
    int m;  // pixels that exist
};

template <Operand kKind, int kAt>
FR_INLINE vf operand(const float* p) {
    if constexpr (kKind == Operand::kPair)
        return doubled<kAt>(p);
    else if constexpr (kKind == Operand::kPlain)
        return load(p);
    else
        return splat(p + kAt);
}

// Operand kAt of the pixels at p, with all taps of a row: those of kStride apart that a pixel meets.
template <Operand kKind, int kAt, int M, int kStride>
FR_INLINE void three_taps(const float* p, const float* w, vf (&s)[M]) {
    const vf w0 = load(w), w1 = load(w + L), w2 = load(w + 2 * L);
#pragma GCC unroll 32
    for (int j = 0; j < (M - 1) * kStride + 3; ++j) {
        const vf v = operand<kKind, kAt>(p + j * L);
        if (j % kStride == 0 && j / kStride < M) s[j / kStride] = fma(v, w0, s[j / kStride]);
        if (j >= 1 && (j - 1) % kStride == 0 && (j - 1) / kStride < M)
            s[(j - 1) / kStride] = fma(v, w1, s[(j - 1) / kStride]);
        if (j >= 2 && (j - 2) % kStride == 0) s[(j - 2) / kStride] = fma(v, w2, s[(j - 2) / kStride]);
    }
}
template <Operand kKind, int kAt, int M>
FR_INLINE void one_tap(const float* p, i64 step, const float* w, vf (&s)[M]) {
    const vf weight = load(w);
#pragma GCC unroll 14
    for (int i = 0; i < M; ++i, p += step) s[i] = fma(operand<kKind, kAt>(p), weight, s[i]);
}

// kStride: of three taps that follow each other, or 0 for any others.
template <class T, Operand kKind, int kStride, int M>
void tile(const Input& in, i64 at, const float* w, const Output<T>& out) {
    vf s[M];
#pragma GCC unroll 14
    for (int i = 0; i < M; ++i) s[i] = vf{};
    for (i64 r = 0; r < in.R; ++r) {
        const float* p = in.rows[r] + at;
        const auto taps = [&]<int kAt>(Constant<kAt>) __attribute__((always_inline)) {
            if constexpr (kStride) {
                three_taps<kKind, kAt, M, kStride>(p, w, s);
            } else {
                for (i64 t = 0; t < in.S; ++t) one_tap<kKind, kAt, M>(p + t * in.dilation, in.step, w + t * L, s);
            }
            w += in.S * L;
        };
        if constexpr (kKind == Operand::kPlain) {
            taps(Constant<0>());
        } else if constexpr (kKind == Operand::kPair) {
            for (i64 q = 0; q < in.copies; ++q, p += in.copy) taps(Constant<0>()), taps(Constant<1>());
        } else {
            for (int c = 0; c < L; c += 2, p += 2) taps(Constant<0>()), taps(Constant<1>());
        }
    }
#pragma GCC unroll 14
    for (int i = 0; i < M; ++i) {
        if (i >= out.m) break;
        vf v = s[i] + out.bias;
        if (out.residual) v += load(out.residual + i * out.pitch);
        store(out.y + i * out.pitch, at_least(v, out.floor));
    }
}

template <class T>
using Tile = void (*)(const Input&, i64, const float*, const Output<T>&);

// The tile of at least m pixels.
template <class T, Operand kKind, int kStride>
Tile<T> tile_of(i64 m) {
    if (m <= 2) return tile<T, kKind, kStride, 2>;
    if (m <= 4) return tile<T, kKind, kStride, 4>;
    if (m <= 7) return tile<T, kKind, kStride, 7>;
#if FASTRES_WIDTH == 16
    if (m <= 9) return tile<T, kKind, kStride, 9>;
    if (m <= 11) return tile<T, kKind, kStride, 11>;
#endif
    return tile<T, kKind, kStride, kMost>;
}
template <class T, Operand kKind>
Tile<T> tile_of(i64 stride, i64 m) {
    return stride == 1 ? tile_of<T, kKind, 1>(m) : stride == 2 ? tile_of<T, kKind, 2>(m) : tile_of<T, kKind, 0>(m);
}

struct Layout {
    i64 width, copies, vectors, vector_floats;  // of a group; of a row; of all outputs; weights of one
    i64 stride;                                 // of the tile
    i64 tiles, part;                            // of a row of y; of a part of it, for which the buffer holds x
    i64 reach, plane, row_floats;               // rows that a row of y reaches over; pixels and floats of one
    explicit Layout(const ConvShape& g)
        : width(g.C / g.groups),
          copies(operand_of(width) == Operand::kPair ? width / 2 : 1),
          vectors(g.K / L),
          vector_floats(g.R * g.S * width * L),
          stride(g.S == 3 && g.dilation_w == 1 && g.stride_w <= 2 ? g.stride_w : 0),
          tiles(ceil_div(g.Q, kMost)),
          reach((g.R - 1) * g.dilation_h + 1) {
        const i64 fit = kBuffer / (reach * copies * L * i64(sizeof(float)) * kMost * g.stride_w);
        part = ceil_div(tiles, ceil_div(tiles, min_of(kMostTiles, max_of(1, fit))));
        plane = (part * kMost - 1) * g.stride_w + (g.S - 1) * g.dilation_w + 1;
        row_floats = copies * plane * L;
    }
};

template <class T>
class Worker {
  public:
    Worker(const ConvShape& g, const Layout& l, const T* x, const float* w, const float* bias, const T* residual,
           bool relu, T* y, float* buffer)
        : g_(g), l_(l), x_(x), w_(w), bias_(bias), residual_(residual), relu_(relu), y_(y), buffer_(buffer) {
        for (i64 i = 0; i < (l.reach + 1) * l.row_floats; i += L) store(buffer + i, vf{});
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
        Tile<T> tile;
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

    Tile<T> pick(i64 m) const {
        switch (operand_of(l_.width)) {
            case Operand::kPlain:
                return tile_of<T, Operand::kPlain>(l_.stride, m);
            case Operand::kPair:
                return tile_of<T, Operand::kPair>(l_.stride, m);
            default:
                return tile_of<T, Operand::kSplat>(l_.stride, m);
        }
    }

    // `columns` pixels from w0 on, zero outside the image.
    void fill(const T* from, i64 w0, i64 columns, float* to) const {
        const i64 first = min_of(columns, max_of(0, -w0)), last = max_of(first, min_of(columns, g_.W - w0));
        const auto all = [&](auto copies) {
            const i64 copy = l_.plane * L, C = g_.C;
            for (i64 c = 0; c < first; ++c) spread<copies.value>(to + c * L, copy, vf{});
            for (i64 c = first; c < last; ++c) spread<copies.value>(to + c * L, copy, load(from + c * C));
            for (i64 c = last; c < columns; ++c) spread<copies.value>(to + c * L, copy, vf{});
        };
        if (l_.copies == 1)
            all(Constant<1>());
        else if (l_.copies == 2)
            all(Constant<2>());
        else
            all(Constant<4>());
    }
    template <int kCopies>
    FR_INLINE static void spread(float* to, i64 copy, vf x) {
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
    const Layout& l_;
    const T* x_;
    const float *w_, *bias_;
    const T* residual_;
    const bool relu_;
    T* y_;
    float* buffer_;
    const T *next_ = nullptr, *end_ = nullptr;
    i64 slice_ = 0, chunk_ = 0;
};

template <class T>
void run(const ConvShape& g, const T* x, const float* w, const float* bias, const T* residual, bool relu, T* y,
         i64 threads) {
    const Layout l(g);
    // Threads share the rows, or the vectors where those come out more evenly.
    const i64 all_rows = g.N * g.P;
    i64 parts = 1, least = 0;
    for (i64 of = 1; of <= min_of(threads, l.vectors); ++of) {
        if (threads % of) continue;
        const i64 work = ceil_div(l.vectors, of) * ceil_div(all_rows, threads / of);
        if (of == 1 || work * 33 < least * 32) least = work, parts = of;
    }
    const i64 shares = threads / parts;
    const i64 row_bytes = (g.W * g.stride_h + g.Q) * ceil_div(l.vectors, parts) * L * i64(sizeof(T));
    const i64 mine = ceil_div(all_rows, shares), band = max_of(1, min_of(mine, l2_bytes() / 4 / max_of(1, row_bytes)));
    const i64 even = ceil_div(mine, ceil_div(mine, band));
    const i64 buffer_floats = (l.reach + 1) * l.row_floats;
    const Scratch buffers(threads * buffer_floats * sizeof(float));
    parallel(threads, shares * parts, [&](i64 first, i64 last, int) {
        for (i64 task = first; task < last; ++task) {
            const i64 share = task / parts, part = task % parts;
            Worker<T> worker(g, l, x, w, bias, residual, relu, y,
                             static_cast<float*>(buffers.get()) + task * buffer_floats);
            worker.run(all_rows * share / shares, all_rows * (share + 1) / shares, l.vectors * part / parts,
                       l.vectors * (part + 1) / parts, even);
        }
    });
}

// [vector][row of taps][operand][tap][L]
template <class T>
void pack(const T* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& g, float* to, i64 threads) {
    const Layout l(g);
    const Operand kind = operand_of(l.width);
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

}  // namespace

bool grouped_serves(const ConvShape& g) {
    if (g.groups <= 1 || g.C != g.K || g.C % L) return false;
    return L % (g.C / g.groups) == 0;
}

i64 grouped_packed_floats(const ConvShape& g) { return g.R * g.S * g.C / g.groups * g.K; }

void grouped_pack(int dtype, const void* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& g, float* packed,
                  i64 threads) {
    with_narrow(dtype, [&](auto type) {
        pack(static_cast<const decltype(type)*>(w), w_k, w_c, w_tap, g, packed, max_of(1, threads));
    });
}

void grouped_fprop(int dtype, const void* x, const float* packed, const ConvShape& g, const float* bias,
                   const void* residual, bool relu, void* y, i64 threads) {
    if (g.N * g.P * g.Q == 0) return;
    with_narrow(dtype, [&](auto type) {
        using T = decltype(type);
        run(g, static_cast<const T*>(x), packed, bias, static_cast<const T*>(residual), relu, static_cast<T*>(y),
            max_of(1, threads));
    });
}

}  // namespace FASTRES_BACKEND
