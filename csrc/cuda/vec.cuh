// Eight channels at a time: 16-byte access, 16-bit floats, ReLU bits. float is the arithmetic type throughout.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "arch.cuh"

namespace FASTRES_BACKEND {

constexpr int kVec = 8;  // channels of a thread: one mask byte, 16 bytes of a 16-bit type

// How a kernel touches memory. Vector: C a multiple of 8 and every address aligned to 16 bytes.
// Scalar: element by element, `valid` of them.
struct Vector {};
struct Scalar {};

template <class A>
constexpr bool kIsVector = false;
template <>
constexpr bool kIsVector<Vector> = true;

// Eight activations as they lie in memory.
template <class T>
struct Pack {
    static constexpr int kWords = kVec * static_cast<int>(sizeof(T)) / 4;
    u32 w[kWords];
};

template <class T>
DEVICE u32 element_bits(const T* p) {
    if constexpr (sizeof(T) == 2) {
        return p->bits;
    } else {
        return float_bits(*p);
    }
}

template <class T>
DEVICE Pack<T> load_elements(const T* p, int valid) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < Pack<T>::kWords; ++i) pack.w[i] = 0;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
        if (j < valid) {
            if constexpr (sizeof(T) == 2) {
                pack.w[j / 2] |= element_bits(p + j) << (16 * (j % 2));
            } else {
                pack.w[j] = element_bits(p + j);
            }
        }
    }
    return pack;
}

// `kLast`: no later pass wants this line.
template <class A, bool kLast, class T>
DEVICE Pack<T> load_pack(const T* p, int valid) {
    if constexpr (kIsVector<A>) {
        Pack<T> pack;
#pragma unroll
        for (int i = 0; i < Pack<T>::kWords; i += 4) {
            const Word4 v = kLast ? load16_last(p + i * 4 / sizeof(T)) : load16(p + i * 4 / sizeof(T));
#pragma unroll
            for (int j = 0; j < 4; ++j) pack.w[i + j] = v.w[j];
        }
        return pack;
    } else {
        return load_elements(p, valid);
    }
}

template <class A, class T>
DEVICE void store_pack(T* p, const Pack<T>& pack, int valid) {
    if constexpr (kIsVector<A>) {
#pragma unroll
        for (int i = 0; i < Pack<T>::kWords; i += 4) {
            store16(p + i * 4 / sizeof(T), {{pack.w[i], pack.w[i + 1], pack.w[i + 2], pack.w[i + 3]}});
        }
    } else {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            if (j < valid) {
                if constexpr (sizeof(T) == 2) {
                    p[j].bits = static_cast<std::uint16_t>(pack.w[j / 2] >> (16 * (j % 2)));
                } else {
                    p[j] = bits_float(pack.w[j]);
                }
            }
        }
    }
}

// Eight per-channel parameters.
template <class A>
DEVICE void load_params(const float* p, int valid, float (&v)[kVec]) {
    const Pack<float> pack = load_pack<A, false>(p, valid);
#pragma unroll
    for (int j = 0; j < kVec; ++j) v[j] = bits_float(pack.w[j]);
}

DEVICE void unpack(const Pack<float>& pack, float (&v)[kVec]) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) v[j] = bits_float(pack.w[j]);
}
DEVICE void unpack(const Pack<bf16>& pack, float (&v)[kVec]) {
#pragma unroll
    for (int j = 0; j < kVec; j += 2) {
        v[j] = bits_float(pack.w[j / 2] << 16);
        v[j + 1] = bits_float(pack.w[j / 2] & 0xffff0000u);
    }
}
DEVICE void unpack(const Pack<f16>& pack, float (&v)[kVec]) {
#pragma unroll
    for (int j = 0; j < kVec; j += 2) unpack_f16(pack.w[j / 2], v[j], v[j + 1]);
}

// Rounds to nearest even.
template <class T>
DEVICE Pack<T> pack(const float (&v)[kVec]) {
    Pack<T> out;
#pragma unroll
    for (int i = 0; i < Pack<T>::kWords; ++i) {
        if constexpr (sizeof(T) == 4) {
            out.w[i] = float_bits(v[i]);
        } else if constexpr (std::is_same_v<T, bf16>) {
            out.w[i] = pack_bf16(v[2 * i], v[2 * i + 1]);
        } else {
            out.w[i] = pack_f16(v[2 * i], v[2 * i + 1]);
        }
    }
    return out;
}

// Bit j: the ReLU lets the gradient of channel j pass. A NaN passes, as in PyTorch.
DEVICE u32 passed(const float (&v)[kVec]) {
    u32 bits = 0;
#pragma unroll
    for (int j = 0; j < kVec; ++j) bits |= static_cast<u32>(!(v[j] <= 0.0f)) << j;
    return bits;
}

// ReLU bits of a pack: of the values as rounded.
template <class T>
DEVICE u32 passed(const Pack<T>& pack) {
    float v[kVec];
    unpack(pack, v);
    return passed(v);
}

// Zero where the bit is off.
template <class T>
DEVICE Pack<T> keep(Pack<T> pack, u32 bits) {
#pragma unroll
    for (int i = 0; i < Pack<T>::kWords; ++i) {
        if constexpr (sizeof(T) == 4) {
            pack.w[i] = (bits >> i & 1) ? pack.w[i] : 0u;
        } else {
            pack.w[i] &= ((bits >> (2 * i) & 1) ? 0x0000ffffu : 0u) | ((bits >> (2 * i + 1) & 1) ? 0xffff0000u : 0u);
        }
    }
    return pack;
}

HOST_DEVICE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
template <class T>
HOST_DEVICE T least(T a, T b) {
    return b < a ? b : a;
}
template <class T>
HOST_DEVICE T most(T a, T b) {
    return a < b ? b : a;
}

// ---- host: from run-time arguments to template parameters

// True where 16-byte access is legal: null pointers do not matter.
template <class... P>
bool aligned16(const P*... p) {
    return ((reinterpret_cast<std::uintptr_t>(p) % 16 == 0) && ...);
}

// Parameters and statistics are float32 for every activation type served here.
inline void require_float(const char* name, int dtype) {
    if (dtype < kF32 || dtype > kF16) {
        throw std::invalid_argument(std::string(name) +
                                    ": dtype code is 0 (float32), 1 (bfloat16) or 2 (float16), got " +
                                    std::to_string(dtype));
    }
}

// Calls f(T{}, Vector{} | Scalar{}) for the activation type T.
template <class F>
void dispatch(const char* name, int dtype, bool vector, F f) {
    require_float(name, dtype);
    const auto with = [&](auto t) { vector ? f(t, Vector{}) : f(t, Scalar{}); };
    if (dtype == kF32) {
        with(float{});
    } else if (dtype == kBF16) {
        with(bf16{});
    } else {
        with(f16{});
    }
}

}  // namespace FASTRES_BACKEND
