// The whole bottleneck of bottleneck_eval.cuh for sm_90: tensor copies bring x, warpgroup products compute.
//
// One block of threads to a multiprocessor: two warpgroups that compute and one warp that starts copies, which run
// ahead through a ring of stages. What conv1 gives, on the tile and a halo of one pixel, lies in shared memory as one
// plane of all pixels for each 8 channels, without swizzle: there a product's operand may begin at any pixel, and a tap
// of the 3x3 is a constant offset. What conv2 gives stays in registers, as conv3's left operand.
//
// x comes 32 channels at a time, zero outside of the image. That is not yet the padding of conv2, which wants zeros
// where conv1 gives relu(bias); they are written with conv1's output.
#pragma once
#include "hopper_pipeline.cuh"

namespace FASTRES_BACKEND {

// ---- the warpgroups that compute

template <int kTiles, int N>
DEVICE void clear(float (&d)[kTiles][N]) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < N; ++i) d[t][i] = 0;
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) settled(d[t]);
}

template <int kTiles, int N>
DEVICE void settle(float (&d)[kTiles][N]) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) settled(d[t]);
}

// Weights [16 * k, n] as planes of n Word4s each (fastres/backends/planes.py).
DEVICE std::uint64_t weights_descriptor(u32 address, int n) {
    return matrix_descriptor(address, static_cast<u32>(n * kUnit), 8 * kUnit, kNoSwizzle);
}

// Eight channels of row lane / 4 (+ 8 for `half` 1), the weights' columns being in the order of what is stored.
template <int N>
DEVICE void eight(float (&v)[kVec], const float (&d)[N], int first, int half) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        v[2 * j] = d[4 * (first + j) + 2 * half];
        v[2 * j + 1] = d[4 * (first + j) + 2 * half + 1];
    }
}

// What a thread of a warpgroup is.
struct Seat {
    int group, row, lane;  // row: of a product's 64, that its first accumulators belong to
};

// conv1: d = x * w1 on this warpgroup's rows of the halo. `ring`: address of stage 0; `weights`: of the resident ones.
template <class T, class P, class R>
DEVICE void halo_products(const HopperShape& s, const Seat& seat, u32 ring, u32 weights, R& reader,
                          float (&d)[P::kHaloTiles][P::kMid / 2]) {
    constexpr int kStep = 2 * P::kMid * kUnit;  // bytes of weights for 16 channels
    int before = 0;
    clear(d);
#pragma unroll 1
    for (int c = 0; c < s.C / kSlice; ++c) {
        const int stage = reader.take();
        const u32 at = ring + static_cast<u32>(stage * P::kStageBytes);
        const u32 x = at + static_cast<u32>(P::halo_first(seat.group) * kSliceRow);
        u32 w = weights + static_cast<u32>(c * 2 * kStep);
        if constexpr (!P::kResident) w = at + P::kSliceBytes;
        warpgroup_fence();
#pragma unroll
        for (int k = 0; k < kSlice / 16; ++k) {
#pragma unroll
            for (int t = 0; t < P::kHaloTiles; ++t) {
                const u32 a = x + static_cast<u32>(t * 64 * kSliceRow + k * 32);
                warpgroup_multiply<T, P::kMid, false, false>(
                    d[t], matrix_descriptor(a, 16, kPattern, kSwizzle64),
                    weights_descriptor(w + static_cast<u32>(k * kStep), P::kMid), true);
            }
        }
        warpgroup_commit();
        if (c > 0) {
            warpgroup_wait<1>();
            reader.give(before);
        }
        before = stage;
    }
    warpgroup_wait<0>();
    settle(d);
    reader.give(before);
}

