// A matrix whose columns are summed: rows of adjacent elements, of which S to a channel lie side by side.
//
// Some rows at a time, so that a column's sums and parameters are loaded and stored once for many elements; and a cache line
// of a row at a time, since rows that lie a multiple of 4 KiB apart share their places in the cache.
#pragma once

#include <array>
#include <vector>

#include "runs.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// step(row, number of rows, first column, number of packs, count) for all columns: `packs` packs at once, of the first of
// `most` rows at a time. Both numbers are constants.
template <int most, int packs, class Step>
[[gnu::always_inline]] inline void over_rows(int64_t rows, int64_t width, Step step) {
    auto sweep = [&](int64_t row, auto number) __attribute__((always_inline)) {
        int64_t j = 0;
        for (; j + packs * lanes <= width; j += packs * lanes)
            step(row, number, j, std::integral_constant<int, packs>{}, Full{});
        for (; j + lanes <= width; j += lanes) step(row, number, j, std::integral_constant<int, 1>{}, Full{});
        if (j < width) step(row, number, j, std::integral_constant<int, 1>{}, width - j);
    };
    int64_t row = 0;
    for (; row + most <= rows; row += most) sweep(row, std::integral_constant<int, most>{});
    for (; row < rows; ++row) sweep(row, std::integral_constant<int, 1>{});
}

// Rows to be taken as one, with as many times the columns: a few adjacent columns alone would not fill a pack.
inline int64_t rows_as_one(bool adjacent, int64_t rows, int64_t width) {
    return adjacent && width < 64 && rows >= 64 ? 64 : 1;
}

// Packs in a cache line of T.
template <class T>
inline constexpr int line_packs = std::max<int>(1, 64 / int(sizeof(T)) / lanes);

// -- sums -----------------------------------------------------------------------------------------------------

// What the terms of sums are read from: where it begins, and how far its rows lie apart.
template <class T>
struct Stream {
    const T* start;
    int64_t distance;
};

// Sums of columns: two for each.
struct ColumnSums {
    std::vector<double> first, second;
    explicit ColumnSums(int64_t width) : first(width), second(width) {}

    // Adds terms(row, j, count), in E, for all rows and columns.
    template <class E, class TermsOf, class T, class... More>
    [[gnu::always_inline]] void add(int64_t rows, int64_t width, TermsOf terms, Stream<T> stream, More... more) {
        over_rows<group_size, line_packs<T>>(
            rows, width,
            [&](int64_t row, auto number, int64_t j, auto packs, auto count) __attribute__((always_inline)) {
                Pack<E> a[packs.value], b[packs.value];
                auto fetch_below = [&](int64_t r) __attribute__((always_inline)) {
                    fetch(stream, r, j);
                    (fetch(more, r, j), ...);
                };
                fetch_below(row);
                for (int p = 0; p < packs.value; ++p) {
                    const Terms<E> t = terms(row, j + p * lanes, count);
                    a[p] = t.first, b[p] = t.a * t.b;
                }
                for (int k = 1; k < number.value; ++k) {
                    fetch_below(row + k);
                    for (int p = 0; p < packs.value; ++p) {
                        const Terms<E> t = terms(row + k, j + p * lanes, count);
                        a[p] = a[p] + t.first, b[p] = fma(t.a, t.b, b[p]);
                    }
                }
                for (int p = 0; p < packs.value; ++p) {
                    keep(a[p], first.data() + j + p * lanes, count);
                    keep(b[p], second.data() + j + p * lanes, count);
                }
            });
    }

    // Those of the columns [begin, end).
    Sums of(int64_t begin, int64_t end) const {
        Sums sums;
        for (int64_t j = begin; j < end; ++j) sums.add({first[j], second[j]});
        return sums;
    }

private:
    template <class E, class Count>
    [[gnu::always_inline]] static void keep(Pack<E> sum, double* total, Count count) {
        store(total, load<double>(total, count) + widened(sum), count);
    }
    // The line of the next rows below this one, or what lies past the last.
    template <class T>
    [[gnu::always_inline]] static void fetch(Stream<T> stream, int64_t row, int64_t j) {
        prefetch(stream.start + (row + group_size) * stream.distance + j);
    }
};

// Where the sums of channels start from, for each of their columns: the mean of a channel's first elements.
template <class T, class E>
inline std::vector<E> channel_pivots(const T* x, int64_t distance, int64_t rows, int64_t channels, int64_t s) {
    std::vector<E> pivots(channels * s);
    if (s > 1) {
        for (int64_t c = 0; c < channels; ++c) std::fill_n(pivots.begin() + c * s, s, E(pivot_of(x + c * s, s)));
        return pivots;
    }
    const int64_t number = number_of_pivots(rows);
    const Pack<E> inverse(E(1) / E(number));
    for (int64_t j = 0; j < channels; j += lanes) {
        const int64_t count = std::min<int64_t>(lanes, channels - j);
        Pack<E> sum(0);
        for (int64_t row = 0; row < number; ++row) sum = sum + load<E>(x + row * distance + j, count);
        T stored[lanes];
        store(stored, sum * inverse);  // as T has it: see pivot_of
        store(pivots.data() + j, load<E>(stored), count);
    }
    return pivots;
}

