// Instructions of sm_90a beside arch.cuh: barriers in shared memory, bulk copies, warpgroup products. On other
// architectures a kernel that uses them traps. csrc/emulator/hopper_arch.h is their meaning on the host.
//
// `store` is the block's DYNAMIC_SHARED(Word4, ...), `bars` a SHARED(std::uint64_t, ...).
#pragma once
#include <stdexcept>
#include <string>

#include "vec.cuh"

namespace FASTRES_BACKEND {

constexpr int kMaxRank = 5;
// As matrix descriptors number them.
constexpr int kNoSwizzle = 0, kSwizzle128 = 1, kSwizzle64 = 2, kSwizzle32 = 3;

// A tensor in global memory and the box that one copy moves: sizes from the innermost dimension outwards, `strides` of
// the dimensions 1.. in bytes. Elements of 2 or 4 bytes.
struct TensorLayout {
    const void* base;
    int rank;
    u32 element;
    std::uint64_t dims[kMaxRank], strides[kMaxRank];  // strides[0] is not read
    u32 box[kMaxRank];
    int swizzle;
};

// Throws std::invalid_argument for what cuTensorMapEncodeTiled refuses.
inline void require_layout(const TensorLayout& t) {
    const auto need = [](bool condition, const char* what) {
        if (!condition) throw std::invalid_argument(std::string("tensor map: ") + what);
    };
    need(t.rank >= 1 && t.rank <= kMaxRank, "the rank must be 1..5");
    need(t.element == 2 || t.element == 4, "elements must have 2 or 4 bytes");
    need(t.swizzle >= kNoSwizzle && t.swizzle <= kSwizzle32, "no such swizzle mode");
    need(reinterpret_cast<std::uintptr_t>(t.base) % 16 == 0, "the address must be a multiple of 16 bytes");
    const u32 inner = t.box[0] * t.element;
    const u32 span = t.swizzle == kSwizzle128 ? 128 : t.swizzle == kSwizzle64 ? 64 : t.swizzle == kSwizzle32 ? 32 : 0;
    need(inner % 16 == 0, "a row of the box must be a multiple of 16 bytes");
    need(!span || inner <= span, "a row of the box must not be longer than the swizzle's");
    for (int d = 0; d < t.rank; ++d) {
        need(t.dims[d] >= 1, "sizes must be at least 1");
        need(t.box[d] >= 1 && t.box[d] <= 256, "sizes of the box must be 1..256");
        need(d == 0 || t.strides[d] % 16 == 0, "strides must be multiples of 16 bytes");
    }
}

// Descriptor of a matrix of 16-bit elements in shared memory. K-major: 8 rows lie behind each other, `stride` bytes
// from one such group to the next; without swizzle `leading` is the distance between neighbouring 16-byte columns.
// MN-major: without swizzle `stride` is that of 8 neighbours along M or N and `leading` that of 8 along K, else the
// reverse, and the neighbours are as many as a row of the pattern holds.
HOST_DEVICE std::uint64_t matrix_descriptor(u32 address, u32 leading, u32 stride, int swizzle, u32 base_offset = 0) {
    const auto field = [](u32 bytes) { return static_cast<std::uint64_t>(bytes >> 4 & 0x3fff); };
    return field(address) | field(leading) << 16 | field(stride) << 32 | static_cast<std::uint64_t>(base_offset) << 49 |
           static_cast<std::uint64_t>(swizzle) << 62;
}

}  // namespace FASTRES_BACKEND

#ifdef FASTRES_EMULATE
#include "../emulator/hopper_arch.h"
#else

#include <cuda.h>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTRES_HOPPER(...) asm volatile(__VA_ARGS__)
#else
#define FASTRES_HOPPER(...) __trap()
#endif

namespace FASTRES_BACKEND {

using TensorMap = CUtensorMap;  // a kernel takes it as `const __grid_constant__ TensorMap`
#define TENSOR_MAP const __grid_constant__ FASTRES_BACKEND::TensorMap

// The driver's encoding of a layout. Throws std::invalid_argument, std::runtime_error where the driver has none.
inline TensorMap tensor_map(const TensorLayout& t) {
    require_layout(t);
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
        throw std::runtime_error("tensor map: the CUDA driver has no cuTensorMapEncodeTiled");
    }
    constexpr CUtensorMapSwizzle kModes[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                             CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_32B};
    const cuuint32_t steps[kMaxRank] = {1, 1, 1, 1, 1};
    const auto type = t.element == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16 : CU_TENSOR_MAP_DATA_TYPE_UINT32;
    cuuint64_t dims[kMaxRank], strides[kMaxRank];
    for (int d = 0; d < t.rank; ++d) dims[d] = t.dims[d];
    for (int d = 1; d < t.rank; ++d) strides[d - 1] = t.strides[d];
    TensorMap map;
    const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
        &map, type, static_cast<cuuint32_t>(t.rank), const_cast<void*>(t.base), dims, strides, t.box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, kModes[t.swizzle], CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) throw std::invalid_argument("tensor map: the driver refused the layout");
    return map;
}

// Whether the current device runs what this file is for.
inline bool is_hopper() {
    int device = 0, major = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
    return major == 9;
}

// ---- shared window

DEVICE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
DEVICE u32 shared_address(Word4* store, i64 i) { return shared_address(store + i); }

