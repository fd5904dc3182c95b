// How bottleneck_hopper.cuh cuts an image into tiles and brings x and the weights into shared memory.
#pragma once
#include "arch_hopper.cuh"
#include "fragments.cuh"

namespace FASTRES_BACKEND {

constexpr int kGroup = 4 * kWarp;  // threads of a warpgroup
constexpr int kGroups = 2, kHopperThreads = (kGroups + 1) * kGroup;
// Registers of a thread that copies and of one that computes; the launch gives all of them 168.
constexpr int kFewRegisters = 40, kManyRegisters = 232;
static_assert(kGroup * (kFewRegisters + kGroups * kManyRegisters) <= kHopperThreads * 168);
constexpr int kUnit = 16;                           // bytes of a Word4
constexpr int kSlice = 32, kSliceRow = 2 * kSlice;  // channels of x in a stage, bytes of a pixel there
constexpr int kBlockK = 64;                         // output channels that conv3 makes at a time
constexpr int kPattern = 512;                       // bytes of the 64-byte swizzle

struct HopperShape {
    int H, W, C, K;               // x [N, H, W, C], out [N, H, W, K]
    int tiles_h, tiles_w, tiles;  // of an image, of all
};

// 64 channels inside: all weights stay in shared memory, and each warpgroup has a tile of 8 x 16 pixels to itself, so
// that one loads while the other computes. A product's 64 rows are 8 x 8 pixels of the output; of the halo, 10 x 18,
// they are pixels in a row. Of 232448 bytes 36864 are the ring, 46592 the planes of both, and for 256 channels outside
// 139264 the weights (147456 for a projection 64 to 256).
struct Narrow {
    static constexpr int kMid = 64, kTileH = 8, kTileW = 16, kHaloW = kTileW + 2, kHaloPixels = (kTileH + 2) * kHaloW;
    static constexpr bool kResident = true;
    static constexpr int kStages = 3, kHaloTiles = 3, kOutTiles = 2;
    // Units of a plane. 2 or 6 modulo 8, and the stores of two pixels by four planes meet no bank twice.
    static constexpr int kPlane = 182;
    static constexpr int kStageBytes = kHaloTiles * 64 * kSliceRow;
    static constexpr int kRowStride = kHaloW * kUnit, kOutStep = 8;  // of 8 rows in bytes, of 64 in pixels
    static constexpr int kShared = kStages * kStageBytes + kGroups * (kMid / 8) * kPlane * kUnit;
    static_assert(kShared == 36864 + 46592);

    DEVICE static int halo_first(int) { return 0; }
    DEVICE static int out_first(int) { return 0; }
    DEVICE static int out_h(int, int, int row) { return row / 8; }
    DEVICE static int out_w(int, int tile, int row) { return 8 * tile + row % 8; }
};

// 128 channels inside: weights come with x through the ring, and both warpgroups share a tile of 14 x 14 pixels. A
// product's 64 rows are four rows of the 16 x 16 halo, in the output too: the last two of each 16 are dropped.
// Of 232448 bytes 147456 are the ring and 74240 the planes; the weights would be 557056.
struct Wide {
    static constexpr int kMid = 128, kTileH = 14, kTileW = 14, kHaloW = 16, kHaloPixels = 16 * 16;
    static constexpr bool kResident = false;
    static constexpr int kStages = 6, kHaloTiles = 2, kOutTiles = 2;
    static constexpr int kPlane = kHaloPixels + 2 * kHaloW + 2;  // the taps of dropped rows read beyond the halo
    static constexpr int kSliceBytes = kHaloPixels * kSliceRow;
    static constexpr int kStageBytes = kSliceBytes + kSlice * kMid * 2;
    static constexpr int kRowStride = 8 * kUnit, kOutStep = 64;
    static constexpr int kShared = kStages * kStageBytes + (kMid / 8) * kPlane * kUnit;
    static_assert(kShared == 147456 + 74240);

    DEVICE static int halo_first(int group) { return 128 * group; }
    DEVICE static int out_first(int group) { return 128 * group; }
    DEVICE static int out_h(int group, int tile, int row) { return (128 * group + 64 * tile + row) / kHaloW; }
    DEVICE static int out_w(int, int, int row) { return row % kHaloW; }
};

// Bytes of dynamic shared memory, with what its alignment may cost.
template <class P>
constexpr i64 hopper_shared_bytes(i64 weights) {
    return kPattern + P::kShared + (P::kResident ? weights * 2 : 0);
}

struct HopperPlace {
    int image, h0, w0;
};

template <class P>
DEVICE HopperPlace hopper_place(const HopperShape& s, int tile) {
    const int row = tile / s.tiles_w;
    HopperPlace at;
    at.image = row / s.tiles_h;
    at.w0 = (tile - row * s.tiles_w) * P::kTileW;
    at.h0 = (row - at.image * s.tiles_h) * P::kTileH;
    return at;
}

// The n-th tile of this block, of both warpgroups in turn where each has its own.
DEVICE int tile_of(int n) { return static_cast<int>(block_x()) + n * static_cast<int>(grid_x()); }

// ---- the barriers: stage s is full for a warpgroup (each has its own ring of these, so that none sees a phase that is
// not its next), is empty when all warps that read it have left it; parts of the resident weights are ready

template <class P>
constexpr int kReaders = P::kResident ? 4 : kGroups * 4;  // warps

// Where a warpgroup stands in the ring.
template <class P, class B>
class Reader {
  public:
    DEVICE Reader(B full, B empty, int group)
        : full_(full), empty_(empty), first_(P::kResident ? group * P::kStages : 0) {}

