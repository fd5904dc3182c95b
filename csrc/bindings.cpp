// Table of contents of a module: one line an entry. The same text for _cpu, _cuda and _emulator.
// Addresses come in as integers (0 = null); nothing is returned; the GIL is released.
#include "bindings.h"

#ifdef FASTRES_MODULE_EXTRAS
namespace FASTRES_BACKEND {
void extras(pybind11::module_& m);  // <backend>/module.cpp
}
#endif

PYBIND11_MODULE(FASTRES_MODULE, m) {
    m.doc() = "Compiled kernels of fastres; see csrc/launch.h for the signatures.";
    ENTRY(add_relu_fwd);
    ENTRY(add_relu_bwd);
    ENTRY(bn_stats);
    ENTRY(bn_finalize);
    ENTRY(bn_fold);
    ENTRY(bn_apply);
    ENTRY(bn_bwd_reduce);
    ENTRY(bn_bwd_finalize);
    ENTRY(bn_bwd_apply);
    ENTRY(bias_act);
    ENTRY(mask_add);
    ENTRY(stem_fwd);
    ENTRY(stem_bwd_reduce);
    ENTRY(stem_bwd_apply);
#ifdef FASTRES_MODULE_EXTRAS
    FASTRES_BACKEND::extras(m);
#endif
}
