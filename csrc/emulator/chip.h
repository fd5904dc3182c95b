// The GPU that the emulator pretends to be: what a launch is checked against.
#pragma once
#include <cstddef>
#include <string>

namespace fastres::emulator {

struct Chip {
    const char* name;
    int threads_per_multiprocessor;
    std::size_t shared_per_block, shared_per_multiprocessor;  // bytes; a block's includes what needs the opt-in
    int multiprocessors;  // far fewer than a real one has: the fibers of a cooperative grid all live at once

    // Blocks of so many threads and bytes of shared memory that one multiprocessor holds, registers aside.
    int resident_blocks(int threads, std::size_t shared_bytes) const;
};

// Of the process. sm_90a with four multiprocessors until set.
const Chip& chip();
// "sm_80", "sm_89", "sm_90a" or "sm_100". Throws std::invalid_argument.
void set_chip(const std::string& name, int multiprocessors);

}  // namespace fastres::emulator
