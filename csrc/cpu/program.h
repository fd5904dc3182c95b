// A chain of kernels as data: what an inference session runs in one call.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/conv.h"

namespace cpu {

// kPairs, kPairsStem: kDirect and kStem by products of pairs of bfloat16.
enum class Op { kDirect, kWinograd, kStem, kMean, kMatrix, kBlock, kMatrixStem, kPairs, kPairsStem, kStrassen };

// Where a tensor lies: a byte offset into the arena, or one of these.
constexpr i64 kInput = -1, kOutput = -2, kNone = -3;

struct Parts {
    std::vector<ConvShape> shapes;
    std::vector<const float*> packed, bias;
    bool projected;
};

struct Step {
    Op op;
    i64 src, residual, dst;
    ConvShape shape;  // of kMean: N, H, W and C
    PoolShape pool;   // of stems
    i64 out;          // of kWinograd: pixels of a tile, a side; of kStrassen: levels
    const float *packed, *bias;
    int relu;
    Parts parts = {};  // of kBlock, with what matrix_block takes
};

// The first `steps` run `times`, each on x_bytes of the input: what lies between them stays in the caches. The tensor
// at `place` is theirs together, place_bytes of it in turn.
struct Turns {
    i64 steps = 0, times = 1, x_bytes = 0, place = kNone, place_bytes = 0;
};

// Runs steps one after the other on activations of one dtype (0..2). Holds no memory: packed weights and biases are the
// caller's, and the arena is taken from the pool for the length of a call, so that threads may share a program.
class Program {
  public:
    Program(int dtype, i64 arena_bytes) : dtype_(dtype), arena_bytes_(arena_bytes) {}
    void add(const Step& step) { steps_.push_back(step); }
    void take_turns(const Turns& turns) { turns_ = turns; }
    i64 arena_bytes() const { return arena_bytes_; }
    // seconds, if given, gets the time of each step.
    void run(const void* x, void* y, i64 threads, double* seconds) const;
    std::size_t size() const { return steps_.size(); }

  private:
    int dtype_;
    i64 arena_bytes_;
    std::vector<Step> steps_;
    Turns turns_;
};

}  // namespace cpu
