// Host meaning of csrc/cuda/arch_hopper.cuh, which alone includes it.
#pragma once
#include <array>

#include "hopper.h"

namespace FASTRES_BACKEND {

using fastres::emulator::Hopper;
using fastres::emulator::kChunk;
using fastres::emulator::kSharedBase;

using TensorMap = TensorLayout;
#define TENSOR_MAP FASTRES_BACKEND::TensorMap

inline bool is_hopper() { return std::string(fastres::emulator::chip().name) == "sm_90a"; }

inline TensorMap tensor_map(const TensorLayout& t) {
    require_layout(t);
    return t;
}

// ---- shared window

inline u32 shared_address(SharedView<Word4> /*store*/, i64 i) { return kSharedBase + static_cast<u32>(i) * 16; }

namespace hopper {

// The chunk at an address of the shared window.
inline std::size_t chunk_at(const fastres::emulator::SharedArray& array, std::uint64_t address, const char* what) {
    const std::uint64_t chunk = (address - kSharedBase) / kChunk;
    if (address < kSharedBase || chunk >= array.trace.size()) {
        Machine::current().fault(std::string(what) + ": address " + std::to_string(address) +
                                 " is outside the dynamic shared memory");
    }
    return static_cast<std::size_t>(chunk);
}

// Bits 4.. of an address change with bits 7..: the repeating pattern of 8 rows of 32, 64 or 128 bytes' worth.
inline std::uint64_t swizzled(std::uint64_t address, int swizzle, u32 base_offset = 0) {
    const std::uint64_t row = ((address >> 7) - base_offset) & 7;
    const std::uint64_t bits = swizzle == kSwizzle128 ? row : swizzle == kSwizzle64 ? row >> 1 & 3 : row >> 2 & 1;
    return swizzle == kNoSwizzle ? address : address ^ bits << 4;
}

}  // namespace hopper

// ---- barriers

inline void barrier_init(SharedView<std::uint64_t> bars, i64 i, u32 count) {
    Machine& m = Machine::current();
    m.hopper().init(m, bars.array(), static_cast<std::size_t>(i), count);
}
inline void fence_barrier_init() {}
inline void barrier_arrive(SharedView<std::uint64_t> bars, i64 i) {
    Machine& m = Machine::current();
    m.hopper().arrive(m, bars.array(), static_cast<std::size_t>(i), 0);
}
inline void barrier_arrive_expect(SharedView<std::uint64_t> bars, i64 i, u32 bytes) {
    Machine& m = Machine::current();
    m.hopper().arrive(m, bars.array(), static_cast<std::size_t>(i), bytes);
}
inline void barrier_wait(SharedView<std::uint64_t> bars, i64 i, u32 parity, Site site = Site::current()) {
    Machine& m = Machine::current();
    m.hopper().wait(m, bars.array(), static_cast<std::size_t>(i), parity, site);
}
inline void fence_async() {
    Machine& m = Machine::current();
    m.hopper().order.fence(m.thread());
}

inline void sync_warp(Site site = Site::current()) {
    Machine& m = Machine::current();
    m.hopper().meet(m, -1 - m.thread() / kWarp, kWarp, "sync_warp", site);
}
inline void sync_group(int id, int threads, Site site = Site::current()) {
    Machine& m = Machine::current();
    if (id < 1 || id > 15 || threads % kWarp) m.fault("sync_group: id must be 1..15, threads whole warps");
    m.hopper().meet(m, id, threads, "sync_group", site);
}

template <int kCount>
void fewer_registers() {}
template <int kCount>
void more_registers() {}

// ---- bulk copies

inline void load_bulk(SharedView<Word4> store, i64 i, const void* source, u32 bytes, SharedView<std::uint64_t> bars,
                      i64 bar) {
    Machine& m = Machine::current();
    if (bytes % 16 || reinterpret_cast<std::uintptr_t>(source) % 16) m.fault("load_bulk: not a multiple of 16 bytes");
    if (m.meter.on) m.meter.load(source, bytes);
    Hopper::Load load{&store.array(), {}, {}, &bars.array(), static_cast<std::size_t>(bar)};
    for (u32 c = 0; c < bytes / 16; ++c) load.chunks.push_back(static_cast<std::size_t>(i) + c);
    load.fill = [=](unsigned char* target) { std::memcpy(target + i * 16, source, bytes); };
    m.hopper().issue(m, std::move(load));
}

namespace hopper {

// Calls f(address of a chunk in the shared window, global address of its elements or null, elements that are inside).
template <class F>
void each_chunk(const TensorMap& map, u32 address, const int* at, F f) {
    u32 index[kMaxRank] = {};
    const u32 per_chunk = static_cast<u32>(kChunk) / map.element, row = map.box[0] / per_chunk;
    u32 rows = 1;
    for (int d = 1; d < map.rank; ++d) rows *= map.box[d];
    for (u32 r = 0; r < rows; ++r) {
        u32 rest = r;
        const char* line = static_cast<const char*>(map.base);
        bool inside = true;
        for (int d = 1; d < map.rank; ++d) {
            index[d] = rest % map.box[d];
            rest /= map.box[d];
            const i64 c = static_cast<i64>(at[d]) + index[d];
            inside &= c >= 0 && c < static_cast<i64>(map.dims[d]);
            line += c * static_cast<i64>(map.strides[d]);
        }
        for (u32 c = 0; c < row; ++c) {
            const i64 first = at[0] + static_cast<i64>(c) * per_chunk;
            f(swizzled(address + (r * row + c) * kChunk, map.swizzle), line, first, per_chunk, inside);
        }
    }
}

}  // namespace hopper

// The box whose first element has coordinates `at`, innermost first, lands at Word4 `i`; zeros where it leaves the
// tensor. Signals its whole size to the barrier.
template <int kRank>
void load_tensor(SharedView<Word4> store, i64 i, const TensorMap& map, const int (&at)[kRank],
                 SharedView<std::uint64_t> bars, i64 bar) {
    Machine& m = Machine::current();
    if (map.rank != kRank) m.fault("tensor copy: coordinates and tensor map differ in rank");
    const u32 address = shared_address(store, i);
    if (address % 128)
        m.fault("load_tensor: the target must be aligned to 128 bytes, got address " + std::to_string(address));
    fastres::emulator::SharedArray& array = store.array();
    struct Piece {
        std::size_t chunk;
        const char* line;
        i64 first;
        u32 n;
        bool inside;
    };
    std::vector<Piece> pieces;
    hopper::each_chunk(map, address, at, [&](std::uint64_t to, const char* line, i64 first, u32 n, bool inside) {
        pieces.push_back({hopper::chunk_at(array, to, "load_tensor"), line, first, n, inside});
    });
    Hopper::Load load{&array, {}, {}, &bars.array(), static_cast<std::size_t>(bar)};
    for (const Piece& p : pieces) {
        load.chunks.push_back(p.chunk);
        if (m.meter.on && p.inside && p.first >= 0 && p.first + p.n <= static_cast<i64>(map.dims[0])) {
            m.meter.load(p.line + p.first * static_cast<i64>(map.element), kChunk);
        }
    }
    load.fill = [pieces, map](unsigned char* target) {
        for (const Piece& p : pieces) {
            unsigned char* const to = target + p.chunk * kChunk;
            std::memset(to, 0, kChunk);
            for (u32 e = 0; p.inside && e < p.n; ++e) {
                const i64 c = p.first + e;
                if (c < 0 || c >= static_cast<i64>(map.dims[0])) continue;
                std::memcpy(to + e * map.element, p.line + c * static_cast<i64>(map.element), map.element);
            }
        }
    };
    m.hopper().issue(m, std::move(load));
}

// The box at Word4 `i` goes to the tensor, but for what lies outside.
template <int kRank>
void store_tensor(const TensorMap& map, const int (&at)[kRank], SharedView<Word4> store, i64 i) {
    Machine& m = Machine::current();
    if (map.rank != kRank) m.fault("tensor copy: coordinates and tensor map differ in rank");
    const u32 address = shared_address(store, i);
    if (address % 128)
        m.fault("store_tensor: the source must be aligned to 128 bytes, got address " + std::to_string(address));
    fastres::emulator::SharedArray* const array = &store.array();
    std::array<int, kRank> from;
    std::copy(at, at + kRank, from.begin());
    m.hopper().enqueue(m.thread(), Hopper::kStores, [=, &m] {
        hopper::each_chunk(map, address, from.data(),
                           [&](std::uint64_t source, const char* line, i64 first, u32 n, bool inside) {
                               const std::size_t chunk = hopper::chunk_at(*array, source, "store_tensor");
                               m.hopper().on_async_read(m, *array, chunk);
                               for (u32 e = 0; inside && e < n; ++e) {
                                   const i64 c = first + e;
                                   if (c < 0 || c >= static_cast<i64>(map.dims[0])) continue;
                                   std::memcpy(const_cast<char*>(line) + c * static_cast<i64>(map.element),
                                               array->bytes.data() + chunk * kChunk + e * map.element, map.element);
                               }
                           });
    });
}
inline void store_commit() { Machine::current().hopper().commit(Machine::current().thread(), Hopper::kStores); }
template <int kLeft>
void store_wait() {
    Machine::current().hopper().wait_groups(Machine::current().thread(), Hopper::kStores, kLeft);
}

// ---- warpgroup products

namespace hopper {

struct Matrix {
    std::uint64_t start, leading, stride;  // bytes
    u32 base_offset;
    int swizzle;
    bool mn_major;

