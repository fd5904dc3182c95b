// Python entries of launch_cuda.h, for the GPU's module and the emulator's.
#pragma once
#include "../bindings.h"
#include "launch_cuda.h"

namespace FASTRES_BACKEND {

inline void cuda_entries(pybind11::module_& m) {
    ENTRY(bn_one_pass_fwd);
    ENTRY(bn_one_pass_bwd);
    ENTRY(shifted_rows);
    ENTRY(bottleneck_eval);
    ENTRY(basic_block_eval);
    ENTRY(stem_eval);
    ENTRY(bottleneck_hopper);
    m.def("has_sm90a", &has_sm90a);
    ENTRY(rotated_stage);
    ENTRY(conv_fprop);
    ENTRY(merge_moments);
}

}  // namespace FASTRES_BACKEND
