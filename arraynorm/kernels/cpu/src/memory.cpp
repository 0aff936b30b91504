#include "memory.hpp"

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL arraynorm_ARRAY_API
#define NO_IMPORT_ARRAY
#include <numpy/arrayobject.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace arraynorm {
namespace {

constexpr size_t line = 64, page = 4096;
// Blocks below are left to malloc, which recycles them itself; and those up from huge_page ask for huge pages.
constexpr size_t recycled_from = size_t(1) << 20, huge_page = size_t(2) << 20;
// From here on it matters where in a page a block begins.
constexpr size_t placed_from = size_t(32) << 10;

// Before every block, in a line of its own.
struct alignas(line) Header {
    void* memory;  // where malloc's block begins
    size_t capacity;
};
static_assert(sizeof(Header) == line);

Header* header_of(void* data) { return static_cast<Header*>(data) - 1; }

thread_local std::span<const void* const> read_beside;

// Bytes into a page at which a block is written fastest. A load waits for a store that has not left the processor yet
// if their addresses agree in the last 12 bits. A loop that reads x and writes y runs about 1 KiB ahead with its loads:
// y should not begin that little behind where x does, within a page. Loops took up to twice as long there.
size_t place() {
    constexpr size_t loads_ahead = 1024, step = 256;
    size_t best = 0, best_distance = 0;
    for (size_t at = 0; !read_beside.empty() && at < page; at += step) {
        size_t nearest = page;
        for (const void* address : read_beside) {
            const size_t distance = (at - reinterpret_cast<uintptr_t>(address) - loads_ahead / 2) % page;
            nearest = std::min({nearest, distance, page - distance});
        }
        if (nearest > best_distance) best = at, best_distance = nearest;
    }
    return best;
}

// The data of a block in malloc's.
void* placed(void* memory, size_t capacity) {
    uintptr_t data = reinterpret_cast<uintptr_t>(memory) + sizeof(Header);
    if (capacity >= placed_from) data += (place() - data) % page / line * line;
    Header* header = header_of(reinterpret_cast<void*>(data));
    *header = {memory, capacity};
    return header + 1;
}

class Pool {
public:
    void* take(size_t size) {
        const size_t capacity = rounded(size);
        if (capacity >= recycled_from) {
            std::lock_guard lock(mutex_);
            // the newest that fits and does not waste more than an eighth
            for (auto it = kept_.begin(); it != kept_.end(); ++it) {
                const Header block = *it;
                if (block.capacity >= capacity && block.capacity - capacity <= capacity / 8) {
                    kept_bytes_ -= block.capacity;
                    kept_.erase(it);
                    return placed(block.memory, block.capacity);
                }
            }
        }
        return fresh(capacity);
    }

    void give_back(void* data) {
        const Header block = *header_of(data);
        if (block.capacity < recycled_from) return std::free(block.memory);
        std::lock_guard lock(mutex_);
        if (block.capacity > limit_) return std::free(block.memory);
        try {
            kept_.push_front(block);
        } catch (const std::bad_alloc&) {  // NumPy, which frees the array, is C
            return std::free(block.memory);
        }
        kept_bytes_ += block.capacity;
        trim(limit_);
    }

    void set_limit(size_t bytes) {
        std::lock_guard lock(mutex_);
        limit_ = bytes;
        trim(limit_);
    }
    void release() {
        std::lock_guard lock(mutex_);
        trim(0);
    }
    size_t limit() const { return limit_; }
    size_t kept() const { return kept_bytes_; }
    std::mutex& mutex() { return mutex_; }

private:
    static size_t rounded(size_t size) {
        const size_t unit = size >= recycled_from ? 65536 : line;
        return (size + unit - 1) / unit * unit;
    }

    static void* fresh(size_t capacity) {
        const bool huge = capacity >= 2 * huge_page;
        const size_t all = sizeof(Header) + capacity + (capacity >= placed_from ? page : 0);
        void* memory = nullptr;
        if (posix_memalign(&memory, huge ? huge_page : line, all)) return nullptr;
#if defined(__linux__)
        if (huge) madvise(memory, all, MADV_HUGEPAGE);
#endif
        return placed(memory, capacity);
    }

    void trim(size_t limit) {
        while (kept_bytes_ > limit) {
            kept_bytes_ -= kept_.back().capacity;
            std::free(kept_.back().memory);
            kept_.pop_back();
        }
    }

    std::mutex mutex_;
    std::list<Header> kept_;  // newest first
    size_t kept_bytes_ = 0, limit_ = size_t(512) << 20;
};

Pool& pool() {
    static Pool* instance = [] {
        Pool* made = new Pool;
#if !defined(_WIN32)
        // a child forked while another thread holds the lock would wait for it for ever
        pthread_atfork([] { pool().mutex().lock(); }, [] { pool().mutex().unlock(); }, [] { pool().mutex().unlock(); });
#endif
        return made;
    }();
    return *instance;
}

void* allocate(void*, size_t size) { return pool().take(std::max<size_t>(size, 1)); }

void* allocate_zeros(void*, size_t number, size_t size) {
    if (size && number > SIZE_MAX / size) return nullptr;
    void* data = allocate(nullptr, number * size);
    if (data) std::memset(data, 0, number * size);
    return data;
}

void give_back(void*, void* data, size_t) {
    if (data) pool().give_back(data);
}

void* reallocate(void*, void* data, size_t size) {
    void* other = allocate(nullptr, size);
    if (data && other) {
        std::memcpy(other, data, std::min(size, header_of(data)->capacity));
        pool().give_back(data);
    }
    return other;
}

PyDataMem_Handler handler = {"arraynorm", 1, {nullptr, allocate, allocate_zeros, reallocate, give_back}};

}  // namespace

std::span<const void* const> exchange_read_beside(std::span<const void* const> addresses) {
    return std::exchange(read_beside, addresses);
}

PyObject* memory_handler() {
    static PyObject* capsule = PyCapsule_New(&handler, "mem_handler", nullptr);
    return capsule;
}

void set_memory_limit(int64_t bytes) { pool().set_limit(size_t(bytes)); }
int64_t memory_limit() { return int64_t(pool().limit()); }
int64_t memory_kept() { return int64_t(pool().kept()); }
void release_memory() { pool().release(); }

}  // namespace arraynorm
