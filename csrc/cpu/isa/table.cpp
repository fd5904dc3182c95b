#include "cpu/conv.h"
#include "cpu/isa.h"
#include "launch.h"

namespace FASTRES_BACKEND {

extern const cpu_isa::Entry table[];
const cpu_isa::Entry table[] = {
#define FASTRES_ADDRESS(name) reinterpret_cast<cpu_isa::Entry>(&name),
    FASTRES_FUNCTIONS(FASTRES_ADDRESS)
#undef FASTRES_ADDRESS
};

}  // namespace FASTRES_BACKEND
