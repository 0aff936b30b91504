// A matrix whose columns are summed: rows of adjacent elements, of which S to a channel lie side by side.
//
// Some rows at a time, so that a column's sums and parameters are loaded and stored once for many elements; and a cache
// line of a row at a time, since rows that lie a multiple of 4 KiB apart share their places in the cache.
#pragma once

#include <array>
#include <initializer_list>
#include <optional>
#include <vector>

#include "calls.hpp"
#include "parallel.hpp"
#include "runs.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// Some rows of some channels of a matrix, as loops walk them: `repeat` rows of memory may stand side by side in one.
struct Tile {
    int64_t row, rows;  // the first is that of memory
    int64_t first, channels, s, repeat = 1;

    int64_t all() const { return channels * repeat; }
    int64_t width() const { return all() * s; }
    int64_t channel(int64_t c) const { return first + c % channels; }

    // Rows to be taken as one where they lie `distance` apart. A few columns alone would not fill a pack: of adjacent
    // rows some are taken as one.
    int64_t rows_as_one(int64_t distance) const { return distance == width() && width() < 64 && rows >= 64 ? 64 : 1; }

    // A tile with the columns that the widest of its rows has.
    Tile columns(int64_t distance) const { return {row, 0, first, channels, s, rows_as_one(distance)}; }

    // visit(tile) for all of this one, whose rows are those of memory.
    template <class Visit>
    void widened(int64_t distance, Visit visit) const {
        const int64_t number = rows_as_one(distance), whole = rows / number;
        visit(Tile{row, whole, first, channels, s, number});
        if (whole * number < rows) visit(Tile{row + whole * number, rows - whole * number, first, channels, s});
    }
};

// visit(tile) for all rows of a tile, some at a time: more and smaller items than for sums, for nothing is added up.
template <class Visit>
inline void over_row_blocks(const Tile& tile, int64_t bytes, Visit visit) {
    const int64_t rows = std::max<int64_t>(4, 64 * 1024 / std::max<int64_t>(1, tile.width()));
    const int64_t items = (tile.rows + rows - 1) / rows;
    parallel_for(items, bytes, [&](int64_t item) {
        const int64_t i = items - 1 - item;  // the last rows may still be in the cache
        visit(Tile{tile.row + i * rows, std::min(rows, tile.rows - i * rows), tile.first, tile.channels, tile.s});
    });
}

// A distance in all of the arrays that there are, or 0 where they differ.
inline int64_t common(int64_t Tensor::* distance, std::initializer_list<Tensor> arrays) {
    std::optional<int64_t> found;
    for (const Tensor& array : arrays) {
        if (!array) continue;
        if (found && *found != array.*distance) return 0;
        found = array.*distance;
    }
    return found.value_or(0);
}

// An array where the rows of a tile are: where the first begins, and how far they lie apart.
template <class T>
struct RowsOf {
    T* start;
    int64_t distance;
    // Rows below the ones that are summed up: these are fetched. 0 where there is a cache that holds all: out of that
    // they come in time by themselves, and fetching costs a third.
    int64_t ahead = 0;

    T* at(int64_t row, int64_t j) const { return start + row * distance + j; }
};

inline int64_t rows_ahead(bool streaming) { return streaming ? group_size : 0; }

template <class T>
inline RowsOf<T> rows_of(const Tensor& tensor, const Tile& tile, bool streaming = false) {
    if (!tensor) return {};
    return {tensor.at<T>(tile.row, tile.first), tensor.sample * tile.repeat, rows_ahead(streaming)};
}

