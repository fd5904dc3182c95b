// Convolutions on the matrix unit (conv_matrix.h): an implicit product over strips of rows.
//
// A strip of x is laid out in planes of 32 channels with its border, one plane for each residue of a pixel's row and
// column modulo the stride: the pixels of a tile follow each other, whatever row they are of, and every tap lies at a
// constant distance. Sums between two rows are made and dropped. 1x1 convolutions of bfloat16 read x where it is.
#include "cpu/conv_matrix.h"

#include <stdexcept>

#include "cpu/matrix_unit.h"

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
};

i64 panels_of(const ConvShape& g) { return ceil_div(g.K, kPair); }
i64 steps_of(const ConvShape& g) { return ceil_div(g.C, kDepth) * g.R * g.S; }

template <class T>
bool in_place(const ConvShape& g) {
    const bool point = g.R == 1 && g.S == 1 && g.stride_h == 1 && g.stride_w == 1 && g.pad_h == 0 && g.pad_w == 0;
    return !kHalves<T> && point && g.C % kDepth == 0;
}

// [panel][chunk][tap][hi, lo][tile of 16 outputs][pair of channels][output][2]
template <class T>
void pack(const float* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& g, u16* packed, i64 threads) {
    const i64 taps = g.R * g.S, chunks = ceil_div(g.C, kDepth);
    parallel(threads, panels_of(g), [&](i64 first, i64 last, int) {
        for (i64 panel = first; panel < last; ++panel)
            for (i64 step = 0; step < chunks * taps; ++step) {
                u16* to = packed + (panel * chunks * taps + step) * kStepWeights<T>;
                __builtin_memset(to, 0, kStepWeights<T> * sizeof(u16));
                const i64 c0 = step / taps * kDepth, k0 = panel * kPair;
                const float* from = w + k0 * w_k + c0 * w_c + step % taps * w_tap;
                for (i64 k = 0; k < min_of(kPair, g.K - k0); ++k)
                    for (i64 c = 0; c < min_of(kDepth, g.C - c0); ++c) {
                        vf hi, lo;
                        split(vf{} + from[k * w_k + c * w_c], hi, lo);
                        u16* at = to + k / kSide * kTile + (c / 2 * kSide + k % kSide) * 2 + c % 2;
                        *at = u16(bit_cast<vu>(hi)[0] >> 16);
                        if (kHalves<T>) at[2 * kTile] = u16(bf16_bits(lo)[0] >> 16);
                    }
            }
    });
}

// How tasks share a product: parts of the pixels times parts of the panels.
struct Shares {
    i64 pixels = 1, panels = 1;
    Shares(i64 threads, i64 rows, i64 row_pixels, i64 panels_in_all, i64 steps, double x_bytes, double step_bytes) {
        constexpr double kCycles = 64, kBytesPerCycle = 12;  // of a block of 32 x 32 and a step; from L3
        double least = -1;
        for (i64 p = 1; p <= threads; ++p) {
            if (threads % p || p > panels_in_all) continue;
            const i64 r = threads / p;
            const double blocks = double(ceil_div(ceil_div(rows, r) * row_pixels, kPair) * ceil_div(panels_in_all, p));
            const double bytes = x_bytes / double(r) + step_bytes * double(steps * ceil_div(panels_in_all, p));
            const double cost = blocks * double(steps) * kCycles + bytes / kBytesPerCycle;
            if (least < 0 || cost < least) least = cost, pixels = r, panels = p;
        }
    }
};

template <class T>
class Worker {
  public:
    Worker(const ConvShape& g, const T* x, const u16* w, const float* bias, const T* residual, bool relu, T* y,
           const Planes& planes, const i64* steps, u16* scratch)
        : g_(g),
          x_(x),
          w_(w),
          bias_(bias),
          residual_(residual),
          y_(y),
          planes_(planes),
          steps_(steps),
          scratch_(scratch),
          panel_(steps_of(g) * kStepWeights<T>) {
        floor_ = relu ? vf{} : vf{} - __builtin_inff();
    }

