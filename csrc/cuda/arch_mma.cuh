// arch.cuh, the part that feeds tensor cores: shared memory 16 bytes at a time, cp.async, ldmatrix, mma.sync (sm_80 and
// later). Included by arch.cuh alone; csrc/emulator/warp.h is its meaning on the host.
#pragma once

namespace FASTRES_BACKEND {

// ptxas for sm_100 needs some registers more than for the architectures before: a kernel that fills 128 there spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kFits128Registers = false;
#else
constexpr bool kFits128Registers = true;
#endif

// The same value, of which the compiler knows nothing: what was derived from it before is derived again, and need not
// be kept in registers meanwhile.
DEVICE int afresh(int v) {
    asm volatile("" : "+r"(v));
    return v;
}

// ---- 16-byte access to shared memory; `i` counts Word4s

DEVICE u32 shared_address(const Word4* shared, int i) { return static_cast<u32>(__cvta_generic_to_shared(shared + i)); }
DEVICE Word4 load_shared16(const Word4* shared, int i) {
    const uint4 v = *reinterpret_cast<const uint4*>(shared + i);
    return {{v.x, v.y, v.z, v.w}};
}
DEVICE void store_shared16(Word4* shared, int i, const Word4& v) {
    *reinterpret_cast<uint4*>(shared + i) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
}

// A word of an array of words.
DEVICE u32 load_shared4(const u32* shared, int i) { return shared[i]; }

// 16 bytes of global memory, zeros where not `valid`: then `p` is not read. One predicated instruction, no branch.
DEVICE Word4 load16_or_zero(const void* p, bool valid) {
    Word4 v;
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        "setp.ne.b32 there, %5, 0;\n"
        "mov.b32 %0, 0;\n"
        "mov.b32 %1, 0;\n"
        "mov.b32 %2, 0;\n"
        "mov.b32 %3, 0;\n"
        "@there ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
        : "l"(p), "r"(static_cast<int>(valid)));
    return v;
}

DEVICE Word2 load8_or_zero(const void* p, bool valid) {
    Word2 v;
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        "setp.ne.b32 there, %3, 0;\n"
        "mov.b32 %0, 0;\n"
        "mov.b32 %1, 0;\n"
        "@there ld.global.v2.u32 {%0, %1}, [%2];\n"
        "}"
        : "=r"(v.w[0]), "=r"(v.w[1])
        : "l"(p), "r"(static_cast<int>(valid)));
    return v;
}

// Two bytes, in the low half.
DEVICE u32 load2_or_zero(const void* p, bool valid) {
    unsigned short v;
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        "setp.ne.b32 there, %2, 0;\n"
        "mov.b16 %0, 0;\n"
        "@there ld.global.u16 %0, [%1];\n"
        "}"
        : "=h"(v)
        : "l"(p), "r"(static_cast<int>(valid)));
    return v;
}

// ---- asynchronous copies of 16 bytes from global to shared memory. They land at the wait of the thread that issued
// them; other threads see them after a barrier behind that wait. cp.async.cg goes past L1.

DEVICE void copy_async16(Word4* shared, int i, const void* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared, i)),
                 "l"(__cvta_generic_to_global(source))
                 : "memory");
}
// Zeros where not `valid`; `source` is then not read.
DEVICE void copy_async16_or_zero(Word4* shared, int i, const void* source, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared, i)),
                 "l"(__cvta_generic_to_global(source)), "r"(valid ? 16 : 0)
                 : "memory");
}
// Copies issued since the last commit form a group.
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All groups but the `kLeft` youngest land.
template <int kLeft>
DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// ---- ldmatrix, stmatrix: `kMatrices` (1, 2, 4) of 8 x 8 elements of 16 bits; lane 8*m + r names row r of matrix m

template <int kMatrices, bool kTransposed>
DEVICE void load_matrix(u32 (&d)[kMatrices], const Word4* shared, int i) {
    const u32 at = shared_address(shared, i);
    if constexpr (kMatrices == 4 && kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                     : "r"(at)
                     : "memory");
    } else if constexpr (kMatrices == 4) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                     : "r"(at)
                     : "memory");
    } else if constexpr (kMatrices == 2 && kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(d[0]), "=r"(d[1])
                     : "r"(at)
                     : "memory");
    } else if constexpr (kMatrices == 2) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(d[0]), "=r"(d[1])
                     : "r"(at)
                     : "memory");
    } else if constexpr (kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(d[0]) : "r"(at) : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(d[0]) : "r"(at) : "memory");
    }
}
// sm_90 and later.
template <int kMatrices, bool kTransposed>
DEVICE void store_matrix(Word4* shared, int i, const u32 (&s)[kMatrices]) {
    const u32 at = shared_address(shared, i);
    if constexpr (kMatrices == 4 && kTransposed) {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(s[0]),
                     "r"(s[1]), "r"(s[2]), "r"(s[3])
                     : "memory");
    } else if constexpr (kMatrices == 4) {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(s[0]), "r"(s[1]),
                     "r"(s[2]), "r"(s[3])
                     : "memory");
    } else if constexpr (kMatrices == 2 && kTransposed) {
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(s[0]), "r"(s[1])
                     : "memory");
    } else if constexpr (kMatrices == 2) {
        asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(s[0]), "r"(s[1])
                     : "memory");
    } else if constexpr (kTransposed) {
        asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(at), "r"(s[0]) : "memory");
    } else {
        asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(at), "r"(s[0]) : "memory");
    }
}

// ---- mma.sync: d += a * b with a 16 x k row by row, b k x 8 column by column; k is 16 for bf16 and f16, 8 for tf32,
// 32 for int8 (then d are int). Fragments as in the PTX ISA, "Matrix fragments for mma".

template <class T, class Acc>
DEVICE void multiply_add(Acc (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (std::is_same_v<T, bf16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else if constexpr (std::is_same_v<T, f16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else if constexpr (std::is_same_v<T, tf32>) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        static_assert(std::is_same_v<T, std::int8_t> && std::is_same_v<Acc, int>);
        asm volatile(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
            "{%8, %9}, {%0, %1, %2, %3};"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

}  // namespace FASTRES_BACKEND