// step(row, number of rows, first column, number of packs, count) for all columns: `packs` packs at once, of the first
// of `most` rows at a time. Both numbers are constants.
template <int most, int packs, class Step>
[[gnu::always_inline]] inline void over_rows(const Tile& tile, Step step) {
    const int64_t width = tile.width();
    auto sweep = [&](int64_t row, auto number) __attribute__((always_inline)) {
        int64_t j = 0;
        for (; j + packs * lanes <= width; j += packs * lanes)
            step(row, number, j, std::integral_constant<int, packs>{}, Full{});
        for (; j + lanes <= width; j += lanes) step(row, number, j, std::integral_constant<int, 1>{}, Full{});
        if (j < width) step(row, number, j, std::integral_constant<int, 1>{}, width - j);
    };
    int64_t row = 0;
    for (; row + most <= tile.rows; row += most) sweep(row, std::integral_constant<int, most>{});
    for (; row < tile.rows; ++row) sweep(row, std::integral_constant<int, 1>{});
}

// Packs in a cache line of T.
template <class T>
inline constexpr int line_packs = std::max<int>(1, 64 / int(sizeof(T)) / lanes);

// -- sums -----------------------------------------------------------------------------------------------------

// Sums of columns: two for each.
struct ColumnSums {
    std::vector<double> first, second;
    explicit ColumnSums(int64_t width) : first(width), second(width) {}

