// Host meaning of csrc/cuda/arch.cuh: each name as scalar C++, warp and block collectives through Machine.
// Included by arch.cuh alone.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "chip.h"
#include "machine.h"

#define KERNEL(min_blocks) void
#define KERNEL_OF(threads) void
#define DEVICE inline
#define HOST_DEVICE inline
#define SHARED(T, name, n)            \
    static const char name##_key = 0; \
    FASTRES_BACKEND::SharedView<T> name(&name##_key, n)
#define DYNAMIC_SHARED(T, name) FASTRES_BACKEND::SharedView<T> name

namespace FASTRES_BACKEND {

using fastres::emulator::Machine;
using fastres::emulator::Site;

// A __shared__ array. Elements are reached through a proxy, so that each access is seen by the race check.
template <class T>
class SharedView {
  public:
    SharedView(const void* key, std::size_t n, Site site = Site::current())
        : array_(Machine::current().shared(key, sizeof(T), n, site)) {}
    explicit SharedView(Site site = Site::current()) : array_(Machine::current().dynamic_shared(sizeof(T), site)) {}

    class Element {
      public:
        Element(fastres::emulator::SharedArray& array, std::size_t i) : array_(array), i_(i) {}
        operator T() const {
            Machine::current().on_read(array_, i_);
            T value;
            std::memcpy(&value, array_.bytes.data() + i_ * sizeof(T), sizeof(T));
            return value;
        }
        Element& operator=(T value) {
            Machine::current().on_write(array_, i_);
            std::memcpy(array_.bytes.data() + i_ * sizeof(T), &value, sizeof(T));
            return *this;
        }
        Element& operator=(const Element& other) { return *this = static_cast<T>(other); }
        Element& operator+=(T value) { return *this = static_cast<T>(*this) + value; }

      private:
        fastres::emulator::SharedArray& array_;
        std::size_t i_;
    };

    Element operator[](i64 i) { return {array_, static_cast<std::size_t>(i)}; }
    fastres::emulator::SharedArray& array() { return array_; }

  private:
    fastres::emulator::SharedArray& array_;
};

inline int thread_index() { return Machine::current().thread(); }
inline i64 block_x() { return Machine::current().block_x(); }
inline i64 block_y() { return Machine::current().block_y(); }
inline i64 grid_x() { return Machine::current().grid_x(); }

inline void sync_block(Site site = Site::current()) { Machine::current().barrier(site); }
inline void sync_grid(Site site = Site::current()) { Machine::current().grid_barrier(site); }

template <class T>
T shuffle_xor(T value, int lane_mask, Site site = Site::current()) {
    static_assert(sizeof(T) <= 8);
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    Machine& machine = Machine::current();
    const int lane = machine.thread() % kWarp;
    const std::uint64_t* const slots = machine.exchange("shuffle_xor", bits, site);
    std::memcpy(&value, &slots[lane ^ lane_mask], sizeof(T));
    return value;
}

inline u32 ballot(bool predicate, Site site = Site::current()) {
    const std::uint64_t* const slots = Machine::current().exchange("ballot", predicate, site);
    u32 bits = 0;
    for (int lane = 0; lane < kWarp; ++lane) bits |= static_cast<u32>(slots[lane] & 1) << lane;
    return bits;
}

// A misaligned vector access is an error on the GPU, so it is one here.
template <class V>
V load_aligned(const void* p) {
    if (reinterpret_cast<std::uintptr_t>(p) % sizeof(V)) Machine::current().fault("misaligned vector load");
    V v;
    std::memcpy(&v, p, sizeof(V));
    if (Machine::current().meter.on) Machine::current().meter.load(p, sizeof(V));
    return v;
}
template <class V>
void store_aligned(void* p, const V& v) {
    if (reinterpret_cast<std::uintptr_t>(p) % sizeof(V)) Machine::current().fault("misaligned vector store");
    std::memcpy(p, &v, sizeof(V));
    if (Machine::current().meter.on) Machine::current().meter.store(p, sizeof(V));
}

inline Word4 load16(const void* p) { return load_aligned<Word4>(p); }
inline Word4 load16_last(const void* p) { return load_aligned<Word4>(p); }
inline Word2 load8(const void* p) { return load_aligned<Word2>(p); }
inline void store16(void* p, const Word4& v) { store_aligned(p, v); }
inline void store8(void* p, const Word2& v) { store_aligned(p, v); }

inline u32 float_bits(float v) { return std::bit_cast<u32>(v); }
inline float bits_float(u32 v) { return std::bit_cast<float>(v); }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline double fused(double a, double b, double c) { return std::fma(a, b, c); }
inline double root(double v) { return std::sqrt(v); }

inline u32 round_bf16(float v) {
    const u32 x = float_bits(v);
    if (v != v) return 0x7fff;  // the NaN CUDA makes
    return (x + 0x7fffu + (x >> 16 & 1)) >> 16;
}
inline u32 round_f16(float v) {
    const u32 x = float_bits(v), sign = x >> 16 & 0x8000u, magnitude = x & 0x7fffffffu;
    if (v != v) return 0x7fff;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and more
    if (magnitude < 0x38800000u) {                        // subnormal: adding 0.5 leaves steps of 2^-24
        return sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u);
    }
    return sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13);
}
inline float widen_f16(u32 v) {
    const u32 sign = (v & 0x8000u) << 16, magnitude = v & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude < 0x400u) return bits_float(sign | float_bits(static_cast<float>(magnitude) * 0x1p-24f));
    return bits_float(sign | ((magnitude << 13) + 0x38000000u));
}
inline u32 larger_halves(u32 a, u32 b) {
    return std::max(a & 0xffffu, b & 0xffffu) | std::max(a & 0xffff0000u, b & 0xffff0000u);
}
inline u32 pack_bf16(float lo, float hi) { return round_bf16(lo) | round_bf16(hi) << 16; }
inline u32 pack_f16(float lo, float hi) { return round_f16(lo) | round_f16(hi) << 16; }
inline void unpack_f16(u32 v, float& lo, float& hi) {
    lo = widen_f16(v & 0xffffu);
    hi = widen_f16(v >> 16);
}

inline i64 multiprocessors() { return fastres::emulator::chip().multiprocessors; }

// `ctx` seeds the order of blocks and threads.
template <class... P>
void launch(const char* name, void (*kernel)(P...), i64 grid_x, i64 grid_y, i64 ctx, std::common_type_t<P>... args) {
    Machine::current().run(name, {grid_x, grid_y, kThreads}, static_cast<std::uint64_t>(ctx), [&] { kernel(args...); });
}

template <int kBlock = kThreads, class... P>
void launch_with_shared(const char* name, void (*kernel)(P...), i64 grid_x, i64 grid_y, i64 shared_bytes, i64 ctx,
                        std::common_type_t<P>... args) {
    Machine::current().run(name, {grid_x, grid_y, kBlock, static_cast<std::size_t>(shared_bytes)},
                           static_cast<std::uint64_t>(ctx), [&] { kernel(args...); });
}

template <int kBlocksPerMultiprocessor, class... P>
void launch_cooperative(const char* name, void (*kernel)(P...), i64 grid_x, i64 grid_y, i64 shared_bytes, i64 ctx,
                        std::common_type_t<P>... args) {
    Machine::current().run(name,
                           {grid_x, grid_y, kThreads, static_cast<std::size_t>(shared_bytes), kBlocksPerMultiprocessor},
                           static_cast<std::uint64_t>(ctx), [&] { kernel(args...); });
}

}  // namespace FASTRES_BACKEND

#include "warp.h"
