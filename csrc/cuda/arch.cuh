// Every hardware instruction, cache hint and launch of the CUDA kernels, and only here.
//
// A kernel file uses these names alone, so that csrc/emulator/arch.h can give each of them a meaning on the
// host: the same .cu then runs as C++ (-DFASTRES_EMULATE), one fiber per CUDA thread.
#pragma once
#include <type_traits>

#include "../launch.h"

namespace FASTRES_BACKEND {

using u32 = std::uint32_t;
using u64 = std::uint64_t;

constexpr int kThreads = 256;  // of every block of every kernel
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr i64 kMaxGridX = 2147483647, kMaxGridY = 65535;

struct alignas(16) Word4 {
    u32 w[4];
};
struct alignas(8) Word2 {
    u32 w[2];
};

// Element types of the tensor cores, as bits.
struct bf16 {
    std::uint16_t bits;
};
struct f16 {
    std::uint16_t bits;
};
struct tf32 {
    u32 bits;
};

}  // namespace FASTRES_BACKEND

#ifdef FASTRES_EMULATE
#include "../emulator/arch.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// min_blocks per SM bounds the registers: 65536 / (256 * min_blocks).
#define KERNEL(min_blocks) __global__ void __launch_bounds__(FASTRES_BACKEND::kThreads, min_blocks)
#define KERNEL_OF(threads) __global__ void __launch_bounds__(threads, 1)
#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define SHARED(T, name, n) __shared__ T name[n]
// The block's dynamic shared memory as an array of T.
#define DYNAMIC_SHARED(T, name)                       \
    extern __shared__ uint4 fastres_dynamic_shared[]; \
    T* const name = reinterpret_cast<T*>(fastres_dynamic_shared)

namespace FASTRES_BACKEND {

DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
DEVICE i64 block_x() { return blockIdx.x; }
DEVICE i64 block_y() { return blockIdx.y; }
DEVICE i64 grid_x() { return gridDim.x; }

DEVICE void sync_block() { __syncthreads(); }

// Value held by the lane whose number differs in `lane_mask`; called by all 32 lanes.
template <class T>
DEVICE T shuffle_xor(T value, int lane_mask) {
    return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// Bit i: the predicate of lane i; called by all 32 lanes.
DEVICE u32 ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }

// Plain loads leave the line to L2's own judgement: the next pass may find it there. `_last` marks the final
// use (evict first). Neither is ld.global.nc, whose data must not change: an output may be its own input here.
DEVICE Word4 load16(const void* p) {
    const uint4 v = *static_cast<const uint4*>(p);
    return {{v.x, v.y, v.z, v.w}};
}
DEVICE Word4 load16_last(const void* p) {
    const uint4 v = __ldcs(static_cast<const uint4*>(p));
    return {{v.x, v.y, v.z, v.w}};
}
DEVICE Word2 load8(const void* p) {
    const uint2 v = *static_cast<const uint2*>(p);
    return {{v.x, v.y}};
}
DEVICE void store16(void* p, const Word4& v) { *static_cast<uint4*>(p) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]); }
DEVICE void store8(void* p, const Word2& v) { *static_cast<uint2*>(p) = make_uint2(v.w[0], v.w[1]); }

DEVICE u32 float_bits(float v) { return __float_as_uint(v); }
DEVICE float bits_float(u32 v) { return __uint_as_float(v); }
DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
DEVICE double root(double v) { return __dsqrt_rn(v); }

// The larger of both low and of both high halves, as unsigned numbers.
DEVICE u32 larger_halves(u32 a, u32 b) { return __vmaxu2(a, b); }

// Two floats rounded to nearest even in one word, `lo` in the low half.
DEVICE u32 pack_bf16(float lo, float hi) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
    return static_cast<u32>(__bfloat16_as_ushort(v.x)) | static_cast<u32>(__bfloat16_as_ushort(v.y)) << 16;
}
DEVICE u32 pack_f16(float lo, float hi) {
    const __half2 v = __floats2half2_rn(lo, hi);
    return static_cast<u32>(__half_as_ushort(__low2half(v))) | static_cast<u32>(__half_as_ushort(__high2half(v))) << 16;
}
DEVICE void unpack_f16(u32 v, float& lo, float& hi) {
    lo = __half2float(__ushort_as_half(static_cast<unsigned short>(v & 0xffffu)));
    hi = __half2float(__ushort_as_half(static_cast<unsigned short>(v >> 16)));
}

