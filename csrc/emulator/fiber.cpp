#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>
#include <utility>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FASTRES_ASAN
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#define FASTRES_ASAN
#endif

#ifdef FASTRES_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) && defined(__ELF__) && !defined(FASTRES_UCONTEXT)
#define FASTRES_X86_SWITCH
#else
#include <ucontext.h>
#endif

namespace fastres::emulator {

struct Fiber::Context {
    void (*entry)() = nullptr;
#ifdef FASTRES_X86_SWITCH
    void* stack_pointer = nullptr;
#else
    ucontext_t state{};
#endif
#ifdef FASTRES_ASAN
    void* fake_stack = nullptr;
    const void* bottom = nullptr;
    std::size_t size = 0;
    Context* resumed_by = nullptr;
#endif
};

namespace {

#ifdef FASTRES_X86_SWITCH
// swapcontext makes a system call for the signal mask at every switch, a thousand times a block. Of a kernel's
// context only the callee-saved registers must travel (System V ABI).
__attribute__((naked, noinline)) void switch_stack(void** /*save: rdi*/, void* /*load: rsi*/) {
    asm("pushq %rbp\n\t"
        "pushq %rbx\n\t"
        "pushq %r12\n\t"
        "pushq %r13\n\t"
        "pushq %r14\n\t"
        "pushq %r15\n\t"
        "movq %rsp, (%rdi)\n\t"
        "movq %rsi, %rsp\n\t"
        "popq %r15\n\t"
        "popq %r14\n\t"
        "popq %r13\n\t"
        "popq %r12\n\t"
        "popq %rbx\n\t"
        "popq %rbp\n\t"
        "ret");
}
constexpr int kSavedRegisters = 6;
#endif

std::size_t page_size() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

// Untyped, because Context is private: the context that runs on this OS thread.
static thread_local void* running = nullptr;

Fiber::Fiber() : context_(std::make_unique<Context>()) {}
Fiber::~Fiber() = default;
Fiber::Fiber(Fiber&&) noexcept = default;

void Fiber::start(void (*entry)(), void* stack, std::size_t bytes) {
    Context& c = *context_;
    c.entry = entry;
#ifdef FASTRES_ASAN
    __asan_unpoison_memory_region(stack, bytes);  // an abandoned fiber never left its frames
    c.bottom = stack;
    c.size = bytes;
    c.fake_stack = nullptr;
#endif
#ifdef FASTRES_X86_SWITCH
    auto* const top = reinterpret_cast<std::uintptr_t*>((reinterpret_cast<std::uintptr_t>(stack) + bytes) & ~15ull);
    top[-1] = 0;  // no caller: the ABI wants rsp = 8 modulo 16 at a function's first instruction
    top[-2] = reinterpret_cast<std::uintptr_t>(&Fiber::begin);
    for (int i = 0; i < kSavedRegisters; ++i) top[-3 - i] = 0;
    c.stack_pointer = top - 2 - kSavedRegisters;
#else
    getcontext(&c.state);
    c.state.uc_stack.ss_sp = stack;
    c.state.uc_stack.ss_size = bytes;
    c.state.uc_link = nullptr;
    makecontext(&c.state, &Fiber::begin, 0);
#endif
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
    leave(*from.context_, *to.context_, false);
    arrive();
}

void Fiber::exit_to(Fiber& from, Fiber& to) {
    leave(*from.context_, *to.context_, true);
    __builtin_trap();
}

void Fiber::leave(Context& from, Context& to, [[maybe_unused]] bool for_good) {
    running = &to;
#ifdef FASTRES_ASAN
    to.resumed_by = &from;
    // Null frees the frames the sanitizer keeps beside the stack.
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.bottom, to.size);
#endif
#ifdef FASTRES_X86_SWITCH
    switch_stack(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.state, &to.state);
#endif
}

void Fiber::arrive() {
#ifdef FASTRES_ASAN
    Context& c = *static_cast<Context*>(running);
    // The bounds of the OS thread's own stack are learnt here, when it is left for the first time.
    __sanitizer_finish_switch_fiber(c.fake_stack, &c.resumed_by->bottom, &c.resumed_by->size);
#endif
}

void Fiber::begin() {
    arrive();
    static_cast<Context*>(running)->entry();
    __builtin_trap();
}

Stacks::Stacks(int count, std::size_t bytes) {
    const std::size_t page = page_size();
    bytes_ = (bytes + page - 1) / page * page;
    stride_ = bytes_ + page;
    total_ = stride_ * static_cast<std::size_t>(count);
    void* const p = mmap(nullptr, total_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(p);
    for (int i = 0; i < count; ++i) {
        if (mprotect(base_ + static_cast<std::size_t>(i) * stride_, page, PROT_NONE) != 0) {
            munmap(base_, total_);
            throw std::bad_alloc();
        }
    }
}

Stacks::~Stacks() { munmap(base_, total_); }

}  // namespace fastres::emulator
