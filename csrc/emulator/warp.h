// Warp collectives of the tensor cores, lane by lane: matrix loads and stores, matrix products, asynchronous copies.
// Fragment layouts: PTX ISA, "Matrix fragments for mma" and "ldmatrix". Included by arch.h alone.
#pragma once
#include <algorithm>

#include "async.h"
#include "counters.h"

namespace FASTRES_BACKEND {

using fastres::emulator::Access;

static_assert(sizeof(Word4) == fastres::emulator::kCopyBytes);

constexpr bool kFits128Registers = true;

inline int afresh(int v) { return v; }

// ---- 16-byte access to shared memory; `i` counts Word4s

inline Word4 load_shared16(SharedView<Word4> shared, i64 i, Site site = Site::current()) {
    Machine& machine = Machine::current();
    if (machine.meter.on) machine.meter.lane(machine.fiber(), static_cast<u64>(i) * 16, Access::kLoad, site);
    return shared[i];
}

inline void store_shared16(SharedView<Word4> shared, i64 i, const Word4& v, Site site = Site::current()) {
    Machine& machine = Machine::current();
    if (machine.meter.on) machine.meter.lane(machine.fiber(), static_cast<u64>(i) * 16, Access::kStore, site);
    shared[i] = v;
}

inline u32 load_shared4(SharedView<u32> shared, i64 i, Site site = Site::current()) {
    Machine& machine = Machine::current();
    if (machine.meter.on) machine.meter.lane(machine.fiber(), static_cast<u64>(i) * 4, Access::kWord, site);
    return shared[i];
}

inline Word4 load16_or_zero(const void* p, bool valid) { return valid ? load16(p) : Word4{}; }

inline Word2 load8_or_zero(const void* p, bool valid) { return valid ? load8(p) : Word2{}; }

inline u32 load2_or_zero(const void* p, bool valid) { return valid ? load_aligned<std::uint16_t>(p) : 0u; }

// ---- cp.async

inline void copy_async16(SharedView<Word4> shared, i64 i, const void* source) {
    Machine& machine = Machine::current();
    if (reinterpret_cast<std::uintptr_t>(source) % 16) machine.fault("misaligned asynchronous copy");
    if (machine.meter.on) machine.meter.load(source, 16);
    machine.copies().issue(machine, shared.array(), static_cast<std::size_t>(i), source);
}

inline void copy_async16_or_zero(SharedView<Word4> shared, i64 i, const void* source, bool valid) {
    if (valid) return copy_async16(shared, i, source);
    Machine& machine = Machine::current();
    machine.copies().issue(machine, shared.array(), static_cast<std::size_t>(i), nullptr);
}

inline void copy_async_commit() { Machine::current().copies().commit(); }

template <int kLeft>
void copy_async_wait() {
    Machine& machine = Machine::current();
    machine.copies().wait(machine, kLeft);
}

// ---- ldmatrix, stmatrix

namespace warp {

struct Row {
    Word4 words;
    u64 byte;
};

inline const Row* rows_of(const unsigned char* slots, int lane) {
    return reinterpret_cast<const Row*>(slots + lane * Machine::kSlotBytes);
}

inline void count(const unsigned char* slots, int matrices, Access kind) {
    Machine& machine = Machine::current();
    if (!machine.meter.on || machine.thread() % kWarp) return;
    for (int m = 0; m < matrices; ++m) {
        u64 bytes[8];
        for (int r = 0; r < 8; ++r) bytes[r] = rows_of(slots, 8 * m + r)->byte;
        machine.meter.rows(bytes, 8, kind);
    }
}

}  // namespace warp

template <int kMatrices, bool kTransposed>
void load_matrix(u32 (&d)[kMatrices], SharedView<Word4> shared, i64 i, Site site = Site::current()) {
    static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
    Machine& machine = Machine::current();
    const int lane = machine.thread() % kWarp;
    warp::Row mine{};
    if (lane < 8 * kMatrices) mine = {shared[i], static_cast<u64>(i) * 16};
    const unsigned char* const slots = machine.exchange_wide("load_matrix", &mine, sizeof mine, site);
    warp::count(slots, kMatrices, Access::kMatrix);
    for (int m = 0; m < kMatrices; ++m) {
        if constexpr (kTransposed) {
            u32 half[2];
            for (int e = 0; e < 2; ++e) {
                const Word4& row = warp::rows_of(slots, 8 * m + 2 * (lane % 4) + e)->words;
                half[e] = row.w[lane / 4 / 2] >> (16 * (lane / 4 % 2)) & 0xffffu;
            }
            d[m] = half[0] | half[1] << 16;
        } else {
            d[m] = warp::rows_of(slots, 8 * m + lane / 4)->words.w[lane % 4];
        }
    }
}

template <int kMatrices, bool kTransposed>
void store_matrix(SharedView<Word4> shared, i64 i, const u32 (&s)[kMatrices], Site site = Site::current()) {
    static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
    Machine& machine = Machine::current();
    const int lane = machine.thread() % kWarp, m = lane / 8, r = lane % 8;
    warp::Row mine{{}, static_cast<u64>(i) * 16};
    std::copy(s, s + kMatrices, mine.words.w);
    const unsigned char* const slots = machine.exchange_wide("store_matrix", &mine, sizeof mine, site);
    warp::count(slots, kMatrices, Access::kStore);
    if (m >= kMatrices) return;
    Word4 row{};
    for (int c = 0; c < 8; ++c) {
        // Element (r, c) sits in the lane of (row, column pair), transposed in that of (column, row pair).
        const int owner = kTransposed ? 4 * c + r / 2 : 4 * r + c / 2, half = kTransposed ? r % 2 : c % 2;
        const u32 bits = warp::rows_of(slots, owner)->words.w[m] >> (16 * half) & 0xffffu;
        row.w[c / 2] |= bits << (16 * (c % 2));
    }
    shared[i] = row;
}

// ---- mma.sync: d += a * b, a row-major, b column-major. Products are exact; sums are rounded to float once.

namespace warp {

template <class T>
struct Operand;  // how many elements a 32-bit register holds, and their values
template <>
struct Operand<bf16> {
    static constexpr int kPacked = 2;
    using Sum = double;
    static double value(u32 word, int i) { return bits_float((word >> (16 * i) & 0xffffu) << 16); }
};
template <>
struct Operand<f16> {
    static constexpr int kPacked = 2;
    using Sum = double;
    static double value(u32 word, int i) { return widen_f16(word >> (16 * i) & 0xffffu); }
};
template <>
struct Operand<tf32> {
    static constexpr int kPacked = 1;
    using Sum = double;
    static double value(u32 word, int) { return bits_float(word & 0xffffe000u); }  // the low 13 bits are not read
};
template <>
struct Operand<std::int8_t> {
    static constexpr int kPacked = 4;
    using Sum = std::int64_t;
    static std::int64_t value(u32 word, int i) { return static_cast<std::int8_t>(word >> (8 * i)); }
};

struct Fragments {
    u32 a[4], b[2];
};

}  // namespace warp

// 16 x 8 x (8 registers of A's row): m16n8k16 for bf16 and f16, m16n8k8 for tf32, m16n8k32 for int8.
template <class T, class Acc>
void multiply_add(Acc (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, Site site = Site::current()) {
    using Op = warp::Operand<T>;
    Machine& machine = Machine::current();
    const warp::Fragments mine{{a[0], a[1], a[2], a[3]}, {b0, b1}};
    const unsigned char* const slots = machine.exchange_wide("multiply_add", &mine, sizeof mine, site);
    const auto of = [&](int lane) {
        return reinterpret_cast<const warp::Fragments*>(slots + lane * Machine::kSlotBytes);
    };
    const int lane = machine.thread() % kWarp, group = lane / 4, pair = lane % 4;
    typename Op::Sum sum[4] = {};
    for (int half = 0; half < 2; ++half) {
        for (int t = 0; t < 4; ++t) {
            const u32 lower = of(4 * group + t)->a[2 * half], upper = of(4 * group + t)->a[2 * half + 1];
            const u32 left = of(8 * pair + t)->b[half], right = of(8 * pair + 4 + t)->b[half];
            for (int i = 0; i < Op::kPacked; ++i) {
                const auto x = Op::value(lower, i), y = Op::value(upper, i);
                const auto u = Op::value(left, i), v = Op::value(right, i);
                sum[0] += x * u;
                sum[1] += x * v;
                sum[2] += y * u;
                sum[3] += y * v;
            }
        }
    }
    for (int i = 0; i < 4; ++i) d[i] = static_cast<Acc>(d[i] + sum[i]);
}

}  // namespace FASTRES_BACKEND
