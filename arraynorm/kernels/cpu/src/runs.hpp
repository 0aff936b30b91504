// What all norms are made of: sums over runs of contiguous elements, and writing runs of results.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "simd.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// The type that deviations, products and results are computed in; results in T are rounded to T in any case. Sums and
// statistics are in double.
template <class T>
using Computation = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elements between two places where a set may be cut: 4096 are 8 KiB of float16 to 32 KiB of double.
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
template <class T, class E>
[[gnu::always_inline]] inline void stream(T* p, Pack<E> a, Full) {
    stream(p, a);
}
template <class E>
[[gnu::always_inline]] inline Pack<E> first_of(Pack<E> a, Full) {
    return a;
}
template <class E, int half>
[[gnu::always_inline]] inline Pack<E> first_of(Pack<E> a, Half<half>) {
    return a;
}

// A mean as loops subtract it, and what that leaves out. A rounded mean alone would make all deviations wrong by its
// rounding error: `rest` is made up for where sums end and in the constant that a map adds, both in double.
template <class E>
struct Mean {
    E rounded;
    double rest;
    explicit Mean(double mean) : rounded(E(mean)), rest(std::isfinite(mean) ? mean - double(rounded) : 0) {}

    // The constant of (x - mean) * scale + constant, where x - rounded stands for x - mean.
    double constant(double scale, double constant) const {
        const double exact = constant - rest * scale;  // NaN where scale is infinite
        return rest == 0 ? constant : exact;
    }
};

// -- sums -----------------------------------------------------------------------------------------------------

struct Sums {
    double first = 0, second = 0;

    void add(const Sums& other) {
        first += other.first;
        second += other.second;
    }
};

// What some elements add to two sums: `first`, and a * b.
template <class E>
struct Terms {
    Pack<E> first, a, b;
};
template <class E>
Terms(Pack<E>, Pack<E>, Pack<E>) -> Terms<E>;

// Packs that are added up in E on their way to a sum in double: so few that their rounding errors, which are those of
// four additions, have random signs and as many as there are groups, are far below the error of one float.
inline constexpr int group_size = 8;

// Two sums of packs in E.
template <class E>
struct Partial {
    Pack<E> first{E(0)}, second{E(0)};
    Partial() = default;
    [[gnu::always_inline]] explicit Partial(const Terms<E>& t) : first(t.first), second(t.a * t.b) {}
    [[gnu::always_inline]] void add(const Terms<E>& t) {
        first = first + t.first;
        second = fma(t.a, t.b, second);
    }
};

// Two sums over runs, or the second alone.
template <bool both = true>
class Accumulators {
public:
    // terms(i, count) are those of the elements from i, zero past count; they are read from `streams`.
    template <class TermsOf, class... T>
    [[gnu::always_inline]] void run(int64_t n, TermsOf terms, const T*... streams) {
        using E = typename decltype(terms(0, Full{}).first)::Element;
        auto two = [&](int64_t i, auto take) __attribute__((always_inline)) {
            if constexpr (is_in_any_order<TermsOf> && (is_cheaper_as_pair<T, E> && ...)) {
                take(terms(i, Half<0>{}), terms(i, Half<1>{}));
            } else {
                take(terms(i, Full{}), terms(i + lanes, Full{}));
            }
        };
        int64_t i = 0;
        const bool is_long = n >= chunk_size;
        for (; i + group_size * lanes <= n; i += group_size * lanes) {
            (fetch(streams + i + (is_long ? elements_far_ahead<T> : elements_ahead<T>)), ...);
            two(i, [&](const auto& first, const auto& second) __attribute__((always_inline)) {
                Partial even(first), odd(second);
                for (int k = 2; k < group_size; k += 2)
                    two(i + k * lanes, [&](const auto& first, const auto& second)
                                           __attribute__((always_inline)) { even.add(first), odd.add(second); });
                add(even.first + odd.first, even.second + odd.second);
            });
        }
        // Less than a group, and perhaps all that there is: of float32 rounded no more than it must be; the errors of
        // these few additions are none to a result in 16 bits.
        if constexpr (((sizeof(T) == 2) && ...)) {
            if (i == n) return;
            Partial<E> even, odd;
            for (; i + 2 * lanes <= n; i += 2 * lanes)
                two(i, [&](const auto& first, const auto& second)
                           __attribute__((always_inline)) { even.add(first), odd.add(second); });
            if (i + lanes <= n) even.add(terms(i, Full{})), i += lanes;
            if (i < n) odd.add(terms(i, n - i));
            add(even.first + odd.first, even.second + odd.second);
        } else {
            for (; i + lanes <= n; i += lanes) add(Partial(terms(i, Full{})));
            if (i < n) add(Partial(terms(i, n - i)));
        }
    }

