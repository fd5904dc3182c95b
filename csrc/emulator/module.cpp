// What only the emulator's module offers: the CUDA entries, and the GPU it pretends to be.
#include <pybind11/stl.h>

#include "chip.h"
#include "cuda/entries.h"
#include "machine.h"

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
    m.def(
        "meter",
        [](bool on) {
            auto& meter = fastres::emulator::Machine::current().meter;
            const auto& c = meter.counters;
            pybind11::dict counted(
                pybind11::arg("loaded") = c.loaded, pybind11::arg("stored") = c.stored,
                pybind11::arg("loaded_once") = c.loaded_once, pybind11::arg("stored_once") = c.stored_once,
                pybind11::arg("wavefronts") = c.wavefronts, pybind11::arg("matrix_conflicts") = c.conflicts[0],
                pybind11::arg("load_conflicts") = c.conflicts[1], pybind11::arg("store_conflicts") = c.conflicts[2],
                pybind11::arg("word_conflicts") = c.conflicts[3]);
            meter.on = on;
            meter.reset();
            return counted;
        },
        pybind11::arg("on"),
        "What this thread's launches moved (bytes) and lost to bank conflicts (wavefronts) since the last call; then "
        "counts from zero, or not at all.");
}

}  // namespace emulator
