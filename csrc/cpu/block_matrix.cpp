// Whole residual blocks on the matrix unit, depth first: a strip of y's rows passes through all convolutions while
// what lies between them stays in L2. y = act(conv(..act(conv(x))) + x), or + projection(x), which joins the sums of
// the last convolution.
//
// A convolution writes into the planes that the next one reads, border included. Strips of an image follow each other
// and keep the rows that they have in common: no row is made twice, but where a thread begins.
#include <stdexcept>

#include "cpu/matrix_planes.h"

namespace FASTRES_BACKEND {
namespace {

constexpr int kMost = 3;  // convolutions one after the other

// A convolution and its input: x where it is, or planes.
struct Level {
    ConvShape g;
    const u16* w;
    const float* bias;
    bool there;
    Planes planes;
    i64 data, steps;  // where its planes and its steps lie in a worker's memory and in the table
};

struct Network {
    int count = 0;
    Level* levels;
    const Level* projection = nullptr;  // its planes hold just the pixels that it reads, one after the other
};

// Rows of a convolution's output that are made in a strip.
struct Rows {
    i64 first = 0, last = 0;
    i64 count() const { return last - first; }
};

template <class T>
class Worker {
  public:
    Worker(const Network& net, const T* x, T* y, const float* bias, const i64* steps, u16* memory, i64 edge)
        : net_(net),
          x_(x),
          y_(y),
          steps_(steps),
          memory_(memory),
          edge_(memory + edge),
          last_(net.count - 1),
          finish_(y, net.projection ? nullptr : x, bias, true, net.levels[net.count - 1].g.K) {}

    // Rows [first, last) of the N*P rows of y. The planes between two convolutions, their borders, are zero.
    void run(i64 first, i64 last, i64 strip) {
        const i64 P = net_.levels[last_].g.P;
        for (i64 r = first, end; r < last; r = end) {
            const i64 image = r / P;
            end = min_of(last, (image + 1) * P);
            bool goes_on = false;
            for (i64 o = r; o < end; o += strip, goes_on = true)
                pass(image, o - image * P, min_of(end, o + strip) - image * P, goes_on);
        }
    }

  private:
    void pass(i64 image, i64 o0, i64 o1, bool goes_on) {
        // From the last convolution to the first: the rows that each adds to what is there.
        Rows rows[kMost];
        rows[last_] = {o0, o1};
        for (int k = last_; k > 0; --k) {
            const ConvShape& g = net_.levels[k].g;
            const i64 top = rows[k].first * g.stride_h - g.pad_h;
            const i64 end = top + (rows[k].count() - 1) * g.stride_h + net_.levels[k].planes.reach_h;
            const i64 from = max_of(goes_on ? rows_[k - 1].last : 0, top);
            const i64 to = max_of(from, min_of(g.H, end));
            rows[k - 1] = {from, rows[k].count() ? to : from};
        }
        const T* x = x_ + image * net_.levels[0].g.H * net_.levels[0].g.W * net_.levels[0].g.C;
        for (int k = 1; k <= last_; ++k)
            if (rows[k].count()) border(net_.levels[k], rows[k], goes_on ? rows_[k].count() : 0);
        const Level& level = net_.levels[0];
        if (!level.there && rows[0].count())
            level.planes.fill(level.g, x, level.g.W * level.g.C, level.g.C,
                              rows[0].first * level.g.stride_h - level.g.pad_h, 0,
                              (rows[0].count() - 1) * level.g.stride_h + level.planes.reach_h, memory_ + level.data);
        for (int k = 0; k < last_; ++k)
            if (rows[k].count()) inner(k, x, rows[k], rows[k + 1]);
        expect(x, rows);
        outer(image, x, rows[last_]);
        for (int k = 0; k <= last_; ++k) rows_[k] = rows[k];
    }

    // The rows of x that the next strip reads, on their way while the last convolution works on this one's.
    void expect(const T* x, const Rows* rows) {
        const ConvShape& g = net_.levels[0].g;
        const i64 first = rows[0].last * g.stride_h + g.pad_h, last = first + rows[0].count() * g.stride_h;
        const T *from = x + min_of(first, g.H) * g.W * g.C, *to = x + min_of(last, g.H) * g.W * g.C;
        const Level& level = net_.levels[last_];
        const i64 blocks = ceil_div(pixels_of(level, rows[last_]), kPair) * panels_of(level.g);
        ahead_ = Ahead(from, (to - from) * i64(sizeof(T)), 2 * blocks * level.planes.steps);
    }

