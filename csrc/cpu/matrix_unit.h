// Whether the processor's matrix unit (Intel AMX with bfloat16) can be used.
#pragma once

namespace cpu_runtime {

// kModelled: of no processor, but of files compiled without the instructions (isa/tiles.h).
enum class MatrixUnit { kNone, kModelled, kTrapped, kThere };

// kThere: the processor has the instructions and the system lets this process use the tiles; asked for once.
// kTrapped: trap_tiles() executes them.
MatrixUnit matrix_unit();

#ifdef FASTRES_TILE_TRAP
// On a processor without the unit, executes its instructions in software from the signal that they raise, or stops
// doing so: compiled kernels can be tested as they are, at microseconds an instruction.
void trap_tiles(bool on);
#endif

}  // namespace cpu_runtime
