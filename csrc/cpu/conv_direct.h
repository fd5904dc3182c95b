// A convolution as both directions need it: for every point of a grid, a sum over taps.
//
//   y[n, i, j, :] = sum_t x[n, i*step_h + dr_t, j*step_w + dc_t, :] . w_t,   x zero outside [H, W]
//
// fprop is one such problem; dgrad with stride s is s*s of them, one per residue of the pixel's position.
#pragma once
#include "launch.h"

namespace FASTRES_BACKEND {

constexpr int kMaxTaps = 121;

struct Direct {
    i64 N, H, W, C, I, J, K;
    i64 groups;  // 0 or 1: none; more, with packed weights: each of whole panels
    i64 step_h, step_w;
    int n_taps;
    i64 dr[kMaxTaps], dc[kMaxTaps];
    i64 w_tap[kMaxTaps];  // where a tap's weights start, in elements
    i64 w_out, w_in;      // strides of the weight in output and input channels
    i64 y_n, y_i, y_j;    // strides of y in images, rows and pixels, in elements
    const void *x, *w;
    const float* packed;  // the weights as pack_direct leaves them, in place of w; or null
    bool pairs;           // products of pairs of bfloat16: of x, and of packed weights, which must be there
    const float* bias;
    const void* residual;
    bool relu;
    void* y;
    // A 1x1 problem without borders is one long row: cut into rows of J points that follow each other in x and y, with
    // `points` in all. 0: N*I*J, nothing special.
    i64 points;
};

struct WeightsLayout {
    // Of the input channels, of the output channels, floats of one of these. A pair of bfloat16 stands for a float.
    i64 blocks, panels, panel_floats;
    i64 inputs, in_blocks;  // channels that a panel reads, and their blocks
    int last_width;         // floats of a pixel in the last of in_blocks
};
WeightsLayout weights_layout(const Direct& problem);

// Weights for `direct`, laid out once: floats that takes, and the work. Of the problem K, C, taps and w are read; pairs
// are made of float32.
i64 packed_floats(const Direct& problem);
void pack_direct(int dtype, const Direct& problem, float* packed, i64 threads);

void direct(int dtype, const Direct& problem, i64 threads);

}  // namespace FASTRES_BACKEND
