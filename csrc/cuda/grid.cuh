// The barrier over a cooperative grid, beside arch.cuh. To be included last: cooperative groups bring a namespace
// cuda::std, and `std` inside namespace cuda means that one from here on.
#pragma once
#include "arch.cuh"

#ifndef FASTRES_EMULATE
#include <cooperative_groups.h>

namespace FASTRES_BACKEND {

// All threads of all blocks of a cooperative launch; what any of them wrote before is seen by all after.
DEVICE void sync_grid() { cooperative_groups::this_grid().sync(); }

}  // namespace FASTRES_BACKEND
#endif
