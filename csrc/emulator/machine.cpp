#include "machine.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "async.h"
#include "chip.h"
#include "hopper.h"

namespace fastres::emulator {

namespace {

constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr std::int64_t kMaxGridX = 2147483647, kMaxGridY = 65535;
constexpr std::size_t kStackBytes = 256 * 1024;  // address space; a kernel commits a page or two

// splitmix64
std::uint64_t next(std::uint64_t& state) {
    std::uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

bool same(const Site& a, const Site& b) {
    return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

}  // namespace

std::string at(const Site& site) {
    const std::string path = site.file_name();
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line());
}

Machine::Machine() = default;
Machine::~Machine() = default;

Machine& Machine::current() {
    thread_local Machine machine;
    return machine;
}

std::string Machine::where() const {
    return std::string("emulated kernel ") + kernel_ + ", block (" + std::to_string(block_->x) + ", " +
           std::to_string(block_->y) + ")";
}

void Machine::fault(const std::string& what) const {
    throw std::runtime_error(where() + ", thread " + std::to_string(thread_) + ": " + what);
}

template <class T>
void Machine::shuffle(std::vector<T>& order) {
    for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next(random_) % i]);
}

void Machine::check_launch(const char* kernel, const Grid& grid) const {
    const auto refuse = [&](const std::string& why) {
        throw std::runtime_error(std::string("emulated kernel ") + kernel + ", grid " + std::to_string(grid.x) + " x " +
                                 std::to_string(grid.y) + ", " + std::to_string(grid.threads) + " threads: " + why);
    };
    if (grid.x < 0 || grid.x > kMaxGridX || grid.y < 0 || grid.y > kMaxGridY || grid.threads < 1 ||
        grid.threads > kMaxThreads) {
        refuse("invalid configuration argument");
    }
    const Chip& on = chip();
    if (grid.shared_bytes > on.shared_per_block) {
        refuse(std::to_string(grid.shared_bytes) + " bytes of dynamic shared memory, at most " +
               std::to_string(on.shared_per_block) + " on " + on.name);
    }
    if (grid.blocks_per_multiprocessor == 0) return;
    const std::int64_t resident =
        std::min<std::int64_t>(grid.blocks_per_multiprocessor, on.resident_blocks(grid.threads, grid.shared_bytes));
    if (grid.x * grid.y > resident * on.multiprocessors) {
        refuse("too many blocks for a cooperative launch, at most " + std::to_string(resident) + " on each of " +
               std::to_string(on.multiprocessors) + " multiprocessors of " + on.name);
    }
}

// Stacks, threads and mail for so many blocks at once.
void Machine::prepare(std::size_t blocks) {
    const auto threads = static_cast<std::size_t>(grid_.threads), total = blocks * threads;
    if (!stacks_ || pool_.size() < total) {
        stacks_ = std::make_unique<Stacks>(static_cast<int>(total), kStackBytes);
        pool_.clear();
        pool_.resize(total);
        copies_.resize(total);
    }
    order_.resize(threads);
    std::iota(order_.begin(), order_.end(), 0);
    blocks_.clear();
    blocks_.resize(blocks);
    for (std::size_t b = 0; b < blocks; ++b) {
        blocks_[b].first = static_cast<int>(b * threads);
        blocks_[b].threads = pool_.data() + b * threads;
        blocks_[b].mail.assign((threads + kWarp - 1) / kWarp * 2 * kWarp, 0);
        blocks_[b].wide.assign(blocks_[b].mail.size() * kSlotBytes, 0);
    }
}

void Machine::run(const char* kernel, const Grid& grid, std::uint64_t seed, const std::function<void()>& body) {
    if (grid.x == 0 || grid.y == 0) return;
    check_launch(kernel, grid);
    if (busy_) throw std::logic_error(std::string(kernel) + ": launched from inside an emulated kernel");
    kernel_ = kernel;
    body_ = &body;
    grid_ = grid;
    random_ = seed;
    const auto blocks = static_cast<std::uint64_t>(grid.x * grid.y);
    prepare(grid.blocks_per_multiprocessor ? blocks : 1);

    struct Busy {
        bool& flag;
        explicit Busy(bool& f) : flag(f) { flag = true; }
        ~Busy() { flag = false; }
    } const guard(busy_);

    if (grid.blocks_per_multiprocessor) {
        for (std::uint64_t b = 0; b < blocks; ++b) begin(blocks_[b], b);
        run_blocks();
        return;
    }
    // Blocks in random order too: a kernel may not count on a block that ran before it.
    std::uint64_t stride = 1;
    if (blocks > 2) {
        do {
            stride = next(random_) % blocks;
        } while (std::gcd(stride, blocks) != 1);
    }
    std::uint64_t block = next(random_) % blocks;
    for (std::uint64_t i = 0; i < blocks; ++i) {
        begin(blocks_[0], block);
        run_blocks();
        block = (block + stride) % blocks;
    }
}