inline void require_launched(const char* name, i64 grid_x, i64 grid_y, cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // reported here: must not surface a second time elsewhere
    throw std::runtime_error(std::string("CUDA kernel ") + name + ", grid " + std::to_string(grid_x) + " x " +
                             std::to_string(grid_y) + ": " + cudaGetErrorString(error));
}

// Starts grid_x x grid_y blocks of kThreads on stream `ctx`. Throws std::runtime_error when the launch is refused;
// an error inside the kernel surfaces at the caller's next synchronisation, as with any CUDA kernel.
template <class... P>
void launch(const char* name, void (*kernel)(P...), i64 grid_x, i64 grid_y, i64 ctx, std::common_type_t<P>... args) {
    if (grid_x == 0 || grid_y == 0) return;
    cudaError_t error = cudaErrorInvalidConfiguration;
    if (grid_x <= kMaxGridX && grid_y <= kMaxGridY) {
        void* params[] = {static_cast<void*>(&args)...};
        error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel),
                                 dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y)), dim3(kThreads),
                                 params, 0, reinterpret_cast<cudaStream_t>(ctx));
    }
    require_launched(name, grid_x, grid_y, error);
}

// Of the current device.
inline i64 multiprocessors() {
    int device = 0, n = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
    return n;
}

// Lets `start(blocks)` launch the kernel once the grid is known to fit and the kernel may use so much dynamic memory.
template <class Start>
void start_with_shared(const char* name, const void* kernel, i64 grid_x, i64 grid_y, i64 shared_bytes, Start start) {
    if (grid_x == 0 || grid_y == 0) return;
    cudaError_t error = cudaErrorInvalidConfiguration;
    if (grid_x <= kMaxGridX && grid_y <= kMaxGridY) {
        error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    }
    if (error == cudaSuccess) error = start(dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y)));
    require_launched(name, grid_x, grid_y, error);
}

// `launch` with dynamic shared memory for each block; kBlock threads in one for a KERNEL_OF(kBlock).
template <int kBlock = kThreads, class... P>
void launch_with_shared(const char* name, void (*kernel)(P...), i64 grid_x, i64 grid_y, i64 shared_bytes, i64 ctx,
                        std::common_type_t<P>... args) {
    const void* const function = reinterpret_cast<const void*>(kernel);
    start_with_shared(name, function, grid_x, grid_y, shared_bytes, [&](dim3 blocks) {
        void* params[] = {static_cast<void*>(&args)...};
        return cudaLaunchKernel(function, blocks, dim3(kBlock), params, static_cast<std::size_t>(shared_bytes),
                                reinterpret_cast<cudaStream_t>(ctx));
    });
}

// The same for a kernel that calls sync_grid() (grid.cuh): all blocks run at once, each with its own dynamic shared
// memory, or the launch is refused. The kernel is a KERNEL(kBlocksPerMultiprocessor).
template <int kBlocksPerMultiprocessor, class... P>
void launch_cooperative(const char* name, void (*kernel)(P...), i64 grid_x, i64 grid_y, i64 shared_bytes, i64 ctx,
                        std::common_type_t<P>... args) {
    const void* const function = reinterpret_cast<const void*>(kernel);
    start_with_shared(name, function, grid_x, grid_y, shared_bytes, [&](dim3 blocks) {
        void* params[] = {static_cast<void*>(&args)...};
        return cudaLaunchCooperativeKernel(function, blocks, dim3(kThreads), params,
                                           static_cast<std::size_t>(shared_bytes), reinterpret_cast<cudaStream_t>(ctx));
    });
}

}  // namespace FASTRES_BACKEND

#include "arch_mma.cuh"

#endif
