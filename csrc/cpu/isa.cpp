#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/conv.h"
#include "launch.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define FASTRES_DECLARE(isa)                 \
    namespace cpu_##isa {                    \
        extern const cpu_isa::Entry table[]; \
    }
FASTRES_DECLARE(scalar)
#ifdef FASTRES_HAS_AVX2
FASTRES_DECLARE(avx2)
#endif
#ifdef FASTRES_HAS_AVX512
FASTRES_DECLARE(avx512)
#endif
#ifdef FASTRES_HAS_AVX512_SIM
FASTRES_DECLARE(avx512_sim)
#endif

namespace cpu_isa {
namespace {

#if defined(__x86_64__)
// The builtin also asks whether the operating system saves the registers. F16C is not among its older names.
bool has_avx2() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & (1u << 29));
    return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif
bool always() { return true; }

struct Isa {
    const char* name;
    const Entry* table;
    bool (*runs_here)();
};

// The best first; avx512_sim exists for tests only and is never chosen by itself.
const Isa isas[] = {
#ifdef FASTRES_HAS_AVX512
    {"avx512", cpu_avx512::table, has_avx512},
#endif
#ifdef FASTRES_HAS_AVX2
    {"avx2", cpu_avx2::table, has_avx2},
#endif
    {"scalar", cpu_scalar::table, always},
#ifdef FASTRES_HAS_AVX512_SIM
    {"avx512_sim", cpu_avx512_sim::table, has_avx2},
#endif
};

std::atomic<const Isa*> chosen{nullptr};

const Isa& find(const std::string& name, const char* who) {
    std::string offered;
    for (const Isa& isa : isas) {
        if (!isa.runs_here()) continue;
        if (name == isa.name) return isa;
        offered += (offered.empty() ? "" : ", ") + std::string(isa.name);
    }
    throw std::invalid_argument(std::string(who) + " must be one of " + offered + " on this machine, got '" + name +
                                "'");
}

const Isa& choose() {
    const Isa* isa = chosen.load(std::memory_order_acquire);
    if (isa) return *isa;
    const char* forced = std::getenv("FASTRES_ISA");
    if (forced && *forced) {
        isa = &find(forced, "FASTRES_ISA");
    } else {
        isa = isas;
        while (!isa->runs_here()) ++isa;
    }
    chosen.store(isa, std::memory_order_release);
    return *isa;
}

}  // namespace

std::vector<std::string> available() {
    std::vector<std::string> names;
    for (const Isa& isa : isas)
        if (isa.runs_here()) names.emplace_back(isa.name);
    return names;
}

std::string current() { return choose().name; }

void set(const std::string& name) { chosen.store(&find(name, "set_isa: name"), std::memory_order_release); }

}  // namespace cpu_isa

