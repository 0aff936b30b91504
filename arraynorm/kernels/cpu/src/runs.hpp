// What all norms are made of: sums over runs of contiguous elements, and writing runs of results.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "simd.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// The type that results in T are computed in. Sixteen-bit formats have so few digits that float's errors don't show in
// one; float32 results are right to half an ulp only from double.
template <class T>
using Computation = std::conditional_t<sizeof(T) == 2, float, double>;

// The type of sums: what they make, statistics, buffers and parameters' gradients, is in float32 at least.
using Summation = double;

// Elements between two additions to a double: 4096 are 8 KiB of float16 to 32 KiB of double, so that a second look at
// them, where it is needed, hits the first-level cache.
inline constexpr int64_t chunk_size = 4096;

struct Full {};  // a whole pack, where a number of elements may stand

template <class E, class T>
[[gnu::always_inline]] inline Pack<E> load(const T* p, Full) {
    return load<E>(p);
}
template <class T, class E>
[[gnu::always_inline]] inline void store(T* p, Pack<E> a, Full) {
    store(p, a);
}

// The elements past the end are copies of the first, as good or bad as the rest.
template <class E, class T, class Count>
[[gnu::always_inline]] inline Pack<E> load_filled(const T* p, Count count) {
    if constexpr (std::is_same_v<Count, Full>)
        return load<E>(p);
    else
        return load<E>(p, count, *p);
}

// A mean, to be subtracted without being rounded: in float it is a pair, for a rounded mean would make the deviations
// wrong by its rounding error.
template <class E>
struct Mean {
    Pack<E> high, low;
    explicit Mean(double mean) : high(E(mean)), low(E(mean - double(E(mean)))) {}
    [[gnu::always_inline]] Pack<E> deviation(Pack<E> x) const {
        if constexpr (std::is_same_v<E, double>)
            return x - high;
        else
            return (x - high) - low;
    }
};

// -- moments --------------------------------------------------------------------------------------------------

// Of n values: their mean, as a distance from a pivot, and the sum of their squared deviations from it. The mean itself,
// rounded, would be wrong by more than the deviations of values that lie close together far from zero.
struct Moments {
    double n = 0, pivot = 0, shift = 0, m2 = 0;

    double mean() const { return pivot + shift; }

    // What another part of so many values weighs in the union.
    struct Weights {
        double total, of_delta, of_square;
        Weights(double n, double other) : total(n + other), of_delta(other / total), of_square(n * of_delta) {}
    };

    // Chan, Golub & LeVeque 1979, equation 1.5: no square of a mean is subtracted, equal constants merge to themselves.
    void add(const Moments& other) {
        if (other.n != 0) add(other, Weights(n, other.n));
    }
    void add(const Moments& other, const Weights& weights) {
        if (n == 0) {
            *this = other;
            return;
        }
        const double delta = (other.pivot - pivot) + (other.shift - shift);
        shift += delta * weights.of_delta;
        m2 += other.m2 + delta * delta * weights.of_square;
        n = weights.total;
    }
};

struct Sums {
    double first = 0, second = 0;

    void add(const Sums& other) {
        first += other.first;
        second += other.second;
    }
};

// Two sums over packs, in as many accumulators as hide the latency of an addition.
template <class E>
struct Accumulators {
    static constexpr int unroll = 4 / Pack<E>::parts > 1 ? 4 / Pack<E>::parts : 2;
    Pack<E> first[unroll], second[unroll];

    Accumulators() {
        for (int k = 0; k < unroll; ++k) first[k] = second[k] = Pack<E>(0);
    }

    // add(first, second, i, count) adds the elements from i
    template <class Add>
    void run(int64_t n, Add add) {
        int64_t i = 0;
        for (; i + unroll * lanes <= n; i += unroll * lanes)
            for (int k = 0; k < unroll; ++k) add(first[k], second[k], i + k * lanes, Full{});
        for (; i + lanes <= n; i += lanes) add(first[0], second[0], i, Full{});
        if (i < n) add(first[0], second[0], i, n - i);
    }

    Sums total() const {
        Pack<E> a = first[0], b = second[0];
        for (int k = 1; k < unroll; ++k) a = a + first[k], b = b + second[k];
        return {sum(a), sum(b)};
    }
};

// Sums of d and d^2, d = x - pivot, over all runs of a block; runs(f) calls f(start, length) for each.
template <class E, class T, class Runs>
inline Sums sums_about(E pivot, const Runs& runs) {
    const Pack<E> k(pivot);
    Accumulators<E> sums;
    runs([&](const T* x, int64_t n) {
        sums.run(n, [&](Pack<E>& s, Pack<E>& q, int64_t i, auto count) {
            Pack<E> d;
            if constexpr (std::is_same_v<decltype(count), Full>) {
                d = load<E>(x + i) - k;
            } else {
                E padded[lanes] = {};  // of the deviations, for a pivot that T can't hold
                Pack<E> whole = load<E>(x + i, count) - k;
                std::memcpy(padded, &whole, count * sizeof(E));
                std::memcpy(&d, padded, sizeof d);
            }
            s = s + d;
            q = fma(d, d, q);
        });
    });
    return sums.total();
}

// Whether a sum of squares in E is neither out of range nor mostly cancelled by the shift of the pivot.
template <class E>
inline bool is_reliable(Sums sums, double n) {
    const bool in_range =
        std::is_same_v<E, double> || sums.second == 0 || (sums.second > 1e-25 && sums.second < 1e30);
    return in_range && sums.first * sums.first <= 0.75 * n * sums.second;
}