    DEVICE int take() {
        const int stage = stage_;
        barrier_wait(full_, first_ + stage, phases_ >> stage & 1);
        phases_ ^= 1u << stage;
        skip(1);
        return stage;
    }
    // By all threads of the warp, when its products have read the stage.
    DEVICE void give(int stage) {
        sync_warp();
        if (thread_index() % kWarp == 0) barrier_arrive(empty_, stage);
    }
    DEVICE void skip(int stages) { stage_ = (stage_ + stages) % P::kStages; }

  private:
    B full_, empty_;
    int first_, stage_ = 0;
    u32 phases_ = 0;
};

// ---- the warp that copies: one thread of it

template <class P, class S, class B>
class Writer {
  public:
    DEVICE Writer(S shared, int ring, B full, B empty) : shared_(shared), ring_(ring), full_(full), empty_(empty) {}

    // Waits for the next stage and announces what will come.
    DEVICE void begin(int group, u32 bytes) {
        barrier_wait(empty_, stage_, phase_);
        bar_ = (P::kResident ? group * P::kStages : 0) + stage_;
        barrier_arrive_expect(full_, bar_, bytes);
    }
    DEVICE void x(const TensorMap& map, const HopperPlace& at, int channel) {
        const int corner[4] = {channel, at.w0 - 1, at.h0 - 1, at.image};
        load_tensor(shared_, place(), map, corner, full_, bar_);
    }
    DEVICE void weights(int offset, const Word4* source, u32 bytes) {
        load_bulk(shared_, place() + offset / kUnit, source, bytes, full_, bar_);
    }
    DEVICE void end() {
        stage_ = stage_ + 1 == P::kStages ? 0 : stage_ + 1;
        if (stage_ == 0) phase_ ^= 1;
    }

  private:
    DEVICE int place() const { return ring_ + stage_ * (P::kStageBytes / kUnit); }

    S shared_;
    int ring_;
    B full_, empty_;
    int stage_ = 0, bar_ = 0;
    u32 phase_ = 1;  // of a fresh barrier the phase before counts as completed
};

// Units of the weights of conv1, conv2 and conv3.
template <class P>
struct Parts {
    int first, middle, last;

    DEVICE explicit Parts(const HopperShape& s, bool projected)
        : first(s.C * P::kMid / kVec),
          middle(9 * P::kMid * P::kMid / kVec),
          last((P::kMid + (projected ? s.C : 0)) * s.K / kVec) {}
};

template <bool kProjected, class S, class B>
DEVICE void produce(Narrow, const HopperShape& s, const TensorMap& map, const Word4* packed, S shared, int ring,
                    int weights, B full, B empty, B ready) {
    using P = Narrow;
    const Parts<P> parts(s, kProjected);
    const auto load = [&](int part, int first, int units) {
        barrier_arrive_expect(ready, part, static_cast<u32>(units * kUnit));
        load_bulk(shared, weights + first, packed + first, static_cast<u32>(units * kUnit), ready, part);
    };
    Writer<P, S, B> to(shared, ring, full, empty);
    load(0, 0, parts.first);
    bool rest = true;
    for (int n = 0, tile = tile_of(0); tile < s.tiles; tile = tile_of(++n)) {
        const HopperPlace at = hopper_place<P>(s, tile);
        for (int channel = 0; channel < s.C; channel += kSlice) {
            to.begin(n % kGroups, P::kHaloPixels * kSliceRow);
            to.x(map, at, channel);
            to.end();
            if (rest && channel > 0) {  // the first of x are there before these
                load(1, parts.first, parts.middle);
                load(2, parts.first + parts.middle, parts.last);
                rest = false;
            }
        }
    }
}

template <bool kProjected, class S, class B>
DEVICE void produce(Wide, const HopperShape& s, const TensorMap& map, const Word4* packed, S shared, int ring, int,
                    B full, B empty, B) {
    using P = Wide;
    static_assert(!kProjected);
    constexpr int kFirst = kSlice * P::kMid * 2, kRest = kBlockK * P::kMid * 2;  // bytes
    Writer<P, S, B> to(shared, ring, full, empty);
    for (int n = 0, tile = tile_of(0); tile < s.tiles; tile = tile_of(++n)) {
        const HopperPlace at = hopper_place<P>(s, tile);
        const Word4* from = packed;
        for (int channel = 0; channel < s.C; channel += kSlice, from += kFirst / kUnit) {
            to.begin(0, P::kSliceBytes + kFirst);
            to.x(map, at, channel);
            to.weights(P::kSliceBytes, from, kFirst);
            to.end();
        }
        const int rest = 9 * P::kMid / kBlockK + s.K / kBlockK;
        for (int i = 0; i < rest; ++i, from += kRest / kUnit) {
            to.begin(0, kRest);
            to.weights(0, from, kRest);
            to.end();
        }
    }
}

}  // namespace FASTRES_BACKEND