// relu(d + bias) into the planes that begin at Word4 `planes`, zero outside of the image.
template <class T, class P, class S>
DEVICE void store_halo(const HopperShape& s, const Seat& seat, const HopperPlace& at, const float* bias, S shared,
                       int planes, const float (&d)[P::kHaloTiles][P::kMid / 2]) {
#pragma unroll
    for (int group = 0; group < P::kMid / 32; ++group) {
        float b[kVec];
        load_bias(b, bias + 32 * group + seat.lane % 4 * kVec);
#pragma unroll
        for (int t = 0; t < P::kHaloTiles; ++t) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int pixel = P::halo_first(seat.group) + 64 * t + seat.row + 8 * e;
                const int h = at.h0 - 1 + pixel / P::kHaloW, w = at.w0 - 1 + pixel % P::kHaloW;
                float y[kVec];
                eight(y, d[t], 4 * group, e);
#pragma unroll
                for (int j = 0; j < kVec; ++j) y[j] += b[j];
                Word4 packed = relu_pack<T>(y);
                if (h < 0 || h >= s.H || w < 0 || w >= s.W) packed = Word4{{0, 0, 0, 0}};
                if (pixel < P::kHaloPixels) {
                    store_shared16(shared, planes + (4 * group + seat.lane % 4) * P::kPlane + pixel, packed);
                }
            }
        }
    }
}

// conv2: d = planes * w2, tap by tap.
template <class T, class P, class R>
DEVICE void tap_products(const Seat& seat, u32 planes, u32 ring, u32 weights, R& reader,
                         float (&d)[P::kOutTiles][P::kMid / 2]) {
    constexpr int kStep = 2 * P::kMid * kUnit, kParts = P::kMid / kBlockK;
    int before = 0;
    clear(d);
#pragma unroll 1
    for (int tap = 0; tap < 9; ++tap) {
        const int pixel = P::out_first(seat.group) + tap / 3 * P::kHaloW + tap % 3;
#pragma unroll 1
        for (int part = 0; part < kParts; ++part) {
            const u32 a = planes + static_cast<u32>((pixel + part * kBlockK / 8 * P::kPlane) * kUnit);
            u32 w = weights + static_cast<u32>(tap * (P::kMid / 16) * kStep);
            int stage = 0;
            if constexpr (!P::kResident) {
                stage = reader.take();
                w = ring + static_cast<u32>(stage * P::kStageBytes);
            }
            warpgroup_fence();
#pragma unroll
            for (int k = 0; k < kBlockK / 16; ++k) {
#pragma unroll
                for (int t = 0; t < P::kOutTiles; ++t) {
                    const u32 left = a + static_cast<u32>((t * P::kOutStep + 2 * k * P::kPlane) * kUnit);
                    warpgroup_multiply<T, P::kMid, false, false>(
                        d[t], matrix_descriptor(left, P::kPlane * kUnit, P::kRowStride, kNoSwizzle),
                        weights_descriptor(w + static_cast<u32>(k * kStep), P::kMid), true);
                }
            }
            warpgroup_commit();
            if constexpr (!P::kResident) {
                if (tap > 0 || part > 0) {
                    warpgroup_wait<1>();
                    reader.give(before);
                }
                before = stage;
            }
        }
    }
    warpgroup_wait<0>();
    settle(d);
    if constexpr (!P::kResident) reader.give(before);
}

// relu(d + bias) as the left operand of conv3: y2[tile][step of 16 channels][4].
template <class T, class P>
DEVICE void pack_operand(const Seat& seat, const float* bias, const float (&d)[P::kOutTiles][P::kMid / 2],
                         u32 (&y2)[P::kOutTiles][P::kMid / 16][4]) {
#pragma unroll
    for (int j = 0; j < P::kMid / 8; ++j) {
        const Word2 b = load8_or_zero(bias + 8 * j + seat.lane % 4 * 2, true);
#pragma unroll
        for (int t = 0; t < P::kOutTiles; ++t) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float lo = d[t][4 * j + 2 * e] + bits_float(b.w[0]);
                const float hi = d[t][4 * j + 2 * e + 1] + bits_float(b.w[1]);
                y2[t][j / 2][j % 2 * 2 + e] = pack2<T>(relu(lo), relu(hi));
                settled(y2[t][j / 2][j % 2 * 2 + e]);
            }
        }
    }
}

