// Launch functions that only the CUDA sources offer; conventions as in ../launch.h.
#pragma once
#include "../launch.h"

namespace FASTRES_BACKEND {

// ---- batch_norm_act in one launch: a cooperative grid of T x ceil(C/256) blocks keeps the tensor on chip between its
// statistics and its map. The same bits as the separate launches with the same T. Throws where the GPU cannot hold all
// blocks, with what they keep, at once (fastres/backends/one_pass.py chooses T so that it can).

// bn_stats, bn_finalize and bn_apply. part [3, T, C] is scratch, stat is an output.
void bn_one_pass_fwd(int dtype, const void* x, i64 M, i64 C, const void* weight /*or null*/,
                     const void* bias /*or null*/, double eps, const void* residual /*or null*/,
                     const void* rstat /*or null*/, int relu, i64 T, void* part, void* stat, void* out,
                     u8* mask /*or null*/, i64 ctx);
// bn_bwd_reduce, bn_bwd_finalize and bn_bwd_apply for a residual without a BN of its own. part [2, T, C] is scratch.
// relu = 1 with mask null: the mask is recomputed (legal without residual only); y then receives the activation, if
// given. dx may be grad.
void bn_one_pass_bwd(int dtype, const void* grad, const void* x, i64 M, i64 C, const void* stat,
                     const u8* mask /*or null*/, int relu, int batch_stats, i64 T, void* part,
                     void* dweight /*or null*/, void* dbias /*or null*/, void* coef, void* dx, void* dres /*or null*/,
                     void* y /*or null*/, i64 ctx);

// ---- for gpu-check on sm_90 alone: bfloat16 x [80, 64] and identity [64, 64], out float [64, 64] = x[shift : shift +
// 64] if a warpgroup product may begin at any row of a tile; all aligned to 16 bytes. planar: 0 or 1, the tile's
// layout.
void shifted_rows(const void* x, const void* identity, i64 shift, int planar, void* out, i64 ctx);

// ---- bottleneck in evaluation, batch normalisations folded into the weights, stride 1: out [N, H, W, K] =
// relu(conv3(relu(conv2(relu(conv1(x) + b1)) + b2)) + b3 + shortcut), x [N, H, W, C]; conv1 1x1 to `mid` channels,
// conv2 3x3 with padding 1, conv3 1x1. shortcut: x, or with `projected` a 1x1 convolution of x.
// With a projection any C for mid 128, 64 for mid 64.
// weights: packed (fastres/backends/fragments.py). bias float [b1, b2, b3], the projection's added to b3. bfloat16 or
// float16; every address a multiple of 16 bytes. Throws std::invalid_argument for sizes that it has no kernel for.
void bottleneck_eval(int dtype, const void* x, i64 N, i64 H, i64 W, i64 C, i64 mid, i64 K, int projected,
                     const void* weights, const void* bias, void* out, i64 ctx);
// The same for sm_90 alone, with weights packed by fastres/backends/planes.py. Throws std::runtime_error on another GPU
// and where has_sm90a() is false.
void bottleneck_hopper(int dtype, const void* x, i64 N, i64 H, i64 W, i64 C, i64 mid, i64 K, int projected,
                       const void* weights, const void* bias, void* out, i64 ctx);
// Whether this was compiled for sm_90a.
bool has_sm90a();

// ---- basic block in evaluation, likewise: out [N, H, W, C] = relu(conv2(relu(conv1(x) + b1)) + b2 + x), both 3x3 with
// stride and padding 1. bias float [b1, b2].
void basic_block_eval(int dtype, const void* x, i64 N, i64 H, i64 W, i64 C, const void* weights, const void* bias,
                      void* out, i64 ctx);

// ---- stem in evaluation, likewise: out [N, P, Q, 64] = max pooling (3x3, stride 2, padding 1) of relu(conv(x) +
// bias), conv 7x7 with stride 2 and padding 3. x: three channels at any addresses; image, channel, row, column: its
// strides in elements, not negative. bias float [64].
void stem_eval(int dtype, const void* x, i64 N, i64 H, i64 W, i64 image, i64 channel, i64 row, i64 column,
               const void* weights, const void* bias, void* out, i64 ctx);

// ---- the rotated unit of a stage of bottlenecks in evaluation, batch normalisations folded into the weights:
// out [N, H, W, K] = relu(conv3(relu(conv2(h) + b2)) + b3 + residual) and, unless it is null, next [N, H, W, mid] =
// relu(conv1'(out) + b1'), the following block's first activation. h [N, H, W, mid], residual [N, H, W, K]; conv2 3x3
// with padding 1, conv3 and conv1' 1x1. weights, bias [b2, b3, b1'] and addresses as in bottleneck_eval, without conv1'
// where next is null. Computed in tiles of tile_h x tile_w pixels, tile_w a multiple of 8
// (fastres/backends/rotated_kernels.py chooses them). Throws std::invalid_argument for sizes that it has no kernel for.
void rotated_stage(int dtype, const void* h, const void* residual, i64 N, i64 H, i64 W, i64 mid, i64 K, i64 tile_h,
                   i64 tile_w, const void* weights, const void* bias, void* out, void* next /*or null*/, i64 ctx);

// ---- forward convolution on tensor cores: out [N, P, Q, K] = act(conv(x [N, H, W, C], w [K, R, S, C/groups]) + bias +
// residual), rounded once. bfloat16 or float16; C/groups and K/groups multiples of 8, R and S 1..7; bias float [K] or
// null; every address but bias and part a multiple of 16 bytes. part: float [3, T, K] or null, legal without relu and
// residual: count, mean and M2 of the rounded out, each of as many pixels as the tile has.
// tile: a row of TILES in fastres/backends/cuda_conv.py. Throws std::invalid_argument for what it has no kernel for.
void conv_fprop(int dtype, const void* x, i64 N, i64 H, i64 W, i64 C, const void* w, i64 K, i64 R, i64 S, i64 stride_h,
                i64 stride_w, i64 pad_h, i64 pad_w, i64 dilation_h, i64 dilation_w, i64 groups,
                const void* bias /*or null*/, const void* residual /*or null*/, int relu, void* part /*or null*/,
                void* out, int tile, i64 ctx);
// part [3, T, C] merged into out [3, G, C], ceil(T/G) tiles in a row each, in ascending order: G such that each has
// one.
void merge_moments(const void* part, i64 T, i64 C, i64 G, void* out, i64 ctx);

}  // namespace FASTRES_BACKEND
