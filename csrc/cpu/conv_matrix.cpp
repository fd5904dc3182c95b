// Convolutions on the matrix unit (conv_matrix.h): an implicit product over strips of rows, laid out in planes
// (matrix_planes.h). Sums between two rows are made and dropped. 1x1 convolutions of bfloat16 read x where it is.
#include <stdexcept>

#include "cpu/matrix_planes.h"
#include "cpu/matrix_unit.h"

namespace FASTRES_BACKEND {
namespace {

// [panel][chunk][tap][hi, lo][tile of 16 outputs][pair of channels][output][2]; with groups the chunk is the panel's
// own.
template <class T>
void pack(const float* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& g, u16* packed, i64 threads) {
    const i64 taps = g.R * g.S, steps = steps_of(g), width = g.C / g.groups;
    parallel(threads, panels_of(g), [&](i64 first, i64 last, int) {
        for (i64 panel = first; panel < last; ++panel)
            for (i64 step = 0; step < steps; ++step) {
                u16* to = packed + (panel * steps + step) * kStepWeights<T>;
                __builtin_memset(to, 0, kStepWeights<T> * sizeof(u16));
                const i64 c0 = step / taps * kDepth, k0 = panel * kPair;
                const float* from = w + k0 * w_k + c0 * w_c + step % taps * w_tap;
                for (i64 k = 0; k < min_of(kPair, g.K - k0); ++k)
                    for (i64 i = 0; i < min_of(kDepth, width - c0); ++i) {
                        const i64 c = g.groups > 1 ? k / width * width + i : i;
                        u16* at = to + k / kSide * kTile + (c / 2 * kSide + k % kSide) * 2 + c % 2;
                        pack_one<T>(from[k * w_k + i * w_c], at);
                    }
            }
    });
}

// How tasks share a product: parts of the pixels times parts of the panels.
//
// Fewer parts of the pixels mean fewer weights for each task, but more of what other cores wrote: x, and what is added
// to the sums, were most likely made in parts of the pixels.
struct Shares {
    i64 pixels = 1, panels = 1;
    Shares(i64 threads, i64 rows, i64 row_pixels, i64 panels_in_all, i64 steps, double x_bytes, double residual_bytes,
           double step_bytes) {
        constexpr double kCycles = 100;                // of a block of 32 x 32 and a step
        constexpr double kWeights = 7, kOthers = 2.3;  // bytes a cycle: from L3; from another core's L2
        double least = -1;
        for (i64 p = 1; p <= threads; ++p) {
            if (threads % p || p > panels_in_all) continue;
            const i64 r = threads / p;
            const double blocks = double(ceil_div(ceil_div(rows, r) * row_pixels, kPair) * ceil_div(panels_in_all, p));
            const double weights = step_bytes * double(steps * ceil_div(panels_in_all, p));
            const double others = (x_bytes + residual_bytes / double(p)) * double(p - 1) / double(threads);
            const double cost = blocks * double(steps) * kCycles + weights / kWeights + others / kOthers;
            if (least < 0 || cost < least) least = cost, pixels = r, panels = p;
        }
    }
};

// How a convolution is made: in place or from planes, shared among threads, and by panels in groups.
template <class T>
struct Scheme {
    ConvShape g;  // dense
    bool there;
    i64 rows, panels, steps, panel_bytes, group;
    Shares shares;

    Scheme(const ConvShape& whole, bool residual, i64 threads)
        : g(dense(whole)),
          there(in_place<T>(whole)),
          rows(there ? g.N * g.H * g.W : g.N * g.P),
          panels(panels_of(g)),
          steps(steps_of(g)),
          panel_bytes(steps * kStepWeights<T> * i64(sizeof(u16))),
          shares(threads, rows, there ? 1 : Planes(g, 1, kHalves<T>).pitch, panels, steps,
                 double(g.N * g.H * g.W * g.C) * sizeof(T), residual ? double(g.N * g.P * g.Q * g.K) * sizeof(T) : 0,
                 double(panel_bytes / steps)) {
        // Panels that a task passes over together, so that they stay in L2, where the next group has to find a place
        // as well.
        const i64 mine = ceil_div(panels, shares.panels), most = l2_bytes() / panel_bytes;
        group = mine <= most / 3 ? mine : max_of(1, most / 6);
    }
    i64 panel(i64 task, i64 further = 0) const { return panels * (task % shares.panels + further) / shares.panels; }
    i64 row(i64 task, i64 further = 0) const { return rows * (task / shares.panels + further) / shares.pixels; }
};

template <class T>
class Worker {
  public:
    Worker(const ConvShape& g, const ConvShape& whole, const T* x, const u16* w, const Finish<T>& finish,
           const Planes& planes, const i64* steps, u16* scratch, i64 group, Ahead following)
        : g_(g),
          whole_(whole),
          x_(x),
          finish_(finish),
          planes_(planes),
          scratch_(scratch),
          group_(group),
          following_(following),
          operand_{nullptr, kDepth, steps, steps_of(g), planes.low, w, g.groups > 1 ? planes.chunk : 0} {}

