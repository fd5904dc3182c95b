// How a launch function becomes a Python function: pointers are integers, the GIL is released.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <type_traits>

#include "launch.h"

namespace FASTRES_BACKEND {

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
void entry(pybind11::module_& m, const char* name, void (*f)(A...)) {
    m.def(name, [f](Plain<A>... a) { f(cast<A>(a)...); }, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace FASTRES_BACKEND

#define ENTRY(name) FASTRES_BACKEND::entry(m, #name, &FASTRES_BACKEND::name)
