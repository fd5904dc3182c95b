// What only the CUDA module offers.
#include "entries.h"

namespace cuda {

void extras(pybind11::module_& m) { cuda_entries(m); }

}  // namespace cuda
