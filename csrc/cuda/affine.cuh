// The per-channel maps of batch normalisation, eight channels in registers.
#pragma once
#include "rows.cuh"

namespace FASTRES_BACKEND {

// Planes of `stat`.
enum Plane : int { kMean = 0, kVariance = 1, kInvstd = 2, kScale = 3, kBias = 4, kStatPlanes = 5 };

// What joins the normalised value before the ReLU.
struct NoResidual {};
struct PlainResidual {};
struct BnResidual {};  // a residual with a batch normalisation of its own

// Where the gradient's ReLU mask comes from.
struct GivenMask {};   // stored bits, or no ReLU at all
struct Recomputed {};  // from x and stat

template <class R>
constexpr bool kHasResidual = !std::is_same_v<R, NoResidual>;
template <class R>
constexpr bool kHasResidualBn = std::is_same_v<R, BnResidual>;
template <class M>
constexpr bool kRecomputes = std::is_same_v<M, Recomputed>;

// fma(x - mean, scale, bias)
struct Affine {
    float mean[kVec], scale[kVec], bias[kVec];

    DEVICE float operator()(float x, int j) const { return fused(x - mean[j], scale[j], bias[j]); }
};

template <class A>
DEVICE Affine load_affine(const float* stat, const Rows& s, const Place& at) {
    Affine a;
    load_params<A>(stat + kMean * s.C + at.c, at.valid, a.mean);
    load_params<A>(stat + kScale * s.C + at.c, at.valid, a.scale);
    load_params<A>(stat + kBias * s.C + at.c, at.valid, a.bias);
    return a;
}

// coef0*g + coef1*(x - mean) + coef2
struct Gradient {
    float mean[kVec], c0[kVec], c1[kVec], c2[kVec];

    DEVICE float operator()(float g, float x, int j) const { return fused(c0[j], g, fused(c1[j], x - mean[j], c2[j])); }
};

template <class A>
DEVICE Gradient load_gradient(const float* stat, const float* coef, const Rows& s, const Place& at) {
    Gradient d;
    load_params<A>(stat + kMean * s.C + at.c, at.valid, d.mean);
    load_params<A>(coef + at.c, at.valid, d.c0);
    load_params<A>(coef + s.C + at.c, at.valid, d.c1);
    load_params<A>(coef + 2 * s.C + at.c, at.valid, d.c2);
    return d;
}

}  // namespace FASTRES_BACKEND
