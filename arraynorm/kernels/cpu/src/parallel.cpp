// Why a pool of our own: where another process competes for the cores, a pool whose caller waits for all its threads
// (OpenMP's) waits for a thread that is not running, for milliseconds. Here the caller takes items too, closes the job
// when there are none left, and waits only for workers that have joined. numba's workqueue aborts when two Python
// threads enter; here the second one runs its job alone. TBB would do as well, and is a dependency of 10 MB.
#include "parallel.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace arraynorm {
namespace {

// Below this much memory waking a worker costs more than it saves: 256 KiB take some 10 us.
constexpr int64_t serial_bytes = 256 * 1024;

// Looks for work before a worker goes to sleep, about 50 us: layers follow each other faster than a sleeper wakes.
constexpr int spins_before_sleep = 2000;
constexpr int spins_before_yield = 2000;

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

class Pool {
public:
    std::mutex busy;  // held by the caller whose job is running

    void run(int threads, int64_t items, void (*body)(void*, int64_t), void* context) {
        hire(threads - 1);
        body_ = body;
        context_ = context;
        welcome_ = threads - 1;
        number_of_shares_ = std::min(threads, most_shares);
        for (int i = 0; i < number_of_shares_; ++i) {
            shares_[i].next.store(items * i / number_of_shares_, std::memory_order_relaxed);
            shares_[i].end = items * (i + 1) / number_of_shares_;
        }
        phase_.fetch_add(1);  // odd: open
        if (sleepers_.load() > 0) {
            {
                std::lock_guard lock(sleep_);
            }
            wake_.notify_all();
        }
        take_items(0);
        phase_.fetch_add(1);  // even: closed; who has joined is waited for, who comes now finds it closed
        for (int spins = 0; joined_.load() > 0; ++spins)
            spins < spins_before_yield ? relax() : std::this_thread::yield();
    }

private:
    void hire(int workers) {
        for (; workers_ < workers; ++workers_) try {
                // detached: it lives as long as the process, which ends without asking it
                std::thread(&Pool::work, this, workers_).detach();
            } catch (const std::system_error&) {  // no more threads to be had: those there are do the work
                return;
            }
    }

    // A thread takes the items of its own share, and then those that are left of the others'. So neighbouring items are
    // mostly one thread's, as they are again in the next job over the same memory: what it reads is in its own cache,
    // and two threads seldom write to either side of a cache line. One after the other for whoever comes first took up
    // to 1.25 times as long.
    void take_items(int own) {
        for (int i = 0; i < number_of_shares_; ++i) {
            Share& share = shares_[(own + i) % number_of_shares_];
            for (int64_t item; (item = share.next.fetch_add(1)) < share.end;) body_(context_, item);
        }
    }

    void work(int number) {
        for (uint64_t seen = 0;;) {
            const uint64_t phase = next_open_phase(seen);
            joined_.fetch_add(1);
            // Either this sees that the job has been closed, or its caller sees that this has joined.
            if (phase_.load() == phase && number < welcome_) take_items(number + 1);
            joined_.fetch_sub(1);
            seen = phase;
        }
    }

    uint64_t next_open_phase(uint64_t seen) {
        auto is_new = [&](uint64_t phase) { return phase != seen && phase % 2 == 1; };
        for (int spins = 0; spins < spins_before_sleep; ++spins) {
            if (uint64_t phase = phase_.load(); is_new(phase)) return phase;
            relax();
        }
        uint64_t phase;
        std::unique_lock lock(sleep_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return is_new(phase = phase_.load()); });
        sleepers_.fetch_sub(1);
        return phase;
    }

    struct alignas(64) Share {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };
    static constexpr int most_shares = 64;

    int workers_ = 0;
    std::array<Share, most_shares> shares_;
    int number_of_shares_ = 0;
    void (*body_)(void*, int64_t) = nullptr;
    void* context_ = nullptr;
    int welcome_ = 0;
    std::atomic<uint64_t> phase_{0};
    std::atomic<int> joined_{0}, sleepers_{0};
    std::mutex sleep_;
    std::condition_variable wake_;
};

std::atomic<int> threads_{1};

Pool*& pool() {
    static Pool* instance = [] {
#if !defined(_WIN32)
        // Threads do not survive a fork: the child starts with a pool of its own, and leaves the parent's alone.
        pthread_atfork(nullptr, nullptr, [] { pool() = new Pool; });
#endif
        return new Pool;
    }();
    return instance;
}

}  // namespace

int num_threads() { return threads_.load(std::memory_order_relaxed); }

void set_num_threads(int threads) { threads_.store(threads, std::memory_order_relaxed); }

void parallel_for(int64_t items, int64_t bytes, void (*body)(void*, int64_t), void* context) {
    const int threads = int(items < num_threads() ? items : num_threads());
    if (threads > 1 && bytes >= serial_bytes) {
        Pool& p = *pool();
        // A second caller, from another thread or from within an item, does its work alone.
        if (std::unique_lock lock(p.busy, std::try_to_lock); lock.owns_lock())
            return p.run(threads, items, body, context);
    }
    for (int64_t item = 0; item < items; ++item) body(context, item);
}

}  // namespace arraynorm
