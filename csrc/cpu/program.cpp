#include "cpu/program.h"

#include <chrono>

#include "cpu/parallel.h"

namespace cpu {
namespace {

struct Places {
    const char* x;
    char* y;
    char* arena;
    char* of(i64 place) const {
        if (place == kInput) return const_cast<char*>(x);
        if (place == kOutput) return y;
        return place == kNone ? nullptr : arena + place;
    }
};

void run_step(int dtype, const Step& s, const Places& at, i64 threads) {
    const char *src = at.of(s.src), *residual = at.of(s.residual);
    char* dst = at.of(s.dst);
    switch (s.op) {
        case Op::kDirect:
            return conv_fprop(dtype, src, nullptr, 0, 0, 0, s.packed, s.shape, s.bias, residual, s.relu, dst, threads);
        case Op::kWinograd:
            return winograd_fprop(dtype, src, s.packed, s.shape, s.out, s.bias, residual, s.relu, dst, threads);
        case Op::kStem:
            return stem_conv(dtype, src, s.packed, s.shape, s.pool, s.bias, dst, threads);
        case Op::kMatrix:
            return matrix_fprop(dtype, src, s.packed, s.shape, s.bias, residual, s.relu, dst, threads);
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
    const Places at{static_cast<const char*>(x), static_cast<char*>(y), static_cast<char*>(arena.get())};
    auto before = Clock::now();
    for (const Step& step : steps_) {
        run_step(dtype_, step, at, threads);
        if (!seconds) continue;
        const auto now = Clock::now();
        *seconds++ = std::chrono::duration<double>(now - before).count();
        before = now;
    }
}

}  // namespace cpu
