// Whether the processor multiplies pairs of bfloat16 (AVX512-BF16's vdpbf16ps), and how fast.
#pragma once

namespace cpu_runtime {

// kModelled: of no processor, but of files compiled without the instruction (isa/vec.h: dot_pairs). kSlow: in at least
// the time of two products of floats, so that those are as fast. kFull: in the time of one.
enum class PairsUnit { kNone, kModelled, kSlow, kFull };

PairsUnit pairs_unit();

}  // namespace cpu_runtime