// conv3, shortcut and output, kBlockK channels at a time.
template <class T, class P, bool kProjected, class R>
DEVICE void expand(const HopperShape& s, const Seat& seat, const HopperPlace& at, const T* x, const float* bias,
                   u32 ring, u32 weights, R& reader, const u32 (&y2)[P::kOutTiles][P::kMid / 16][4], T* out) {
    constexpr int kStep = 2 * kBlockK * kUnit, kSteps = P::kMid / 16, kBeside = 64 / 16;  // steps of the projection
    PixelPair pixel[P::kOutTiles];
#pragma unroll
    for (int t = 0; t < P::kOutTiles; ++t) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int row = P::out_h(seat.group, t, seat.row + 8 * e),
                      column = P::out_w(seat.group, t, seat.row + 8 * e);
            const int h = at.h0 + row, w = at.w0 + column;
            const bool there = row < P::kTileH && column < P::kTileW && h < s.H && w < s.W;
            pixel[t].p[e] = there ? h * s.W + w : -1;
        }
    }
    const i64 image = static_cast<i64>(at.image) * s.H * s.W;
    x += image * s.C + seat.lane % 4 * (kProjected ? 4 : 8);
    out += image * s.K + seat.lane % 4 * 8;
    u32 beside[kProjected ? P::kOutTiles : 1][kBeside][4];
    if constexpr (kProjected) {
#pragma unroll
        for (int t = 0; t < P::kOutTiles; ++t) {
#pragma unroll
            for (int k = 0; k < kBeside; ++k) {
                load_operand(beside[t][k], x, pixel[t], s.C, 16 * k);
#pragma unroll
                for (int i = 0; i < 4; ++i) settled(beside[t][k][i]);
            }
        }
    }
    Word4 ahead[P::kOutTiles][2][2];  // of the residual, for the next round: [tile][32 channels][half]
    const auto load_ahead = [&](int channel) {
#pragma unroll
        for (int t = 0; t < P::kOutTiles; ++t) {
#pragma unroll
            for (int g = 0; g < 2; ++g) load_pixels(ahead[t][g], x, pixel[t], s.C, channel + 32 * g);
        }
    };
    if constexpr (!kProjected) load_ahead(0);
#pragma unroll 1
    for (int channel = 0; channel < s.K; channel += kBlockK) {
        u32 w = weights;
        int stage = 0;
        if constexpr (P::kResident) {
            weights += static_cast<u32>((kSteps + (kProjected ? kBeside : 0)) * kStep);
        } else {
            stage = reader.take();
            w = ring + static_cast<u32>(stage * P::kStageBytes);
        }
        float z[P::kOutTiles][kBlockK / 2];
        clear(z);
        warpgroup_fence();
#pragma unroll
        for (int t = 0; t < P::kOutTiles; ++t) {
#pragma unroll
            for (int k = 0; k < kSteps; ++k) {
                warpgroup_multiply<T, kBlockK, false>(
                    z[t], y2[t][k], weights_descriptor(w + static_cast<u32>(k * kStep), kBlockK), true);
            }
            if constexpr (kProjected) {
#pragma unroll
                for (int k = 0; k < kBeside; ++k) {
                    warpgroup_multiply<T, kBlockK, false>(
                        z[t], beside[t][k], weights_descriptor(w + static_cast<u32>((kSteps + k) * kStep), kBlockK),
                        true);
                }
            }
            warpgroup_commit();
        }
        Word4 residual[P::kOutTiles][2][2];
        if constexpr (!kProjected) {
#pragma unroll
            for (int t = 0; t < P::kOutTiles; ++t) {
#pragma unroll
                for (int i = 0; i < 4; ++i) residual[t][i / 2][i % 2] = ahead[t][i / 2][i % 2];
            }
            if (channel + kBlockK < s.K) load_ahead(channel + kBlockK);
        }
        warpgroup_wait<0>();
        settle(z);
        if constexpr (!P::kResident) reader.give(stage);
#pragma unroll
        for (int g = 0; g < 2; ++g) {
            float b[kVec];
            load_bias(b, bias + channel + 32 * g + seat.lane % 4 * kVec);
#pragma unroll
            for (int t = 0; t < P::kOutTiles; ++t) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float v[kVec];
                    eight(v, z[t], 4 * g, e);
#pragma unroll
                    for (int j = 0; j < kVec; ++j) v[j] += b[j];
                    if constexpr (!kProjected) {
                        const Word4& word = residual[t][g][e];
                        float r[kVec];
                        unpack(Pack<T>{{word.w[0], word.w[1], word.w[2], word.w[3]}}, r);
#pragma unroll
                        for (int j = 0; j < kVec; ++j) v[j] += r[j];
                    }
                    const Word4 packed = relu_pack<T>(v);
                    if (pixel[t].p[e] >= 0) store16(at_pixel(out, pixel[t].p[e], s.K, channel + 32 * g), packed);
                }
            }
        }
    }
}