void Machine::begin(Block& block, std::uint64_t number) {
    block.x = static_cast<std::int64_t>(number % static_cast<std::uint64_t>(grid_.x));
    block.y = static_cast<std::int64_t>(number / static_cast<std::uint64_t>(grid_.x));
    block.phase = 1;
    block.stuck = false;
    block.hopper = std::make_shared<Hopper>(grid_.threads);
    for (auto& [key, array] : block.arrays) {
        std::fill(array->bytes.begin(), array->bytes.end(), kPoison);
        std::fill(array->trace.begin(), array->trace.end(), Trace{});
    }
    error_.clear();
    for (int t = 0; t < grid_.threads; ++t) {
        Thread& thread = block.threads[t];
        thread.state = State::kReady;
        thread.round = 0;
        copies_[static_cast<std::size_t>(block.first + t)].clear();
        thread.fiber.start(&Machine::fiber_main, (*stacks_)[block.first + t], stacks_->bytes());
    }
}

void Machine::run_blocks() {
    std::vector<Block*> order;
    for (Block& block : blocks_) order.push_back(&block);
    do {
        for (bool moving = true; moving;) {
            moving = false;
            shuffle(order);
            for (Block* const block : order) {
                // Blocks of a cooperative grid drift apart by as much as their barriers allow.
                std::uint64_t steps = blocks_.size() == 1 ? 1 : next(random_) % 4;
                for (; steps && !block->stuck; --steps) block->stuck = !step(*block);
                moving |= !block->stuck;
            }
        }
    } while (release_grid());
    meter.settle();
}

// Every thread of the block goes on to its next wait. False if all have returned or wait for the grid.
bool Machine::step(Block& block) {
    block_ = &block;
    shuffle(order_);
    for (const int t : order_) {
        Thread& thread = block.threads[t];
        if (thread.state != State::kReady) continue;
        thread_ = t;
        Fiber::switch_to(host_, thread.fiber);
        if (!error_.empty()) throw std::runtime_error(error_);
    }
    return release();
}

void Machine::fiber_main() {
    Machine& machine = current();
    Thread& self = machine.block_->threads[machine.thread_];
    try {
        (*machine.body_)();
        machine.hopper().on_return(machine);
        if (machine.copies().in_flight()) machine.fault("returns with asynchronous copies in flight");
    } catch (const std::exception& e) {
        machine.error_ = e.what();
    }
    self.state = State::kDone;
    Fiber::exit_to(self.fiber, machine.host_);
}

void Machine::wait(State state, const char* kind, Site site) {
    // The scheduler sets block_ and thread_ again before it resumes this fiber.
    Thread& thread = block_->threads[thread_];
    thread.state = state;
    thread.kind = kind;
    thread.site = site;
    Fiber::switch_to(thread.fiber, host_);
}

void Machine::wait_until(const std::function<bool()>& ready, const char* kind, Site site) {
    if (ready()) return;
    block_->threads[thread_].ready = &ready;
    wait(State::kCondition, kind, site);
}

Copies& Machine::copies() { return copies_[static_cast<std::size_t>(fiber())]; }

void Machine::barrier(Site site) { wait(State::kBarrier, "sync_block", site); }

void Machine::grid_barrier(Site site) {
    if (!grid_.blocks_per_multiprocessor) fault("a grid barrier in a launch that is not cooperative, " + at(site));
    wait(State::kGrid, "sync_grid", site);
}

const std::uint64_t* Machine::exchange(const char* kind, std::uint64_t value, Site site) {
    const int self = thread_;
    const unsigned round = block_->threads[self].round++;
    std::uint64_t* const slots =
        &block_->mail[static_cast<std::size_t>(self / kWarp * 2 + static_cast<int>(round % 2)) * kWarp];
    slots[self % kWarp] = value;
    wait(State::kWarp, kind, site);
    return slots;
}

const unsigned char* Machine::exchange_wide(const char* kind, const void* bytes, std::size_t size, Site site) {
    const int self = thread_;
    const unsigned round = block_->threads[self].round++;
    unsigned char* const slots =
        &block_->wide[static_cast<std::size_t>(self / kWarp * 2 + static_cast<int>(round % 2)) * kWarp * kSlotBytes];
    std::memcpy(slots + self % kWarp * kSlotBytes, bytes, size);
    wait(State::kWarp, kind, site);
    return slots;
}