    Sums total() const { return {sum(first_), sum(second_)}; }

private:
    template <class E>
    [[gnu::always_inline]] void add(Pack<E> first, Pack<E> second) {
        if constexpr (both) first_ = first_ + widened(first);
        second_ = second_ + widened(second);
    }
    template <class E>
    [[gnu::always_inline]] void add(const Partial<E>& partial) {
        add(partial.first, partial.second);
    }
    template <class T>
    [[gnu::always_inline]] static void fetch(const T* p) {
        for (int64_t i = 0; i < group_size * lanes; i += int64_t(64 / sizeof(T))) __builtin_prefetch(p + i, 0, 3);
    }

    Pack<double> first_{0.0}, second_{0.0};
};

// -- moments --------------------------------------------------------------------------------------------------

// Of n values: their mean, as a distance from a pivot, and the sum of their squared deviations from it. The mean
// itself, rounded, would be wrong by more than the deviations of values that lie close together far from zero.
struct Moments {
    double n = 0, pivot = 0, shift = 0, m2 = 0;

    double mean() const { return pivot + shift; }

    // Chan, Golub & LeVeque 1979, equation 1.5: no square of a mean is subtracted, equal constants merge to themselves.
    void add(const Moments& other) {
        if (other.n == 0) return;
        if (n == 0) {
            *this = other;
            return;
        }
        const double total = n + other.n, delta = (other.pivot - pivot) + (other.shift - shift);
        shift += delta * (other.n / total);
        m2 += other.m2 + delta * delta * (n * (other.n / total));
        n = total;
    }
};

// Sums of d and d^2, d = x - pivot, over all runs of a block; runs(f) calls f(start, length, fetched...) for each,
// where what else memory is to bring meanwhile may be named. Not `centered`, of x^2 alone.
template <class E, class T, bool centered = true, class Runs>
[[gnu::flatten]] Sums sums_about(E pivot, const Runs& runs) {
    const Pack<E> k(pivot);
    Accumulators<centered> sums;
    runs([&](const T* x, int64_t n, const auto*... fetched) __attribute__((always_inline)) {
        sums.run(n, InAnyOrder{[=](int64_t i, auto count) __attribute__((always_inline)) {
                     // of the deviations, for a pivot that T can't hold
                     const Pack<E> value = load<E>(x + i, count), d = first_of(centered ? value - k : value, count);
                     return Terms{d, d, d};
                 }},
                 x, fetched...);
    });
    return sums.total();
}

// Whether a sum of squares in E is neither out of range nor mostly cancelled by the shift of the pivot. Zero may be
// what has become of small ones. (Without branches, as what follows: loops over channels are to be vectorized.)
template <class E>
inline bool is_reliable(Sums sums, double n) {
    const bool in_range = std::is_same_v<E, double> ? std::isfinite(sums.second) & std::isfinite(sums.first)
                                                    : (sums.second > 1e-25) & (sums.second < 1e30);
    return in_range & (sums.first * sums.first <= 0.75 * n * sums.second);
}

// Where sums of deviations start from: the mean of the first elements, up to eight of them. A power of two, so that the
// mean of equal elements is exactly that element.
inline int64_t number_of_pivots(int64_t n) {
    int64_t number = 1;
    while (2 * number <= std::min<int64_t>(n, 8)) number *= 2;
    return number;
}

// As T has it. Elements of T differ from that by multiples of their last place, which float adds up exactly for long;
// from any other number they all differ by the same odd bits, and a sum rounds those off to the same side each time.
template <class T>
inline double pivot_of(const T* x, int64_t n) {
    const int64_t number = number_of_pivots(n);
    double mean = 0;
    if (number == lanes) {
        mean = sum(load<Computation<T>>(x)) * (1. / lanes);
    } else {
        for (int64_t i = 0; i < number; ++i) mean += double(to_float(x[i]));
        mean /= double(number);
    }
    if constexpr (sizeof(T) == 2) {
        T stored[lanes];
        store(stored, Pack<float>(float(mean)));
        return double(first_lane(load<float>(stored)));
    } else {
        return double(T(mean));
    }
}

// The moments of n elements by the sums of their deviations from a center and of those' squares.
inline Moments moments_about(double center, double n, Sums sums) {
    const double shift = sums.first / n;
    double m2 = sums.second - sums.first * shift;
    // squares beyond double: as infinity they would make y quietly zero
    if (std::isinf(m2)) m2 = std::numeric_limits<double>::quiet_NaN();
    return {n, center, std::isfinite(center) ? shift : 0, m2};
}

// The moments of n elements in two passes in double: about `first`, one of them, then about the mean that this gives.
template <class T, class Runs>
Moments two_pass_moments(double n, double first, const Runs& runs) {
    const double mean = first + sums_about<double, T>(first, runs).first / n;
    return moments_about(mean, n, sums_about<double, T>(mean, runs));
}

