// The same kernels once per instruction set, chosen at run time.
// Every op file is compiled several times, each time with other flags and FASTRES_BACKEND=cpu_<isa>; isa/table.cpp
// collects the functions of one instruction set, isa.cpp forwards the functions of launch.h to the chosen table.
#pragma once
#include <string>
#include <vector>

namespace cpu_isa {

using Entry = void (*)();  // a launch function with its type erased

// The functions of launch.h, in its order, and those of cpu/conv.h.
#define FASTRES_FUNCTIONS(X)     \
    X(add_relu_fwd)              \
    X(add_relu_bwd)              \
    X(bn_stats)                  \
    X(bn_finalize)               \
    X(bn_fold)                   \
    X(bn_apply)                  \
    X(bn_bwd_reduce)             \
    X(bn_bwd_finalize)           \
    X(bn_bwd_apply)              \
    X(bias_act)                  \
    X(mask_add)                  \
    X(stem_fwd)                  \
    X(stem_bwd_reduce)           \
    X(stem_bwd_apply)            \
    X(conv_fprop)                \
    X(conv_packed_floats)        \
    X(conv_pack)                 \
    X(conv_dgrad)                \
    X(conv_wgrad)                \
    X(winograd_fprop)            \
    X(winograd_packed_floats)    \
    X(winograd_pack)             \
    X(strassen_fprop)            \
    X(strassen_packed_floats)    \
    X(strassen_pack)             \
    X(conv_groups)               \
    X(pairs_unit)                \
    X(matrix_groups)             \
    X(stem_conv)                 \
    X(stem_packed_floats)        \
    X(stem_pack)                 \
    X(global_mean)               \
    X(matrix_unit)               \
    X(matrix_products)           \
    X(matrix_fprop)              \
    X(matrix_packed_floats)      \
    X(matrix_pack)               \
    X(matrix_block)              \
    X(matrix_stem)               \
    X(matrix_stem_packed_floats) \
    X(matrix_stem_pack)

enum Index {
#define FASTRES_INDEX(name) k_##name,
    FASTRES_FUNCTIONS(FASTRES_INDEX)
#undef FASTRES_INDEX
};

// Instruction sets that were compiled and that this machine can run, the best first.
std::vector<std::string> available();
// Chosen on first use: FASTRES_ISA, else the best. Throws std::invalid_argument for a name that is not available.
std::string current();
void set(const std::string& name);

}  // namespace cpu_isa
