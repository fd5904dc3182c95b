// A fiber: a stack of its own, entered and left by an explicit switch.
#pragma once
#include <cstddef>
#include <memory>

namespace fastres::emulator {

// A context that can be suspended and resumed on one OS thread. The caller of the first switch is one too.
class Fiber {
  public:
    Fiber();
    ~Fiber();
    Fiber(Fiber&&) noexcept;

    // The next switch here calls `entry` on the given stack, from its beginning. `entry` never returns.
    void start(void (*entry)(), void* stack, std::size_t bytes);

    // Suspends the running context `from`, resumes `to`; returns when somebody resumes `from`.
    static void switch_to(Fiber& from, Fiber& to);

    // The last switch of `from`: it is never resumed, but may be started anew.
    [[noreturn]] static void exit_to(Fiber& from, Fiber& to);

  private:
    struct Context;
    std::unique_ptr<Context> context_;

    static void begin();
    static void leave(Context& from, Context& to, bool for_good);
    static void arrive();
};

// Memory for `count` stacks, each below a page that traps on overflow; committed page by page on first use.
class Stacks {
  public:
    Stacks(int count, std::size_t bytes);  // throws std::bad_alloc
    ~Stacks();
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;

    void* operator[](int i) const { return base_ + static_cast<std::size_t>(i) * stride_ + (stride_ - bytes_); }
    std::size_t bytes() const { return bytes_; }

  private:
    std::size_t bytes_, stride_, total_;
    char* base_;
};

}  // namespace fastres::emulator
