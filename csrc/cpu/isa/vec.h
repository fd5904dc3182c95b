// What the kernels do with vectors: arithmetic, loads and stores of whole and partial vectors, ReLU masks.
#pragma once
#include "cpu/isa/half.h"

namespace FASTRES_BACKEND {
namespace {

// ---- lane arithmetic

FR_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && FASTRES_WIDTH == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FMA__)
    for (int i = 0; i < L; ++i) a[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return a;
#else
    return a * b + c;
#endif
}
// c + the products of the pair of bfloat16 in each lane of a and b. Without the instruction as two products, which keep
// the denormals that it takes for zero.
FR_INLINE vf dot_pairs(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    // Not every processor with AVX-512 has it: whoever gets here has asked (cpu/pairs.h).
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
#else
    const vu x = bit_cast<vu>(a), y = bit_cast<vu>(b);
    c = fma(bit_cast<vf>(x & 0xffff0000u), bit_cast<vf>(y & 0xffff0000u), c);
    return fma(bit_cast<vf>(x << 16), bit_cast<vf>(y << 16), c);
#endif
}
FR_INLINE vd fma(vd a, vd b, vd c) {
#if defined(__FMA__)
    for (int i = 0; i < L; ++i) a[i] = __builtin_fma(a[i], b[i], c[i]);
    return a;
#else
    return a * b + c;
#endif
}

// The greater of v and floor; a NaN in v stays.
FR_INLINE vf at_least(vf v, vf floor) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)floor, (__m512)v);
#elif defined(__AVX2__) && FASTRES_WIDTH == 8
    return (vf)_mm256_max_ps((__m256)floor, (__m256)v);
#else
    return v < floor ? floor : v;
#endif
}
FR_INLINE vd at_least(vd v, vd floor) { return v < floor ? floor : v; }

// ---- memory

FR_INLINE vf load(const float* p) { return read<vf>(p); }
FR_INLINE vd load(const double* p) { return read<vd>(p); }
FR_INLINE vf load(const bf16* p) { return from_bf16(read<vh>(p)); }
FR_INLINE vf load(const fp16* p) { return from_fp16(read<vh>(p)); }
FR_INLINE void store(float* p, vf v) { write(p, v); }
FR_INLINE void store(double* p, vd v) { write(p, v); }
FR_INLINE void store(bf16* p, vf v) { write(p, to_bf16(v)); }
FR_INLINE void store(fp16* p, vf v) { write(p, to_fp16(v)); }

// 2 * L values, where dot_pairs may be used or tiles are: by the instruction beside them, which rounds alike and takes
// denormals for zero, as the products do.
FR_INLINE vn narrow_pairs(vf low, vf high) {
#if defined(__AVX512F__)
    vn both;
    asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(high), "v"(low));
    return both;
#else
    bf16 both[2 * L];
    store(both, low), store(both + L, high);
    return read<vn>(both);
#endif
}
FR_INLINE void store_pairs(bf16* p, vf low, vf high) { write(p, narrow_pairs(low, high)); }

FR_INLINE void store_pairs(bf16* p, vf v) {
#if defined(__AVX512F__)
    vh rounded;
    asm("vcvtneps2bf16 %1, %0" : "=v"(rounded) : "v"(v));
    write(p, rounded);
#else
    store(p, v);
#endif
}

// h in the lower lanes; what is in the others does not matter.
FR_INLINE vf low_half(vh h) {
#if defined(__AVX512F__)
    return (vf)_mm512_castsi256_si512((__m256i)h);
#else
    vf v{};
    __builtin_memcpy(&v, &h, sizeof h);
    return v;
#endif
}

FR_INLINE vf splat(const float* p) {
#if defined(__AVX512F__)
    vf v = (vf)_mm512_set1_ps(*p);
    asm("" : "+v"(v));  // or it becomes a memory operand of both products, and loads are the limit
    return v;
#elif defined(__AVX2__) && FASTRES_WIDTH == 8
    return (vf)_mm256_set1_ps(*p);
#else
    vf v;
    for (int i = 0; i < L; ++i) v[i] = *p;
    return v;
#endif
}

