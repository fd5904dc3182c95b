// What only the CPU module offers: the choice of instruction set and the OpenMP runtime.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cpu/conv.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/pool.h"

namespace cpu {
namespace {

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

ConvShape shape_of(const std::array<i64, 15>& s) {
    return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], s[14]};
}

}  // namespace

void extras(pybind11::module_& m) {
    m.def("available_isas", &cpu_isa::available,
          "Instruction sets this build can use on this machine, the best first.");
    m.def("isa", &cpu_isa::current, "The instruction set in use: FASTRES_ISA, set_isa, or the best one.");
    m.def("set_isa", &cpu_isa::set, pybind11::arg("name"), "Use another instruction set; ValueError if unavailable.");
    m.def("set_openmp", &cpu_runtime::set_openmp, pybind11::arg("parallel"), pybind11::arg("thread_num"),
          pybind11::arg("num_threads"),
          "Addresses of GOMP_parallel, omp_get_thread_num, omp_get_num_threads, or 0, 0, 0.");
    // `sizes` are the fields of ConvShape, addresses as everywhere.
    using Address = std::uintptr_t;
    using Sizes = std::array<i64, 15>;
    const auto released = pybind11::call_guard<pybind11::gil_scoped_release>();
    m.def(
        "conv_fprop",
        [](int dtype, Address x, Address w, i64 w_k, i64 w_c, i64 w_tap, Address packed, const Sizes& sizes,
           Address bias, Address residual, int relu, Address y, i64 ctx) {
            conv_fprop(dtype, pointer<void>(x), pointer<void>(w), w_k, w_c, w_tap, pointer<float>(packed),
                       shape_of(sizes), pointer<float>(bias), pointer<void>(residual), relu, pointer<void>(y), ctx);
        },
        released, "See csrc/cpu/conv.h.");
    m.def("conv_packed_floats", [](const Sizes& sizes) { return conv_packed_floats(shape_of(sizes)); });
    m.def(
        "conv_pack",
        [](int dtype, Address w, i64 w_k, i64 w_c, i64 w_tap, const Sizes& sizes, Address packed, i64 ctx) {
            conv_pack(dtype, pointer<void>(w), w_k, w_c, w_tap, shape_of(sizes), pointer<float>(packed), ctx);
        },
        released, "See csrc/cpu/conv.h.");
    m.def(
        "conv_dgrad",
        [](int dtype, Address dy, Address w, i64 w_k, i64 w_c, i64 w_tap, const Sizes& sizes, Address dx, i64 ctx) {
            conv_dgrad(dtype, pointer<void>(dy), pointer<void>(w), w_k, w_c, w_tap, shape_of(sizes), pointer<void>(dx),
                       ctx);
        },
        released, "See csrc/cpu/conv.h.");
    m.def(
        "conv_wgrad",
        [](int dtype, Address dy, Address x, const Sizes& sizes, Address dw, i64 ctx) {
            conv_wgrad(dtype, pointer<void>(dy), pointer<void>(x), shape_of(sizes), pointer<float>(dw), ctx);
        },
        released, "See csrc/cpu/conv.h.");
    using cpu_runtime::PoolBlock;
    pybind11::class_<PoolBlock>(m, "PoolBlock", pybind11::buffer_protocol(),
                                "Bytes from the pool, see csrc/cpu/pool.h.")
        .def(pybind11::init<std::size_t>(), pybind11::arg("bytes"))
        .def_buffer([](const PoolBlock& b) {
            return pybind11::buffer_info(static_cast<std::uint8_t*>(b.get()),
                                         static_cast<pybind11::ssize_t>(b.bytes()));
        });
    m.def("pool_info", [] {
        const cpu_runtime::PoolInfo info = cpu_runtime::pool_info();
        return pybind11::make_tuple(info.in_use, info.peak);
    });
    m.def("pool_release", &cpu_runtime::pool_release);
    m.def("has_openmp", &cpu_runtime::has_openmp, "Whether more than one thread can run.");
}

}  // namespace cpu
