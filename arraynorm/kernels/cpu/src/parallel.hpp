// The thread pool: `parallel_for` runs independent items on the caller and on whichever workers come in time.
//
// Which thread runs an item is left to chance, so items must write to places of their own, and how work is cut into
// items must not depend on the number of threads: then neither do the bits.
#pragma once

#include <cstdint>
#include <type_traits>

namespace arraynorm {

// The most threads that a call may use, the caller among them.
int num_threads();
void set_num_threads(int threads);

// Calls body(context, item) for every item in [0, items); `bytes` of memory are touched in all.
void parallel_for(int64_t items, int64_t bytes, void (*body)(void*, int64_t), void* context);

template <class F>
void parallel_for(int64_t items, int64_t bytes, F&& f) {
    parallel_for(
        items, bytes, [](void* context, int64_t item) { (*static_cast<std::remove_reference_t<F>*>(context))(item); },
        &f);
}

}  // namespace arraynorm
