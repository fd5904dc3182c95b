// What the multi-pass and the one-pass kernels of batch normalisation share: the same arithmetic in the same order, so
// that equal tiles give equal bits.
#pragma once
#include "affine.cuh"

namespace FASTRES_BACKEND {

// ---- forward

// Rows whose mean and M2 are taken exactly before they join the running ones.
template <class T>
constexpr int kChunkRows = 8 / static_cast<int>(sizeof(T));

// Count, mean and M2 of a thread's rows. Everything is measured from the tile's first row, so that a large common mean
// costs no digits.
struct Moments {
    float pivot[kVec], mean[kVec], m2[kVec];
    float count;

    // Chan's merge with the first `rows` of a chunk.
    template <class T>
    DEVICE void join(const Pack<T>* raw, int rows) {
        constexpr int kChunk = kChunkRows<T>;
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
};

template <class A, class T>
DEVICE Moments start_moments(const Rows& s, const Place& at, const T* x) {
    Moments m{};
    if (at.n > 0) unpack(load_pack<A, false>(x + (at.lo - at.y) * s.C + at.c, at.valid), m.pivot);
    return m;
}

// Of a thread's rows. Each goes to `visit(i, row)` as well, before its chunk joins. kLast: x is read no more.
template <class A, bool kLast, class T, class Visit>
DEVICE Moments moments_of(const Rows& s, const Place& at, const T* x, Visit visit) {
    constexpr int kChunk = kChunkRows<T>;
    Moments moments = start_moments<A>(s, at, x);
    for (i64 i = 0; i < at.n; i += kChunk) {
        const int rows = static_cast<int>(least<i64>(at.n - i, kChunk));
        Pack<T> raw[kChunk];
#pragma unroll
        for (int u = 0; u < kChunk; ++u) {
            if (u < rows) raw[u] = load_pack<A, kLast>(x + (at.lo + (i + u) * s.depth) * s.C + at.c, at.valid);
        }
#pragma unroll
        for (int u = 0; u < kChunk; ++u) {
            if (u < rows) visit(i + u, raw[u]);
        }
        moments.join(raw, rows);
    }
    return moments;
}

// The block's tile of part [3, T, C].
template <class S, class T>
DEVICE void write_moments(const Rows& s, const Place& at, S& shared, const Moments& m, const T* x, float* part) {
    put(shared, 0, m.mean);
    put(shared, 1, m.m2);
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

// stat of the kFinalChannels channels from `first` on, by a whole block; `shared` holds kWarps * kFinalChannels
// doubles.
template <class S>
DEVICE void finalize_stat(S& shared, i64 first, const float* part, i64 T, i64 C, const float* weight, const float* bias,
                          double eps, float* stat) {
    const i64 c = first + thread_index() % kFinalChannels;
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

// act(bn(x) + residual) of one row, and its mask byte.
template <class A, class R, class T>
DEVICE void apply_row(const Rows& s, const Place& at, i64 row, const Affine& bn, const Pack<T>& x, const Affine& rbn,
                      const Pack<T>& residual, int relu, T* out, u8* mask) {
    float v[kVec];
    unpack(x, v);
#pragma unroll
    for (int j = 0; j < kVec; ++j) v[j] = bn(v[j], j);
    if constexpr (kHasResidual<R>) {
        float r[kVec];
        unpack(residual, r);
#pragma unroll
        for (int j = 0; j < kVec; ++j) v[j] += kHasResidualBn<R> ? rbn(r[j], j) : r[j];
    }
    Pack<T> result = pack<T>(v);
    const u32 bits = passed(result);
    if (relu) result = keep(result, bits);
    store_pack<A>(out + row * s.C + at.c, result, at.valid);
    if (mask) mask[row * s.groups + at.group] = static_cast<u8>(bits & valid_bits(at));
}

// ---- backward

// The mask must be stored where it cannot be recomputed from x and stat alone.
inline bool recomputes(const char* name, int relu, const u8* mask, const void* residual) {
    const bool missing = relu && !mask;
    if (missing && residual) {
        throw std::invalid_argument(std::string(name) + ": relu with a residual needs a mask, got a null mask");
    }
    return missing;
}

// Bits of the ReLU of bn(x), of the value as rounded to T.
template <class T>
DEVICE u32 relu_bits(const Affine& bn, const float (&x)[kVec], Pack<T>& rounded) {
    float v[kVec];
#pragma unroll
    for (int j = 0; j < kVec; ++j) v[j] = bn(x[j], j);
    rounded = pack<T>(v);
    return passed(rounded);
}

// What a thread's rows add to the sums of a backward: the masked gradient, and that times x - mean, also for a residual
// with a BN of its own.
struct GradientSums {
    float g[kVec] = {}, gx[kVec] = {}, gr[kVec] = {};
};

// Of a thread's rows, with y, the activation, where asked for. Each goes to `visit(i, masked gradient, x)` as well.
// kLast: nothing of this is read again.
template <class A, class M, class R, bool kLast, class T, class Visit>
DEVICE GradientSums gradient_sums(const Rows& s, const Place& at, const T* grad, const T* x, const float* stat,
                                  const T* residual, const float* rstat, const u8* mask, int relu, T* y, Visit visit) {
    constexpr int kStep = kUnroll<T, A>;
    GradientSums sum;
    if (at.n == 0) return sum;
    Affine bn{};
    float rmean[kVec] = {};
    if constexpr (kRecomputes<M>) {
        bn = load_affine<A>(stat, s, at);
    } else {
        load_params<A>(stat + kMean * s.C + at.c, at.valid, bn.mean);
    }
    if constexpr (kHasResidualBn<R>) load_params<A>(rstat + kMean * s.C + at.c, at.valid, rmean);

    for (i64 i = 0; i < at.n; i += kStep) {
        Pack<T> gs[kStep], xs[kStep], rs[kStep];
        u32 bits[kStep];
#pragma unroll
        for (int u = 0; u < kStep; ++u) {
            if (i + u < at.n) {
                const i64 row = at.lo + (i + u) * s.depth, offset = row * s.C + at.c;
                gs[u] = load_pack<A, kLast>(grad + offset, at.valid);
                xs[u] = load_pack<A, kLast>(x + offset, at.valid);
                if constexpr (kHasResidualBn<R>) rs[u] = load_pack<A, kLast>(residual + offset, at.valid);
                bits[u] = relu && mask ? mask[row * s.groups + at.group] : 0xffu;
            }
        }
#pragma unroll
        for (int u = 0; u < kStep; ++u) {
            if (i + u < at.n) {
                float g[kVec], v[kVec];
                unpack(xs[u], v);
                if constexpr (kRecomputes<M>) {
                    Pack<T> act;
                    const u32 own = relu_bits(bn, v, act);
                    if (relu && !mask) bits[u] = own;
                    if (y) {
                        const i64 offset = (at.lo + (i + u) * s.depth) * s.C + at.c;
                        store_pack<A>(y + offset, relu ? keep(act, own) : act, at.valid);
                    }
                }
                const Pack<T> masked = keep(gs[u], bits[u]);
                visit(i + u, masked, xs[u]);
                unpack(masked, g);
#pragma unroll
                for (int j = 0; j < kVec; ++j) {
                    sum.g[j] += g[j];
                    sum.gx[j] = fused(g[j], v[j] - bn.mean[j], sum.gx[j]);
                }
                if constexpr (kHasResidualBn<R>) {
                    unpack(rs[u], v);
#pragma unroll
                    for (int j = 0; j < kVec; ++j) sum.gr[j] = fused(g[j], v[j] - rmean[j], sum.gr[j]);
                }
            }
        }
    }
    return sum;
}

// coef and parameter gradients of the kFinalChannels channels from `first` on; as finalize_stat.
template <class S>
DEVICE void finalize_coef(S& shared, i64 first, const float* part, i64 plane, i64 T, i64 M, i64 C, const float* stat,
                          int batch_stats, float* dweight, float* dbias, float* coef) {
    const i64 c = first + thread_index() % kFinalChannels;
    const i64 length = ceil_div(T, kRuns), begin = thread_index() / kFinalChannels * length;
    const i64 end = c < C ? least(begin + length, T) : 0;
    const float* const gs = part + c;
    const float* const gxs = gs + plane * T * C;
    double sum_g = 0, sum_gx = 0;
#pragma unroll 4
    for (i64 t = begin; t < end; ++t) {
        sum_g += gs[t * C];
        sum_gx += gxs[t * C];
    }
    sum_g = sum_runs(shared, sum_g);
    sum_gx = sum_runs(shared, sum_gx);
    if (c >= C || thread_index() >= kFinalChannels) return;
    const double invstd = stat[kInvstd * C + c], scale = stat[kScale * C + c];
    if (dweight) dweight[c] = static_cast<float>(sum_gx * invstd);
    if (dbias) dbias[c] = static_cast<float>(sum_g);
    const double share = -scale / static_cast<double>(M);
    coef[c] = static_cast<float>(scale);
    coef[C + c] = batch_stats ? static_cast<float>(share * invstd * invstd * sum_gx) : 0.0f;
    coef[2 * C + c] = batch_stats ? static_cast<float>(share * sum_g) : 0.0f;
}

}  // namespace FASTRES_BACKEND
