// The stem of an evaluation, max_pool(relu(conv(x) + bias)): rows of conv's output live in a ring until the pooling has
// taken them.
#pragma once
#include <cstdint>
#include <type_traits>

#include "cpu/conv.h"
#include "cpu/isa/rows.h"

namespace FASTRES_BACKEND {
namespace {

constexpr i64 kMostRows = 16;  // of the input that are held, more than a filter's

// The ring holds sums (E is float), or what is finished: relu(sum + bias), without a sign, as integers in the same
// order, a NaN the greatest. i16: bfloat16; i32: the bits of a float.
using i16 = std::int16_t;
using i32 = std::int32_t;
typedef i16 vs __attribute__((vector_size(4 * L)));

// `width` elements, a multiple of 2 * L, for each of the ring's `pixels` in a row; the first K of them count.
template <class T, class E = float>
class PooledRows {
  public:
    PooledRows(const ConvShape& g, const PoolShape& pool, const float* bias, T* y, i64 width, i64 pixels)
        : g_(g), pool_(pool), bias_(bias), y_(y), width_(width), row_(pixels * width) {
        while (slots_ < pool.kernel) slots_ *= 2;
    }
    // Of the channels [k, k + L), zero from K on.
    FR_INLINE vf bias(i64 k) const {
        return k + L <= g_.K ? load(bias_ + k) : k < g_.K ? load_part(bias_ + k, int(g_.K - k)) : vf{};
    }
    i64 ring_floats() const { return slots_ * row_ * i64(sizeof(E)) / i64(sizeof(float)); }

    // Pooled rows [first, last) of all images. bring(n, h): row h of image n is needed from now on, in slot h modulo
    // kMostRows. make(top, out): a row of the convolution, of the input rows from `top` on.
    template <class Bring, class Make>
    void run(i64 first, i64 last, E* ring, const Bring& bring, const Make& make) const {
        i64 image = -1, have = 0, made = 0;  // input rows and rows of the convolution that are there, up to these
        for (i64 r = first; r < last; ++r) {
            const i64 n = r / pool_.P, p = r % pool_.P;
            const i64 h0 = max_of(0, p * pool_.stride - pool_.padding);
            const i64 h1 = min_of(g_.P, p * pool_.stride - pool_.padding + pool_.kernel);
            if (n != image) image = n, made = h0, have = h0 * g_.stride_h - g_.pad_h;
            made = max_of(made, h0);
            for (; made < h1; ++made) {
                const i64 top = made * g_.stride_h - g_.pad_h;
                for (have = max_of(have, top); have < top + g_.R; ++have)
                    if (have >= 0 && have < g_.H) bring(n, have);
                make(top, ring + made % slots_ * row_);
            }
            pool(h0, h1, ring, y_ + r * pool_.Q * g_.K);
        }
    }

  private:
    void pool(i64 h0, i64 h1, const E* ring, T* y) const {
        for (i64 q = 0; q < pool_.Q; ++q, y += g_.K) {
            const i64 w0 = max_of(0, q * pool_.stride - pool_.padding);
            const i64 w1 = min_of(g_.Q, q * pool_.stride - pool_.padding + pool_.kernel);
            i64 k = 0;
            if constexpr (sizeof(E) == sizeof(i16)) {
                for (; k + 2 * L <= g_.K; k += 2 * L) write(y + k, greatest<vs>(h0, h1, w0, w1, ring + k));
                if (k < g_.K) {
                    const vs best = greatest<vs>(h0, h1, w0, w1, ring + k);
                    __builtin_memcpy(y + k, &best, (g_.K - k) * sizeof(i16));
                }
                continue;
            }
            for (; k + L <= g_.K; k += L) window(h0, h1, w0, w1, ring, y, k, Full());
            if (k < g_.K) window(h0, h1, w0, w1, ring, y, k, Tail{int(g_.K - k), false});
        }
    }

    template <class V>
    FR_INLINE V greatest(i64 h0, i64 h1, i64 w0, i64 w1, const E* ring) const {
        // Known at compile time, the usual window has no branch to be predicted.
        if (h1 - h0 == 3 && w1 - w0 == 3) return greatest<V>(h0, w0, ring, Constant<3>(), Constant<3>());
        return greatest<V>(h0, w0, ring, Extent{h1 - h0}, Extent{w1 - w0});
    }
    struct Extent {
        i64 value;
    };
    template <class V, class H, class W>
    FR_INLINE V greatest(i64 h0, i64 w0, const E* ring, H height, W width) const {
        V best = read<V>(ring + h0 % slots_ * row_ + w0 * width_);
        for (i64 h = 0; h < height.value; ++h) {
            const E* row = ring + (h0 + h) % slots_ * row_ + w0 * width_;
            for (i64 w = 0; w < width.value; ++w) {
                const V v = read<V>(row + w * width_);
                best = v > best ? v : best;
            }
        }
        return best;
    }

    // The greatest sum, then the bias and the ReLU, which keep the order of two values.
    template <class Span>
    FR_INLINE void window(i64 h0, i64 h1, i64 w0, i64 w1, const E* ring, T* y, i64 k, Span span) const {
        if constexpr (!std::is_same_v<E, float>) {
            span.store(y + k, bit_cast<vf>(greatest<vi>(h0, h1, w0, w1, ring + k)));
        } else {
            sums(h0, h1, w0, w1, ring, y, k, span);
        }
    }

    template <class Span>
    FR_INLINE void sums(i64 h0, i64 h1, i64 w0, i64 w1, const float* ring, T* y, i64 k, Span span) const {
        vf best = load(ring + h0 % slots_ * row_ + w0 * width_ + k);
        for (i64 h = h0; h < h1; ++h) {
            const float* row = ring + h % slots_ * row_ + k;
            for (i64 w = w0; w < w1; ++w) {
                const vf v = load(row + w * width_);
                best = v != v ? v : at_least(best, v);  // a NaN wins, whichever comes first
            }
        }
        span.store(y + k, at_least(best + span.load(bias_ + k), vf{}));
    }

    const ConvShape& g_;
    const PoolShape& pool_;
    const float* bias_;
    T* y_;
    const i64 width_, row_;
    i64 slots_ = 1;
};

}  // namespace
}  // namespace FASTRES_BACKEND
