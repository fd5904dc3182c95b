// cp.async: copies from global to shared memory that land at a wait, not before.
#pragma once
#include <array>
#include <cstddef>
#include <cstring>
#include <vector>

#include "machine.h"

namespace fastres::emulator {

constexpr std::size_t kCopyBytes = 16;

// One thread's copies in flight. The destination holds NaN from the moment a copy is issued until it lands.
class Copies {
  public:
    // `source` null: zeros.
    void issue(Machine& machine, SharedArray& array, std::size_t element, const void* source) {
        machine.on_write(array, element);
        Copy copy{&array, element, {}};
        if (source) std::memcpy(copy.bytes.data(), source, kCopyBytes);
        std::memset(array.bytes.data() + element * kCopyBytes, 0xff, kCopyBytes);
        open_.push_back(copy);
    }
    void commit() {
        groups_.push_back(std::move(open_));
        open_.clear();
    }
    // All but the youngest `left` groups land.
    void wait(Machine& machine, std::size_t left) {
        while (groups_.size() > left) {
            for (const Copy& copy : groups_.front()) {
                machine.on_write(*copy.array, copy.element);
                std::memcpy(copy.array->bytes.data() + copy.element * kCopyBytes, copy.bytes.data(), kCopyBytes);
            }
            groups_.erase(groups_.begin());
        }
    }
    bool in_flight() const {
        for (const auto& group : groups_) {
            if (!group.empty()) return true;
        }
        return !open_.empty();
    }
    void clear() {
        open_.clear();
        groups_.clear();
    }

  private:
    struct Copy {
        SharedArray* array;
        std::size_t element;
        std::array<unsigned char, kCopyBytes> bytes;
    };
    std::vector<Copy> open_;
    std::vector<std::vector<Copy>> groups_;
};

}  // namespace fastres::emulator
