// What only the emulator's module offers: the CUDA entries, and the GPU it pretends to be.
#include <pybind11/stl.h>

#include "chip.h"
#include "cuda/entries.h"

namespace emulator {

void extras(pybind11::module_& m) {
    cuda_entries(m);
    m.def(
        "chip",
        [] {
            const auto& chip = fastres::emulator::chip();
            return pybind11::dict(pybind11::arg("name") = chip.name,
                                  pybind11::arg("multiprocessors") = chip.multiprocessors,
                                  pybind11::arg("shared_per_block") = chip.shared_per_block,
                                  pybind11::arg("shared_per_multiprocessor") = chip.shared_per_multiprocessor);
        },
        "The GPU that launches are checked against; bytes.");
    m.def("set_chip", &fastres::emulator::set_chip, pybind11::arg("name"), pybind11::arg("multiprocessors"),
          "Pretend to be sm_80, sm_89, sm_90a or sm_100 with 1 to 32 multiprocessors; ValueError otherwise.");
}

}  // namespace emulator
