// Memory of large activations, kept between steps: fresh pages cost more than many a kernel that fills them.
#pragma once
#include <cstddef>

namespace cpu_runtime {

// At least `bytes` of uninitialised memory on a huge page's boundary; back to the pool on destruction.
// Throws std::bad_alloc.
class PoolBlock {
  public:
    explicit PoolBlock(std::size_t bytes);
    ~PoolBlock();
    PoolBlock(const PoolBlock&) = delete;
    PoolBlock& operator=(const PoolBlock&) = delete;
    void* get() const { return memory_; }
    std::size_t bytes() const { return bytes_; }

  private:
    char* memory_;
    std::size_t bytes_, held_;
};

struct PoolInfo {
    std::size_t in_use, peak;  // bytes; peak: most in use at once, and about what the pool holds
};
PoolInfo pool_info();
// Gives the pages of idle memory back to the system.
void pool_release();

}  // namespace cpu_runtime
