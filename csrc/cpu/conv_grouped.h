// Convolutions of groups that are narrower than a vector, or as wide.
#pragma once
#include "cpu/conv.h"

namespace FASTRES_BACKEND {

// Whether a vector of outputs is made of whole groups.
bool grouped_serves(const ConvShape& shape, int pairs);
// As conv_fprop and its packed weights, of which conv_pack and conv_packed_floats tell.
i64 grouped_packed_floats(const ConvShape& shape, int pairs);
void grouped_pack(int dtype, const void* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& shape, int pairs,
                  float* packed, i64 threads);
void grouped_fprop(int dtype, const void* x, const float* packed, int pairs, const ConvShape& shape, const float* bias,
                   const void* residual, bool relu, void* y, i64 threads);
// The same where x need not be laid out (conv_grouped_inplace.cpp), and whether that is so.
bool grouped_in_place(int dtype, const ConvShape& shape, int pairs, bool residual);
void grouped_in_place_fprop(const void* x, const float* packed, int pairs, const ConvShape& shape, const float* bias,
                            bool relu, void* y, i64 threads);

}  // namespace FASTRES_BACKEND
