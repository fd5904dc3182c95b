// Vectors of L lanes (8, or 16 with AVX-512) over GCC/Clang vector extensions, with intrinsics where they matter.
// Activations are float, bf16, fp16 or double in memory; lanes are their accumulator type, float or double.
//
// Everything lives in an anonymous namespace and no std template is used: a function compiled for one instruction
// set must never be merged by the linker with its twin of another one.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "launch.h"

#define FR_INLINE inline __attribute__((always_inline))

namespace FASTRES_BACKEND {
namespace {

using u16 = std::uint16_t;
using u32 = std::uint32_t;

constexpr int L = FASTRES_WIDTH;
static_assert(L == 8 || L == 16, "a mask byte holds 8 channels");

// How often a loop over values that belong in registers is unrolled: as often as it runs. Not in the model of AVX-512
// that is made for tests: its vectors lie in memory anyway, and the compiler took ten minutes for it.
constexpr int unrolled(int times) {
#if defined(__AVX512F__) || FASTRES_WIDTH == 8
    return times;
#else
    return times > 0;
#endif
}

typedef float vf __attribute__((vector_size(L * 4)));
typedef double vd __attribute__((vector_size(L * 8)));
typedef std::int32_t vi __attribute__((vector_size(L * 4)));
typedef std::uint32_t vu __attribute__((vector_size(L * 4)));
typedef std::int64_t vl __attribute__((vector_size(L * 8)));
typedef std::uint16_t vh __attribute__((vector_size(L * 2)));
typedef std::uint16_t vn __attribute__((vector_size(L * 4)));  // of two vectors
typedef std::uint8_t vb __attribute__((vector_size(L)));

struct bf16 {
    u16 bits;
};
struct fp16 {
    u16 bits;
};

// Acc: lane type. V: its vector. I: integer vector of lanes of the same size (Lane), the type of a comparison.
template <class T>
struct Traits {
    using Acc = float;
    using V = vf;
    using I = vi;
    using Lane = std::int32_t;
};
template <>
struct Traits<double> {
    using Acc = double;
    using V = vd;
    using I = vl;
    using Lane = std::int64_t;
};
template <class T>
using Acc = typename Traits<T>::Acc;
template <class T>
using Vec = typename Traits<T>::V;
template <class T>
using Int = typename Traits<T>::I;

// Unaligned access to memory of any type. Not memcpy: GCC then takes a detour over the stack now and then.
template <class V, class S>
FR_INLINE V read(const S* p) {
    typedef V Unaligned __attribute__((aligned(1), may_alias));
    return *reinterpret_cast<const Unaligned*>(p);
}
template <class V, class S>
FR_INLINE void write(S* p, V v) {
    typedef V Unaligned __attribute__((aligned(1), may_alias));
    *reinterpret_cast<Unaligned*>(p) = v;
}
template <class To, class From>
FR_INLINE To bit_cast(From v) {
    static_assert(sizeof(To) == sizeof(From));
    To t;
    __builtin_memcpy(&t, &v, sizeof t);
    return t;
}

}  // namespace
}  // namespace FASTRES_BACKEND
