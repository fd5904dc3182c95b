// Memory of large activations, kept between steps: fresh pages cost more than many a kernel that fills them.
#pragma once
#include <cstddef>

namespace cpu_runtime {

// A block of memory of at least `bytes`, page aligned; back to the pool on destruction. Throws std::bad_alloc.
class PoolBlock {
  public:
    explicit PoolBlock(std::size_t bytes);
    ~PoolBlock();
    PoolBlock(const PoolBlock&) = delete;
    PoolBlock& operator=(const PoolBlock&) = delete;
    void* get() const { return memory_; }
    std::size_t bytes() const { return bytes_; }

  private:
    void* memory_;
    std::size_t bytes_, held_;
};

struct PoolInfo {
    std::size_t in_use, idle, peak;  // bytes; peak: most in use at once
};
PoolInfo pool_info();
// Gives idle blocks back to the system; the peak starts anew.
void pool_release();

}  // namespace cpu_runtime
