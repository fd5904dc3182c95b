// bf16 and fp16 in memory, float in lanes.
#pragma once
#include "cpu/isa/types.h"

namespace FASTRES_BACKEND {
namespace {

FR_INLINE vf from_bf16(vh h) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)h), 16);
#elif defined(__AVX2__) && FASTRES_WIDTH == 8
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)h), 16);
#else
    return bit_cast<vf>(__builtin_convertvector(h, vu) << 16);
#endif
}

// Round to nearest even on the integer, in the upper half of a lane; a NaN becomes 0xffff, a NaN. The native
// instruction of AVX512-BF16 is not used: it flushes denormals, and the result would depend on the machine.
FR_INLINE vu bf16_bits(vf v) {
    const vu u = bit_cast<vu>(v);
    const vu nearest = u + 0x7fffu + ((u >> 16) & 1u);
#if defined(__AVX512F__)
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
    return (vu)_mm512_mask_set1_epi32((__m512i)nearest, nan, -1);
#else
    return nearest | bit_cast<vu>(v != v);
#endif
}
// a in the lower half, where a pair has the even channel.
FR_INLINE u32 bf16_pair(float a, float b) {
    const vu u = bf16_bits(vf{a, b});
    return u[0] >> 16 | (u[1] & 0xffff0000u);
}
FR_INLINE vh to_bf16(vf v) {
    const vu u = bf16_bits(v);
#if defined(__AVX512F__)
    return (vh)_mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)u, 16));
#elif defined(__AVX2__) && FASTRES_WIDTH == 8
    const __m256i upper = _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                           2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i halves = _mm256_shuffle_epi8((__m256i)u, upper);
    return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08));
#else
    return __builtin_convertvector(u >> 16, vh);
#endif
}

#if !defined(__F16C__)
FR_INLINE float half_to_float(u16 h) {
    const u32 sign = u32(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 0x3ff;
    if (exponent == 31) return bit_cast<float>(sign | 0x7f800000u | (fraction ? 0x400000u : 0u) | fraction << 13);
    if (exponent) return bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
    const float magnitude = float(fraction) * 0x1p-24f;  // exact: zero or subnormal
    return sign ? -magnitude : magnitude;
}
FR_INLINE u16 float_to_half(float f) {
    const u32 u = bit_cast<u32>(f), sign = (u >> 16) & 0x8000, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return u16(sign | 0x7e00 | (a >> 13 & 0x3ff));
    if (a >= 0x477ff000u) return u16(sign | 0x7c00);  // from 65520 on the nearest is infinity
    if (a < 0x38800000u) {                            // subnormal: adding 0.5 rounds at 2^-24
        const float shifted = bit_cast<float>(a) + 0.5f;
        return u16(sign | (bit_cast<u32>(shifted) - 0x3f000000u));
    }
    return u16(sign | ((a + 0xfffu + (a >> 13 & 1) - 0x38000000u) >> 13));
}
// Without the instruction a conversion is a hundred others: a call, or a kernel that has it 81 times in line takes the
// compiler minutes.
#define FR_HALF __attribute__((noinline)) inline
#else
#define FR_HALF FR_INLINE
#endif
FR_HALF vf from_fp16(vh h) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__) && FASTRES_WIDTH == 8
    return (vf)_mm256_cvtph_ps((__m128i)h);
#elif defined(__F16C__)
    __m128i part[2];
    __m256 wide[2];
    __builtin_memcpy(part, &h, sizeof h);
    for (int i = 0; i < 2; ++i) wide[i] = _mm256_cvtph_ps(part[i]);
    return read<vf>(wide);
#else
    vf v;
    for (int i = 0; i < L; ++i) v[i] = half_to_float(h[i]);
    return v;
#endif
}
FR_HALF vh to_fp16(vf v) {
#if defined(__AVX512F__)
    return (vh)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__) && FASTRES_WIDTH == 8
    return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
    __m256 wide[2];
    __m128i part[2];
    __builtin_memcpy(wide, &v, sizeof v);
    for (int i = 0; i < 2; ++i) part[i] = _mm256_cvtps_ph(wide[i], _MM_FROUND_TO_NEAREST_INT);
    return read<vh>(part);
#else
    vh h;
    for (int i = 0; i < L; ++i) h[i] = float_to_half(v[i]);
    return h;
#endif
}

}  // namespace
}  // namespace FASTRES_BACKEND
