// Shared memory of a block: its arrays, and the check that no two threads race for an element.
#include <memory>
#include <string>

#include "chip.h"
#include "hopper.h"
#include "machine.h"

namespace fastres::emulator {

namespace {

constexpr int kMany = -2;
constexpr std::size_t kStaticSharedLimit = 48 * 1024;

}  // namespace

SharedArray& Machine::shared(const void* key, std::size_t element, std::size_t count, Site site) {
    std::size_t total = 0;
    for (auto& [known, array] : block_->arrays) {
        if (known == key) return *array;
        if (known) total += array->bytes.size();
    }
    total += element * count;
    // A null key is the dynamic memory, which the launch was checked for.
    if (key && total > kStaticSharedLimit) {
        fault("static shared memory " + std::to_string(total) + " bytes, at most " +
              std::to_string(kStaticSharedLimit) + " (" + at(site) + ")");
    }
    if (key && total + grid_.shared_bytes > chip().shared_per_block) {
        fault("shared memory " + std::to_string(total) + " bytes static, " + std::to_string(grid_.shared_bytes) +
              " dynamic, at most " + std::to_string(chip().shared_per_block) + " on " + chip().name + " (" + at(site) +
              ")");
    }
    // CUDA knows the static part when it counts the blocks of a cooperative grid; here it comes to light one by one.
    if (key && grid_.blocks_per_multiprocessor) {
        Grid whole = grid_;
        whole.shared_bytes += total;
        check_launch(kernel_, whole);
    }
    auto array = std::make_unique<SharedArray>();
    array->bytes.assign(element * count, kPoison);
    array->trace.assign(count, Trace{});
    array->element = element;
    array->site = site;
    block_->arrays.emplace_back(key, std::move(array));
    return *block_->arrays.back().second;
}

SharedArray& Machine::dynamic_shared(std::size_t element, Site site) {
    SharedArray& array = shared(nullptr, element, grid_.shared_bytes / element, site);
    if (array.element != element) {
        fault("dynamic shared memory in elements of " + std::to_string(array.element) + " and of " +
              std::to_string(element) + " bytes (" + at(array.site) + ", " + at(site) + ")");
    }
    return array;
}

Trace& Machine::traced(SharedArray& array, std::size_t i, const char* access) {
    if (i >= array.trace.size()) {
        fault("index " + std::to_string(i) + " of " + std::to_string(array.trace.size()) + " in the shared array of " +
              at(array.site));
    }
    Trace& t = array.trace[i];
    if (t.written_at == block_->phase && t.writer != thread_ &&
        !block_->hopper->order.knows(thread_, t.writer, t.write_clock)) {
        fault(std::string("race: ") + access + " element " + std::to_string(i) + " of the shared array of " +
              at(array.site) + ", which " +
              (t.by_copy ? std::string("an asynchronous copy") : "thread " + std::to_string(t.writer)) +
              " wrote since the last barrier");
    }
    return t;
}

void Machine::on_read(SharedArray& array, std::size_t i) {
    Trace& t = traced(array, i, "reads");
    Order& order = block_->hopper->order;
    if (t.read_at == block_->phase && t.reader != thread_) {
        if (t.reader == kMany || !order.knows(thread_, t.reader, t.read_clock)) {
            order.read_by_many(&t, t.reader == kMany ? -1 : t.reader, t.read_clock, thread_);
            t.reader = kMany;
            return;
        }
    }
    t.reader = thread_;
    t.read_clock = order.clock(thread_);
    t.read_at = block_->phase;
}

void Machine::on_write(SharedArray& array, std::size_t i) {
    Trace& t = traced(array, i, "writes");
    const Order& order = block_->hopper->order;
    if (t.read_at == block_->phase && t.reader != thread_ &&
        !(t.reader == kMany ? order.knows_readers(thread_, &t) : order.knows(thread_, t.reader, t.read_clock))) {
        fault("race: writes element " + std::to_string(i) + " of the shared array of " + at(array.site) +
              ", which another thread read since the last barrier");
    }
    t.writer = thread_;
    t.write_clock = order.clock(thread_);
    t.written_at = block_->phase;
    t.by_copy = false;
}

}  // namespace fastres::emulator