    Matrix(std::uint64_t d, bool mn)
        : start((d & 0x3fff) << 4),
          leading((d >> 16 & 0x3fff) << 4),
          stride((d >> 32 & 0x3fff) << 4),
          base_offset(static_cast<u32>(d >> 49 & 7)),
          swizzle(static_cast<int>(d >> 62)),
          mn_major(mn) {}

    // Address of element (mn, k) of 16 bits: PTX ISA, "Shared memory matrix layout", canonical layouts in 16-byte
    // units.
    std::uint64_t address(int mn, int k) const {
        const int span = swizzle == kSwizzle128 ? 8 : swizzle == kSwizzle64 ? 4 : swizzle == kSwizzle32 ? 2 : 1;
        std::uint64_t at = start;
        if (mn_major) {
            const int unit = mn / 8;
            at += static_cast<std::uint64_t>(unit % span * 16 + k % 8 * span * 16);
            if (swizzle == kNoSwizzle) {
                at += static_cast<std::uint64_t>(unit) * stride + static_cast<std::uint64_t>(k / 8) * leading;
            } else {
                at += static_cast<std::uint64_t>(unit / span) * leading + static_cast<std::uint64_t>(k / 8) * stride;
            }
            return swizzled(at, swizzle, base_offset) + static_cast<std::uint64_t>(mn % 8) * 2;
        }
        at += static_cast<std::uint64_t>(mn % 8 * span * 16) + static_cast<std::uint64_t>(mn / 8) * stride;
        at += swizzle == kNoSwizzle ? static_cast<std::uint64_t>(k / 8) * leading
                                    : static_cast<std::uint64_t>(k / 8 * 16);
        return swizzled(at, swizzle, base_offset) + static_cast<std::uint64_t>(k % 8) * 2;
    }
};

template <class T>
double widened(u32 bits) {
    if constexpr (std::is_same_v<T, bf16>) {
        return bits_float(bits << 16);
    } else {
        return widen_f16(bits);
    }
}

template <class T>
double element(fastres::emulator::SharedArray& array, const Matrix& matrix, int mn, int k) {
    const std::uint64_t address = matrix.address(mn, k);
    chunk_at(array, address, "warpgroup_multiply");
    std::uint16_t bits;
    std::memcpy(&bits, array.bytes.data() + (address - kSharedBase), sizeof bits);
    return widened<T>(bits);
}

// The running thread's share of a read that its warp makes as one: each chunk of rows [0, rows) is checked by a lane.
inline void check_share(Machine& m, fastres::emulator::SharedArray& array, const Matrix& matrix, int rows, int lane) {
    for (int mn = 0; mn < rows; ++mn) {
        for (int k = 0; k < 16; k += matrix.mn_major ? 1 : 8) {
            if (matrix.mn_major ? mn % 8 != 0 || (mn / 8 + k) % kWarp != lane : (mn + k / 8 * 16) % kWarp != lane) {
                continue;
            }
            m.hopper().on_async_read(m, array, chunk_at(array, matrix.address(mn, k), "warpgroup_multiply"));
        }
    }
}

inline void require_fence(Machine& m) {
    if (!m.hopper().products_fenced(m.thread())) m.fault("warpgroup_multiply without a warpgroup_fence before it");
}

// Queues one product; load(row, left) gives the 16 elements of a row of A.
template <class T, int N, bool kTransposeB, class A>
void product(float (&d)[N / 2], std::uint64_t b, bool accumulate, A load) {
    Machine& m = Machine::current();
    require_fence(m);
    Hopper& h = m.hopper();
    const int thread = m.thread(), lane = thread % kWarp, row = thread / kWarp % 4 * 16 + lane / 4;
    const auto sums = h.accumulators(thread, d, N / 2);
    fastres::emulator::SharedArray& array = m.dynamic_shared(sizeof(Word4), Site::current());
    h.enqueue(thread, Hopper::kProducts, [=, &m, &array, d = &d[0]] {
        const Matrix right(b, kTransposeB);
        check_share(m, array, right, N, lane);
        double left[2][16];
        for (int half = 0; half < 2; ++half) load(row + 8 * half, left[half]);
        for (int j = 0; j < N / 8; ++j) {
            for (int e = 0; e < 2; ++e) {
                double sum[2] = {};
                for (int k = 0; k < 16; ++k) {
                    const double v = element<T>(array, right, 8 * j + lane % 4 * 2 + e, k);
                    for (int half = 0; half < 2; ++half) sum[half] += left[half][k] * v;
                }
                for (int half = 0; half < 2; ++half) {
                    float& to = (*sums)[static_cast<std::size_t>(4 * j + 2 * half + e)];
                    to = static_cast<float>((accumulate ? static_cast<double>(to) : 0.0) + sum[half]);
                }
            }
        }
        m.hopper().done_with(thread, d);
    });
}

}  // namespace hopper

template <int N>
void settled(float (&)[N]) {}
inline void settled(u32&) {}
inline void warpgroup_fence() { Machine::current().hopper().products_fenced(Machine::current().thread()) = true; }

// d [64, N] += A [64, 16] * B [16, N]: both from shared memory. All four warps of a warpgroup call it.
template <class T, int N, bool kTransposeA, bool kTransposeB>
void warpgroup_multiply(float (&d)[N / 2], std::uint64_t a, std::uint64_t b, bool accumulate,
                        Site site = Site::current()) {
    Machine& m = Machine::current();
    const std::uint64_t* const same = m.exchange("warpgroup_multiply", a ^ b * 0x9e3779b97f4a7c15ull, site);
    for (int lane = 1; lane < kWarp; ++lane) {
        if (same[lane] != same[0]) m.fault("warpgroup_multiply: lanes of one warp have different descriptors");
    }
    fastres::emulator::SharedArray& array = m.dynamic_shared(sizeof(Word4), site);
    hopper::product<T, N, kTransposeB>(d, b, accumulate, [a, &m, &array](int row, double* left) {
        const hopper::Matrix matrix(a, kTransposeA);
        for (int k = 0; k < 16; ++k) {
            const std::uint64_t address = matrix.address(row, k);
            m.hopper().on_async_read(m, array, hopper::chunk_at(array, address, "warpgroup_multiply"));
            left[k] = hopper::element<T>(array, matrix, row, k);
        }
    });
}

// A from registers, as the fragment of mma m16n8k16.
template <class T, int N, bool kTransposeB>
void warpgroup_multiply(float (&d)[N / 2], const u32 (&a)[4], std::uint64_t b, bool accumulate,
                        Site site = Site::current()) {
    Machine& m = Machine::current();
    struct Pair {
        u32 lo, hi;
    };
    std::array<u32, 16> rows{};  // of the lane's quad: [register][lane of the quad]
    const int lane = m.thread() % kWarp;
    for (int half = 0; half < 2; ++half) {
        std::uint64_t packed = 0;
        const Pair mine{a[2 * half], a[2 * half + 1]};
        std::memcpy(&packed, &mine, sizeof packed);
        const std::uint64_t* const slots = m.exchange("warpgroup_multiply", packed, site);
        for (int q = 0; q < 4; ++q) {
            Pair theirs;
            std::memcpy(&theirs, &slots[lane / 4 * 4 + q], sizeof theirs);
            rows[static_cast<std::size_t>(8 * half + q)] = theirs.lo;
            rows[static_cast<std::size_t>(8 * half + 4 + q)] = theirs.hi;
        }
    }
    hopper::product<T, N, kTransposeB>(d, b, accumulate, [rows](int row, double* left) {
        for (int k = 0; k < 16; ++k) {
            const u32 word = rows[static_cast<std::size_t>(8 * (k / 8) + row % 16 / 8 * 4 + k % 8 / 2)];
            left[k] = hopper::widened<T>(word >> (16 * (k % 2)) & 0xffffu);
        }
    });
}

inline void warpgroup_commit() { Machine::current().hopper().commit(Machine::current().thread(), Hopper::kProducts); }
template <int kLeft>
void warpgroup_wait() {
    Machine& m = Machine::current();
    m.hopper().products_fenced(m.thread()) = false;
    m.hopper().wait_groups(m.thread(), Hopper::kProducts, kLeft);
}

}  // namespace FASTRES_BACKEND
