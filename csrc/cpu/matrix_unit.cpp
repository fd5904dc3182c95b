#include "cpu/matrix_unit.h"

#include <atomic>
#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cpu_runtime {
namespace {

bool ask_for_tiles() {
#if defined(__linux__) && defined(__x86_64__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kXsave = 1u << 27;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kXsave)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTiles)) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 5)) return false;  // AVX512-BF16, for the stores
    unsigned low = 0, high = 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr unsigned kState = 3u << 17;
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, for all threads of the process
    return (low & kState) == kState && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}

std::atomic<bool> trapped{false};

}  // namespace

MatrixUnit matrix_unit() {
    static const bool there = ask_for_tiles();
    return there ? MatrixUnit::kThere : trapped.load() ? MatrixUnit::kTrapped : MatrixUnit::kNone;
}

}  // namespace cpu_runtime

#ifdef FASTRES_TILE_TRAP
#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace cpu_runtime {
namespace {

using u8 = std::uint8_t;
using u32 = std::uint32_t;
using i64 = std::int64_t;

constexpr int kRows = 16, kBytes = 64;

struct State {
    bool configured = false;
    u8 rows[8];
    int bytes[8];
    alignas(64) u8 tile[8][kRows][kBytes];
};
// The first use may be inside the handler and allocate: the signal comes from a kernel, not from the allocator.
thread_local State state;
struct sigaction before;

float value(u32 bits) {
    if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;  // denormals are zero
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

float flushed(float f) {
    u32 bits;
    std::memcpy(&bits, &f, 4);
    return value(bits);
}

// The pseudocode of TDPBF16PS in Intel's manual.
void dot(int d, int a, int b) {
    for (int m = 0; m < state.rows[d]; ++m)
        for (int n = 0; n < state.bytes[d] / 4; ++n) {
            float even = 0, odd = 0;
            for (int k = 0; k < state.bytes[a] / 4; ++k) {
                u32 x, y;
                std::memcpy(&x, &state.tile[a][m][4 * k], 4);
                std::memcpy(&y, &state.tile[b][k][4 * n], 4);
                even = flushed(even + value(x << 16) * value(y << 16));
                odd = flushed(odd + value(x & 0xffff0000u) * value(y & 0xffff0000u));
            }
            float sum;
            std::memcpy(&sum, &state.tile[d][m][4 * n], 4);
            sum = flushed(flushed(sum) + flushed(even + odd));
            std::memcpy(&state.tile[d][m][4 * n], &sum, 4);
        }
}

struct Memory {
    char* base;
    i64 index;  // times its scale
    int length;
};

// ModRM and what follows it: the addressing forms of a memory operand.
Memory memory(const u8* modrm, const greg_t* registers, bool x, bool b) {
    static const int names[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    const int mod = modrm[0] >> 6, rm = modrm[0] & 7;
    const u8* next = modrm + 1;
    i64 base = 0, index = 0;
    int displacement = mod == 1 ? 1 : mod == 2 ? 4 : 0;
    bool relative = false;
    if (rm == 4) {
        const u8 sib = *next++;
        const int i = (sib >> 3 & 7) | x << 3, r = (sib & 7) | b << 3;
        if (i != 4) index = registers[names[i]] << (sib >> 6);
        if (mod == 0 && (sib & 7) == 5)
            displacement = 4;
        else
            base = registers[names[r]];
    } else if (mod == 0 && rm == 5) {
        displacement = 4, relative = true;
    } else {
        base = registers[names[rm | b << 3]];
    }
    if (displacement == 1) base += static_cast<signed char>(*next);
    if (displacement == 4) {
        std::int32_t far;
        std::memcpy(&far, next, 4);
        base += far;
    }
    next += displacement;
    if (relative) base += reinterpret_cast<i64>(next);
    return {reinterpret_cast<char*>(base), index, static_cast<int>(next - modrm)};
}

// Executes the instruction at the program counter: its length, or 0 for one that is not of the unit.
int execute(greg_t* registers) {
    const u8* at = reinterpret_cast<const u8*>(registers[REG_RIP]);
    if (at[0] != 0xc4 || (at[1] & 0x1f) != 2) return 0;  // three-byte VEX, map 0F38
    const bool x = !(at[1] & 0x40), b = !(at[1] & 0x20);
    const int prefix = at[2] & 3, third = ~(at[2] >> 3) & 7, opcode = at[3], mod = at[4] >> 6;
    const int first = at[4] >> 3 & 7, second = at[4] & 7;
    enum { kNoPrefix, k66, kF3, kF2 };
    if (opcode == 0x49 && prefix == kNoPrefix && mod == 3) {  // TILERELEASE
        state.configured = false;
        return 5;
    }
    if (opcode == 0x49 && prefix == kNoPrefix) {  // LDTILECFG
        const Memory m = memory(at + 4, registers, x, b);
        if (m.base[0] != 1) return 0;
        for (int t = 0; t < 8; ++t) {
            state.bytes[t] = static_cast<u8>(m.base[16 + 2 * t]) | m.base[17 + 2 * t] << 8;
            state.rows[t] = static_cast<u8>(m.base[48 + t]);
            if (state.bytes[t] < 4 || state.bytes[t] > kBytes || state.bytes[t] % 4) return 0;
            if (state.rows[t] < 1 || state.rows[t] > kRows) return 0;
        }
        std::memset(state.tile, 0, sizeof state.tile);
        state.configured = true;
        return 4 + m.length;
    }
    if (!state.configured) return 0;
    if (opcode == 0x49 && prefix == kF2 && mod == 3) {  // TILEZERO
        std::memset(state.tile[first], 0, sizeof state.tile[first]);
        return 5;
    }
    if (opcode == 0x4b && prefix != kNoPrefix && mod != 3) {  // TILELOADD, TILELOADDT1, TILESTORED
        const Memory m = memory(at + 4, registers, x, b);
        for (int r = 0; r < state.rows[first]; ++r)
            if (prefix != kF3)
                std::memcpy(state.tile[first][r], m.base + r * m.index, state.bytes[first]);
            else
                std::memcpy(m.base + r * m.index, state.tile[first][r], state.bytes[first]);
        return 4 + m.length;
    }
    if (opcode == 0x5c && prefix == kF3 && mod == 3) {  // TDPBF16PS
        const bool fits = state.rows[first] == state.rows[second] && state.bytes[second] == 4 * state.rows[third] &&
                          state.bytes[first] == state.bytes[third];
        if (!fits) return 0;
        dot(first, second, third);
        return 5;
    }
    return 0;
}

void handle(int, siginfo_t*, void* context) {
    greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    const int length = execute(registers);
    if (length)
        registers[REG_RIP] += length;
    else
        sigaction(SIGILL, &before, nullptr);  // it comes again, and is not ours
}

}  // namespace

void trap_tiles(bool on) {
    if (matrix_unit() == MatrixUnit::kThere) throw std::runtime_error("trap_tiles: this processor has a matrix unit");
    if (on == trapped.load()) return;
    struct sigaction action{};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO;
    sigemptyset(&action.sa_mask);
    const int failed = on ? sigaction(SIGILL, &action, &before) : sigaction(SIGILL, &before, nullptr);
    if (failed) throw std::runtime_error("trap_tiles: sigaction failed");
    trapped.store(on);
}

}  // namespace cpu_runtime
#endif
