// Tensor-core collectives and asynchronous copies, sound and with planted faults, for tests/test_emulator_mma.py.
// Fragments are filled and read here element by element, after the tables of the PTX ISA. Not part of any module.
#include "../cuda/arch.cuh"

#include <cstdio>
#include <cstring>

namespace FASTRES_BACKEND {

namespace {

DEVICE int lane_index() { return thread_index() % kWarp; }

// ---- matrices: in holds 32 rows of 16 bytes for each warp, out the registers [warp][lane][matrix]

constexpr int kRowsEach = 32;

template <int kPitch>
DEVICE void fill_rows(SharedView<Word4>& rows, const u32* in) {
    const int warp = thread_index() / kWarp, lane = lane_index();
    rows[(warp * kRowsEach + lane) * kPitch] = load16(in + 4 * thread_index());
    sync_block();
}

template <int kMatrices, bool kTransposed, int kPitch>
KERNEL(1)
matrix_load(const u32* in, u32* out) {
    SHARED(Word4, rows, kThreads * kPitch);
    fill_rows<kPitch>(rows, in);
    u32 d[kMatrices];
    const int row = thread_index() / kWarp * kRowsEach + lane_index() % (8 * kMatrices);
    load_matrix<kMatrices, kTransposed>(d, rows, row * kPitch);
    for (int m = 0; m < kMatrices; ++m) out[thread_index() * kMatrices + m] = d[m];
}

template <int kMatrices, bool kTransposed>
KERNEL(1)
matrix_store(const u32* in, u32* out) {
    SHARED(Word4, rows, kThreads);
    rows[thread_index()] = Word4{};
    sync_block();
    u32 s[kMatrices];
    for (int m = 0; m < kMatrices; ++m) s[m] = in[thread_index() * kMatrices + m];
    store_matrix<kMatrices, kTransposed>(rows, thread_index() / kWarp * kRowsEach + lane_index(), s);
    sync_block();
    store16(out + 4 * thread_index(), rows[thread_index()]);
}

KERNEL(1)
matrix_half_warp(const u32* in, u32* out) {
    SHARED(Word4, rows, kThreads);
    fill_rows<1>(rows, in);
    u32 d[1] = {0};
    if (lane_index() < 16) load_matrix<1, false>(d, rows, lane_index());
    out[thread_index()] = d[0];
}

// ---- products: for each warp A [16][k], B [k][8] and C [16][8], element by element in words

template <class T>
struct Kind;
template <>
struct Kind<bf16> {
    static constexpr int kDepth = 16;
    using Acc = float;
};
template <>
struct Kind<f16> {
    static constexpr int kDepth = 16;
    using Acc = float;
};
template <>
struct Kind<tf32> {
    static constexpr int kDepth = 8;
    using Acc = float;
};
template <>
struct Kind<std::int8_t> {
    static constexpr int kDepth = 32;
    using Acc = int;
};

template <class T>
KERNEL(1)
product(const u32* in, u32* out) {
    using Acc = typename Kind<T>::Acc;
    constexpr int k = Kind<T>::kDepth, packed = k / 8, bits = 32 / packed;
    const int warp = thread_index() / kWarp, group = lane_index() / 4, pair = lane_index() % 4;
    const u32* const A = in + warp * (16 * k + k * 8 + 16 * 8);
    const u32* const B = A + 16 * k;
    const u32* const C = B + k * 8;
    u32 a[4] = {}, b[2] = {};
    for (int r = 0; r < 4; ++r) {
        const int row = group + (r % 2) * 8, column = pair * packed + (r / 2) * (k / 2);
        for (int i = 0; i < packed; ++i) a[r] |= A[row * k + column + i] << (packed == 1 ? 0 : bits * i);
    }
    for (int r = 0; r < 2; ++r) {
        const int row = pair * packed + r * (k / 2);
        for (int i = 0; i < packed; ++i) b[r] |= B[(row + i) * 8 + group] << (packed == 1 ? 0 : bits * i);
    }
    Acc d[4];
    for (int i = 0; i < 4; ++i) d[i] = std::bit_cast<Acc>(C[(group + i / 2 * 8) * 8 + 2 * pair + i % 2]);
    multiply_add<T>(d, a, b[0], b[1]);
    for (int i = 0; i < 4; ++i) {
        out[warp * 128 + (group + i / 2 * 8) * 8 + 2 * pair + i % 2] = std::bit_cast<u32>(d[i]);
    }
}

// ---- asynchronous copies: in [8][256] Word4, each thread sums its neighbour's over the rounds

constexpr int kRounds = 8;

template <int kLeft, bool kBarrierBefore, bool kBarrierAfter>
KERNEL(1)
pipeline(const u32* in, u32* out) {
    SHARED(Word4, stages, 2 * kThreads);
    const auto issue = [&](int round) {
        copy_async16(stages, round % 2 * kThreads + thread_index(), in + 4 * (round * kThreads + thread_index()));
        copy_async_commit();
    };
    float sum = 0;
    issue(0);
    for (int round = 0; round < kRounds; ++round) {
        if (round + 1 < kRounds) {
            issue(round + 1);
        } else {
            copy_async_commit();
        }
        copy_async_wait<kLeft>();
        if (kBarrierAfter) sync_block();
        const Word4 v = stages[round % 2 * kThreads + (thread_index() + 1) % kThreads];
        sum += bits_float(v.w[0]);
        if (kBarrierBefore) sync_block();
    }
    copy_async_wait<0>();
    out[thread_index()] = float_bits(sum);
}

KERNEL(1)
copies_or_zeros(const u32* in, u32* out) {
    SHARED(Word4, value, kThreads);
    copy_async16_or_zero(value, thread_index(), in + 4 * thread_index(), thread_index() % 3 != 0);
    copy_async_commit();
    copy_async_wait<0>();
    store16(out + 4 * thread_index(), value[thread_index()]);
}

KERNEL(1)
copy_never_awaited(const u32* in, u32* out) {
    SHARED(Word4, value, kThreads);
    copy_async16(value, thread_index(), in + 4 * thread_index());
    copy_async_commit();
    out[thread_index()] = 0;
}

KERNEL(1)
copy_out_of_range(const u32* in, u32*) {
    SHARED(Word4, value, kThreads);
    copy_async16(value, thread_index() + 1, in + 4 * thread_index());
    copy_async_commit();
    copy_async_wait<0>();
}

KERNEL(1)
copy_misaligned(const u32* in, u32*) {
    SHARED(Word4, value, kThreads);
    copy_async16(value, thread_index(), in + 4 * thread_index() + 1);
    copy_async_commit();
    copy_async_wait<0>();
}

// ---- bank conflicts: a lane's 16 bytes kStride Word4s after its neighbour's

template <int kStride>
KERNEL(1)
strided(const u32* in, u32* out) {
    SHARED(Word4, value, 9 * kThreads);
    store_shared16(value, kStride * thread_index(), load16(in + 4 * thread_index()));
    store16(out + 4 * thread_index(), load_shared16(value, kStride * thread_index()));
}

// The lanes of each quarter read one address: a broadcast.
KERNEL(1)
broadcast(const u32* in, u32* out) {
    SHARED(Word4, value, kThreads);
    value[thread_index()] = load16(in + 4 * thread_index());
    sync_block();
    store16(out + 4 * thread_index(), load_shared16(value, thread_index() / 8));
}

struct Test {
    const char* name;
    void (*kernel)(const u32*, u32*);
};

constexpr Test kTests[] = {
    {"load x1", matrix_load<1, false, 1>},
    {"load x2", matrix_load<2, false, 1>},
    {"load x4", matrix_load<4, false, 1>},
    {"load x1 trans", matrix_load<1, true, 1>},
    {"load x2 trans", matrix_load<2, true, 1>},
    {"load x4 trans", matrix_load<4, true, 1>},
    {"load x4 pitch 9", matrix_load<4, false, 9>},
    {"load x4 pitch 8", matrix_load<4, false, 8>},
    {"load x4 pitch 2", matrix_load<4, false, 2>},
    {"store x1", matrix_store<1, false>},
    {"store x2", matrix_store<2, false>},
    {"store x4", matrix_store<4, false>},
    {"store x1 trans", matrix_store<1, true>},
    {"store x2 trans", matrix_store<2, true>},
    {"store x4 trans", matrix_store<4, true>},
    {"half warp", matrix_half_warp},
    {"product bf16", product<bf16>},
    {"product f16", product<f16>},
    {"product tf32", product<tf32>},
    {"product int8", product<std::int8_t>},
    {"pipeline", pipeline<1, true, true>},
    {"pipeline, no wait", pipeline<2, true, true>},
    {"pipeline, no barrier after", pipeline<1, true, false>},
    {"pipeline, no barrier before", pipeline<1, false, true>},
    {"copies or zeros", copies_or_zeros},
    {"copy never awaited", copy_never_awaited},
    {"copy out of range", copy_out_of_range},
    {"copy misaligned", copy_misaligned},
    {"stride 1", strided<1>},
    {"stride 2", strided<2>},
    {"stride 8", strided<8>},
    {"stride 9", strided<9>},
    {"broadcast", broadcast},
};

}  // namespace

}  // namespace FASTRES_BACKEND

// 0: the kernel ran; 1: it failed with `message`; 2: no such kernel. counts, if given: bytes loaded and stored, each
// sector once, wavefronts, conflicts of matrix loads, loads, stores.
extern "C" __attribute__((visibility("default"))) int selftest(const char* name, const void* in, void* out,
                                                               std::int64_t seed, char* message, std::size_t size,
                                                               std::int64_t* counts) {
    using namespace FASTRES_BACKEND;
    auto& meter = fastres::emulator::Machine::current().meter;
    for (const Test& test : kTests) {
        if (std::strcmp(test.name, name) != 0) continue;
        meter.reset();
        meter.on = counts;
        int status = 0;
        try {
            launch(test.name, test.kernel, 1, 1, seed, static_cast<const u32*>(in), static_cast<u32*>(out));
        } catch (const std::exception& e) {
            std::snprintf(message, size, "%s", e.what());
            status = 1;
        }
        if (counts) {
            const auto& c = meter.counters;
            const std::int64_t all[] = {c.loaded,     c.stored,       c.loaded_once,  c.stored_once,
                                        c.wavefronts, c.conflicts[0], c.conflicts[1], c.conflicts[2]};
            std::copy(all, all + 8, counts);
        }
        return status;
    }
    return 2;
}