namespace cpu {

#define FORWARD(name, parameters, ...) \
    void name parameters { reinterpret_cast<decltype(&name)>(cpu_isa::choose().table[cpu_isa::k_##name])(__VA_ARGS__); }
#define FORWARD_SIZE(name, parameters, ...)                                                                \
    i64 name parameters {                                                                                  \
        return reinterpret_cast<decltype(&name)>(cpu_isa::choose().table[cpu_isa::k_##name])(__VA_ARGS__); \
    }

FORWARD(add_relu_fwd, (int dtype, const void* x, const void* residual, i64 n, void* out, u8* mask, i64 ctx), dtype, x,
        residual, n, out, mask, ctx)
FORWARD(add_relu_bwd, (int dtype, const void* grad, const u8* mask, i64 n, void* dx, i64 ctx), dtype, grad, mask, n, dx,
        ctx)
FORWARD(bn_stats, (int dtype, const void* x, i64 M, i64 C, i64 T, void* part, i64 ctx), dtype, x, M, C, T, part, ctx)
FORWARD(bn_finalize,
        (int dtype, const void* part, i64 T, i64 C, const void* weight, const void* bias, double eps, void* stat,
         i64 ctx),
        dtype, part, T, C, weight, bias, eps, stat, ctx)
FORWARD(bn_fold,
        (int dtype, const void* running_mean, const void* running_var, const void* weight, const void* bias, double eps,
         i64 C, void* stat, i64 ctx),
        dtype, running_mean, running_var, weight, bias, eps, C, stat, ctx)
FORWARD(bn_apply,
        (int dtype, const void* x, i64 M, i64 C, const void* stat, const void* residual, const void* rstat, int relu,
         void* out, u8* mask, i64 ctx),
        dtype, x, M, C, stat, residual, rstat, relu, out, mask, ctx)
FORWARD(bn_bwd_reduce,
        (int dtype, const void* grad, const void* x, i64 M, i64 C, const void* stat, const void* residual,
         const void* rstat, const u8* mask, int relu, i64 T, void* part, void* y, i64 ctx),
        dtype, grad, x, M, C, stat, residual, rstat, mask, relu, T, part, y, ctx)
FORWARD(bn_bwd_finalize,
        (int dtype, const void* part, i64 plane, i64 T, i64 M, i64 C, const void* stat, int batch_stats, void* dweight,
         void* dbias, void* coef, i64 ctx),
        dtype, part, plane, T, M, C, stat, batch_stats, dweight, dbias, coef, ctx)
FORWARD(bn_bwd_apply,
        (int dtype, const void* grad, const void* x, i64 M, i64 C, const void* stat, const void* coef,
         const void* residual, const void* rstat, const void* rcoef, const u8* mask, int relu, void* dx, void* dres,
         i64 ctx),
        dtype, grad, x, M, C, stat, coef, residual, rstat, rcoef, mask, relu, dx, dres, ctx)
FORWARD(bias_act,
        (int dtype, const void* x, i64 M, i64 C, const void* bias, const void* residual, int relu, void* out, i64 ctx),
        dtype, x, M, C, bias, residual, relu, out, ctx)
FORWARD(mask_add, (int dtype, const void* a, const void* grad, const u8* mask, i64 M, i64 C, void* out, i64 ctx), dtype,
        a, grad, mask, M, C, out, ctx)
FORWARD(stem_fwd,
        (int dtype, const void* x, i64 N, i64 H, i64 W, i64 C, const void* stat, i64 P, i64 Q, i64 k, i64 stride,
         i64 pad, void* out, u8* idx, i64 ctx),
        dtype, x, N, H, W, C, stat, P, Q, k, stride, pad, out, idx, ctx)
FORWARD(stem_bwd_reduce,
        (int dtype, const void* grad, const u8* idx, const void* x, i64 N, i64 H, i64 W, i64 C, const void* stat, i64 P,
         i64 Q, i64 k, i64 stride, i64 pad, i64 T, void* part, i64 ctx),
        dtype, grad, idx, x, N, H, W, C, stat, P, Q, k, stride, pad, T, part, ctx)
FORWARD(stem_bwd_apply,
        (int dtype, const void* grad, const u8* idx, const void* x, i64 N, i64 H, i64 W, i64 C, const void* stat,
         const void* coef, i64 P, i64 Q, i64 k, i64 stride, i64 pad, void* dx, i64 ctx),
        dtype, grad, idx, x, N, H, W, C, stat, coef, P, Q, k, stride, pad, dx, ctx)
FORWARD(conv_fprop,
        (int dtype, const void* x, const void* w, i64 w_k, i64 w_c, i64 w_tap, const float* packed, int pairs,
         const ConvShape& shape, const float* bias, const void* residual, int relu, void* y, i64 ctx),
        dtype, x, w, w_k, w_c, w_tap, packed, pairs, shape, bias, residual, relu, y, ctx)
FORWARD(conv_pack,
        (int dtype, const void* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& shape, int pairs, float* packed,
         i64 ctx),
        dtype, w, w_k, w_c, w_tap, shape, pairs, packed, ctx)
FORWARD(conv_dgrad,
        (int dtype, const void* dy, const void* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& shape, void* dx,
         i64 ctx),
        dtype, dy, w, w_k, w_c, w_tap, shape, dx, ctx)
FORWARD(conv_wgrad, (int dtype, const void* dy, const void* x, const ConvShape& shape, float* dw, i64 ctx), dtype, dy,
        x, shape, dw, ctx)
FORWARD(winograd_fprop,
        (int dtype, const void* x, const float* packed, const ConvShape& shape, i64 out, const float* bias,
         const void* residual, int relu, void* y, i64 ctx),
        dtype, x, packed, shape, out, bias, residual, relu, y, ctx)
FORWARD(winograd_pack,
        (const float* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& shape, i64 out, float* packed, i64 ctx), w, w_k,
        w_c, w_tap, shape, out, packed, ctx)
FORWARD(strassen_fprop,
        (int dtype, const void* x, const float* packed, const ConvShape& shape, i64 levels, const float* bias,
         const void* residual, int relu, void* y, i64 ctx),
        dtype, x, packed, shape, levels, bias, residual, relu, y, ctx)
FORWARD(strassen_pack, (const float* w, i64 w_k, i64 w_c, const ConvShape& shape, i64 levels, float* packed, i64 ctx),
        w, w_k, w_c, shape, levels, packed, ctx)
FORWARD(stem_conv,
        (int dtype, const void* x, const float* packed, int pairs, const ConvShape& shape, const PoolShape& pool,
         const float* bias, void* y, i64 ctx),
        dtype, x, packed, pairs, shape, pool, bias, y, ctx)
FORWARD(stem_pack, (const float* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& shape, int pairs, float* packed), w,
        w_k, w_c, w_tap, shape, pairs, packed)
FORWARD(global_mean, (int dtype, const void* x, i64 N, i64 M, i64 C, void* y, i64 ctx), dtype, x, N, M, C, y, ctx)
FORWARD(matrix_products, (i64 count, i64 ctx), count, ctx)
FORWARD(matrix_fprop,
        (int dtype, const void* x, const float* packed, const ConvShape& shape, const float* bias, const void* residual,
         int relu, void* y, const Following* following, i64 ctx),
        dtype, x, packed, shape, bias, residual, relu, y, following, ctx)
FORWARD(matrix_pack,
        (int dtype, const float* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& shape, float* packed, i64 ctx), dtype,
        w, w_k, w_c, w_tap, shape, packed, ctx)
FORWARD(matrix_block,
        (int dtype, const void* x, const ConvShape* shapes, const float* const* packed, const float* const* bias,
         int count, int projected, void* y, i64 ctx),
        dtype, x, shapes, packed, bias, count, projected, y, ctx)
FORWARD(matrix_stem,
        (int dtype, const void* x, const float* packed, const ConvShape& shape, const PoolShape& pool,
         const float* bias, void* y, i64 ctx),
        dtype, x, packed, shape, pool, bias, y, ctx)
FORWARD(matrix_stem_pack,
        (int dtype, const float* w, i64 w_k, i64 w_c, i64 w_tap, const ConvShape& shape, float* packed), dtype, w, w_k,
        w_c, w_tap, shape, packed)
FORWARD_SIZE(matrix_stem_packed_floats, (int dtype, const ConvShape& shape), dtype, shape)
FORWARD_SIZE(matrix_unit, ())
FORWARD_SIZE(matrix_packed_floats, (int dtype, const ConvShape& shape), dtype, shape)
FORWARD_SIZE(conv_packed_floats, (const ConvShape& shape, int pairs), shape, pairs)
FORWARD_SIZE(conv_groups, (i64 C, i64 K, i64 groups, int pairs), C, K, groups, pairs)
FORWARD_SIZE(pairs_unit, ())
FORWARD_SIZE(matrix_groups, (i64 C, i64 K, i64 groups), C, K, groups)
FORWARD_SIZE(winograd_packed_floats, (const ConvShape& shape, i64 out), shape, out)
FORWARD_SIZE(strassen_packed_floats, (const ConvShape& shape, i64 levels), shape, levels)
FORWARD_SIZE(stem_packed_floats, (const ConvShape& shape, int pairs), shape, pairs)

}  // namespace cpu
