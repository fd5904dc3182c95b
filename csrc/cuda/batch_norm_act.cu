// Batch normalisation, forward: per-tile statistics, their merge, and one pass normalise + residual + ReLU.
#include "affine.cuh"

namespace FASTRES_BACKEND {

// Rows whose mean and M2 are taken exactly before they join the running ones.
template <class T>
constexpr int kChunkRows = 8 / static_cast<int>(sizeof(T));

// part [3, T, C]. Everything is measured from the tile's first row, so that a large common mean costs no digits.
template <class T, class A>
KERNEL(2)
bn_stats_kernel(Rows s, const T* x, float* part) {
    constexpr int kChunk = kChunkRows<T>;
    SHARED(float, shared, 2 * kTile);
    const Place at = place(s);
    float pivot[kVec] = {}, mean[kVec] = {}, m2[kVec] = {};
    if (at.n > 0) unpack(load_pack<A, false>(x + (at.lo - at.y) * s.C + at.c, at.valid), pivot);
    float count = 0;
    for (i64 i = 0; i < at.n; i += kChunk) {
        const int rows = static_cast<int>(least<i64>(at.n - i, kChunk));
        Pack<T> raw[kChunk];
#pragma unroll
        for (int u = 0; u < kChunk; ++u) {
            if (u < rows) raw[u] = load_pack<A, false>(x + (at.lo + (i + u) * s.depth) * s.C + at.c, at.valid);
        }
        float d[kChunk][kVec], sum[kVec] = {}, square[kVec] = {};
#pragma unroll
        for (int u = 0; u < kChunk; ++u) {
            if (u < rows) {
                unpack(raw[u], d[u]);
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    d[u][j] -= pivot[j];
                    sum[j] += d[u][j];
                }
            }
        }
        const float inverse = 1.0f / static_cast<float>(rows);
#pragma unroll
        for (int j = 0; j < kVec; ++j) sum[j] *= inverse;
#pragma unroll
        for (int u = 0; u < kChunk; ++u) {
            if (u < rows) {
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    const float e = d[u][j] - sum[j];
                    square[j] = fused(e, e, square[j]);
                }
            }
        }
        // Chan's merge of (rows, sum, square) into (count, mean, m2).
        const float joined = count + static_cast<float>(rows);
        const float share = static_cast<float>(rows) / joined;
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            const float delta = sum[j] - mean[j];
            mean[j] = fused(delta, share, mean[j]);
            m2[j] += fused(delta * delta, count * share, square[j]);
        }
        count = joined;
    }
    put(shared, 0, mean);
    put(shared, 1, m2);
    sync_block();

    i64 c;
    if (!owns_channel(s, c)) return;
    // Rows y, y + depth, ... of the tile were counted by y: the first `longer` of them hold one row more.
    const int used = static_cast<int>(least<i64>(at.tile_rows, s.depth));
    const i64 shorter = at.tile_rows / s.depth, longer = at.tile_rows % s.depth;
    const float total = static_cast<float>(at.tile_rows);
    float centre = 0, spread = 0;
    for (int y = 0; y < used; ++y) {
        const float n = static_cast<float>(shorter + (y < longer));
        centre = fused(n, get(shared, 0, y, s.lanes), centre);
    }
    if (used) centre /= total;
    for (int y = 0; y < used; ++y) {
        const float n = static_cast<float>(shorter + (y < longer));
        const float delta = get(shared, 0, y, s.lanes) - centre;
        spread += fused(delta * delta, n, get(shared, 1, y, s.lanes));
    }
    float first[kVec] = {};
    if (used) unpack(load_pack<Scalar, false>(x + (at.lo - at.y) * s.C + c, 1), first);
    const i64 tile = block_x() * s.C + c, plane = s.blocks * s.C;
    part[tile] = total;
    part[tile + plane] = first[0] + centre;
    part[tile + 2 * plane] = spread;
}

// Writes the five planes of `stat` at channel c from float64 statistics.
DEVICE void write_stat(double mean, double variance, const float* weight, const float* bias, double eps, i64 c, i64 C,
                       float* stat) {
    const double invstd = 1.0 / root(variance + eps);
    stat[kMean * C + c] = static_cast<float>(mean);
    stat[kVariance * C + c] = static_cast<float>(variance);
    stat[kInvstd * C + c] = static_cast<float>(invstd);
    stat[kScale * C + c] = static_cast<float>(weight ? static_cast<double>(weight[c]) * invstd : invstd);
    stat[kBias * C + c] = bias ? bias[c] : 0.0f;
}

KERNEL(2)
bn_finalize_kernel(const float* part, i64 T, i64 C, const float* weight, const float* bias, double eps, float* stat) {
    SHARED(double, shared, kWarps* kFinalChannels);
    const i64 c = block_x() * kFinalChannels + thread_index() % kFinalChannels;
    const i64 length = ceil_div(T, kRuns), begin = thread_index() / kFinalChannels * length;
    const i64 end = c < C ? least(begin + length, T) : 0;
    const float* const counts = part + c;
    const float* const means = counts + T * C;
    const float* const m2s = means + T * C;

    double count = 0, sum = 0;
#pragma unroll 4
    for (i64 t = begin; t < end; ++t) {
        const double n = counts[t * C];
        count += n;
        sum = fused(n, static_cast<double>(means[t * C]), sum);
    }
    count = sum_runs(shared, count);
    const double mean = sum_runs(shared, sum) / count;
    double m2 = 0;
#pragma unroll 4
    for (i64 t = begin; t < end; ++t) {
        const double delta = means[t * C] - mean;
        m2 += fused(delta * delta, static_cast<double>(counts[t * C]), static_cast<double>(m2s[t * C]));
    }
    m2 = sum_runs(shared, m2);
    if (c < C && thread_index() < kFinalChannels) write_stat(mean, m2 / count, weight, bias, eps, c, C, stat);
}