// Nobody in the block can go on: wakes every warp whose lanes met at one collective, else the whole block at one
// barrier. False when the block has finished or waits for the grid. Throws where threads wait for others that will
// never come.
bool Machine::release() {
    bool woken = false;
    int waiting = 0, done = 0;
    const Thread *first = nullptr, *asleep = nullptr;
    for (int t = 0; t < grid_.threads; ++t) {
        Thread& thread = block_->threads[t];
        if (thread.state != State::kCondition) continue;
        thread_ = t;
        if ((*thread.ready)()) {
            thread.state = State::kReady;
            woken = true;
        } else {
            asleep = &thread;
        }
    }
    for (int w = 0; w < grid_.threads; w += kWarp) {
        const int last = std::min(w + kWarp, grid_.threads);
        Thread* const begin = block_->threads + w;
        Thread* const end = block_->threads + last;
        // Lanes that sleep or have just woken may still come to where the others of their warp wait.
        const auto on_its_way = [](const Thread& t) {
            return t.state == State::kCondition || t.state == State::kReady;
        };
        if (std::any_of(begin, end, on_its_way)) continue;
        if (std::any_of(begin, end, [](const Thread& t) { return t.state == State::kWarp; })) {
            check_warp(w, last);
            std::for_each(begin, end, [](Thread& t) { t.state = State::kReady; });
            woken = true;
            continue;
        }
        for (Thread* t = begin; t != end; ++t) {
            if (t->state == State::kDone) {
                ++done;
                continue;
            }
            ++waiting;
            if (!first) first = t;
            if (!same(first->site, t->site)) {
                throw std::runtime_error(where() + ": threads of one block wait at different barriers, " +
                                         at(first->site) + " and " + at(t->site));
            }
        }
    }
    if (woken) return true;
    if (asleep) {
        // Copies land as late as they may: when nothing else can move.
        if (block_->hopper->land_one(*this, next(random_))) return true;
        throw std::runtime_error(where() + ": deadlock, " + asleep->kind + " " + at(asleep->site) +
                                 " waits for what never comes");
    }
    if (waiting == 0) return false;
    if (done) {
        throw std::runtime_error(where() + ": " + std::to_string(waiting) + " threads wait at the barrier " +
                                 at(first->site) + ", " + std::to_string(done) + " have returned");
    }
    if (first->state == State::kGrid) return false;
    for (int t = 0; t < grid_.threads; ++t) block_->threads[t].state = State::kReady;
    ++block_->phase;
    return true;
}

// Every block is stuck. False when all have finished.
bool Machine::release_grid() {
    const Block* waiting = nullptr;
    for (const Block& block : blocks_) {
        if (block.threads[0].state == State::kGrid && !waiting) waiting = &block;
    }
    if (!waiting) return false;
    for (Block& block : blocks_) {
        const Thread& thread = block.threads[0];
        if (thread.state == State::kGrid && same(thread.site, waiting->threads[0].site)) continue;
        block_ = &block;
        throw std::runtime_error(
            where() + (thread.state == State::kGrid ? " waits at " + at(thread.site) : std::string(" has returned")) +
            ", other blocks wait at the grid barrier " + at(waiting->threads[0].site));
    }
    for (Block& block : blocks_) {
        for (int t = 0; t < grid_.threads; ++t) block.threads[t].state = State::kReady;
        block.stuck = false;
        ++block.phase;
    }
    return true;
}

void Machine::check_warp(int first, int last) const {
    const Thread* waiting = nullptr;
    for (int t = first; t < last; ++t) {
        const Thread& thread = block_->threads[t];
        if (thread.state == State::kWarp && !waiting) waiting = &thread;
    }
    for (int t = first; t < last; ++t) {
        const Thread& thread = block_->threads[t];
        if (thread.state == State::kWarp && same(thread.site, waiting->site)) continue;
        std::string elsewhere = "has returned";
        if (thread.state != State::kDone) elsewhere = std::string("waits at ") + thread.kind + " " + at(thread.site);
        throw std::runtime_error(where() + ": lanes of warp " + std::to_string(first / kWarp) + " wait at " +
                                 waiting->kind + " " + at(waiting->site) + ", but lane " + std::to_string(t - first) +
                                 " " + elsewhere);
    }
}

}  // namespace fastres::emulator