// ---- barriers: `count` arrivals and the bytes announced complete a phase; phases have parity 0, 1, 0, ...

DEVICE void barrier_init(std::uint64_t* bars, i64 i, u32 count) {
    FASTRES_HOPPER("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bars + i)), "r"(count) : "memory");
}
// After the inits, by the thread that made them, and a block barrier behind it.
DEVICE void fence_barrier_init() { FASTRES_HOPPER("fence.mbarrier_init.release.cluster;" :: : "memory"); }
DEVICE void barrier_arrive(std::uint64_t* bars, i64 i) {
    FASTRES_HOPPER("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bars + i)) : "memory");
}
DEVICE void barrier_arrive_expect(std::uint64_t* bars, i64 i, u32 bytes) {
    FASTRES_HOPPER("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bars + i)),
                   "r"(bytes) : "memory");
}
// Until the phase of this parity has completed.
DEVICE void barrier_wait(std::uint64_t* bars, i64 i, u32 parity) {
    FASTRES_HOPPER(
        "{\n.reg .pred done;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
            shared_address(bars + i)),
        "r"(parity) : "memory");
}
// What this thread wrote to shared memory is seen by the copies and products that come after the next barrier.
DEVICE void fence_async() { FASTRES_HOPPER("fence.proxy.async.shared::cta;" :: : "memory"); }

// ---- threads that meet without the rest of the block; what they wrote to shared memory before is seen by all of them

DEVICE void sync_warp() { __syncwarp(); }
// `threads` of them, whole warps; id 1..15.
DEVICE void sync_group(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- registers of a thread from here on, for all warps of a warpgroup; the launch gave each as many

template <int kCount>
DEVICE void fewer_registers() {
    FASTRES_HOPPER("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
DEVICE void more_registers() {
    FASTRES_HOPPER("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- bulk copies; `bytes` is announced to the barrier by barrier_arrive_expect

DEVICE void load_bulk(Word4* store, i64 i, const void* source, u32 bytes, std::uint64_t* bars, i64 bar) {
    FASTRES_HOPPER("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       shared_address(store, i)),
                   "l"(source), "r"(bytes), "r"(shared_address(bars + bar)) : "memory");
}

// The box at coordinates `at`, innermost first, lands at Word4 i; zeros where it leaves the tensor.
DEVICE void load_tensor(Word4* store, i64 i, const TensorMap& map, const int (&at)[2], std::uint64_t* bars, i64 bar) {
    FASTRES_HOPPER(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(shared_address(store, i)),
        "l"(&map), "r"(shared_address(bars + bar)), "r"(at[0]), "r"(at[1]) : "memory");
}
DEVICE void load_tensor(Word4* store, i64 i, const TensorMap& map, const int (&at)[3], std::uint64_t* bars, i64 bar) {
    FASTRES_HOPPER(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, "
        "%5}], [%2];" ::"r"(shared_address(store, i)),
        "l"(&map), "r"(shared_address(bars + bar)), "r"(at[0]), "r"(at[1]), "r"(at[2]) : "memory");
}
DEVICE void load_tensor(Word4* store, i64 i, const TensorMap& map, const int (&at)[4], std::uint64_t* bars, i64 bar) {
    FASTRES_HOPPER(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, "
        "%5, %6}], [%2];" ::"r"(shared_address(store, i)),
        "l"(&map), "r"(shared_address(bars + bar)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]) : "memory");
}
DEVICE void load_tensor(Word4* store, i64 i, const TensorMap& map, const int (&at)[5], std::uint64_t* bars, i64 bar) {
    FASTRES_HOPPER(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, "
        "%5, %6, %7}], [%2];" ::"r"(shared_address(store, i)),
        "l"(&map), "r"(shared_address(bars + bar)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]),
        "r"(at[4]) : "memory");
}

// The box at Word4 i goes to the tensor, but for what lies outside.
DEVICE void store_tensor(const TensorMap& map, const int (&at)[2], Word4* store, i64 i) {
    FASTRES_HOPPER("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
                   "r"(shared_address(store, i)), "r"(at[0]), "r"(at[1]) : "memory");
}
DEVICE void store_tensor(const TensorMap& map, const int (&at)[4], Word4* store, i64 i) {
    FASTRES_HOPPER("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                   "r"(shared_address(store, i)), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]) : "memory");
}
DEVICE void store_commit() { FASTRES_HOPPER("cp.async.bulk.commit_group;" :: : "memory"); }
template <int kLeft>
DEVICE void store_wait() {
    FASTRES_HOPPER("cp.async.bulk.wait_group %0;" ::"n"(kLeft) : "memory");
}

// ---- warpgroup products

// Registers of a product, behind the wait before they are read and before the fence after they were written: the
// compiler moves neither across.
template <int N>
DEVICE void settled(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
DEVICE void settled(u32& v) { asm volatile("" : "+r"(v)::"memory"); }
// Before the first product, and wherever accumulators or A registers were touched since.
DEVICE void warpgroup_fence() { FASTRES_HOPPER("wgmma.fence.sync.aligned;" :: : "memory"); }
DEVICE void warpgroup_commit() { FASTRES_HOPPER("wgmma.commit_group.sync.aligned;" :: : "memory"); }
template <int kLeft>
DEVICE void warpgroup_wait() {
    FASTRES_HOPPER("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

}  // namespace FASTRES_BACKEND

#include "arch_wgmma.cuh"

#endif
