// What only the CPU module offers: the choice of instruction set and the OpenMP runtime.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/conv.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace cpu {

void extras(pybind11::module_& m) {
    m.def("available_isas", &cpu_isa::available,
          "Instruction sets this build can use on this machine, the best first.");
    m.def("isa", &cpu_isa::current, "The instruction set in use: FASTRES_ISA, set_isa, or the best one.");
    m.def("set_isa", &cpu_isa::set, pybind11::arg("name"), "Use another instruction set; ValueError if unavailable.");
    m.def("set_openmp", &cpu_runtime::set_openmp, pybind11::arg("parallel"), pybind11::arg("thread_num"),
          pybind11::arg("num_threads"),
          "Addresses of GOMP_parallel, omp_get_thread_num, omp_get_num_threads, or 0, 0, 0.");
    m.def(
        "conv_wgrad",
        [](std::uintptr_t dy, std::uintptr_t x, i64 N, i64 H, i64 W, i64 C, i64 K, i64 P, i64 Q, i64 R, i64 S,
           i64 stride_h, i64 stride_w, i64 pad_h, i64 pad_w, i64 dilation_h, i64 dilation_w, std::uintptr_t dw,
           i64 ctx) {
            const ConvShape shape{N, H, W, C, K, P, Q, R, S, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w};
            conv_wgrad(reinterpret_cast<const float*>(dy), reinterpret_cast<const float*>(x), shape,
                       reinterpret_cast<float*>(dw), ctx);
        },
        pybind11::call_guard<pybind11::gil_scoped_release>(), "float32 weight gradient, see csrc/cpu/conv.h.");
    m.def("has_openmp", &cpu_runtime::has_openmp, "Whether more than one thread can run.");
}

}  // namespace cpu