    // Before rows of a convolution are made: its planes keep what the strip before them (of `made` rows) had in common
    // with this one, and what lies outside the image is zero.
    void border(const Level& level, const Rows& rows, i64 made) {
        const ConvShape& g = level.g;
        const Planes& p = level.planes;
        u16* to = memory_ + level.data;
        const i64 shared_rows = Planes::rows_of(g, 1) - 1;
        for (i64 c = 0; made && shared_rows && c < p.chunks; ++c)
            for (i64 phase = 0; phase < g.stride_h * g.stride_w; ++phase)
                for (i64 half = 0; half <= (p.low ? 1 : 0); ++half) {
                    u16* at = to + c * p.chunk + half * p.low + phase * p.phase * kDepth;
                    __builtin_memmove(at, at + made * p.pitch * kDepth, shared_rows * p.pitch * kDepth * sizeof(u16));
                }
        const i64 top = rows.first * g.stride_h - g.pad_h, height = (rows.count() - 1) * g.stride_h + p.reach_h;
        for (i64 h = 0; h < height; ++h) {
            if (top + h >= 0 && top + h < g.H) continue;
            for (i64 w = 0; w < g.stride_w; ++w) p.clear(to + (p.row(g, h) + w * p.phase) * kDepth, p.pitch);
        }
    }

    Operand operand(const Level& level, const u16* x, i64 pitch) const {
        return {x, pitch, steps_ + level.steps, level.planes.steps, level.there ? 0 : level.planes.low, level.w};
    }

    Operand input(int k, const T* x, const Rows& rows) const {
        const Level& level = net_.levels[k];
        if (!level.there) return operand(level, memory_ + level.data, kDepth);
        return operand(level, reinterpret_cast<const u16*>(x) + rows.first * level.g.W * level.g.C, level.g.C);
    }

    static i64 pitch_of(const Level& level) { return level.there ? level.g.W : level.planes.pitch; }
    static i64 pixels_of(const Level& level, const Rows& rows) {
        return (rows.count() - 1) * pitch_of(level) + level.g.Q;
    }

    // Convolution k into the planes of the next, of which `reads` are the rows to be made.
    void inner(int k, const T* x, const Rows& rows, const Rows& reads) {
        const Level &level = net_.levels[k], &next = net_.levels[k + 1];
        const ConvShape &g = level.g, &into = next.g;
        const Planes& p = next.planes;
        u16* to = memory_ + next.data;
        const i64 pitch = pitch_of(level), top = reads.first * into.stride_h - into.pad_h;
        i64 i = rows.first, j = 0, row = p.row(into, i - top);
        const auto place = [&]() -> i64 {
            if (j == pitch) j = 0, ++i, row = p.row(into, i - top);
            if (j >= g.Q) return ++j, -1;
            const i64 column = p.column(into, j++);
            return column < 0 ? -1 : (row + column) * kDepth;
        };
        const Operand o[1] = {input(k, x, rows)};
        const float* bias = level.bias;
        blocks<T, 1>(tiles_, sums_, o, pixels_of(level, rows), 0, panels_of(g), level.there ? edge_ : nullptr, nothing_,
                     place, [&](const float* sums, const i64* at, i64 i0, i64 i1, i64 panel) {
                         into_planes(sums, at, i0, i1, bias + panel * kPair, to + panel * p.chunk, p.low);
                     });
    }

    static __attribute__((noinline)) void into_planes(const float* sums, const i64* at, i64 i0, i64 i1,
                                                      const float* bias, u16* to, i64 low) {
        constexpr int kVectors = int(kPair) / L;
        vf b[kVectors];
        for (int v = 0; v < kVectors; ++v) b[v] = load(bias + v * L);
        for (i64 i = i0; i < i1; ++i) {
            if (at[i] < 0) continue;
            const float* s = sums + i * kPair;
            u16* pixel = to + at[i];
            for (int v = 0; v < kVectors; v += 2, pixel += 2 * L) {
                const vf first = at_least(load(s + v * L) + b[v], vf{});
                const vf second = at_least(load(s + v * L + L) + b[v + 1], vf{});
                if constexpr (kHalves<T>)
                    store_halves(pixel, low, first, second);
                else
                    write(pixel, narrow_pairs(first, second));
            }
        }
    }

