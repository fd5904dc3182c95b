// How [M, C] is spread over a grid: lanes along channels, depth along rows, one block per tile of rows.
#pragma once
#include "vec.cuh"

namespace FASTRES_BACKEND {

constexpr i64 kBlocks = 528;       // four for each of an H100's 132 SMs; tiles() of backends/cuda.py uses the same
constexpr i64 kRowsPerThread = 4;  // at least, before a tensor is cut into more tiles

// A block serves `lanes` groups of eight channels side by side, `depth` rows of them at a time; block x owns the
// rows [x*R, min((x+1)*R, M)), block y the y-th run of `lanes` groups.
struct Rows {
    i64 M, C, R, groups;
    int lanes, depth;
    i64 blocks, channel_blocks;  // grid x and y
};

// `tiles` 0: as many as suit the shape. The apply kernels are thus cut like the reductions before them, and walking
// each tile from its end they meet first what the reduction left in L2.
inline Rows plan(i64 M, i64 C, i64 tiles = 0) {
    Rows s{};
    s.M = M;
    s.C = C;
    s.groups = ceil_div(C, kVec);
    s.channel_blocks = ceil_div(s.groups, kWarp);
    if (C == 0) return s;
    s.lanes = static_cast<int>(ceil_div(s.groups, s.channel_blocks));
    s.depth = kThreads / s.lanes;
    s.blocks = tiles ? tiles : least(ceil_div(kBlocks, s.channel_blocks), ceil_div(M, s.depth * kRowsPerThread));
    s.R = s.blocks ? ceil_div(M, s.blocks) : 0;
    return s;
}

// The rows of one thread: lo + depth*i for i < n, at channels [c, c + valid).
struct Place {
    i64 group, c, lo, n, tile_rows;
    int lane, y, valid;
};

DEVICE Place place(const Rows& s) {
    Place at;
    at.lane = thread_index() % s.lanes;
    at.y = thread_index() / s.lanes;
    at.group = block_y() * s.lanes + at.lane;
    at.c = at.group * kVec;
    at.valid = static_cast<int>(least<i64>(s.C - at.c, kVec));
    const i64 begin = least(block_x() * s.R, s.M);
    const i64 end = least(begin + s.R, s.M);
    at.tile_rows = end - begin;
    at.lo = begin + at.y;
    at.n = (at.y < s.depth && at.group < s.groups && at.lo < end) ? ceil_div(end - at.lo, s.depth) : 0;
    return at;
}

DEVICE u32 valid_bits(const Place& at) { return 0xffu >> (kVec - at.valid); }

// Rows in flight: 32 bytes of each tensor for a thread. Element by element one row is as many loads already.
template <class T, class A>
constexpr int kUnroll = kIsVector<A> ? 4 / static_cast<int>(sizeof(T)) : 1;

// ---- block reduction over depth, the rows side by side in a block

constexpr int kPitch = kThreads + 4;  // shared [kVec][kPitch]: +4 keeps lanes 0..3 x channels 0..7 in distinct banks
constexpr int kTile = kVec * kPitch;  // one plane

template <class S>
DEVICE void put(S& shared, int plane, const float (&v)[kVec]) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) shared[plane * kTile + j * kPitch + thread_index()] = v[j];
}

// After a barrier, thread i < lanes*8 owns channel i of the block; `y` picks one of the rows put by it.
template <class S>
DEVICE float get(S& shared, int plane, int y, int lanes) {
    return shared[plane * kTile + thread_index() % kVec * kPitch + y * lanes + thread_index() / kVec];
}

DEVICE bool owns_channel(const Rows& s, i64& c) {
    c = block_y() * s.lanes * kVec + thread_index();
    return thread_index() < s.lanes * kVec && c < s.C;
}

// Sums each plane over the rows put side by side, in ascending order, and writes the block's tile of part.
template <int kPlanes, class S>
DEVICE void write_sums(const Rows& s, const Place& at, S& shared, float* part) {
    i64 c;
    if (!owns_channel(s, c)) return;
    const int used = static_cast<int>(least<i64>(at.tile_rows, s.depth));
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
        float sum = 0;
        for (int y = 0; y < used; ++y) sum += get(shared, plane, y, s.lanes);
        part[(plane * s.blocks + block_x()) * s.C + c] = sum;
    }
}

// ---- finalisation: eight channels a block, the tiles cut into 32 runs of ascending t

constexpr int kFinalChannels = 8;
constexpr int kRuns = kThreads / kFinalChannels;

// Sum of `v` over the 32 runs, for every thread of the channel; the same order on every run of the program.
template <class S>
DEVICE double sum_runs(S& shared, double v) {
    v += shuffle_xor(v, 8);
    v += shuffle_xor(v, 16);
    const int channel = thread_index() % kFinalChannels;
    if (thread_index() % kWarp < kFinalChannels) shared[thread_index() / kWarp * kFinalChannels + channel] = v;
    sync_block();
    double total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += shared[w * kFinalChannels + channel];
    sync_block();
    return total;
}

}  // namespace FASTRES_BACKEND
