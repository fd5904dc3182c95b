#include "counters.h"

#include <algorithm>

namespace fastres::emulator {

namespace {

constexpr int kWarp = 32, kRows = 8;
constexpr std::uint64_t kUnit = 16, kWord = 4, kBankBytes = 128;  // one row of all 32 banks
constexpr std::uintptr_t kSector = 32;

}  // namespace

void Meter::reset() {
    counters = {};
    loaded_.clear();
    stored_.clear();
    streams_.clear();
}

std::int64_t Meter::touch(std::unordered_set<std::uintptr_t>& sectors, const void* p, std::size_t bytes) {
    const auto at = reinterpret_cast<std::uintptr_t>(p);
    std::int64_t fresh = 0;
    for (std::uintptr_t s = at / kSector; s <= (at + bytes - 1) / kSector; ++s) fresh += sectors.insert(s).second;
    return fresh * static_cast<std::int64_t>(kSector);
}

void Meter::load(const void* p, std::size_t bytes) {
    counters.loaded += static_cast<std::int64_t>(bytes);
    counters.loaded_once += touch(loaded_, p, bytes);
}

void Meter::store(const void* p, std::size_t bytes) {
    counters.stored += static_cast<std::int64_t>(bytes);
    counters.stored_once += touch(stored_, p, bytes);
}

void Meter::rows(const std::uint64_t* bytes, int n, Access kind) {
    // Lanes that name one address share it; those that meet in a bank with different ones wait for each other.
    const std::uint64_t unit = kind == Access::kWord ? kWord : kUnit;
    std::array<std::vector<std::uint64_t>, kBankBytes / kWord> banks;
    for (int i = 0; i < n; ++i) {
        auto& bank = banks[bytes[i] % kBankBytes / unit];
        if (std::find(bank.begin(), bank.end(), bytes[i]) == bank.end()) bank.push_back(bytes[i]);
    }
    std::size_t worst = 0;
    for (const auto& bank : banks) worst = std::max(worst, bank.size());
    counters.wavefronts += static_cast<std::int64_t>(worst);
    counters.conflicts[static_cast<int>(kind)] += static_cast<std::int64_t>(worst) - (worst > 0);
}

void Meter::close(const Instruction& instruction, Access kind) {
    // A 16-byte access of a warp is served eight lanes at a time, one of 4 bytes at once.
    const int together = kind == Access::kWord ? kWarp : kRows;
    for (int first = 0; first < kWarp; first += together) {
        std::array<std::uint64_t, kWarp> bytes;
        int n = 0;
        for (int lane = first; lane < first + together; ++lane) {
            if (instruction.present >> lane & 1) bytes[n++] = instruction.bytes[lane];
        }
        if (n) rows(bytes.data(), n, kind);
    }
}

void Meter::lane(int thread, std::uint64_t byte, Access kind, const std::source_location& site) {
    const auto key = std::tuple(thread / kWarp, site.file_name(), site.line(), site.column(), static_cast<int>(kind));
    Stream& stream = streams_[key];
    const int lane = thread % kWarp;
    const std::size_t at = stream.passed[lane]++ - stream.first;
    if (at >= stream.open.size()) stream.open.resize(at + 1);
    stream.open[at].present |= 1u << lane;
    stream.open[at].bytes[lane] = byte;
    while (!stream.open.empty() && stream.open.front().present == ~0u) {
        close(stream.open.front(), kind);
        stream.open.erase(stream.open.begin());
        ++stream.first;
    }
}

void Meter::settle() {
    for (const auto& [key, stream] : streams_) {
        for (const Instruction& instruction : stream.open) close(instruction, static_cast<Access>(std::get<4>(key)));
    }
    streams_.clear();
}

}  // namespace fastres::emulator