// The value as it will be read back from memory.
FR_INLINE vf rounded(vf v, float) { return v; }
FR_INLINE vd rounded(vd v, double) { return v; }
FR_INLINE vf rounded(vf v, bf16) { return bit_cast<vf>(bf16_bits(v) & 0xffff0000u); }
FR_INLINE vf rounded(vf v, fp16) { return from_fp16(to_fp16(v)); }

// ---- parts of a vector: the first n lanes, 0 < n < L

template <class T>
FR_INLINE void copy_lanes(T* to, const T* from, int n) {
    // At most four moves of a fixed size, and branches that go the same way in every row.
    if constexpr (L == 16)
        if (n & 8) __builtin_memcpy(to, from, 8 * sizeof(T)), to += 8, from += 8;
    if (n & 4) __builtin_memcpy(to, from, 4 * sizeof(T)), to += 4, from += 4;
    if (n & 2) __builtin_memcpy(to, from, 2 * sizeof(T)), to += 2, from += 2;
    if (n & 1) __builtin_memcpy(to, from, sizeof(T));
}

// Lanes past n are zero.
template <class T>
FR_INLINE Vec<T> load_part(const T* p, int n) {
#if defined(__AVX512F__)
    const u32 lanes = (1u << n) - 1;
    if constexpr (sizeof(T) == 2) {
        const vh h = (vh)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(lanes), p);
        return load(reinterpret_cast<const T*>(&h));
    } else if constexpr (sizeof(T) == 4) {
        return (vf)_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), p);
    } else
#endif
    {
        T whole[L];
        __builtin_memset(whole, 0, sizeof whole);
        copy_lanes(whole, p, n);
        return load(whole);
    }
}
template <class T>
FR_INLINE void store_part(T* p, Vec<T> v, int n) {
#if defined(__AVX512F__)
    const u32 lanes = (1u << n) - 1;
    if constexpr (sizeof(T) == 2) {
        vh h;
        store(reinterpret_cast<T*>(&h), v);
        _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(lanes), (__m256i)h);
    } else if constexpr (sizeof(T) == 4) {
        _mm512_mask_storeu_ps(p, static_cast<__mmask16>(lanes), (__m512)v);
    } else
#endif
    {
        T whole[L];
        store(whole, v);
        copy_lanes(p, whole, n);
    }
}

// ---- the ReLU mask: bit i belongs to lane i

// The greatest value that a dtype rounds to zero: whether the rounded value is <= 0 shows before rounding.
constexpr float zero_limit(float) { return 0.0f; }
constexpr double zero_limit(double) { return 0.0; }
constexpr float zero_limit(bf16) { return 0x1p-134f; }  // half of the least subnormal, a tie that goes to even
constexpr float zero_limit(fp16) { return 0x1p-25f; }

// !(v <= limit): true for NaN.
FR_INLINE u32 passed(vf v, float limit) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(limit), _CMP_NLE_UQ);
#elif defined(__AVX2__) && FASTRES_WIDTH == 8
    return u32(_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(limit), _CMP_NLE_UQ)));
#else
    u32 bits = 0;
    for (int i = 0; i < L; ++i) bits |= u32(!(v[i] <= limit)) << i;
    return bits;
#endif
}
FR_INLINE u32 passed(vd v, double limit) {
    u32 bits = 0;
    for (int i = 0; i < L; ++i) bits |= u32(!(v[i] <= limit)) << i;
    return bits;
}

// Whether a comparison holds in any lane.
FR_INLINE bool any(vi comparison) {
    bool held = false;
    for (int i = 0; i < L; ++i) held |= comparison[i] != 0;
    return held;
}
FR_INLINE bool any(vl comparison) {
    bool held = false;
    for (int i = 0; i < L; ++i) held |= comparison[i] != 0;
    return held;
}

// v where the bit is set, 0 elsewhere, also in place of a NaN.
FR_INLINE vf keep(vf v, u32 bits) {
#if defined(__AVX512F__)
    return (vf)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)v);
