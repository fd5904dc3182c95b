// Convolution kernels that only the CPU has. Compiled per instruction set like the functions of launch.h.
#pragma once
#include "launch.h"

namespace FASTRES_BACKEND {

// Geometry of a 2-D convolution: x [N, H, W, C], dy [N, P, Q, K], weight [K, R, S, C / groups], all dense NHWC.
// Groups, where they are served (conv_fprop with packed weights): see conv_groups.
struct ConvShape {
    i64 N, H, W, C, K, P, Q, R, S;
    i64 stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups;
};

// Sums are float32 whatever the dtype (0..2) of the activations; every element is one sum in a fixed order: the same
// bits for any number of threads.

// y [N, P, Q, K] = conv(x, w) [+ bias] [+ residual], then ReLU. w [K, R, S, C] in the dtype of x, with element strides
// w_k and w_c; taps of [R, S] are w_tap apart; packed, if given, stands in its place. residual has the shape and
// dtype of y, and may be y. pairs: by products of pairs of bfloat16, which x is of and packed, made for it, must be.
void conv_fprop(int dtype, const void* x, const void* w, i64 w_k, i64 w_c, i64 w_tap, const float* packed /*or null*/,
                int pairs, const ConvShape& shape, const float* bias /*or null*/, const void* residual /*or null*/,
                int relu, void* y, i64 ctx);
// Weights laid out once for conv_fprop, in a layout of the instruction set's own; for pairs rounded to bfloat16, from
// float32. Of the shape K, C, R and S are read.
i64 conv_packed_floats(const ConvShape& shape, int pairs);
// Whether conv_fprop serves so many groups of C channels into K: groups of a panel, or panels of a group, come out
// even.
i64 conv_groups(i64 C, i64 K, i64 groups, int pairs);
void conv_pack(int dtype, const void* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& shape, int pairs, float* packed,
               i64 ctx);
// One of cpu_runtime::PairsUnit (pairs.h).
i64 pairs_unit();

// conv_fprop by Winograd's F(out x out, 3x3): 3x3 taps, out 2, 3, 4, 5 or 7 with stride 1, 2 or 4 with stride 2 and
// dilation 1. packed: what winograd_pack made of the float32 weights for this out and stride.
void winograd_fprop(int dtype, const void* x, const float* packed, const ConvShape& shape, i64 out,
                    const float* bias /*or null*/, const void* residual /*or null*/, int relu, void* y, i64 ctx);
i64 winograd_packed_floats(const ConvShape& shape, i64 out);
void winograd_pack(const float* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& shape, i64 out, float* packed,
                   i64 ctx);

// conv_fprop by Strassen's product, of 1x1 taps, one group and no padding; levels: 1 or 2. packed: what strassen_pack
// made of the float32 weights for as many.
void strassen_fprop(int dtype, const void* x, const float* packed, const ConvShape& shape, i64 levels,
                    const float* bias /*or null*/, const void* residual /*or null*/, int relu, void* y, i64 ctx);
i64 strassen_packed_floats(const ConvShape& shape, i64 levels);
void strassen_pack(const float* w, i64 w_k, i64 w_c, const ConvShape& shape, i64 levels, float* packed, i64 ctx);

// A square pooling window and the size of its output.
struct PoolShape {
    i64 kernel, stride, padding, P, Q;
};
// y [N, pool.P, pool.Q, K] = max_pool(relu(conv(x, w) + bias)) of images [N, H, W, 3], of a stride_w of 2. packed: what
// stem_pack made of the float32 weights. pairs: as of conv_fprop.
void stem_conv(int dtype, const void* x, const float* packed, int pairs, const ConvShape& shape, const PoolShape& pool,
               const float* bias, void* y, i64 ctx);
i64 stem_packed_floats(const ConvShape& shape, int pairs);
void stem_pack(const float* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& shape, int pairs, float* packed);

// The same on the matrix unit, of up to 4 channels, 8 columns and 15 rows and any stride; packed as matrix_stem_pack
// made it for the dtype.
void matrix_stem(int dtype, const void* x, const float* packed, const ConvShape& shape, const PoolShape& pool,
                 const float* bias, void* y, i64 ctx);
i64 matrix_stem_packed_floats(int dtype, const ConvShape& shape);
void matrix_stem_pack(int dtype, const float* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& shape, float* packed);

// y [N, C] = mean over M of x [N, M, C], summed in float32 in the order of M.
void global_mean(int dtype, const void* x, i64 N, i64 M, i64 C, void* y, i64 ctx);

// conv_fprop on the matrix unit (conv_matrix.h), of the groups that matrix_groups allows: products of bfloat16 where
// the activations are, else of float32 as sums of two bfloat16. packed: what matrix_pack made of the float32 weights
// for the dtype. matrix_unit: one of cpu_runtime::MatrixUnit (matrix_unit.h). following: the call that comes next, if
// it is one of these; its first weights are fetched meanwhile.
i64 matrix_unit();
// So many products of two tiles (16,384 FLOP each) on every thread, from registers: what the unit can do at most.
void matrix_products(i64 count, i64 ctx);
struct Following {
    ConvShape shape;
    const float* packed;
    bool residual;
};
void matrix_fprop(int dtype, const void* x, const float* packed, const ConvShape& shape, const float* bias /*or null*/,
                  const void* residual /*or null*/, int relu, void* y, const Following* following /*or null*/, i64 ctx);
// Whether so many groups of C channels into K are served: one, or several of 1 to 32 channels that fill 32 together.
i64 matrix_groups(i64 C, i64 K, i64 groups);
i64 matrix_packed_floats(int dtype, const ConvShape& shape);
void matrix_pack(int dtype, const float* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& shape, float* packed,
                 i64 ctx);

// A residual block of two or three convolutions in one pass, y = relu(conv(.. relu(conv(x) + bias)) + bias + shortcut),
// the shortcut x or, if projected, a 1x1 convolution of x that comes last in shapes, packed and bias. Between two
// convolutions lie multiples of 32 channels. packed: as above; bias: none is null.
void matrix_block(int dtype, const void* x, const ConvShape* shapes, const float* const* packed,
                  const float* const* bias, int count, int projected, void* y, i64 ctx);

// dx [N, H, W, C], every element written.
void conv_dgrad(int dtype, const void* dy, const void* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& shape, void* dx,
                i64 ctx);

// dw [K, R, S, C] = sum over pixels of dy x shifted x, float32.
void conv_wgrad(int dtype, const void* dy, const void* x, const ConvShape& shape, float* dw, i64 ctx);

}  // namespace FASTRES_BACKEND