    // The last convolution, with the shortcut, into y.
    void outer(i64 image, const T* x, const Rows& rows) {
        const Level& level = net_.levels[last_];
        const ConvShape& g = level.g;
        const i64 pitch = pitch_of(level);
        i64 at = (image * g.P + rows.first) * g.Q * g.K, j = 0;
        const auto place = [&]() -> i64 {
            if (j == pitch) j = 0;
            if (j++ >= g.Q) return -1;
            at += g.K;
            return at - g.K;
        };
        const auto done = [&](const float* sums, const i64* to, i64 i0, i64 i1, i64 panel) {
            finish_(sums, to, i0, i1, panel);
        };
        const i64 count = pixels_of(level, rows), panels = panels_of(g);
        if (!net_.projection) {
            const Operand o[1] = {input(last_, x, rows)};
            blocks<T, 1>(tiles_, sums_, o, count, 0, panels, nullptr, ahead_, place, done);
            return;
        }
        gather(x, rows, pitch);
        const Operand o[2] = {input(last_, x, rows),
                              operand(*net_.projection, memory_ + net_.projection->data, kDepth)};
        blocks<T, 2>(tiles_, sums_, o, count, 0, panels, nullptr, ahead_, place, done);
    }

    // The pixels that the projection reads, at the pitch of the last convolution's.
    void gather(const T* x, const Rows& rows, i64 pitch) {
        const Level& level = *net_.projection;
        const ConvShape& g = level.g;
        for (i64 i = 0; i < rows.count(); ++i)
            for (i64 j = 0; j < g.Q; ++j) {
                const T* pixel = x + ((rows.first + i) * g.stride_h * g.W + j * g.stride_w) * g.C;
                level.planes.lay_out(pixel, g.C, memory_ + level.data + (i * pitch + j) * kDepth);
            }
    }

