// Convolution kernels that only the CPU has. Compiled per instruction set like the functions of launch.h.
#pragma once
#include "launch.h"

namespace FASTRES_BACKEND {

// Geometry of a 2-D convolution without groups: x [N, H, W, C], dy [N, P, Q, K], weight [K, R, S, C], all dense NHWC.
struct ConvShape {
    i64 N, H, W, C, K, P, Q, R, S;
    i64 stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// dw [K, R, S, C] = sum over pixels of dy x shifted x, float32. Every element is one sum over the pixels in
// ascending order: the same bits for any number of threads.
void conv_wgrad(const float* dy, const float* x, const ConvShape& shape, float* dw, i64 ctx);

}  // namespace FASTRES_BACKEND