#else
    vi select;
    for (int i = 0; i < L; ++i) select[i] = 1 << i;
    const vi lane = (vi{} + std::int32_t(bits)) & select;
    return bit_cast<vf>(bit_cast<vi>(v) & (lane == select));
#endif
}
FR_INLINE vd keep(vd v, u32 bits) {
    vl select;
    for (int i = 0; i < L; ++i) select[i] = std::int64_t(1) << i;
    const vl lane = (vl{} + std::int64_t(bits)) & select;
    return bit_cast<vd>(bit_cast<vl>(v) & (lane == select));
}

// ---- lane spans: a full vector, or the tail of a row

struct Full {
    template <class T>
    FR_INLINE Vec<T> load(const T* p) const {
        return FASTRES_BACKEND::load(p);
    }
    template <class T>
    FR_INLINE void store(T* p, Vec<T> v) const {
        FASTRES_BACKEND::store(p, v);
    }
    FR_INLINE u32 bits(const u8* p) const {
        if constexpr (L == 8)
            return *p;
        else
            return u32(p[0]) | u32(p[1]) << 8;
    }
    FR_INLINE void bits(u8* p, u32 value) const {
        p[0] = u8(value);
        if constexpr (L == 16) p[1] = u8(value >> 8);
    }
    FR_INLINE vb bytes(const u8* p) const { return read<vb>(p); }
    FR_INLINE void bytes(u8* p, vb v) const { write(p, v); }
};

struct Tail {
    int n;           // lanes that exist
    bool over_read;  // a whole vector may be read: what follows the row is memory of this task

    template <class T>
    FR_INLINE Vec<T> load(const T* p) const {
#if defined(__AVX512F__)
        if constexpr (sizeof(T) <= 4) return load_part(p, n);
#endif
        return over_read ? FASTRES_BACKEND::load(p) : load_part(p, n);
    }
    template <class T>
    FR_INLINE void store(T* p, Vec<T> v) const {
        store_part(p, v, n);
    }
    FR_INLINE u32 bits(const u8* p) const { return n > 8 ? u32(p[0]) | u32(p[1]) << 8 : p[0]; }
    FR_INLINE void bits(u8* p, u32 value) const {
        value &= (1u << n) - 1;
        p[0] = u8(value);
        if (n > 8) p[1] = u8(value >> 8);
    }
    FR_INLINE vb bytes(const u8* p) const {
        if (over_read) return read<vb>(p);
        u8 whole[L] = {};
        copy_lanes(whole, p, n);
        return read<vb>(whole);
    }
    FR_INLINE void bytes(u8* p, vb v) const {
        u8 whole[L];
        write(whole, v);
        copy_lanes(p, whole, n);
    }
};

// Accumulators in double.
FR_INLINE vd wide(vf v) { return __builtin_convertvector(v, vd); }
FR_INLINE vd wide(vd v) { return v; }

// Bytes and integer lanes.
FR_INLINE vi widen(vb b, vf) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtepu8_epi32((__m128i)b);
#elif defined(__AVX2__) && FASTRES_WIDTH == 8
    return (vi)_mm256_cvtepu8_epi32(_mm_set1_epi64x(bit_cast<std::int64_t>(b)));
#else
    return __builtin_convertvector(b, vi);
#endif
}
FR_INLINE vl widen(vb b, vd) { return __builtin_convertvector(b, vl); }
FR_INLINE vb narrow(vi v) {
#if defined(__AVX512F__)
    return (vb)_mm512_cvtepi32_epi8((__m512i)v);
#elif defined(__AVX2__) && FASTRES_WIDTH == 8
    const __m256i lowest = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                            0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i quads = _mm256_shuffle_epi8((__m256i)v, lowest);
    const __m128i joined = _mm_unpacklo_epi32(_mm256_castsi256_si128(quads), _mm256_extracti128_si256(quads, 1));
    return bit_cast<vb>(_mm_cvtsi128_si64(joined));
#else
    return __builtin_convertvector(v, vb);
#endif
}
FR_INLINE vb narrow(vl v) { return __builtin_convertvector(v, vb); }

}  // namespace
}  // namespace FASTRES_BACKEND
