// A kernel's own vectors, through which its loops go.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

namespace arraynorm {

// Memory from the beginning of a cache line: what malloc gives may begin 16 bytes past one, and then half of all loads
// and stores of 32 bytes reach into two lines. By hand, for aligned operator new takes longer than small calls do.
template <class V>
struct FromLine {
    using value_type = V;

    FromLine() = default;
    template <class U>
    FromLine(const FromLine<U>&) {}

    V* allocate(size_t number) {
        // a line is left over, in whose last byte before the values stands how much of it lies there
        auto* whole = static_cast<unsigned char*>(::operator new(number * sizeof(V) + line));
        const size_t skipped = line - reinterpret_cast<uintptr_t>(whole) % line;
        whole[skipped - 1] = static_cast<unsigned char>(skipped);
        return reinterpret_cast<V*>(whole + skipped);
    }
    void deallocate(V* values, size_t) {
        auto* first = reinterpret_cast<unsigned char*>(values);
        ::operator delete(first - first[-1]);
    }
    // A vector of a size has no values before it is given some: to set them all to zero would be one thread's work.
    template <class U, class... Arguments>
    void construct(U* place, Arguments&&... arguments) {
        if constexpr (sizeof...(Arguments) == 0)
            ::new (static_cast<void*>(place)) U;
        else
            ::new (static_cast<void*>(place)) U(std::forward<Arguments>(arguments)...);
    }
    friend bool operator==(FromLine, FromLine) { return true; }

private:
    static constexpr size_t line = 64;
};
template <class V>
using Scratch = std::vector<V, FromLine<V>>;

}  // namespace arraynorm
