// The matrix unit: eight tiles of 16 rows of 64 bytes (Intel AMX with bfloat16), one set for each thread.
//
// A file that is not compiled for it gets a model of the instructions, so that kernels can be tested on any machine:
// the same products in the same order, from the pseudocode of Intel's manual. Denormals, which the instructions take
// for zero, are kept.
#pragma once
#include "cpu/isa/vec.h"

namespace FASTRES_BACKEND {
namespace {

constexpr int kTileRows = 16, kTileBytes = 64;

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
constexpr bool kModelled = false;

// The tiles of a thread, for the life of the object: 0 to 3 of sums, 4 and 5 of A with `depth` bfloat16 in a row, 6 and
// 7 of B with depth / 2 rows. depth is even, at most 32.
class Tiles {
  public:
    explicit Tiles(int depth = 2 * kTileRows) {
        struct alignas(64) {
            u8 palette = 1, start = 0, reserved[14] = {};
            u16 bytes[16] = {};
            u8 rows[16] = {};
        } config;
        for (int t = 0; t < 8; ++t) {
            config.bytes[t] = u16(t == 4 || t == 5 ? 2 * depth : kTileBytes);
            config.rows[t] = u8(t == 6 || t == 7 ? depth / 2 : kTileRows);
        }
        __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
    }
    ~Tiles() { __asm__ volatile("tilerelease" ::: "memory"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    template <int T>
    FR_INLINE void zero() {
        __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
    }
    // Rows of 64 bytes, `bytes` apart.
    template <int T>
    FR_INLINE void load(const void* from, i64 bytes) {
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(T) : "memory");
    }
    // As load, of what is not read again soon: it passes L1 by, where other operands stay.
    template <int T>
    FR_INLINE void load_once(const void* from, i64 bytes) {
        __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(T) : "memory");
    }
    template <int T>
    FR_INLINE void store(void* to, i64 bytes) {
        __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes), "i"(T) : "memory");
    }
    // The vector units fall asleep after some 2000 cycles without work, and the store of a tile waits 260 ns for them
    // to wake up.
    FR_INLINE void keep_awake() {
        float sum;
        __asm__ volatile("vaddss %1, %1, %0" : "=x"(sum) : "x"(0.0f));
    }
    // D [16, 16] += A [16, depth] . B, B as rows of pairs: (B[2i][n], B[2i+1][n]).
    template <int D, int A, int B>
    FR_INLINE void dot() {
        __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(D), "i"(A), "i"(B));
    }
};

#else
constexpr bool kModelled = true;

class Tiles {
  public:
    explicit Tiles(int depth = 2 * kTileRows) : pairs_(depth / 2) {}
    template <int T>
    void zero() {
        __builtin_memset(tile_[T], 0, sizeof tile_[T]);
    }
    template <int T>
    void load(const void* from, i64 bytes) {
        const int rows = T >= 6 ? pairs_ : kTileRows, width = T == 4 || T == 5 ? 4 * pairs_ : kTileBytes;
        for (int r = 0; r < rows; ++r)
            __builtin_memcpy(tile_[T] + r * 16, static_cast<const char*>(from) + r * bytes, width);
    }
    template <int T>
    void load_once(const void* from, i64 bytes) {
        load<T>(from, bytes);
    }
    template <int T>
    void store(void* to, i64 bytes) {
        for (int r = 0; r < kTileRows; ++r)
            __builtin_memcpy(static_cast<char*>(to) + r * bytes, tile_[T] + r * 16, kTileBytes);
    }
    void keep_awake() {}
    template <int D, int A, int B>
    void dot() {
        for (int m = 0; m < kTileRows; ++m)
            for (int n = 0; n < 16; n += L) {
                vf even{}, odd{};
                for (int i = 0; i < pairs_; ++i) {
                    const u32 a = tile_[A][m * 16 + i];
                    const vu b = read<vu>(tile_[B] + i * 16 + n);
                    even = fma(splat(a << 16), bit_cast<vf>(b << 16), even);
                    odd = fma(splat(a & 0xffff0000u), bit_cast<vf>(b & 0xffff0000u), odd);
                }
                u32* d = tile_[D] + m * 16 + n;
                write(d, read<vf>(d) + (even + odd));
            }
    }

  private:
    static vf splat(u32 bits) { return vf{} + bit_cast<float>(bits); }
    const int pairs_;
    u32 tile_[8][kTileRows * 16] = {};
};
#endif

}  // namespace
}  // namespace FASTRES_BACKEND
