#include "cpu/program.h"

#include <chrono>

#include "cpu/parallel.h"

namespace cpu {
namespace {

struct Places {
    const char* x;
    char* y;
    char* arena;
    i64 turn_place, turn_bytes;  // a place that is so far from where it starts
    char* of(i64 place) const {
        if (place == kNone) return nullptr;
        const i64 further = place == turn_place ? turn_bytes : 0;
        if (place == kInput) return const_cast<char*>(x);
        return (place == kOutput ? y : arena + place) + further;
    }
};

void run_step(int dtype, const Step& s, const Step* next, const Places& at, i64 threads) {
    const char *src = at.of(s.src), *residual = at.of(s.residual);
    char* dst = at.of(s.dst);
    switch (s.op) {
        case Op::kDirect:
        case Op::kPairs:
            return conv_fprop(dtype, src, nullptr, 0, 0, 0, s.packed, s.op == Op::kPairs, s.shape, s.bias, residual,
                              s.relu, dst, threads);
        case Op::kWinograd:
            return winograd_fprop(dtype, src, s.packed, s.shape, s.out, s.bias, residual, s.relu, dst, threads);
        case Op::kStrassen:
            return strassen_fprop(dtype, src, s.packed, s.shape, s.out, s.bias, residual, s.relu, dst, threads);
        case Op::kStem:
        case Op::kPairsStem:
            return stem_conv(dtype, src, s.packed, s.op == Op::kPairsStem, s.shape, s.pool, s.bias, dst, threads);
        case Op::kMatrix: {
            const bool more = next && next->op == Op::kMatrix;
            const Following following =
                more ? Following{next->shape, next->packed, next->residual != kNone} : Following{};
            return matrix_fprop(dtype, src, s.packed, s.shape, s.bias, residual, s.relu, dst,
                                more ? &following : nullptr, threads);
        }
        case Op::kMatrixStem:
            return matrix_stem(dtype, src, s.packed, s.shape, s.pool, s.bias, dst, threads);
        case Op::kBlock: {
            const Parts& p = s.parts;
            return matrix_block(dtype, src, p.shapes.data(), p.packed.data(), p.bias.data(),
                                int(p.shapes.size()) - p.projected, p.projected, dst, threads);
        }
        case Op::kMean:
            return global_mean(dtype, src, s.shape.N, s.shape.H * s.shape.W, s.shape.C, dst, threads);
    }
}

}  // namespace

void Program::run(const void* x, void* y, i64 threads, double* seconds) const {
    using Clock = std::chrono::steady_clock;
    const cpu_runtime::Scratch arena(arena_bytes_);
    Places at{static_cast<const char*>(x), static_cast<char*>(y), static_cast<char*>(arena.get()), kNone, 0};
    auto before = Clock::now();
    const auto steps = [&](std::size_t first, std::size_t last) {
        for (std::size_t i = first; i < last; ++i) {
            run_step(dtype_, steps_[i], i + 1 < steps_.size() ? &steps_[i + 1] : nullptr, at, threads);
            if (!seconds) continue;
            const auto now = Clock::now();
            seconds[i] += std::chrono::duration<double>(now - before).count();
            before = now;
        }
    };
    const auto shared = static_cast<std::size_t>(turns_.steps);
    at.turn_place = turns_.place;
    for (i64 turn = 0; turn < turns_.times; ++turn) {
        at.x = static_cast<const char*>(x) + turn * turns_.x_bytes;
        at.turn_bytes = turn * turns_.place_bytes;
        steps(0, shared);
    }
    at.turn_place = kNone;
    steps(shared, steps_.size());
}

}  // namespace cpu
