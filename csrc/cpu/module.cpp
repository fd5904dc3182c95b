// What only the CPU module offers: the choice of instruction set and the OpenMP runtime.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "cpu/conv.h"
#include "cpu/isa.h"
#include "cpu/matrix_unit.h"
#include "cpu/parallel.h"
#include "cpu/pool.h"
#include "cpu/program.h"

namespace cpu {
namespace {

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

ConvShape shape_of(const std::array<i64, 16>& s) {
    return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], s[14], s[15]};
}

// (sizes, packed, bias) of each convolution.
using Blocks = std::vector<std::tuple<std::array<i64, 16>, std::uintptr_t, std::uintptr_t>>;

Parts parts_of(const Blocks& convs, bool projected) {
    Parts parts{{}, {}, {}, projected};
    for (const auto& [sizes, packed, bias] : convs) {
        parts.shapes.push_back(shape_of(sizes));
        parts.packed.push_back(pointer<float>(packed));
        parts.bias.push_back(pointer<float>(bias));
    }
    return parts;
}

// Addresses that a program keeps belong to its user, who must keep the tensors alive.
void program(pybind11::module_& m) {
    using Address = std::uintptr_t;
    pybind11::enum_<Op>(m, "Op")
        .value("direct", Op::kDirect)
        .value("winograd", Op::kWinograd)
        .value("strassen", Op::kStrassen)
        .value("stem", Op::kStem)
        .value("mean", Op::kMean)
        .value("pairs", Op::kPairs)
        .value("pairs_stem", Op::kPairsStem)
        .value("matrix", Op::kMatrix)
        .value("matrix_stem", Op::kMatrixStem);
    m.attr("PLACE_INPUT") = kInput;
    m.attr("PLACE_OUTPUT") = kOutput;
    m.attr("PLACE_NONE") = kNone;
    pybind11::class_<Program>(m, "Program", "A chain of kernels, see csrc/cpu/program.h.")
        .def(pybind11::init<int, i64>(), pybind11::arg("dtype"), pybind11::arg("arena_bytes"))
        .def(
            "add",
            [](Program& self, Op op, i64 src, i64 residual, i64 dst, const std::array<i64, 16>& sizes,
               const std::array<i64, 5>& pool, i64 out, Address packed, Address bias, bool relu) {
                self.add({op,
                          src,
                          residual,
                          dst,
                          shape_of(sizes),
                          {pool[0], pool[1], pool[2], pool[3], pool[4]},
                          out,
                          pointer<float>(packed),
                          pointer<float>(bias),
                          relu});
            },
            pybind11::arg("op"), pybind11::arg("src"), pybind11::arg("residual"), pybind11::arg("dst"),
            pybind11::arg("sizes"), pybind11::arg("pool"), pybind11::arg("out"), pybind11::arg("packed"),
            pybind11::arg("bias"), pybind11::arg("relu"))
        .def(
            "add_block",
            [](Program& self, i64 src, i64 dst, const Blocks& convs, bool projected) {
                Step step{Op::kBlock, src, kNone, dst, {}, {}, 0, nullptr, nullptr, 1, parts_of(convs, projected)};
                self.add(step);
            },
            pybind11::arg("src"), pybind11::arg("dst"), pybind11::arg("convs"), pybind11::arg("projected"))
        .def(
            "take_turns",
            [](Program& self, i64 steps, i64 times, i64 x_bytes, i64 place, i64 place_bytes) {
                self.take_turns({steps, times, x_bytes, place, place_bytes});
            },
            pybind11::arg("steps"), pybind11::arg("times"), pybind11::arg("x_bytes"), pybind11::arg("place"),
            pybind11::arg("place_bytes"))
        .def(
            "run",
            [](const Program& self, Address x, Address y, i64 threads) {
                self.run(pointer<void>(x), pointer<void>(y), threads, nullptr);
            },
            pybind11::call_guard<pybind11::gil_scoped_release>())
        .def("timed",
             [](const Program& self, Address x, Address y, i64 threads) {
                 std::vector<double> seconds(self.size());
                 {
                     pybind11::gil_scoped_release released;
                     self.run(pointer<void>(x), pointer<void>(y), threads, seconds.data());
                 }
                 return seconds;
             })
        .def_property_readonly("arena_bytes", &Program::arena_bytes);
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
    using Sizes = std::array<i64, 16>;
    const auto released = pybind11::call_guard<pybind11::gil_scoped_release>();
    m.def(
        "conv_fprop",
        [](int dtype, Address x, Address w, i64 w_k, i64 w_c, i64 w_tap, Address packed, bool pairs, const Sizes& sizes,
           Address bias, Address residual, int relu, Address y, i64 ctx) {
            conv_fprop(dtype, pointer<void>(x), pointer<void>(w), w_k, w_c, w_tap, pointer<float>(packed), pairs,
                       shape_of(sizes), pointer<float>(bias), pointer<void>(residual), relu, pointer<void>(y), ctx);
        },
        released, "See csrc/cpu/conv.h.");
    m.def("conv_groups", [](i64 C, i64 K, i64 groups, bool pairs) { return conv_groups(C, K, groups, pairs) != 0; });
    m.def("pairs_unit", &pairs_unit, "Of the instruction set in use. See csrc/cpu/conv.h.");
    m.def("matrix_groups", [](i64 C, i64 K, i64 groups) { return matrix_groups(C, K, groups) != 0; });
    m.def("conv_packed_floats",
          [](const Sizes& sizes, bool pairs) { return conv_packed_floats(shape_of(sizes), pairs); });
    m.def(
        "conv_pack",
        [](int dtype, Address w, i64 w_k, i64 w_c, i64 w_tap, const Sizes& sizes, bool pairs, Address packed, i64 ctx) {
            conv_pack(dtype, pointer<void>(w), w_k, w_c, w_tap, shape_of(sizes), pairs, pointer<float>(packed), ctx);
        },
        released, "See csrc/cpu/conv.h.");
    m.def(
        "winograd_fprop",
        [](int dtype, Address x, Address packed, const Sizes& sizes, i64 out, Address bias, Address residual, int relu,
           Address y, i64 ctx) {
            winograd_fprop(dtype, pointer<void>(x), pointer<float>(packed), shape_of(sizes), out, pointer<float>(bias),
                           pointer<void>(residual), relu, pointer<void>(y), ctx);
        },
        released, "See csrc/cpu/conv.h.");
    m.def("winograd_packed_floats",
          [](const Sizes& sizes, i64 out) { return winograd_packed_floats(shape_of(sizes), out); });
    m.def(
        "winograd_pack",
        [](Address w, i64 w_k, i64 w_c, i64 w_tap, const Sizes& sizes, i64 out, Address packed, i64 ctx) {
            winograd_pack(pointer<float>(w), w_k, w_c, w_tap, shape_of(sizes), out, pointer<float>(packed), ctx);
        },
        released, "See csrc/cpu/conv.h.");
    m.def(
        "strassen_fprop",
        [](int dtype, Address x, Address packed, const Sizes& sizes, i64 levels, Address bias, Address residual,
           int relu, Address y, i64 ctx) {
            strassen_fprop(dtype, pointer<void>(x), pointer<float>(packed), shape_of(sizes), levels,
                           pointer<float>(bias), pointer<void>(residual), relu, pointer<void>(y), ctx);
        },
        released, "See csrc/cpu/conv.h.");
    m.def("strassen_packed_floats",
          [](const Sizes& sizes, i64 levels) { return strassen_packed_floats(shape_of(sizes), levels); });
    m.def(
        "strassen_pack",
        [](Address w, i64 w_k, i64 w_c, const Sizes& sizes, i64 levels, Address packed, i64 ctx) {
            strassen_pack(pointer<float>(w), w_k, w_c, shape_of(sizes), levels, pointer<float>(packed), ctx);
        },
        released, "See csrc/cpu/conv.h.");
    m.def(
        "matrix_block",
        [](int dtype, Address x, const Blocks& convs, bool projected, Address y, i64 ctx) {
            const Parts p = parts_of(convs, projected);
            pybind11::gil_scoped_release released;
            matrix_block(dtype, pointer<void>(x), p.shapes.data(), p.packed.data(), p.bias.data(),
                         int(p.shapes.size()) - projected, projected, pointer<void>(y), ctx);
        },
        "See csrc/cpu/conv.h.");
#ifdef FASTRES_TILE_TRAP
    m.def("trap_tiles", &cpu_runtime::trap_tiles, pybind11::arg("on"), "See csrc/cpu/matrix_unit.h.");
#endif
    m.def("matrix_products", &matrix_products, released, "See csrc/cpu/conv.h.");
    m.def("matrix_unit", &matrix_unit, "Of the instruction set in use. See csrc/cpu/conv.h.");
    m.def(
        "matrix_fprop",
        [](int dtype, Address x, Address packed, const Sizes& sizes, Address bias, Address residual, int relu,
           Address y, i64 ctx) {
            matrix_fprop(dtype, pointer<void>(x), pointer<float>(packed), shape_of(sizes), pointer<float>(bias),
                         pointer<void>(residual), relu, pointer<void>(y), nullptr, ctx);
        },
        released, "See csrc/cpu/conv.h.");
    m.def("matrix_packed_floats",
          [](int dtype, const Sizes& sizes) { return matrix_packed_floats(dtype, shape_of(sizes)); });
    m.def(
        "matrix_pack",
        [](int dtype, Address w, i64 w_k, i64 w_c, i64 w_tap, const Sizes& sizes, Address packed, i64 ctx) {
            matrix_pack(dtype, pointer<float>(w), w_k, w_c, w_tap, shape_of(sizes), pointer<float>(packed), ctx);
        },
        released, "See csrc/cpu/conv.h.");
    m.def("matrix_stem_packed_floats",
          [](int dtype, const Sizes& sizes) { return matrix_stem_packed_floats(dtype, shape_of(sizes)); });
    m.def(
        "matrix_stem_pack",
        [](int dtype, Address w, i64 w_k, i64 w_c, i64 w_tap, const Sizes& sizes, Address packed) {
            matrix_stem_pack(dtype, pointer<float>(w), w_k, w_c, w_tap, shape_of(sizes), pointer<float>(packed));
        },
        released, "See csrc/cpu/conv.h.");
    m.def("stem_packed_floats",
          [](const Sizes& sizes, bool pairs) { return stem_packed_floats(shape_of(sizes), pairs); });
    m.def(
        "stem_pack",
        [](Address w, i64 w_k, i64 w_c, i64 w_tap, const Sizes& sizes, bool pairs, Address packed) {
            stem_pack(pointer<float>(w), w_k, w_c, w_tap, shape_of(sizes), pairs, pointer<float>(packed));
        },
        released, "See csrc/cpu/conv.h.");
    program(m);
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