// Where sums of deviations start from: the mean of the first elements, up to eight of them. A power of two, so that the
// mean of equal elements is exactly that element.
inline int64_t number_of_pivots(int64_t n, int64_t most) {
    int64_t number = 1;
    while (2 * number <= std::min(n, most)) number *= 2;
    return number;
}

template <class T>
inline double pivot_of(const T* x, int64_t n) {
    const int64_t number = number_of_pivots(n, 8);
    double sum = 0;
    for (int64_t i = 0; i < number; ++i) sum += double(to_float(x[i]));
    return sum / double(number);
}

// A pivot as T has it. Elements of T differ from that by multiples of their last place, which float adds up exactly for
// long; from any other number they all differ by the same odd bits, and a sum rounds those off to the same side each time.
template <class T, class E>
[[gnu::always_inline]] inline Pack<E> representable(Pack<E> pivots) {
    T stored[lanes];
    store(stored, pivots);
    return load<E>(stored);
}
template <class T, class E>
inline E representable(E pivot) {
    const Pack<E> pivots = representable<T>(Pack<E>(pivot));
    E first;
    std::memcpy(&first, &pivots, sizeof first);
    return first;
}

// The moments of n elements in two passes in double: about `first`, one of them, then about the mean that this gives.
template <class T, class Runs>
Moments two_pass_moments(double n, double first, const Runs& runs) {
    Sums sums = sums_about<double, T>(first, runs);
    const double mean = first + sums.first / n;
    sums = sums_about<double, T>(mean, runs);
    double m2 = sums.second - sums.first * sums.first / n;
    // squares beyond double: as infinity they would make y quietly zero
    if (std::isinf(m2)) m2 = std::numeric_limits<double>::quiet_NaN();
    return {n, mean, std::isfinite(mean) ? sums.first / n : 0, m2};
}

// The moments of the n elements of a block's runs, in one pass about a pivot; or in two, should that lie far from the
// rest. Equal elements deviate by exactly zero at any magnitude.
template <class T, class Runs>
inline Moments moments_of(const Runs& runs) {
    using E = Summation;
    const T* first = nullptr;
    int64_t n = 0, first_length = 0;
    runs([&](const T* run, int64_t length) {
        if (!first) first = run, first_length = length;
        n += length;
    });
    if (n == 0) return {};
    const E pivot = representable<T>(E(pivot_of(first, first_length)));
    const Sums sums = sums_about<E, T>(pivot, runs);
    if (!is_reliable<E>(sums, double(n))) return two_pass_moments<T>(double(n), double(to_float(*first)), runs);
    return {double(n), double(pivot), sums.first / double(n), sums.second - sums.first * sums.first / double(n)};
}

// 1 / sqrt(var + eps), and 0 where that is 1/0: a set without deviation normalizes to zero.
inline double reciprocal_std(double var, double eps) {
    const double v = var + eps;
    return v == 0 ? 0 : 1 / std::sqrt(v);
}

// Whether (x - mean) * scale can be computed in float, for any x of which these are statistics.
inline bool is_tame(double mean, double scale) {
    const double size = std::abs(scale);
    return std::abs(mean) < 1e15 && (size == 0 || (size > 1e-15 && size < 1e15));
}

// Whether sums of products in E have neither overflowed nor underflowed.
template <class E>
inline bool is_representable(Sums sums) {
    if (std::is_same_v<E, double>) return true;
    const double size = std::abs(sums.second);
    return std::isfinite(sums.first) && size < 1e30 && (size == 0 || size > 1e-30);
}

// -- writing --------------------------------------------------------------------------------------------------

// Elements from p to the next cache line.
template <class T>
inline int64_t to_line(const T* p) {
    return (64 - (reinterpret_cast<uintptr_t>(p) & 63)) % 64 / sizeof(T);
}

// How results reach memory.
struct Writing {
    bool streaming;  // around the cache: where input and output exceed it, for then a cached store reads what it replaces
};

// y[i] = value(i, count) for i in [0, n). `ahead`, which may be null, is what this thread will read next: as many bytes
// of it are fetched while the stores of this run keep the memory busy.
template <class T, class Value>
inline void write_run(T* y, int64_t n, Writing how, const void* ahead, Value value) {
    constexpr int64_t line = 64 / sizeof(T), packs = line / lanes;
    const char* next = static_cast<const char*>(ahead);
    int64_t i = 0;
    if (how.streaming && n >= 4 * line) {
        for (const int64_t head = to_line(y); i < head;) {
            const int64_t count = std::min<int64_t>(lanes, head - i);
            store(y + i, value(i, count), count);
            i += count;
        }
        for (; i + line <= n; i += line) {
            if (next) prefetch(next + i * sizeof(T));
            for (int k = 0; k < packs; ++k) stream(y + i + k * lanes, value(i + k * lanes, Full{}));
        }
    } else {
        for (; i + line <= n; i += line) {
            if (next) prefetch(next + i * sizeof(T));
            for (int k = 0; k < packs; ++k) store(y + i + k * lanes, value(i + k * lanes, Full{}));
        }
    }
    for (; i + lanes <= n; i += lanes) store(y + i, value(i, Full{}));
    if (i < n) store(y + i, value(i, n - i), n - i);
}

}  // namespace arraynorm::ARRAYNORM_ISA
