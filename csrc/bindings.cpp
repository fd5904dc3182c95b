// Table of contents of a module: one line an entry. The same text for _cpu, _cuda and _emulator.
// Addresses come in as integers (0 = null); nothing is returned; the GIL is released.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

#include "launch.h"

namespace py = pybind11;

namespace FASTRES_BACKEND {
#ifdef FASTRES_MODULE_EXTRAS
void extras(py::module_& m);  // <backend>/module.cpp
#endif

// Pointers are integers on the Python side, everything else is itself.
template <class T>
using Plain = std::conditional_t<std::is_pointer_v<T>, std::uintptr_t, T>;

template <class T>
T cast(Plain<T> value) {
    if constexpr (std::is_pointer_v<T>)
        return reinterpret_cast<T>(value);
    else
        return value;
}

template <class... A>
void entry(py::module_& m, const char* name, void (*f)(A...)) {
    m.def(name, [f](Plain<A>... a) { f(cast<A>(a)...); }, py::call_guard<py::gil_scoped_release>());
}
}  // namespace FASTRES_BACKEND

#define ENTRY(name) FASTRES_BACKEND::entry(m, #name, &FASTRES_BACKEND::name)

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