// The moments that n elements have by their sums about a pivot; or by two passes, should that lie far from the rest or
// a square be out of E's range. Equal elements deviate by exactly zero at any magnitude.
template <class E, class T, class Runs>
inline Moments moments_by(Sums sums, double pivot, double n, const T* first, const Runs& runs) {
    if (!is_reliable<E>(sums, n)) return two_pass_moments<T>(n, double(to_float(*first)), runs);
    return moments_about(pivot, n, sums);
}

// The moments of the elements of some runs, the sums of which begin in E.
template <class T, class E = Computation<T>, class Runs>
inline Moments moments_of(const Runs& runs) {
    const T* first = nullptr;
    int64_t n = 0, first_length = 0;
    runs([&](const T* run, int64_t length, const auto*...) {
        if (!first) first = run, first_length = length;
        n += length;
    });
    if (n == 0) return {};
    const double pivot = pivot_of(first, first_length);
    return moments_by<E>(sums_about<E, T>(E(pivot), runs), pivot, double(n), first, runs);
}

// -- what fits float ------------------------------------------------------------------------------------------

// Whether a factor neither overflows nor underflows in a product of floats. NaN does neither: whoever shares a decision
// with a NaN is not to notice.
template <class V>
inline bool is_moderate(V factor) {
    const V size = std::abs(factor), smallest(0x1p-50f), largest(0x1p50f);
    return (size == 0) | ((size > smallest) & (size < largest)) | (size != size);
}

// Whether (x - mean) * scale can be computed in E, for any x of which these are statistics.
template <class E>
inline bool is_tame(double mean, double scale) {
    return std::is_same_v<E, double> || std::isnan(scale) | ((std::abs(mean) < 0x1p50) & is_moderate(scale));
}

// Whether sums of products in E have neither overflowed nor underflowed; those of zeros alone are asked for again.
template <class E>
inline bool is_representable(Sums sums) {
    if (std::is_same_v<E, double>) return true;
    const double size = std::abs(sums.second);
    return std::isfinite(sums.first) & (size < 1e30) & (size > 1e-30);
}

// f(E{}) where E will do, else f(double{}).
template <class E, class F>
inline auto computed(bool tame, F f) {
    return tame ? f(E{}) : f(double{});
}

// -- writing --------------------------------------------------------------------------------------------------

// Elements from p to the next cache line.
template <class T>
inline int64_t to_line(const T* p) {
    return (64 - (reinterpret_cast<uintptr_t>(p) & 63)) % 64 / sizeof(T);
}

// y[i] = value(i, count, streams) for i in [0, n). `streaming` is around the cache: where input and output exceed it,
// for then a cached store reads what it replaces; `streams` tells whether these elements are. What this thread most
// likely reads next lies `ahead` elements behind x, or nowhere if that is 0: as many of it are fetched while the stores
// of this run keep the memory busy.
template <class T, class Value>
[[gnu::always_inline]] inline void write_run(T* y, int64_t n, bool streaming, const T* x, int64_t ahead, Value value) {
    constexpr int64_t line = 64 / sizeof(T);
    constexpr std::true_type streams;
    constexpr std::false_type stays;
    const T* next = ahead ? x + ahead : nullptr;
    int64_t i = 0;
    auto write_line = [&](auto way) __attribute__((always_inline)) {
        if constexpr (line == lanes) {  // of double
            way.value ? stream(y + i, value(i, Full{}, way)) : store(y + i, value(i, Full{}, way));
        } else {
            for (int64_t k = 0; k < line; k += 2 * lanes)
                if constexpr (has_pairs<T> && is_in_any_order<Value>) {
                    put(y + i + k, value(i + k, Two{}, way), way);
                } else {
                    const auto first = value(i + k, Full{}, way), second = value(i + k + lanes, Full{}, way);
                    put(y + i + k, first, second, way);
                }
        }
    };
    auto write_some = [&](int64_t count, auto way) __attribute__((always_inline)) {
        if (count == 0) return;
        way.value ? stream(y + i, value(i, count, way), count) : store(y + i, value(i, count, way), count);
        i += count;
    };
    auto write_packs = [&](int64_t end, auto way) __attribute__((always_inline)) {
        for (; i + lanes <= end; i += lanes)
            way.value ? stream(y + i, value(i, Full{}, way)) : store(y + i, value(i, Full{}, way));
    };
    const bool is_long = n >= 4 * line;
    if (streaming && is_long) {
        write_some(to_line(y) % lanes, streams), write_packs(to_line(y), streams);
        for (; i + line <= n; i += line) {
            if (next) prefetch(next + i);
            write_line(streams);
        }
        write_packs(n, streams), write_some(n - i, streams);
        return;
    }
    if (is_long) write_some(to_line(y) % lanes, stays), write_packs(to_line(y), stays);
    for (; i + line <= n; i += line) {
        if (next) prefetch(next + i);
        prefetch_to_write(further_on(y + i));
        write_line(stays);
    }
    write_packs(n, stays), write_some(n - i, stays);
}

}  // namespace arraynorm::ARRAYNORM_ISA