    // Adds terms(row, j, count), in E, for all rows and columns of the tile; they are read from `streams`.
    template <class E, class TermsOf, class T, class... More>
    [[gnu::always_inline]] void add(const Tile& tile, TermsOf terms, RowsOf<const T> stream, More... more) {
        over_rows<group_size, line_packs<T>>(
            tile, [&](int64_t row, auto number, int64_t j, auto packs, auto count) __attribute__((always_inline)) {
                Pack<E> a[packs.value], b[packs.value];
                auto fetch_below = [&](int64_t r) __attribute__((always_inline)) {
                    fetch(tile, stream, r, j);
                    (fetch(tile, more, r, j), ...);
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
    // The line below or, at the end of the rows, one of the next columns, with which this thread perhaps goes on.
    template <class T>
    [[gnu::always_inline]] static void fetch(const Tile& tile, RowsOf<const T> stream, int64_t row, int64_t j) {
        const int64_t below = row + stream.ahead;
        prefetch(below < tile.rows ? stream.at(below, j) : stream.at(below - tile.rows, j + tile.width()));
    }
};

// Where the sums of channels start from, for each of their columns: the mean of a channel's first elements.
template <class E, class T>
inline std::vector<E> channel_pivots(RowsOf<const T> x, const Tile& tile) {
    const int64_t width = tile.width();
    std::vector<E> pivots(width);
    if (tile.s > 1) {
        // of a row, or of the first elements of some rows if those are more
        const int64_t number = number_of_pivots(tile.rows);
        const bool of_rows = number > number_of_pivots(tile.s);
        for (int64_t j = 0; j < width; j += tile.s) {
            T first[lanes];
            for (int64_t row = 0; of_rows && row < number; ++row) first[row] = *x.at(row, j);
            const double pivot = of_rows ? pivot_of(first, number) : pivot_of(x.at(0, j), tile.s);
            std::fill_n(pivots.begin() + j, tile.s, E(pivot));
        }
        return pivots;
    }
    const int64_t number = number_of_pivots(tile.rows);
    const Pack<E> inverse(E(1) / E(number));
    for (int64_t j = 0; j < width; j += lanes) {
        const int64_t count = std::min<int64_t>(lanes, width - j);
        Pack<E> sum(0);
        for (int64_t row = 0; row < number; ++row) sum = sum + load<E>(x.at(row, j), count);
        T stored[lanes];
        store(stored, sum * inverse);  // as T has it: see pivot_of
        store(pivots.data() + j, load<E>(stored), count);
    }
    return pivots;
}

// The moments of the tile's channels, the sums of which begin in E; take(c, moments) is told each one's.
//
// In one pass about the mean of a channel's first elements; one for which that lies far from the rest is looked at
// again.
template <class E, class T, class Take>
[[gnu::flatten]] void channel_moments(RowsOf<const T> x, const Tile& tile, Take take) {
    const double n = double(tile.rows * tile.s);
    if (n == 0) return;
    ColumnSums sums(tile.width());
    const std::vector<E> pivots = channel_pivots<E>(x, tile);
    const E* k = pivots.data();
    sums.add<E>(
        tile,
        [=](int64_t row, int64_t j, auto count) __attribute__((always_inline)) {
            const Pack<E> d = load<E>(x.at(row, j), count) - load<E>(k + j, count);
            return Terms<E>{d, d, d};
        },
        x);
    for (int64_t c = 0; c < tile.all(); ++c) {
        const int64_t j = c * tile.s;
        auto runs = [&](auto f) {
            for (int64_t row = 0; row < tile.rows; ++row) f(x.at(row, j), tile.s);
        };
        take(c, moments_by<E>(sums.of(j, j + tile.s), double(pivots[j]), n, x.at(0, j), runs));
    }
}

// Two sums for each of the tile's channels, as channel_moments: of g, and of g * (x - mean of the channel), where
// g = gate(dy, row, j, count).
template <class E, class T, class MeanOf, class Gate, class Take>
[[gnu::flatten]] void channel_sums_in(RowsOf<const T> dy, RowsOf<const T> x, const Tile& tile, MeanOf mean_of,
                                      Gate gate, Take take) {
    std::vector<E> means(tile.width());
    for (int64_t c = 0; c < tile.all(); ++c)
        std::fill_n(means.begin() + c * tile.s, tile.s, Mean<E>(mean_of(c)).rounded);
    const E* k = means.data();
    ColumnSums sums(tile.width());
    sums.add<E>(
        tile,
        [=](int64_t row, int64_t j, auto count) __attribute__((always_inline)) {
            const Pack<E> g = gate(load<E>(dy.at(row, j), count), row, j, count);
            return Terms<E>{g, g, load<E>(x.at(row, j), count) - load<E>(k + j, count)};
        },
        dy, x);
    for (int64_t c = 0; c < tile.all(); ++c) {
        Sums sum = sums.of(c * tile.s, (c + 1) * tile.s);
        sum.second = Mean<E>(mean_of(c)).constant(sum.first, sum.second);
        take(c, sum);
    }
}
// In the type that will do for a channel, is_tame(c) and the sums being what they should; else in double. What one
// channel needs changes no bit of another.
template <class E, class T, class IsTame, class MeanOf, class Gate, class Take>
void channel_sums(RowsOf<const T> dy, RowsOf<const T> x, const Tile& tile, IsTame is_tame, MeanOf mean_of, Gate gate,
                  Take take) {
    std::vector<Sums> found(tile.all());
    std::vector<char> good(tile.all());
    bool all = true;
    channel_sums_in<E>(dy, x, tile, mean_of, gate, [&](int64_t c, const Sums& sums) {
        found[c] = sums;
        good[c] = is_tame(c) && is_representable<E>(sums);
        all = all && good[c];
    });
    if (!all)
        channel_sums_in<double>(dy, x, tile, mean_of, gate, [&](int64_t c, const Sums& sums) {
            if (!good[c]) found[c] = sums;
        });
    for (int64_t c = 0; c < tile.all(); ++c) take(c, found[c]);
}

// -- writing --------------------------------------------------------------------------------------------------

// Vectors of a value per column, and zeros to the end of the four packs that the last ones are in.
template <class E, size_t number>
class ColumnValues {
public:
    using Element = E;
    explicit ColumnValues(int64_t width)
        : width_((width + 4 * lanes - 1) / (4 * lanes) * 4 * lanes), values_(number * width_) {}
    // Of `some` columns from j on.
    void set(int64_t j, int64_t some, const std::array<double, number>& values) {
        for (size_t v = 0; v < number; ++v) {
            E* first = values_.data() + v * width_ + j;
            *first = E(values[v]);  // mostly there is no other
            std::fill(first + 1, first + some, *first);
        }
    }
    template <class Count>
    [[gnu::always_inline]] std::array<Pack<E>, number> at(int64_t j, Count count) const {
        std::array<Pack<E>, number> packs;
        for (size_t v = 0; v < number; ++v) packs[v] = load<E>(values_.data() + v * width_ + j, count);
        return packs;
    }

private:
    int64_t width_;
    std::vector<E> values_;
};

// The values of the tile's columns, of(E{}, channel) for each; and whether E will do for all of the channels.
template <class E, class IsTame, class Of>
inline auto values_of(const Tile& tile, IsTame is_tame, Of of) {
    constexpr size_t number = std::tuple_size_v<decltype(of(E{}, tile.first))>;
    std::pair found(ColumnValues<E, number>(tile.width()), true);
    for (int64_t c = 0; c < tile.channels; ++c) {
        const std::array<double, number> channel = of(E{}, tile.first + c);
        for (int64_t j = c * tile.s; j < tile.width(); j += tile.channels * tile.s) found.first.set(j, tile.s, channel);
        found.second &= is_tame(tile.first + c);
    }
    return found;
}

// body(write_rows) with a function for any rows of the tile's channels, write_rows(tile), that hands them to
// write(tile, values of its columns). In E where that will do for all of the channels; else those one by one, each in
// what it needs.
template <class E, class IsTame, class Of, class Write, class Body>
inline void with_values(const Tile& tile, IsTame is_tame, Of of, Write write, Body body) {
    {
        const auto [values, all] = values_of<E>(tile, is_tame, of);
        if (all) return body([&values = values, &write](const Tile& rows) { write(rows, values); });
    }
    for (int64_t c = tile.first; c < tile.first + tile.channels; ++c)
        computed<E>(is_tame(c), [&](auto e) {
            const auto values = values_of<decltype(e)>(Tile{0, 0, c, 1, tile.s}, is_tame, of).first;
            body([&](const Tile& rows) { write(Tile{rows.row, rows.rows * rows.repeat, c, 1, rows.s}, values); });
        });
}

// y at (row, j) = value(values of column j, row, j, count)
template <class T, class Values, class Value>
[[gnu::always_inline]] inline void write_columns(RowsOf<T> y, const Tile& tile, bool streaming, const Values& values,
                                                 Value value) {
    const bool stream_all = streaming && to_line(y.start) == 0 && y.distance * sizeof(T) % 64 == 0;
    auto write = [&](auto at_once, auto streams) __attribute__((always_inline)) {
        over_rows<at_once.value, line_packs<T>>(
            tile, [&](int64_t row, auto number, int64_t j, auto packs, auto count) __attribute__((always_inline)) {
                using P = decltype(values.at(j, count));
                P of[packs.value];
                for (int p = 0; p < packs.value; ++p) of[p] = values.at(j + p * lanes, count);
                for (int k = 0; k < number.value; ++k)
                    for (int p = 0; p < packs.value; ++p) {
                        T* to = y.at(row + k, j + p * lanes);
                        const auto v = value(of[p], row + k, j + p * lanes, count);
                        if constexpr (streams.value && std::is_same_v<decltype(count), Full>)
                            stream(to, v);
                        else
                            store(to, v, count);
                    }
            });
    };
    // Memory is fastest walked as it lies. In the cache some rows at a time save loads of the values; of rows that lie
    // whole pages apart, whose lines share their places in the cache, only two.
    if (stream_all)
        write(std::integral_constant<int, 1>{}, std::true_type{});
    else if (y.distance * sizeof(T) % 4096 == 0)
        write(std::integral_constant<int, 2>{}, std::false_type{});
    else
        write(std::integral_constant<int, 4>{}, std::false_type{});
    if (stream_all) finish_streaming();
}

}  // namespace arraynorm::ARRAYNORM_ISA
