// A matrix whose columns are summed: rows of adjacent elements, each column with a mean and a map of its own.
//
// Four rows at a time, so that a column's sums and parameters are loaded and stored once for four elements.
#pragma once

#include <vector>

#include "runs.hpp"

namespace arraynorm::ARRAYNORM_ISA {

inline constexpr int rows_at_once = 4;

// Rows between two additions to a double. A column has one accumulator, where a run has dozens: in float its rounding
// errors would show after some hundred rows.
template <class E>
inline constexpr int64_t rows_per_chunk = std::is_same_v<E, float> ? 128 : chunk_size;

// step(rows, j, count) for all packs of `width` columns, of up to rows_at_once rows at a time
template <class Step>
inline void over_rows(int64_t rows, int64_t width, Step step) {
    auto sweep = [&](int64_t row, auto number) {
        int64_t j = 0;
        for (; j + lanes <= width; j += lanes) step(row, number, j, Full{});
        if (j < width) step(row, number, j, width - j);
    };
    int64_t row = 0;
    for (; row + rows_at_once <= rows; row += rows_at_once) sweep(row, std::integral_constant<int, rows_at_once>{});
    for (; row < rows; ++row) sweep(row, std::integral_constant<int, 1>{});
}

// E per column; for means the pair of Mean<E>.
template <class E>
struct ColumnMeans {
    std::vector<E> high, low;
    explicit ColumnMeans(int64_t width) : high(width), low(std::is_same_v<E, float> ? width : 0) {}
    void set(int64_t j, double mean) {
        high[j] = E(mean);
        if constexpr (std::is_same_v<E, float>) low[j] = E(mean - double(E(mean)));
    }
    template <class Count>
    Mean<E> at(int64_t j, Count count) const {
        Mean<E> mean(0);
        mean.high = load<E>(high.data() + j, count);
        if constexpr (std::is_same_v<E, float>) mean.low = load<E>(low.data() + j, count);
        return mean;
    }
};

// Sums of columns of a matrix, in E: two for each column.
template <class E>
struct ColumnSums {
    std::vector<E> first, second;
    explicit ColumnSums(int64_t width) : first(width), second(width) {}

    // add(first, second, row, j, count) for every row
    template <class Add>
    void run(int64_t rows, int64_t width, Add add) {
        std::fill(first.begin(), first.end(), E(0));
        std::fill(second.begin(), second.end(), E(0));
        over_rows(rows, width, [&](int64_t row, auto number, int64_t j, auto count) {
            Pack<E> s = load<E>(first.data() + j, count), q = load<E>(second.data() + j, count);
            for (int k = 0; k < number; ++k) add(s, q, row + k, j, count);
            store(first.data() + j, s, count);
            store(second.data() + j, q, count);
        });
    }
};

// The moments of `width` columns of a block of rows, x[row * distance + j], added to moments[j].
//
// In one pass about the mean of the first rows; a column for which that lies far from the rest is looked at again.
template <class T>
[[gnu::flatten]] void add_column_moments(const T* x, int64_t distance, int64_t rows, int64_t width, Moments* moments) {
    using E = Summation;
    ColumnSums<E> sums(width);
    std::vector<E> pivots(width);
    constexpr int64_t chunk = rows_per_chunk<E>;
    for (int64_t begin = 0; begin < rows; begin += chunk, x += chunk * distance) {
        const int64_t n = std::min(chunk, rows - begin), first_rows = number_of_pivots(n, 4);
        for (int64_t j = 0; j < width; j += lanes) {
            const int64_t count = std::min<int64_t>(lanes, width - j);
            Pack<E> sum(0);
            for (int64_t row = 0; row < first_rows; ++row) sum = sum + load<E>(x + row * distance + j, count);
            store(pivots.data() + j, representable<T>(sum * Pack<E>(E(1) / E(first_rows))), count);
        }
        sums.run(n, width, [&](Pack<E>& s, Pack<E>& q, int64_t row, int64_t j, auto count) {
            const Pack<E> d = load<E>(x + row * distance + j, count) - load<E>(pivots.data() + j, count);
            s = s + d;
            q = fma(d, d, q);
        });
        // all columns have had as many rows, so that what Chan's formula divides by is the same for all
        const Moments::Weights weights(moments[0].n, double(n));
        const double inverse = 1 / double(n);
        for (int64_t j = 0; j < width; ++j) {
            const double s = sums.first[j], q = sums.second[j];
            if (is_reliable<E>({s, q}, double(n))) {
                moments[j].add({double(n), double(pivots[j]), s * inverse, q - s * s * inverse}, weights);
            } else {
                auto runs = [&](auto f) {
                    for (int64_t row = 0; row < n; ++row) f(x + row * distance + j, 1);
                };
                moments[j].add(two_pass_moments<T>(double(n), double(to_float(x[j])), runs), weights);
            }
        }
    }
}

// The moments of some columns together, which have as many rows each.
inline Moments merged(const Moments* columns, int64_t number) {
    const double n = columns->n, pivot = columns->pivot, inverse = 1 / double(number);
    auto distance = [&](int64_t j) { return (columns[j].pivot - pivot) + columns[j].shift; };
    double shift = 0, between = 0, within = 0;
    for (int64_t j = 0; j < number; ++j) shift += distance(j);
    shift *= inverse;
    for (int64_t j = 0; j < number; ++j) {
        const double d = distance(j) - shift;
        between += d * d;
        within += columns[j].m2;
    }
    return {n * double(number), pivot, shift, within + n * between};
}

// y[row * distance + j] = value(parameters(j, count), row, j, count)
template <class T, class Parameters, class Value>
inline void write_columns(
    T* y, int64_t distance, int64_t rows, int64_t width, bool streaming, Parameters parameters, Value value) {
    const bool stream_all = streaming && to_line(y) == 0 && distance * sizeof(T) % 64 == 0;
    over_rows(rows, width, [&](int64_t row, auto number, int64_t j, auto count) {
        const auto p = parameters(j, count);
        for (int k = 0; k < number; ++k) {
            T* to = y + (row + k) * distance + j;
            const auto v = value(p, row + k, j, count);
            if constexpr (std::is_same_v<decltype(count), Full>)
                if (stream_all) {
                    stream(to, v);
                    continue;
                }
            store(to, v, count);
        }
    });
}

}  // namespace arraynorm::ARRAYNORM_ISA
