#include "hopper.h"

#include <algorithm>
#include <limits>
#include <string>

namespace fastres::emulator {

// ---- Order

void Order::activate() {
    if (active()) return;
    const auto n = static_cast<std::size_t>(proxy_) + 1;
    clock_.assign(n, 1);
    fence_.assign(n, 0);
    known_.resize(n);
}

bool Order::knows(int thread, int other, std::uint32_t at) const {
    if (!active() || other < 0) return false;
    const Clocks& known = known_[static_cast<std::size_t>(thread)];
    return !known.empty() && known[static_cast<std::size_t>(other)] >= at;
}

void Order::join(Clocks& into, const Clocks& from) {
    if (into.size() < from.size()) into.resize(from.size(), 0);
    for (std::size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

Order::Clocks Order::release(int thread) {
    activate();
    const auto t = static_cast<std::size_t>(thread);
    Clocks clocks = known_[t];
    clocks.resize(clock_.size(), 0);
    clocks[t] = clock_[t]++;
    return clocks;
}

void Order::acquire(int thread, const Clocks& clocks) {
    activate();
    join(known_[static_cast<std::size_t>(thread)], clocks);
}

void Order::read_by_many(const void* element, int first, std::uint32_t at, int thread) {
    if (!active()) return;
    Clocks& readers = readers_[element];
    if (first >= 0) {
        readers.assign(clock_.size(), 0);
        readers[static_cast<std::size_t>(first)] = at;
    }
    readers.resize(clock_.size(), 0);
    readers[static_cast<std::size_t>(thread)] = clock_[static_cast<std::size_t>(thread)];
}

bool Order::knows_readers(int thread, const void* element) const {
    const auto found = readers_.find(element);
    if (!active() || found == readers_.end()) return false;
    for (std::size_t other = 0; other < found->second.size(); ++other) {
        if (!found->second[other] || static_cast<int>(other) == thread) continue;
        if (!knows(thread, static_cast<int>(other), found->second[other])) return false;
    }
    return true;
}

void Order::fence(int thread) {
    activate();
    const auto t = static_cast<std::size_t>(thread);
    fence_[t] = clock_[t]++;
}

bool Order::fenced(int thread, std::uint32_t at) const {
    return active() && fence_[static_cast<std::size_t>(thread)] >= at;
}

// ---- barriers

Hopper::Hopper(int threads) : order(threads), threads_(static_cast<std::size_t>(threads)) {}

Hopper::Barrier& Hopper::find(Machine& m, SharedArray& array, std::size_t i, const char* what) {
    m.on_read(array, i);  // a race where another thread's init is not behind a block barrier
    const auto found = barriers_.find(&array.trace[i]);
    if (found == barriers_.end()) {
        m.fault(std::string(what) + ": element " + std::to_string(i) + " is no barrier, it was not initialised");
    }
    return found->second;
}

void Hopper::init(Machine& m, SharedArray& array, std::size_t i, std::uint32_t count) {
    order.activate();
    m.on_write(array, i);
    if (count < 1) m.fault("barrier_init: a barrier of no arrivals");
    barriers_[&array.trace[i]] = Barrier{count, count, 0, 0, {}, {}};
}

void Hopper::advance(Barrier& b) {
    if (b.pending || b.bytes) return;
    b.pending = b.expected;
    ++b.completed;
    Order::join(b.released, b.gathered);
    b.gathered.clear();
}

void Hopper::arrive(Machine& m, SharedArray& array, std::size_t i, std::uint32_t bytes) {
    Barrier& b = find(m, array, i, "barrier_arrive");
    if (b.pending == 0) {
        m.fault("barrier_arrive: more than the " + std::to_string(b.expected) + " arrivals of the barrier's phase");
    }
    b.bytes += bytes;
    --b.pending;
    Order::join(b.gathered, order.release(m.thread()));
    advance(b);
}

void Hopper::wait(Machine& m, SharedArray& array, std::size_t i, std::uint32_t parity, Site site) {
    Barrier& b = find(m, array, i, "barrier_wait");
    const std::function<bool()> ready = [&] { return (b.completed & 1) != parity; };
    m.wait_until(ready, "barrier_wait", site);
    order.acquire(m.thread(), b.released);
}

void Hopper::meet(Machine& m, int id, std::uint32_t count, const char* kind, Site site) {
    Barrier& b = meetings_[id];
    if (b.expected && b.expected != count) {
        m.fault(std::string(kind) + ": " + std::to_string(count) + " threads meet where " + std::to_string(b.expected) +
                " did before");
    }
    if (!b.expected) b.expected = b.pending = count;
    Order::join(b.gathered, order.release(m.thread()));
    const std::uint64_t phase = b.completed;
    --b.pending;
    advance(b);
    const std::function<bool()> ready = [&] { return b.completed != phase; };
    m.wait_until(ready, kind, site);
    order.acquire(m.thread(), b.released);
}

// ---- loads

void Hopper::issue(Machine& m, Load load) {
    Barrier& b = find(m, *load.barrier, load.at, "bulk load");
    static_cast<void>(b);
    // A tick of the proxy's own for each load: whoever waited for another one does not know of this.
    const std::uint32_t clock = order.release(order.proxy())[static_cast<std::size_t>(order.proxy())];
    for (const std::size_t chunk : load.chunks) {
        m.on_write(*load.target, chunk);
        Trace& t = load.target->trace[chunk];
        t.writer = order.proxy();
        t.write_clock = clock;
        t.by_copy = true;
        std::fill_n(load.target->bytes.begin() + static_cast<std::ptrdiff_t>(chunk * kChunk), kChunk, kPoison);
    }
    flights_.push_back({std::move(load), clock});
}

bool Hopper::land_one(Machine& m, std::uint64_t random) {
    if (flights_.empty()) return false;
    const auto at = flights_.begin() + static_cast<std::ptrdiff_t>(random % flights_.size());
    const Flight flight = std::move(*at);
    flights_.erase(at);
    const Load& load = flight.load;
    load.fill(load.target->bytes.data());
    Barrier& b = barriers_.at(&load.barrier->trace[load.at]);
    b.bytes -= static_cast<std::int64_t>(load.chunks.size() * kChunk);
    Order::Clocks landed(static_cast<std::size_t>(order.proxy()) + 1, 0);
    landed.back() = flight.clock;
    Order::join(b.gathered, landed);
    static_cast<void>(m);
    advance(b);
    return true;
}

// ---- groups

void Hopper::enqueue(int thread, Kind kind, std::function<void()> run) {
    threads_[static_cast<std::size_t>(thread)].queues[kind].open.push_back(std::move(run));
}

void Hopper::commit(int thread, Kind kind) {
    Queue& q = threads_[static_cast<std::size_t>(thread)].queues[kind];
    q.groups.push_back(std::move(q.open));
    q.open.clear();
}

void Hopper::wait_groups(int thread, Kind kind, std::size_t left) {
    Queue& q = threads_[static_cast<std::size_t>(thread)].queues[kind];
    while (q.groups.size() > left) {
        for (const auto& run : q.groups.front()) run();
        q.groups.erase(q.groups.begin());
    }
}

std::shared_ptr<std::vector<float>> Hopper::accumulators(int thread, float* d, std::size_t n) {
    auto& open = threads_[static_cast<std::size_t>(thread)].accumulators;
    for (Accumulators& a : open) {
        if (a.d != d) continue;
        ++a.products;
        return a.values;
    }
    open.push_back({d, std::make_shared<std::vector<float>>(d, d + n), 1});
    std::fill_n(d, n, std::numeric_limits<float>::quiet_NaN());
    return open.back().values;
}

void Hopper::done_with(int thread, float* d) {
    auto& open = threads_[static_cast<std::size_t>(thread)].accumulators;
    const auto at = std::find_if(open.begin(), open.end(), [&](const Accumulators& a) { return a.d == d; });
    if (--at->products) return;
    std::copy(at->values->begin(), at->values->end(), d);
    open.erase(at);
}

void Hopper::on_async_read(Machine& m, SharedArray& array, std::size_t chunk) {
    m.on_read(array, chunk);
    const Trace& t = array.trace[chunk];
    if (t.written_at && !t.by_copy && !order.fenced(t.writer, t.write_clock)) {
        m.fault("the asynchronous proxy reads element " + std::to_string(chunk) + ", which thread " +
                std::to_string(t.writer) + " wrote without a fence_async after it");
    }
}

void Hopper::on_return(Machine& m) {
    for (const Queue& q : threads_[static_cast<std::size_t>(m.thread())].queues) {
        if (!q.open.empty() || !q.groups.empty()) m.fault("returns with stores or products that it has not waited for");
    }
}

}  // namespace fastres::emulator