KERNEL(2)
bn_fold_kernel(const float* mean, const float* variance, const float* weight, const float* bias, double eps, i64 C,
               float* stat) {
    const i64 c = block_x() * kThreads + thread_index();
    if (c < C) write_stat(mean[c], variance[c], weight, bias, eps, c, C, stat);
}

template <class T, class A, class R>
KERNEL(2)
bn_apply_kernel(Rows s, const T* x, const float* stat, const T* residual, const float* rstat, int relu, T* out,
                u8* mask) {
    const Place at = place(s);
    if (at.n == 0) return;
    const Affine bn = load_affine<A>(stat, s, at);
    Affine rbn{};
    if constexpr (kHasResidualBn<R>) rbn = load_affine<A>(rstat, s, at);

    for (i64 i = at.n; i > 0; i -= kUnroll<T, A>) {
        Pack<T> xs[kUnroll<T, A>], rs[kUnroll<T, A>];
#pragma unroll
        for (int u = 0; u < kUnroll<T, A>; ++u) {
            if (u < i) {
                const i64 offset = (at.lo + (i - 1 - u) * s.depth) * s.C + at.c;
                xs[u] = load_pack<A, true>(x + offset, at.valid);
                if constexpr (kHasResidual<R>) rs[u] = load_pack<A, true>(residual + offset, at.valid);
            }
        }
#pragma unroll
        for (int u = 0; u < kUnroll<T, A>; ++u) {
            if (u < i) {
                const i64 row = at.lo + (i - 1 - u) * s.depth;
                float v[kVec];
                unpack(xs[u], v);
#pragma unroll
                for (int j = 0; j < kVec; ++j) v[j] = bn(v[j], j);
                if constexpr (kHasResidual<R>) {
                    float r[kVec];
                    unpack(rs[u], r);
#pragma unroll
                    for (int j = 0; j < kVec; ++j) v[j] += kHasResidualBn<R> ? rbn(r[j], j) : r[j];
                }
                Pack<T> result = pack<T>(v);
                const u32 bits = passed(result);
                if (relu) result = keep(result, bits);
                store_pack<A>(out + row * s.C + at.c, result, at.valid);
                if (mask) mask[row * s.groups + at.group] = static_cast<u8>(bits & valid_bits(at));
            }
        }
    }
}

void bn_stats(int dtype, const void* x, i64 M, i64 C, i64 T, void* part, i64 ctx) {
    const Rows s = plan(M, C, T);
    dispatch("bn_stats", dtype, C % kVec == 0 && aligned16(x), [&](auto t, auto access) {
        using E = decltype(t);
        launch("bn_stats", bn_stats_kernel<E, decltype(access)>, s.blocks, s.channel_blocks, ctx, s,
               static_cast<const E*>(x), static_cast<float*>(part));
    });
}

void bn_finalize(int dtype, const void* part, i64 T, i64 C, const void* weight, const void* bias, double eps,
                 void* stat, i64 ctx) {
    require_float("bn_finalize", dtype);
    launch("bn_finalize", bn_finalize_kernel, ceil_div(C, kFinalChannels), 1, ctx, static_cast<const float*>(part), T,
           C, static_cast<const float*>(weight), static_cast<const float*>(bias), eps, static_cast<float*>(stat));
}

void bn_fold(int dtype, const void* running_mean, const void* running_var, const void* weight, const void* bias,
             double eps, i64 C, void* stat, i64 ctx) {
    require_float("bn_fold", dtype);
    launch("bn_fold", bn_fold_kernel, ceil_div(C, kThreads), 1, ctx, static_cast<const float*>(running_mean),
           static_cast<const float*>(running_var), static_cast<const float*>(weight), static_cast<const float*>(bias),
           eps, C, static_cast<float*>(stat));
}

void bn_apply(int dtype, const void* x, i64 M, i64 C, const void* stat, const void* residual, const void* rstat,
              int relu, void* out, u8* mask, i64 ctx) {
    const Rows s = plan(M, C);
    const bool vector = C % kVec == 0 && aligned16(x, stat, residual, rstat, out);
    dispatch("bn_apply", dtype, vector, [&](auto t, auto access) {
        using E = decltype(t);
        using A = decltype(access);
        const auto start = [&](auto kernel) {
            launch("bn_apply", kernel, s.blocks, s.channel_blocks, ctx, s, static_cast<const E*>(x),
                   static_cast<const float*>(stat), static_cast<const E*>(residual), static_cast<const float*>(rstat),
                   relu, static_cast<E*>(out), mask);
        };
        if (!residual) {
            start(bn_apply_kernel<E, A, NoResidual>);
        } else if (!rstat) {
            start(bn_apply_kernel<E, A, PlainResidual>);
        } else {
            start(bn_apply_kernel<E, A, BnResidual>);
        }
    });
}

}  // namespace FASTRES_BACKEND