    // Pixels [first, last) of all images.
    void run_in_place(i64 first, i64 last, i64 panel0, i64 panel1) {
        operand_.x = reinterpret_cast<const u16*>(x_) + first * g_.C;
        operand_.pitch = g_.C;
        if (operand_.panel) operand_.panel = kDepth;
        groups(panel0, panel1, ceil_div(last - first, kPair), true, [&](i64 g0, i64 g1) {
            ahead_.x = pixels_ahead(operand_.x, last - first, g_.C, g1 - g0);
            if (finish_.residual && g1 - g0 == panels_of(g_))
                ahead_.residual = pixels_ahead(finish_.residual + first * g_.K, last - first, g_.K, g1 - g0);
            i64 at = (first - 1) * g_.K;
            pixels(last - first, g0, g1, scratch_, [&] { return at += g_.K; });
        });
    }

    // Rows [first, last) of the N*P rows of y.
    void run(i64 first, i64 last, i64 panel0, i64 panel1, i64 strip) {
        const bool picked = g_.stride_h != whole_.stride_h || g_.stride_w != whole_.stride_w;
        const i64 x_row = (picked ? whole_.stride_h : 1) * whole_.W * g_.C;
        const i64 x_pixel = (picked ? whole_.stride_w : 1) * g_.C;
        for (i64 r = first; r < last; r += strip) {
            const i64 end = min_of(last, r + strip);
            i64 passes = 0;
            parts(r, end, [&](i64 image, i64 i0, i64 n, i64 row) {
                passes += ceil_div((n - 1) * planes_.pitch + g_.Q, kPair);
                planes_.fill(g_, x_ + image * whole_.H * whole_.W * g_.C, x_row, x_pixel, i0 * g_.stride_h - g_.pad_h,
                             0, (n - 1) * g_.stride_h + planes_.reach_h, scratch_ + row * planes_.pitch * kDepth);
            });
            groups(panel0, panel1, passes, end == last, [&](i64 g0, i64 g1) {
                parts(r, end, [&](i64 image, i64 i0, i64 n, i64 row) {
                    operand_.x = scratch_ + row * planes_.pitch * kDepth;
                    i64 at = (image * g_.P + i0) * g_.Q * g_.K, j = 0;
                    pixels((n - 1) * planes_.pitch + g_.Q, g0, g1, nullptr, [&]() -> i64 {
                        if (j == planes_.pitch) j = 0;
                        if (j++ >= g_.Q) return -1;
                        at += g_.K;
                        return at - g_.K;
                    });
                });
            });
        }
    }

  private:
    // Groups of panels, each passed over `passes` times; last: nothing of this convolution comes after them.
    template <class F>
    void groups(i64 panel0, i64 panel1, i64 passes, bool last, const F& f) {
        const i64 panel = steps_of(g_) * kStepWeights<T>;
        for (i64 g = panel0; g < panel1; g += group_) {
            const i64 end = min_of(panel1, g + group_), times = 2 * passes * (end - g) * steps_of(g_);
            if (end < panel1)
                ahead_.weights =
                    Ahead(operand_.w + end * panel, min_of(panel1 - end, group_) * panel * i64(sizeof(u16)), times);
            else if (last)
                ahead_.weights = Ahead(following_.next, following_.end - following_.next, times);
            else
                ahead_.weights = Ahead();
            f(g, end);
        }
    }

