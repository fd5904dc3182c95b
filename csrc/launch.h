// The launch signature: every kernel of every backend, declared once.
//
// Buffers in, nothing out: a kernel fills memory it is given and knows neither torch nor Python.
// bindings.cpp exposes these functions with the same names and the same argument order, and
// fastres/backends/reference.py is their executable meaning in plain PyTorch.
//
// Conventions
//   dtype   type of the activations: 0 float32, 1 bfloat16, 2 float16, 3 float64.
//   acc     float for dtypes 0..2, double for dtype 3: type of `stat`, `part`, `coef`, parameters.
//   [M, C]  activations in NHWC, dense: M = N*H*W rows of C channels. M may be 0, C may be odd,
//           addresses are aligned to their element only.
//   mask    uint8 [M, ceil(C/8)]: bit j of byte b in row m belongs to channel 8*b + j and is 1 where
//           the ReLU lets the gradient pass, that is !(v <= 0) as in PyTorch (NaN passes).
//           Unused bits of a row's last byte are 0.
//   stat    acc [5, C]: 0 mean, 1 biased variance, 2 invstd, 3 scale = weight*invstd, 4 bias.
//           A normalised value is fma(x - mean, scale, bias), rounded to dtype once, after a
//           residual was added; the ReLU and its mask look at the rounded value.
//   part    acc [planes, T, C]: per-tile partial results; tile t owns rows [t*R, min((t+1)*R, M))
//           with R = ceil(M/T). Merged in an order that depends on T alone: the same bits on every run.
//   coef    acc [3, C]: dx = coef0*g + coef1*(x - mean) + coef2, with g the masked gradient.
//   null    a pointer marked "or null" may be null.
//   alias   dx may be the very buffer grad (bn_bwd_apply), out the very buffer x (bn_apply, bias_act) or a (mask_add).
//   ctx     CPU: number of threads. CUDA: cudaStream_t as an integer. Emulator: seed of the fiber order.
#pragma once
#include <cstdint>

#ifndef FASTRES_BACKEND
#error "FASTRES_BACKEND names the namespace of the backend being compiled: cpu, cuda or emulator"
#endif

namespace FASTRES_BACKEND {

using i64 = std::int64_t;
using u8 = std::uint8_t;

enum Dtype : int { kF32 = 0, kBF16 = 1, kF16 = 2, kF64 = 3 };

// ---- add_relu: out = relu(x + residual) over n elements in storage order; here mask is [ceil(n/8)]
void add_relu_fwd(int dtype, const void* x, const void* residual, i64 n, void* out, u8* mask /*or null*/, i64 ctx);
void add_relu_bwd(int dtype, const void* grad, const u8* mask, i64 n, void* dx, i64 ctx);

// ---- batch_norm_act
// part [3, T, C]: count, mean, M2 of each tile (two-pass or shifted: never E[x^2] - E[x]^2).
void bn_stats(int dtype, const void* x, i64 M, i64 C, i64 T, void* part, i64 ctx);
// Chan merge of part in float64 -> stat. weight / bias null mean 1 / 0.
void bn_finalize(int dtype, const void* part, i64 T, i64 C, const void* weight /*or null*/,
                 const void* bias /*or null*/, double eps, void* stat, i64 ctx);
// stat from given statistics, computed in float64.
void bn_fold(int dtype, const void* running_mean, const void* running_var, const void* weight /*or null*/,
             const void* bias /*or null*/, double eps, i64 C, void* stat, i64 ctx);
// out = act(bn(x) [+ residual | + rbn(residual)]); rstat null: the residual is added as it is.
void bn_apply(int dtype, const void* x, i64 M, i64 C, const void* stat, const void* residual /*or null*/,
              const void* rstat /*or null*/, int relu, void* out, u8* mask /*or null*/, i64 ctx);
// g = grad where the ReLU passed. part [planes, T, C]: sum g, sum g*(x - mean) and, with rstat, sum g*(r - rmean).
// relu = 1 with mask null: the mask is recomputed from x and stat (legal without residual only).
// y, if given, receives act(bn(x)): the activation recomputed in the same pass (without residual only).
void bn_bwd_reduce(int dtype, const void* grad, const void* x, i64 M, i64 C, const void* stat,
                   const void* residual /*or null*/, const void* rstat /*or null*/, const u8* mask /*or null*/,
                   int relu, i64 T, void* part, void* y /*or null*/, i64 ctx);
// plane: 1 for x, 2 for the residual. batch_stats = 0: statistics were given, so coef1 = coef2 = 0.
void bn_bwd_finalize(int dtype, const void* part, i64 plane, i64 T, i64 M, i64 C, const void* stat, int batch_stats,
                     void* dweight /*or null*/, void* dbias /*or null*/, void* coef, i64 ctx);
// dx as under coef. dres: with rcoef the same map for the residual's own BN, without it g itself.
void bn_bwd_apply(int dtype, const void* grad, const void* x, i64 M, i64 C, const void* stat, const void* coef,
                  const void* residual /*or null*/, const void* rstat /*or null*/, const void* rcoef /*or null*/,
                  const u8* mask /*or null*/, int relu, void* dx, void* dres /*or null*/, i64 ctx);

// ---- conv_bn_act: epilogue of a convolution with folded BN. out may be x.
void bias_act(int dtype, const void* x, i64 M, i64 C, const void* bias /*acc, or null*/,
              const void* residual /*or null*/, int relu, void* out, i64 ctx);

// ---- bottleneck and basic_block: out = a + g, the residual branch's gradient joining the main one. out may be a.
void mask_add(int dtype, const void* a, const void* grad, const u8* mask, i64 M, i64 C, void* out, i64 ctx);

// ---- stem: max pooling of relu(bn(x)), x [N, H, W, C] -> out [N, P, Q, C], window k x k.
// Values are compared after rounding to dtype; the first maximum in row-major order wins, a NaN wins over all.
// idx uint8 [N, P, Q, C]: winning tap r*k + s, or 255 where no gradient passes (winner <= 0). k*k <= 225.
void stem_fwd(int dtype, const void* x, i64 N, i64 H, i64 W, i64 C, const void* stat, i64 P, i64 Q, i64 k, i64 stride,
              i64 pad, void* out, u8* idx /*or null*/, i64 ctx);
// part [2, T, C] as in bn_bwd_reduce; tiles run over the N*P*Q pooled pixels.
void stem_bwd_reduce(int dtype, const void* grad, const u8* idx, const void* x, i64 N, i64 H, i64 W, i64 C,
                     const void* stat, i64 P, i64 Q, i64 k, i64 stride, i64 pad, i64 T, void* part, i64 ctx);
// dx [N, H, W, C], every element written.
void stem_bwd_apply(int dtype, const void* grad, const u8* idx, const void* x, i64 N, i64 H, i64 W, i64 C,
                    const void* stat, const void* coef, i64 P, i64 Q, i64 k, i64 stride, i64 pad, void* dx, i64 ctx);

}  // namespace FASTRES_BACKEND
