// arch_hopper.cuh, the warpgroup products themselves. Included by it alone.
#pragma once

namespace FASTRES_BACKEND {

// Accumulators as operands of an asm statement, and their numbers in its text.
#define FASTRES_SUMS_32(d)                                                                                          \
    "+f"((d)[0]), "+f"((d)[1]), "+f"((d)[2]), "+f"((d)[3]), "+f"((d)[4]), "+f"((d)[5]), "+f"((d)[6]), "+f"((d)[7]), \
        "+f"((d)[8]), "+f"((d)[9]), "+f"((d)[10]), "+f"((d)[11]), "+f"((d)[12]), "+f"((d)[13]), "+f"((d)[14]),      \
        "+f"((d)[15]), "+f"((d)[16]), "+f"((d)[17]), "+f"((d)[18]), "+f"((d)[19]), "+f"((d)[20]), "+f"((d)[21]),    \
        "+f"((d)[22]), "+f"((d)[23]), "+f"((d)[24]), "+f"((d)[25]), "+f"((d)[26]), "+f"((d)[27]), "+f"((d)[28]),    \
        "+f"((d)[29]), "+f"((d)[30]), "+f"((d)[31])
#define FASTRES_SUMS_64(d)                                                                                        \
    FASTRES_SUMS_32(d), "+f"((d)[32]), "+f"((d)[33]), "+f"((d)[34]), "+f"((d)[35]), "+f"((d)[36]), "+f"((d)[37]), \
        "+f"((d)[38]), "+f"((d)[39]), "+f"((d)[40]), "+f"((d)[41]), "+f"((d)[42]), "+f"((d)[43]), "+f"((d)[44]),  \
        "+f"((d)[45]), "+f"((d)[46]), "+f"((d)[47]), "+f"((d)[48]), "+f"((d)[49]), "+f"((d)[50]), "+f"((d)[51]),  \
        "+f"((d)[52]), "+f"((d)[53]), "+f"((d)[54]), "+f"((d)[55]), "+f"((d)[56]), "+f"((d)[57]), "+f"((d)[58]),  \
        "+f"((d)[59]), "+f"((d)[60]), "+f"((d)[61]), "+f"((d)[62]), "+f"((d)[63])
#define FASTRES_NAMES_32                                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
    "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTRES_NAMES_64                                                                                   \
    FASTRES_NAMES_32                                                                                       \
    ", "                                                                                                   \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
    "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// [64, n] += A [64, 16] * B [16, n]; `left` is A's operand, a descriptor or registers, the others operand numbers.
#define FASTRES_PRODUCT(n, type, names, left, right, accumulate, major)                                         \
    "{\n.reg .pred p;\nsetp.ne.b32 p, %" accumulate ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type \
    "." type " {" names "}, " left ", %" right ", p, 1, 1, " major ";\n}"

// d [64, N] += A [64, 16] * B [16, N] in bfloat16 or float16, both from shared memory; kTranspose: MN-major. All four
// warps of a warpgroup call it.
template <class T, int N, bool kTransposeA, bool kTransposeB>
DEVICE void warpgroup_multiply(float (&d)[N / 2], std::uint64_t a, std::uint64_t b, bool accumulate) {
    static_assert(N == 64 || N == 128, "two sizes so far");
#define FASTRES_OPERANDS \
    "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposeA ? 1 : 0), "n"(kTransposeB ? 1 : 0)
    constexpr bool kBrain = std::is_same_v<T, bf16>;
    static_assert(kBrain || std::is_same_v<T, f16>);
    if constexpr (N == 64 && kBrain) {
        FASTRES_HOPPER(FASTRES_PRODUCT("64", "bf16", FASTRES_NAMES_32, "%32", "33", "34",
                                       "%35, %36") : FASTRES_SUMS_32(d) : FASTRES_OPERANDS);
    } else if constexpr (N == 64) {
        FASTRES_HOPPER(FASTRES_PRODUCT("64", "f16", FASTRES_NAMES_32, "%32", "33", "34",
                                       "%35, %36") : FASTRES_SUMS_32(d) : FASTRES_OPERANDS);
    } else if constexpr (kBrain) {
        FASTRES_HOPPER(FASTRES_PRODUCT("128", "bf16", FASTRES_NAMES_64, "%64", "65", "66",
                                       "%67, %68") : FASTRES_SUMS_64(d) : FASTRES_OPERANDS);
    } else {
        FASTRES_HOPPER(FASTRES_PRODUCT("128", "f16", FASTRES_NAMES_64, "%64", "65", "66",
                                       "%67, %68") : FASTRES_SUMS_64(d) : FASTRES_OPERANDS);
    }
#undef FASTRES_OPERANDS
}

// A from registers, as the fragment of mma m16n8k16: rows 16 * warp .. of A.
template <class T, int N, bool kTransposeB>
DEVICE void warpgroup_multiply(float (&d)[N / 2], const u32 (&a)[4], std::uint64_t b, bool accumulate) {
    static_assert(N == 64, "one size so far");
#define FASTRES_OPERANDS \
    "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransposeB ? 1 : 0)
    if constexpr (std::is_same_v<T, bf16>) {
        FASTRES_HOPPER(FASTRES_PRODUCT("64", "bf16", FASTRES_NAMES_32, "{%32, %33, %34, %35}", "36", "37",
                                       "%38") : FASTRES_SUMS_32(d) : FASTRES_OPERANDS);
    } else {
        static_assert(std::is_same_v<T, f16>);
        FASTRES_HOPPER(FASTRES_PRODUCT("64", "f16", FASTRES_NAMES_32, "{%32, %33, %34, %35}", "36", "37",
                                       "%38") : FASTRES_SUMS_32(d) : FASTRES_OPERANDS);
    }
#undef FASTRES_OPERANDS
}

}  // namespace FASTRES_BACKEND