    const Network& net_;
    const T* x_;
    T* y_;
    const i64* steps_;
    u16 *memory_, *edge_;
    const int last_;
    const Finish<T> finish_;
    Rows rows_[kMost];  // of the strip before
    Ahead ahead_, nothing_;
    Tiles tiles_;
    Sums sums_;
};

void check(const ConvShape* g, int count, bool projected) {
    const auto refuse = [](const char* why) { throw std::invalid_argument(why); };
    if (!matrix_unit()) throw std::runtime_error("matrix_block: this processor has no matrix unit");
    if (count < 2 || count > kMost) refuse("matrix_block: expected two or three convolutions");
    for (int k = 0; k < count + projected; ++k)
        if (g[k].groups > 1) refuse("matrix_block: expected one group");
    for (int k = 1; k < count; ++k)
        if (g[k].N != g[0].N || g[k].C != g[k - 1].K || g[k].H != g[k - 1].P || g[k].W != g[k - 1].Q)
            refuse("matrix_block: a convolution does not take what the one before it makes");
    for (int k = 1; k < count; ++k)
        if (g[k].C % kDepth) refuse("matrix_block: expected multiples of 32 channels between two convolutions");
    const ConvShape &first = g[0], &last = g[count - 1];
    if (!projected) {
        if (first.C != last.K || first.H != last.P || first.W != last.Q)
            refuse("matrix_block: x and y differ in shape");
        return;
    }
    const ConvShape& p = g[count];
    if (p.R != 1 || p.S != 1 || p.pad_h || p.pad_w) refuse("matrix_block: expected a 1x1 projection without borders");
    if (p.C != first.C || p.H != first.H || p.W != first.W || p.K != last.K || p.P != last.P || p.Q != last.Q)
        refuse("matrix_block: the projection does not lead from x to y");
}

template <class T>
void run(const ConvShape* g, const float* const* packed, const float* const* bias, int count, bool projected,
         const T* x, T* y, i64 threads) {
    const i64 rows = g[0].N * g[count - 1].P;
    // Rows of a strip: half of L2 for what all of them touch of x, y and the planes between.
    i64 row_bytes = 0;
    for (int k = 0; k < count; ++k) row_bytes += (g[k].W * g[k].C * g[k].H + g[k].Q * g[k].K * g[k].P) / g[count - 1].P;
    row_bytes *= i64(sizeof(T));
    const i64 most = min_of(ceil_div(rows, threads), g[count - 1].P);
    i64 strip = min_of(most, max_of(4, l2_bytes() / 2 / max_of(1, row_bytes)));
    strip = ceil_div(most, ceil_div(most, strip));

    i64 of_level[kMost];
    of_level[count - 1] = strip;
    for (int k = count - 1; k > 0; --k)
        of_level[k - 1] = (of_level[k] - 1) * g[k].stride_h + (g[k].R - 1) * g[k].dilation_h + 1;
    i64 elements = 0, steps = 0;
    const auto level = [&](int k, const Planes& planes, bool there) {
        const Level found{g[k], reinterpret_cast<const u16*>(packed[k]), bias[k], there, planes, elements, steps};
        elements += there ? 0 : planes.elements();
        steps += planes.steps;
        return found;
    };
    const auto of = [&](int k) { return Planes(g[k], Planes::rows_of(g[k], of_level[k]), kHalves<T>); };
    const bool there = in_place<T>(g[0]);
    const Level first = level(0, of(0), there), second = level(1, of(1), false);
    Level levels[kMost] = {first, second, count > 2 ? level(2, of(2), false) : second};
    const i64 pitch = levels[count - 1].planes.pitch;
    const ConvShape dense{g[0].N, strip, pitch, g[0].C, g[0].K, strip, pitch, 1, 1, 1, 1, 0, 0, 1, 1, 1};
    const Level projection = projected ? level(count, Planes(dense, strip, kHalves<T>), false) : first;
    const Network net{count, levels, projected ? &projection : nullptr};
    const i64 edge = elements;
    if (there) elements += kPair * g[0].C;
    elements = scratch_elements(elements);

    const Scratch table(steps * sizeof(i64)), memory(threads * elements * sizeof(u16));
    for (int k = 0; k < count; ++k)
        steps_to(g[k], levels[k].planes, levels[k].there, static_cast<i64*>(table.get()) + levels[k].steps);
    if (projected) steps_to(dense, projection.planes, false, static_cast<i64*>(table.get()) + projection.steps);
    // The projection's sums join those of the last convolution, and so does its bias.
    const i64 K = g[count - 1].K;
    const Scratch joined(K * sizeof(float));
    float* sum = static_cast<float*>(joined.get());
    for (i64 k = 0; k < K; ++k) sum[k] = bias[count - 1][k] + (projected ? bias[count][k] : 0.0f);
    const i64 tasks = min_of(threads, rows);
    parallel(threads, tasks, [&](i64 begin, i64 end, int) {
        for (i64 task = begin; task < end; ++task) {
            u16* mine = static_cast<u16*>(memory.get()) + task * elements;
            for (int k = 1; k < count; ++k)
                if (g[k].pad_h || g[k].pad_w)
                    __builtin_memset(mine + levels[k].data, 0, levels[k].planes.elements() * sizeof(u16));
            Worker<T> worker(net, x, y, sum, static_cast<const i64*>(table.get()), mine, edge);
            worker.run(rows * task / tasks, rows * (task + 1) / tasks, strip);
        }
    });
}

}  // namespace

void matrix_block(int dtype, const void* x, const ConvShape* shapes, const float* const* packed,
                  const float* const* bias, int count, int projected, void* y, i64 ctx) {
    check(shapes, count, projected != 0);
    const ConvShape& last = shapes[count - 1];
    if (last.N * last.P * last.Q == 0 || last.K == 0) return;
    with_narrow(dtype, [&](auto type) {
        using T = decltype(type);
        run<T>(shapes, packed, bias, count, projected != 0, static_cast<const T*>(x), static_cast<T*>(y),
               max_of(1, ctx));
    });
}

}  // namespace FASTRES_BACKEND