    // Pixels [first, last) of all images.
    void run_in_place(i64 first, i64 last, i64 panel0, i64 panel1) {
        const Operand x{reinterpret_cast<const u16*>(x_) + first * g_.C, g_.C, steps_, planes_.chunks, 0, w_};
        groups(panel0, panel1, [&](i64 g0, i64 g1) {
            blocks(x, last - first, g0, g1, true, [&](i64 m) { return (first + m) * g_.K; });
        });
    }

    // Rows [first, last) of the N*P rows of y.
    void run(i64 first, i64 last, i64 panel0, i64 panel1, i64 strip) {
        for (i64 r = first; r < last; r += strip) {
            const i64 end = min_of(last, r + strip);
            parts(r, end, [&](i64 image, i64 i0, i64 n, i64 row) { fill(image, i0, n, row); });
            groups(panel0, panel1, [&](i64 g0, i64 g1) {
                bool fetch = true;
                parts(r, end, [&](i64 image, i64 i0, i64 n, i64 row) {
                    const i64 pitch = planes_.pitch, y0 = (image * g_.P + i0) * g_.Q * g_.K;
                    const Operand x{scratch_ + row * pitch * kDepth, kDepth, steps_, planes_.steps, planes_.low, w_};
                    blocks(x, (n - 1) * pitch + g_.Q, g0, g1, fetch, [&](i64 m) {
                        const i64 i = m / pitch, j = m % pitch;
                        return j < g_.Q ? y0 + (i * g_.Q + j) * g_.K : -1;
                    });
                    fetch = false;
                });
            });
        }
    }

  private:
    // Panels whose weights stay in L2 together.
    template <class F>
    void groups(i64 panel0, i64 panel1, const F& f) const {
        const i64 fit = max_of(1, l2_bytes() / 3 / (panel_ * i64(sizeof(u16))));
        for (i64 g = panel0; g < panel1; g += fit) f(g, min_of(panel1, g + fit));
    }

    // f(image, first row, rows, row of the planes) for the images that rows [first, last) are of.
    template <class F>
    void parts(i64 first, i64 last, const F& f) const {
        i64 row = 0;
        for (i64 r = first, n; r < last; r += n) {
            const i64 i0 = r % g_.P;
            n = min_of(last - r, g_.P - i0);
            f(r / g_.P, i0, n, row);
            row += Planes::rows_of(g_, n);
        }
    }

    void fill(i64 image, i64 i0, i64 n, i64 row) {
        const i64 height = (n - 1) * g_.stride_h + planes_.reach_h;
        for (i64 h = 0; h < height; ++h) {
            const i64 from = i0 * g_.stride_h - g_.pad_h + h, phase_h = h % g_.stride_h;
            const bool inside = from >= 0 && from < g_.H;
            const T* x = x_ + (image * g_.H + from) * g_.W * g_.C;
            for (i64 phase_w = 0; phase_w < g_.stride_w; ++phase_w) {
                if (!planes_.used(g_, phase_h, phase_w)) continue;
                const i64 at = (phase_h * g_.stride_w + phase_w) * planes_.phase;
                u16* to = scratch_ + (at + (row + h / g_.stride_h) * planes_.pitch) * kDepth;
                for (i64 q = 0; q < planes_.pitch; ++q, to += kDepth) {
                    const i64 c = q * g_.stride_w + phase_w - g_.pad_w;
                    if (inside && c >= 0 && c < g_.W)
                        lay_out(x + c * g_.C, to);
                    else
                        clear(to);
                }
                for (i64 i = 0; i < planes_.shared; ++i, to += kDepth) clear(to);  // right of the last row
            }
        }
    }

    void clear(u16* to) const {
        for (i64 c = 0; c < planes_.chunks; ++c, to += planes_.chunk) {
            __builtin_memset(to, 0, kDepth * sizeof(u16));
            if (kHalves<T>) __builtin_memset(to + planes_.low, 0, kDepth * sizeof(u16));
        }
    }

    void lay_out(const T* x, u16* to) const {
        i64 left = g_.C;
        for (; left >= kDepth; left -= kDepth, x += kDepth, to += planes_.chunk)
            for (i64 i = 0; i < kDepth; i += 2 * L) two(x + i, to + i);
        if (left == 0) return;
        T last[kDepth] = {};
        __builtin_memcpy(last, x, left * sizeof(T));
        for (i64 i = 0; i < kDepth; i += 2 * L) two(last + i, to + i);
    }