    // All but the first block of `count` pixels, a block ahead of the products with so many panels. Few of them are in
    // L2 as they are.
    Ahead pixels_ahead(const void* from, i64 count, i64 channels, i64 panels) const {
        const i64 pixel = channels * i64(sizeof(T)), left = count - kPair;
        if (left * pixel <= cpu_runtime::l2_bytes() / 4) return {};
        return {static_cast<const char*>(from) + kPair * pixel, left * pixel,
                2 * ceil_div(left, kPair) * panels * steps_of(g_)};
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

    template <class Next>
    void pixels(i64 count, i64 g0, i64 g1, u16* edge, Next&& next) {
        blocks<T, 1>(tiles_, sums_, {operand_}, count, g0, g1, edge, ahead_, next,
                     [&](const float* sums, const i64* at, i64 i0, i64 i1, i64 g) { finish_(sums, at, i0, i1, g); });
    }

    const ConvShape &g_, &whole_;
    const T* x_;
    const Finish<T>& finish_;
    const Planes& planes_;
    u16* scratch_;
    const i64 group_;
    const Ahead following_;
    Fetch ahead_;
    Operand operand_;
    Tiles tiles_;
    Sums sums_;
};

// The weights that a task reads first.
template <class T>
Ahead first_weights(const Following& next, i64 threads, i64 task) {
    const Scheme<T> scheme(next.shape, next.residual, threads);
    if (task >= scheme.shares.pixels * scheme.shares.panels) return {};
    const i64 p0 = scheme.panel(task), p1 = min_of(scheme.panel(task, 1), p0 + scheme.group);
    const char* w = reinterpret_cast<const char*>(next.packed);
    return {w + p0 * scheme.panel_bytes, (p1 - p0) * scheme.panel_bytes, 1};
}

template <class T>
void run(const ConvShape& whole, const T* x, const u16* w, const float* bias, const T* residual, bool relu, T* y,
         const Following* following, i64 threads) {
    const Scheme<T> scheme(whole, residual, threads);
    const ConvShape& g = scheme.g;
    const Shares& shares = scheme.shares;
    const i64 mine = ceil_div(scheme.rows, shares.pixels), steps = scheme.steps;
    i64 strip = 1;
    if (!scheme.there) {
        const i64 row_bytes = Planes(g, 1, kHalves<T>).pitch * g.stride_h * g.stride_w * ceil_div(g.C, kDepth) *
                              kDepth * i64(sizeof(u16)) * (kHalves<T> ? 2 : 1);
        // Where the weights do not fit in L2, each strip reads them from L3.
        const bool large = scheme.panels / shares.panels * scheme.panel_bytes > l2_bytes() / 3;
        strip = min_of(mine, max_of(1, l2_bytes() / (large ? 2 : 4) / row_bytes));
        strip = ceil_div(mine, ceil_div(mine, strip));
    }
    const i64 images = strip / g.P + 2;
    const Planes planes(g, strip + images * (Planes::rows_of(g, 1)), kHalves<T>);
    const i64 elements = scratch_elements(scheme.there ? kPair * g.C : planes.elements());
    const Scratch scratch(threads * elements * sizeof(u16)), offsets(steps * sizeof(i64));
    steps_to(g, planes, scheme.there, static_cast<i64*>(offsets.get()));
    const Finish<T> finish(y, residual, bias, relu, g.K);
    parallel(threads, shares.pixels * shares.panels, [&](i64 first, i64 last, int) {
        for (i64 task = first; task < last; ++task) {
            Worker<T> worker(g, whole, x, w, finish, planes, static_cast<const i64*>(offsets.get()),
                             static_cast<u16*>(scratch.get()) + task * elements, scheme.group,
                             following ? first_weights<T>(*following, threads, task) : Ahead());
            const i64 r0 = scheme.row(task), r1 = scheme.row(task, 1), p0 = scheme.panel(task),
                      p1 = scheme.panel(task, 1);
            if (scheme.there)
                worker.run_in_place(r0, r1, p0, p1);
            else
                worker.run(r0, r1, p0, p1, strip);
        }
    });
}

void check(const ConvShape& g) {
    if (!matrix_groups(g.C, g.K, g.groups))
        throw std::invalid_argument(
            "matrix: expected one group, or several that fill panels of 32 channels in and out");
    if (!matrix_unit()) throw std::runtime_error("matrix: this processor has no matrix unit");
}

}  // namespace

i64 matrix_unit() {
    using cpu_runtime::MatrixUnit;
    return i64(kModelled ? MatrixUnit::kModelled : cpu_runtime::matrix_unit());
}

void matrix_products(i64 count, i64 ctx) {
    check({1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1});
    alignas(64) static const u16 zeros[kTile] = {};
    const i64 threads = max_of(1, ctx);
    parallel(threads, threads, [&](i64 first, i64 last, int) {
        Tiles t;
        t.load<4>(zeros, kTileBytes), t.load<5>(zeros, kTileBytes);
        t.load<6>(zeros, kTileBytes), t.load<7>(zeros, kTileBytes);
        for (i64 n = (last - first) * ceil_div(count, 4); n > 0; --n) {
            t.dot<0, 4, 6>(), t.dot<1, 4, 7>();
            t.dot<2, 5, 6>(), t.dot<3, 5, 7>();
        }
    });
}

// Whole ones make up a panel: it reads the input channels of the same numbers, and no others.
i64 matrix_groups(i64 C, i64 K, i64 groups) {
    return groups == 1 || (C > 0 && C == K && C % kPair == 0 && kPair % (C / groups) == 0);
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
                  const void* residual, int relu, void* y, const Following* following, i64 ctx) {
    check(g);
    if (g.N * g.P * g.Q == 0 || g.K == 0) return;
    with_narrow(dtype, [&](auto type) {
        using T = decltype(type);
        run<T>(g, static_cast<const T*>(x), reinterpret_cast<const u16*>(packed), bias, static_cast<const T*>(residual),
               relu != 0, static_cast<T*>(y), following, max_of(1, ctx));
    });
}

}  // namespace FASTRES_BACKEND