// bias: b1 [kMid], b2 [kMid], b3 [K], the projection's added to b3.
template <class T, class P, bool kProjected>
KERNEL_OF(kHopperThreads)
bottleneck_hopper_kernel(HopperShape s, TENSOR_MAP map, const T* x, const void* packed, const float* bias, T* out) {
    constexpr int kPlanesEach = P::kMid / 8 * P::kPlane;
    SHARED(std::uint64_t, full, kGroups* P::kStages);
    SHARED(std::uint64_t, empty, P::kStages);
    SHARED(std::uint64_t, ready, 3);
    DYNAMIC_SHARED(Word4, shared);
    const int thread = thread_index(), group = thread / kGroup, lane = thread % kWarp;
    const int ring = static_cast<int>((kPattern - shared_address(shared, 0) % kPattern) % kPattern / kUnit);
    int planes = ring + P::kStages * P::kStageBytes / kUnit;
    const int weights = planes + (P::kResident ? kGroups : 1) * kPlanesEach;
    if (thread == 0) {
#pragma unroll
        for (int i = 0; i < kGroups * P::kStages; ++i) barrier_init(full, i, 1);
#pragma unroll
        for (int i = 0; i < P::kStages; ++i) barrier_init(empty, i, kReaders<P>);
#pragma unroll
        for (int i = 0; i < 3; ++i) barrier_init(ready, i, 1);
        fence_barrier_init();
    }
    sync_block();
    if (group == kGroups) {
        fewer_registers<kFewRegisters>();
        if (thread == kGroups * kGroup) {
            using B = std::decay_t<decltype(full)>;
            produce<kProjected, decltype(shared), B>(P{}, s, map, static_cast<const Word4*>(packed), shared, ring,
                                                     weights, full, empty, ready);
        }
        return;
    }
    more_registers<kManyRegisters>();
    const Seat seat{group, thread % kGroup / kWarp * 16 + lane / 4, lane};
    // Who meets around the planes: the warpgroup whose they are, or both.
    const int meeting = P::kResident ? 1 + group : 1;
    constexpr int kMembers = P::kResident ? kGroup : kGroups * kGroup;
    if constexpr (P::kResident) planes += group * kPlanesEach;
    const u32 ring_at = shared_address(shared, ring), planes_at = shared_address(shared, planes);
    const Parts<P> parts(s, kProjected);
    const u32 w1 = shared_address(shared, weights), w2 = w1 + static_cast<u32>(parts.first * kUnit);
    const u32 w3 = w2 + static_cast<u32>(parts.middle * kUnit);
    Reader<P, std::decay_t<decltype(full)>> reader(full, empty, group);
    constexpr int kTurns = P::kResident ? kGroups : 1;
    const int slices = s.C / kSlice;
    if constexpr (P::kResident) reader.skip(group * slices);
    for (int n = P::kResident ? group : 0, tile = tile_of(n); tile < s.tiles; tile = tile_of(n += kTurns)) {
        const HopperPlace at = hopper_place<P>(s, tile);
        {
            float d[P::kHaloTiles][P::kMid / 2];
            if constexpr (P::kResident) barrier_wait(ready, 0, 0);
            halo_products<T, P>(s, seat, ring_at, w1, reader, d);
            sync_group(meeting, kMembers);  // the last tile's taps have been read
            store_halo<T, P>(s, seat, at, bias, shared, planes, d);
        }
        fence_async();
        sync_group(meeting, kMembers);
        u32 y2[P::kOutTiles][P::kMid / 16][4];
        {
            float d[P::kOutTiles][P::kMid / 2];
            if constexpr (P::kResident) barrier_wait(ready, 1, 0);
            tap_products<T, P>(seat, planes_at, ring_at, w2, reader, d);
            pack_operand<T, P>(seat, bias + P::kMid, d, y2);
        }
        if constexpr (P::kResident) barrier_wait(ready, 2, 0);
        expand<T, P, kProjected>(s, seat, at, x, bias + 2 * P::kMid, ring_at, w3, reader, y2, out);
        if constexpr (P::kResident) reader.skip(slices);
    }
}

}  // namespace FASTRES_BACKEND