    void two(const T* x, u16* to) const {
        if constexpr (!kHalves<T>) {
            __builtin_memcpy(to, x, 2 * L * sizeof(u16));
        } else {
            vf hi[2], lo[2];
            split(load(x), hi[0], lo[0]);
            split(load(x + L), hi[1], lo[1]);
            store_narrow(to, hi[0], hi[1]);
            store_narrow(to + planes_.low, lo[0], lo[1]);
        }
    }

    // `count` pixels from x on with the panels [g0, g1); place(m): where pixel m lies in y, or -1 for none.
    template <class Place>
    void blocks(const Operand& x, i64 count, i64 g0, i64 g1, bool fetch, const Place& place) {
        for (i64 m = 0; m < count; m += kPair) {
            const i64 n = min_of(kPair, count - m);
            i64 at[kPair];
            for (i64 i = 0; i < n; ++i) at[i] = place(m + i);
            Operand block = x;
            block.x += m * x.pitch;
            if (x.pitch != kDepth && n % kSide) {  // where x is: nothing may be read behind it
                __builtin_memcpy(scratch_, block.x, n * x.pitch * sizeof(u16));
                block.x = scratch_;
            }
            for (i64 g = g0; g < g1; ++g) {
                for (i64 i = 0; i < n; ++i)
                    if (at[i] >= 0) own(y_ + at[i] + g * kPair);
                block.w = w_ + g * panel_;
                float* sums = sums_[g % 2];
                products<kHalves<T>>(tiles_, &block, 1, n > kSide, fetch && m == 0, sums);
                finish(sums, at, n, g * kPair);
            }
        }
    }

    // The lines that will be written, on their way while the sums are made.
    static void own(const T* y) {
        __builtin_prefetch(y, 1, 3);
        if (kPair * sizeof(T) > 64) __builtin_prefetch(reinterpret_cast<const char*>(y) + 64, 1, 3);
    }

    void finish(const float* sums, const i64* at, i64 n, i64 k0) {
        constexpr int kVectors = int(kPair) / L;
        const i64 outs = g_.K - k0;
        if (outs >= kPair) {
            vf bias[kVectors];
            for (int v = 0; v < kVectors; ++v) bias[v] = bias_ ? load(bias_ + k0 + v * L) : vf{};
            for (i64 i = 0; i < n; ++i, sums += kPair) {
                if (at[i] < 0) continue;
                T* y = y_ + at[i] + k0;
                const T* r = residual_ ? residual_ + at[i] + k0 : nullptr;
                for (int v = 0; v < kVectors; v += 2, y += 2 * L) {
                    vf a = load(sums + v * L) + bias[v], b = load(sums + v * L + L) + bias[v + 1];
                    if (r) a += load(r + v * L), b += load(r + v * L + L);
                    a = at_least(a, floor_), b = at_least(b, floor_);
                    if constexpr (!kHalves<T>) {
                        store_narrow(reinterpret_cast<u16*>(y), a, b);
                    } else {
                        store(y, a);
                        store(y + L, b);
                    }
                }
            }
            return;
        }
        for (i64 i = 0; i < n; ++i, sums += kPair) {
            if (at[i] < 0) continue;
            i64 k = 0;
            for (; k + L <= outs; k += L) finish_part(sums + k, at[i], k0 + k, Full());
            if (k < outs) finish_part(sums + k, at[i], k0 + k, Tail{int(outs - k), false});
        }
    }

    template <class Span>
    FR_INLINE void finish_part(const float* sums, i64 at, i64 k, Span span) {
        vf v = load(sums);
        if (bias_) v += span.load(bias_ + k);
        if (residual_) v += span.load(residual_ + at + k);
        span.store(y_ + at + k, at_least(v, floor_));
    }

    const ConvShape& g_;
    const T* x_;
    const u16* w_;
    const float* bias_;
    const T* residual_;
    T* y_;
    const Planes& planes_;
    const i64* steps_;
    u16* scratch_;
    i64 panel_;
    vf floor_;
    Tiles tiles_;
    alignas(64) float sums_[2][kSums];
};