// The moments of some channels over a block of rows: element j of channel c in row r is x[r * distance + c * s + j].
// take(c, moments) is told each channel's.
//
// In one pass about the mean of a channel's first elements; one for which that lies far from the rest is looked at again.
template <class T, class Take>
[[gnu::flatten]] void channel_moments(const T* x, int64_t distance, int64_t rows, int64_t channels, int64_t s, Take take) {
    using E = Computation<T>;
    const int64_t width = channels * s;
    const double n = double(rows * s);
    if (n == 0) return;
    ColumnSums sums(width);
    const std::vector<E> pivots = channel_pivots<T, E>(x, distance, rows, channels, s);
    const E* k = pivots.data();
    sums.add<E>(
        rows, width,
        [=](int64_t row, int64_t j, auto count) __attribute__((always_inline)) {
            const Pack<E> d = first_of(load<E>(x + row * distance + j, count) - load<E>(k + j, count), count);
            return Terms<E>{d, d, d};
        },
        Stream<T>{x, distance});
    for (int64_t c = 0; c < channels; ++c) {
        const T* first = x + c * s;
        auto runs = [&](auto f) {
            for (int64_t row = 0; row < rows; ++row) f(first + row * distance, s);
        };
        take(c, moments_by<E>(sums.of(c * s, (c + 1) * s), double(pivots[c * s]), n, first, runs));
    }
}

// Two sums for each of some channels, as channel_moments: of g, and of g * (x - mean of the channel), where
// g = gate(dy, row, j, count).
template <class T, class E, class MeanOf, class Gate, class Take>
[[gnu::flatten]] void channel_sums_in(
    Stream<T> dy, Stream<T> x, int64_t rows, int64_t channels, int64_t s, MeanOf mean_of, Gate gate, Take take) {
    const int64_t width = channels * s;
    std::vector<E> means(width);
    for (int64_t c = 0; c < channels; ++c) std::fill_n(means.begin() + c * s, s, Mean<E>(mean_of(c)).rounded);
    const E* k = means.data();
    ColumnSums sums(width);
    sums.add<E>(
        rows, width,
        [=](int64_t row, int64_t j, auto count) __attribute__((always_inline)) {
            const Pack<E> g = gate(load<E>(dy.start + row * dy.distance + j, count), row, j, count);
            return Terms<E>{g, g, load_filled<E>(x.start + row * x.distance + j, count) - load<E>(k + j, count)};
        },
        dy, x);
    for (int64_t c = 0; c < channels; ++c) {
        Sums sum = sums.of(c * s, (c + 1) * s);
        sum.second = Mean<E>(mean_of(c)).constant(sum.first, sum.second);
        take(c, sum);
    }
}
// In E where that will do for a channel, is_tame(c) and the sums being what they should; else in double. What one channel
// needs changes no bit of another.
template <class T, class IsTame, class MeanOf, class Gate, class Take>
void channel_sums(Stream<T> dy, Stream<T> x, int64_t rows, int64_t channels, int64_t s, IsTame is_tame, MeanOf mean_of,
                  Gate gate, Take take) {
    using E = Computation<T>;
    std::vector<Sums> found(channels);
    std::vector<char> good(channels);
    bool all = true;
    channel_sums_in<T, E>(dy, x, rows, channels, s, mean_of, gate, [&](int64_t c, const Sums& sums) {
        found[c] = sums;
        good[c] = is_tame(c) && is_representable<E>(sums);
        all = all && good[c];
    });
    if (!all)
        channel_sums_in<T, double>(dy, x, rows, channels, s, mean_of, gate, [&](int64_t c, const Sums& sums) {
            if (!good[c]) found[c] = sums;
        });
    for (int64_t c = 0; c < channels; ++c) take(c, found[c]);
}

// -- writing --------------------------------------------------------------------------------------------------

// Vectors of a value per column.
template <class E, int number>
class ColumnValues {
public:
    explicit ColumnValues(int64_t width) : width_(width), values_(number * width) {}
    void set(int64_t j, const std::array<double, number>& values) {
        for (int v = 0; v < number; ++v) values_[v * width_ + j] = E(values[v]);
    }
    template <class Count>
    [[gnu::always_inline]] std::array<Pack<E>, number> at(int64_t j, Count count) const {
        std::array<Pack<E>, number> packs;
        for (int v = 0; v < number; ++v) packs[v] = load<E>(values_.data() + v * width_ + j, count);
        return packs;
    }

private:
    int64_t width_;
    std::vector<E> values_;
};

// y[row * distance + j] = value(values of column j, row, j, count)
template <class T, class Values, class Value>
[[gnu::always_inline]] inline void write_columns(
    T* y, int64_t distance, int64_t rows, int64_t width, bool streaming, const Values& values, Value value) {
    const bool stream_all = streaming && to_line(y) == 0 && distance * sizeof(T) % 64 == 0;
    auto write = [&](auto at_once, auto streams) __attribute__((always_inline)) {
        over_rows<at_once.value, line_packs<T>>(
            rows, width,
            [&](int64_t row, auto number, int64_t j, auto packs, auto count) __attribute__((always_inline)) {
                using P = decltype(values.at(j, count));
                P of[packs.value];
                for (int p = 0; p < packs.value; ++p) of[p] = values.at(j + p * lanes, count);
                for (int k = 0; k < number.value; ++k)
                    for (int p = 0; p < packs.value; ++p) {
                        T* to = y + (row + k) * distance + j + p * lanes;
                        const auto v = value(of[p], row + k, j + p * lanes, count);
                        if constexpr (streams.value && std::is_same_v<decltype(count), Full>)
                            stream(to, v);
                        else
                            store(to, v, count);
                    }
            });
    };
    constexpr std::integral_constant<int, 4> four;
    constexpr std::integral_constant<int, 1> one;
    if (distance * sizeof(T) % 4096 == 0)  // written by turns they would drive each other from the caches
        stream_all ? write(one, std::true_type{}) : write(one, std::false_type{});
    else
        stream_all ? write(four, std::true_type{}) : write(four, std::false_type{});
}

}  // namespace arraynorm::ARRAYNORM_ISA
