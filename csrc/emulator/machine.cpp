#include "machine.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

namespace fastres::emulator {

namespace {

constexpr int kWarp = 32, kMaxThreads = 1024, kMany = -2;
constexpr std::int64_t kMaxGridX = 2147483647, kMaxGridY = 65535;
constexpr std::size_t kStaticSharedLimit = 48 * 1024;
constexpr std::size_t kStackBytes = 256 * 1024;  // address space; a kernel commits a page or two
constexpr unsigned char kPoison = 0xff;          // NaN in every floating type, -1 in every integer

// splitmix64
std::uint64_t next(std::uint64_t& state) {
    std::uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

std::string at(const Site& site) {
    const std::string path = site.file_name();
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(site.line());
}

bool same(const Site& a, const Site& b) {
    return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

}  // namespace

Machine& Machine::current() {
    thread_local Machine machine;
    return machine;
}

std::string Machine::where() const {
    return std::string("emulated kernel ") + kernel_ + ", block (" + std::to_string(block_x_) + ", " +
           std::to_string(block_y_) + ")";
}

void Machine::fault(const std::string& what) const {
    throw std::runtime_error(where() + ", thread " + std::to_string(thread_) + ": " + what);
}

void Machine::shuffle(std::vector<int>& order) {
    for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next(random_) % i]);
}

void Machine::run(const char* kernel, std::int64_t grid_x, std::int64_t grid_y, int threads, std::uint64_t seed,
                  const std::function<void()>& body) {
    if (grid_x == 0 || grid_y == 0) return;
    if (grid_x < 0 || grid_x > kMaxGridX || grid_y < 0 || grid_y > kMaxGridY || threads < 1 || threads > kMaxThreads) {
        throw std::runtime_error(std::string("emulated kernel ") + kernel + ", grid " + std::to_string(grid_x) + " x " +
                                 std::to_string(grid_y) + ", " + std::to_string(threads) +
                                 " threads: invalid configuration argument");
    }
    if (busy_) throw std::logic_error(std::string(kernel) + ": launched from inside an emulated kernel");
    kernel_ = kernel;
    body_ = &body;
    grid_x_ = grid_x;
    random_ = seed;
    if (!stacks_ || static_cast<int>(pool_.size()) < threads) {
        stacks_ = std::make_unique<Stacks>(threads, kStackBytes);
        pool_.clear();
        pool_.resize(static_cast<std::size_t>(threads));
    }
    threads_ = threads;
    mail_.assign(static_cast<std::size_t>((threads + kWarp - 1) / kWarp) * 2 * kWarp, 0);
    order_.resize(static_cast<std::size_t>(threads));
    std::iota(order_.begin(), order_.end(), 0);
    arrays_.clear();

    struct Busy {
        bool& flag;
        explicit Busy(bool& f) : flag(f) { flag = true; }
        ~Busy() { flag = false; }
    } const guard(busy_);

    // Blocks in random order too: a kernel may not count on a block that ran before it.
    const auto blocks = static_cast<std::uint64_t>(grid_x * grid_y);
    std::uint64_t step = 1;
    if (blocks > 2) {
        do {
            step = next(random_) % blocks;
        } while (std::gcd(step, blocks) != 1);
    }
    std::uint64_t block = next(random_) % blocks;
    for (std::uint64_t i = 0; i < blocks; ++i) {
        block_x_ = static_cast<std::int64_t>(block % static_cast<std::uint64_t>(grid_x));
        block_y_ = static_cast<std::int64_t>(block / static_cast<std::uint64_t>(grid_x));
        run_block();
        block = (block + step) % blocks;
    }
}

void Machine::run_block() {
    for (auto& [key, array] : arrays_) {
        std::fill(array->bytes.begin(), array->bytes.end(), kPoison);
        std::fill(array->trace.begin(), array->trace.end(), Trace{});
    }
    phase_ = 1;
    error_.clear();
    for (int t = 0; t < threads_; ++t) {
        Thread& thread = pool_[static_cast<std::size_t>(t)];
        thread.state = State::kReady;
        thread.round = 0;
        thread.fiber.start(&Machine::fiber_main, (*stacks_)[t], stacks_->bytes());
    }
    do {
        shuffle(order_);
        for (const int t : order_) {
            Thread& thread = pool_[static_cast<std::size_t>(t)];
            if (thread.state != State::kReady) continue;
            thread_ = t;
            Fiber::switch_to(host_, thread.fiber);
            if (!error_.empty()) throw std::runtime_error(error_);
        }
    } while (release());
}

void Machine::fiber_main() {
    Machine& machine = current();
    const auto self = static_cast<std::size_t>(machine.thread_);
    try {
        (*machine.body_)();
    } catch (const std::exception& e) {
        machine.error_ = e.what();
    }
    machine.pool_[self].state = State::kDone;
    Fiber::exit_to(machine.pool_[self].fiber, machine.host_);
}

void Machine::wait(State state, const char* kind, Site site) {
    Thread& thread = pool_[static_cast<std::size_t>(thread_)];
    thread.state = state;
    thread.kind = kind;
    thread.site = site;
    const int self = thread_;
    Fiber::switch_to(thread.fiber, host_);
    thread_ = self;
}

void Machine::barrier(Site site) { wait(State::kBarrier, "sync_block", site); }

const std::uint64_t* Machine::exchange(const char* kind, std::uint64_t value, Site site) {
    const int self = thread_;
    const unsigned round = pool_[static_cast<std::size_t>(self)].round++;
    std::uint64_t* const slots =
        &mail_[static_cast<std::size_t>(self / kWarp * 2 + static_cast<int>(round % 2)) * kWarp];
    slots[self % kWarp] = value;
    wait(State::kWarp, kind, site);
    return slots;
}

// Nobody can go on: wakes every warp whose lanes met at one collective, else the whole block at one barrier.
// False when the block has finished. Throws where threads wait for others that will never come.
bool Machine::release() {
    bool woken = false;
    int waiting = 0, done = 0;
    const Thread* first = nullptr;
    for (int w = 0; w < threads_; w += kWarp) {
        const int last = std::min(w + kWarp, threads_);
        const auto begin = pool_.begin() + w, end = pool_.begin() + last;
        if (std::any_of(begin, end, [](const Thread& t) { return t.state == State::kWarp; })) {
            check_warp(w, last);
            std::for_each(begin, end, [](Thread& t) { t.state = State::kReady; });
            woken = true;
            continue;
        }
        for (auto t = begin; t != end; ++t) {
            if (t->state == State::kDone) {
                ++done;
                continue;
            }
            ++waiting;
            if (!first) first = &*t;
            if (!same(first->site, t->site)) {
                throw std::runtime_error(where() + ": threads of one block wait at different barriers, " +
                                         at(first->site) + " and " + at(t->site));
            }
        }
    }
    if (woken) return true;
    if (waiting == 0) return false;
    if (done) {
        throw std::runtime_error(where() + ": " + std::to_string(waiting) + " threads wait at the barrier " +
                                 at(first->site) + ", " + std::to_string(done) + " have returned");
    }
    for (int t = 0; t < threads_; ++t) pool_[static_cast<std::size_t>(t)].state = State::kReady;
    ++phase_;
    return true;
}

void Machine::check_warp(int first, int last) const {
    const Thread* waiting = nullptr;
    for (int t = first; t < last; ++t) {
        const Thread& thread = pool_[static_cast<std::size_t>(t)];
        if (thread.state == State::kWarp && !waiting) waiting = &thread;
    }
    for (int t = first; t < last; ++t) {
        const Thread& thread = pool_[static_cast<std::size_t>(t)];
        if (thread.state == State::kWarp && same(thread.site, waiting->site)) continue;
        std::string elsewhere = "has returned";
        if (thread.state != State::kDone) elsewhere = std::string("waits at ") + thread.kind + " " + at(thread.site);
        throw std::runtime_error(where() + ": lanes of warp " + std::to_string(first / kWarp) + " wait at " +
                                 waiting->kind + " " + at(waiting->site) + ", but lane " + std::to_string(t - first) +
                                 " " + elsewhere);
    }
}

SharedArray& Machine::shared(const void* key, std::size_t element, std::size_t count, Site site) {
    std::size_t total = 0;
    for (auto& [known, array] : arrays_) {
        if (known == key) return *array;
        total += array->bytes.size();
    }
    if (total + element * count > kStaticSharedLimit) {
        fault("static shared memory " + std::to_string(total + element * count) + " bytes, at most " +
              std::to_string(kStaticSharedLimit) + " (" + at(site) + ")");
    }
    auto array = std::make_unique<SharedArray>();
    array->bytes.assign(element * count, kPoison);
    array->trace.assign(count, Trace{});
    array->element = element;
    array->site = site;
    arrays_.emplace_back(key, std::move(array));
    return *arrays_.back().second;
}

void Machine::on_read(SharedArray& array, std::size_t i) {
    if (i >= array.trace.size()) {
        fault("index " + std::to_string(i) + " of " + std::to_string(array.trace.size()) + " in the shared array of " +
              at(array.site));
    }
    Trace& t = array.trace[i];
    if (t.written_at == phase_ && t.writer != thread_) {
        fault("race: reads element " + std::to_string(i) + " of the shared array of " + at(array.site) +
              ", which thread " + std::to_string(t.writer) + " wrote since the last barrier");
    }
    t.reader = t.read_at == phase_ && t.reader != thread_ ? kMany : thread_;
    t.read_at = phase_;
}

void Machine::on_write(SharedArray& array, std::size_t i) {
    if (i >= array.trace.size()) {
        fault("index " + std::to_string(i) + " of " + std::to_string(array.trace.size()) + " in the shared array of " +
              at(array.site));
    }
    Trace& t = array.trace[i];
    if (t.written_at == phase_ && t.writer != thread_) {
        fault("race: writes element " + std::to_string(i) + " of the shared array of " + at(array.site) +
              ", which thread " + std::to_string(t.writer) + " wrote since the last barrier");
    }
    if (t.read_at == phase_ && t.reader != thread_) {
        fault("race: writes element " + std::to_string(i) + " of the shared array of " + at(array.site) +
              ", which another thread read since the last barrier");
    }
    t.writer = thread_;
    t.written_at = phase_;
}

}  // namespace fastres::emulator