template <class T>
void run(const ConvShape& g, const T* x, const u16* w, const float* bias, const T* residual, bool relu, T* y,
         i64 threads) {
    const bool there = in_place<T>(g);
    const i64 rows = there ? g.N * g.H * g.W : g.N * g.P, panels = panels_of(g), steps = steps_of(g);
    const i64 row_pixels = there ? 1 : Planes(g, 1, kHalves<T>).pitch;
    const Shares shares(threads, rows, row_pixels, panels, steps, double(g.N * g.H * g.W * g.C) * sizeof(T),
                        double(kStepWeights<T> * i64(sizeof(u16))));
    const i64 mine = ceil_div(rows, shares.pixels);
    i64 strip = 1;
    if (!there) {
        const i64 row_bytes = Planes(g, 1, kHalves<T>).pitch * g.stride_h * g.stride_w * steps / (g.R * g.S) * kDepth *
                              i64(sizeof(u16)) * (kHalves<T> ? 2 : 1);
        strip = min_of(mine, max_of(1, l2_bytes() / 4 / row_bytes));
        strip = ceil_div(mine, ceil_div(mine, strip));
    }
    const i64 images = strip / g.P + 2;
    const Planes planes(g, strip + images * (Planes::rows_of(g, 1)), kHalves<T>);
    const i64 elements = there ? kPair * g.C : planes.elements();
    const Scratch scratch(threads * elements * sizeof(u16)), offsets(steps * sizeof(i64));
    i64* at = static_cast<i64*>(offsets.get());
    for (i64 c = 0; c < planes.chunks; ++c)
        for (i64 r = 0; r < g.R; ++r)
            for (i64 s = 0; s < g.S; ++s) *at++ = there ? c * kDepth : c * planes.chunk + planes.tap(g, r, s);
    parallel(threads, shares.pixels * shares.panels, [&](i64 first, i64 last, int) {
        for (i64 task = first; task < last; ++task) {
            const i64 r = task / shares.panels, p = task % shares.panels;
            Worker<T> worker(g, x, w, bias, residual, relu, y, planes, static_cast<const i64*>(offsets.get()),
                             static_cast<u16*>(scratch.get()) + task * elements);
            const i64 r0 = rows * r / shares.pixels, r1 = rows * (r + 1) / shares.pixels;
            const i64 p0 = panels * p / shares.panels, p1 = panels * (p + 1) / shares.panels;
            if (there)
                worker.run_in_place(r0, r1, p0, p1);
            else
                worker.run(r0, r1, p0, p1, strip);
        }
    });
}

void check(const ConvShape& g) {
    if (g.groups > 1) throw std::invalid_argument("matrix: expected one group");
    if (!matrix_unit()) throw std::runtime_error("matrix: this processor has no matrix unit");
}

}  // namespace

i64 matrix_unit() {
    using cpu_runtime::MatrixUnit;
    return i64(kModelled ? MatrixUnit::kModelled : cpu_runtime::matrix_unit());
}

i64 matrix_packed_floats(int dtype, const ConvShape& g) {
    return panels_of(g) * steps_of(g) * (dtype == kBF16 ? kStepWeights<bf16> : kStepWeights<float>) / 2;
}

void matrix_pack(int dtype, const float* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& g, float* packed, i64 ctx) {
    check(g);
    const auto to = dtype == kBF16 ? pack<bf16> : pack<float>;
    to(w, w_k, w_c, w_tap, g, reinterpret_cast<u16*>(packed), max_of(1, ctx));
}

void matrix_fprop(int dtype, const void* x, const float* packed, const ConvShape& g, const float* bias,
                  const void* residual, int relu, void* y, i64 ctx) {
    check(g);
    if (g.N * g.P * g.Q == 0 || g.K == 0) return;
    with_narrow(dtype, [&](auto type) {
        using T = decltype(type);
        run<T>(g, static_cast<const T*>(x), reinterpret_cast<const u16*>(packed), bias, static_cast<const T*>(residual),
               relu != 0, static_cast<T*>(y), max_of(1, ctx));
    });
}

}  // namespace FASTRES_BACKEND
