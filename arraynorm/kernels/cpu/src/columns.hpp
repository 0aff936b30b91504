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
#include "scratch.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// Some rows of some channels of a matrix, as loops walk them: `repeat` rows of memory may stand side by side in one.
struct Tile {
    int64_t row, rows;  // the first of memory's rows, and the number of the loop's
    int64_t first, channels, s, repeat = 1;

    int64_t all() const { return channels * repeat; }
    int64_t width() const { return all() * s; }

    // Rows to be taken as one where they lie `distance` apart: a few columns alone would not fill a pack, or a loop;
    // and many would not stay in the first-level cache with what goes with them.
    int64_t rows_as_one(int64_t distance) const {
        if (distance != width() || width() >= 256) return 1;
        int64_t number = 1;
        while (number < 64 && (number * width() < 64 || number * width() % lanes)) number *= 2;
        return rows >= 8 * number ? number : 1;
    }

    // A tile with the columns that the widest of its rows has.
    Tile widest(int64_t distance) const { return {row, 0, first, channels, s, rows_as_one(distance)}; }

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
        // The last rows may still be in the cache; those of a matrix that the threads' own caches hold are where the
        // thread is that has read them (see parallel.cpp).
        const bool as_read = num_threads() > 1 && bytes <= (int64_t(8) << 20);
        const int64_t i = as_read ? item : items - 1 - item;
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
    bool uncached = false;  // fetched ahead; out of a cache it comes in time by itself, and fetching costs a third
    int64_t to_next = 0;    // how far on in a row the tile lies that is next, if that is to be fetched

    T* at(int64_t row, int64_t j) const { return start + row * distance + j; }
    bool are_near() const { return distance * int64_t(sizeof(T)) < page; }
    [[gnu::always_inline]] void fetch(int64_t row, int64_t j) const {
        if (uncached) __builtin_prefetch(further_on(at(row, j)), 0, 3);
    }
    [[gnu::always_inline]] void fetch_next(int64_t row, int64_t j) const {
        if (to_next) prefetch(at(row, j) + to_next);
    }

    static constexpr int64_t page = 4096;
};

template <class T>
inline RowsOf<T> rows_of(const Tensor& tensor, const Tile& tile, bool uncached = false) {
    if (!tensor) return {};
    return {tensor.at<T>(tile.row, tile.first), tensor.sample * tile.repeat, uncached};
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

// A value per channel for each of the tile's columns.
template <class E>
inline Scratch<E> by_columns(const Tile& tile, const double* of_channels) {
    Scratch<E> columns(tile.width());
    E* to = columns.data();
    if (tile.s == 1)
        for (int64_t c = 0; c < tile.channels; ++c) *to++ = E(of_channels[c]);
    else
        for (int64_t c = 0; c < tile.channels; ++c, to += tile.s) std::fill_n(to, tile.s, E(of_channels[c]));
    for (int64_t k = 1; k < tile.repeat; ++k, to += tile.channels * tile.s)
        std::copy_n(columns.data(), tile.channels * tile.s, to);
    return columns;
}

// Sums of columns: two for each.
class ColumnSums {
public:
    // `results`, if any, replace what is fetched while their columns are summed.
    template <class T = char>
    explicit ColumnSums(const Tile& tile, RowsOf<T> results = {})
        : tile_(tile),
          first_(tile.width(), 0.0),
          second_(tile.width(), 0.0),
          results_(reinterpret_cast<const char*>(results.start)),
          bytes_to_row_(results.distance * int64_t(sizeof(T))) {}

    // Adds terms(row, j, count), in E, for all rows and columns of the tile; they are read from the `streams`.
    template <class E, class TermsOf, class T, class... More>
    [[gnu::always_inline]] void add(TermsOf terms, RowsOf<const T> stream, More... more) {
        // the streams of rows as wide as whole pages the hardware follows by itself
        const bool fetches = stream.uncached && (stream.distance != tile_.width() || stream.are_near());
        fetches ? add_rows<E>(std::true_type{}, terms, stream, more...)
                : add_rows<E>(std::false_type{}, terms, stream, more...);
    }

    // Adds those of each channel's columns to its total.
    void add_to(Sums* total) const {
        const double *a = first_.data(), *b = second_.data();
        for (int64_t k = 0; k < tile_.repeat; ++k)
            if (tile_.s == 1)
                for (int64_t c = 0; c < tile_.channels; ++c) total[c].add({*a++, *b++});
            else
                for (int64_t c = 0; c < tile_.channels; ++c, a += tile_.s, b += tile_.s)
                    total[c].add({sum_of(a, tile_.s), sum_of(b, tile_.s)});
    }

private:
    static double sum_of(const double* values, int64_t n) {
        Pack<double> all(0.0);
        int64_t i = 0;
        for (; i + lanes <= n; i += lanes) all = all + load<double>(values + i);
        return sum(i < n ? all + load<double>(values + i, n - i) : all);
    }
    template <class E, class Count>
    [[gnu::always_inline]] static void keep(Pack<E> sum, double* total, Count count) {
        store(total, load<double>(total, count) + widened(sum), count);
    }
    template <class E, class Fetches, class TermsOf, class T, class... More>
    [[gnu::always_inline]] void add_rows(Fetches, TermsOf terms, RowsOf<const T> stream, More... more) {
        over_rows<group_size, line_packs<T>>(
            tile_, [&](int64_t row, auto number, int64_t j, auto packs, auto count) __attribute__((always_inline)) {
                Pack<E> a[packs.value], b[packs.value];
                if (results_)
                    for (int k = 0; k < number.value; ++k)
                        prefetch(results_ + (row + k) * bytes_to_row_ + j * int64_t(sizeof(T)));
#pragma GCC unroll 8
                for (int k = 0; k < number.value; ++k) {
                    if constexpr (Fetches::value) fetch_below(row + k, j, stream), (fetch_below(row + k, j, more), ...);
                    for (int p = 0; p < packs.value; ++p) {
                        // not const: GCC 12 would store it on the stack, too
                        auto t = terms(row + k, j + p * lanes, count);
                        a[p] = k == 0 ? t.first : a[p] + t.first;
                        b[p] = k == 0 ? t.a * t.b : fma(t.a, t.b, b[p]);
                    }
                }
                for (int p = 0; p < packs.value; ++p) {
                    keep(a[p], first_.data() + j + p * lanes, count);
                    keep(b[p], second_.data() + j + p * lanes, count);
                }
            });
    }
    // The line below or, at the end of the rows, one of the next columns, with which this thread perhaps goes on.
    template <class T>
    [[gnu::always_inline]] void fetch_below(int64_t row, int64_t j, RowsOf<const T> stream) const {
        const int64_t below = row + group_size;
        prefetch(below < tile_.rows ? stream.at(below, j) : stream.at(below - tile_.rows, j + tile_.width()));
    }

    Tile tile_;
    Scratch<double> first_, second_;
    const char* results_;
    int64_t bytes_to_row_;
};

// Where the sums of a tile's channels start from: means of some elements each, as T has them (see pivot_of). Of several
// rows those that are taken lie all over the tile, for neighbours are often alike.
template <class T>
inline void find_pivots(RowsOf<const T> x, const Tile& tile, double* pivots) {
    const int64_t number = number_of_pivots(tile.rows);
    auto row = [&](int64_t k) { return k * tile.rows / number; };
    if (tile.s > 1) {
        const bool of_rows = number > number_of_pivots(tile.s);
        for (int64_t c = 0; c < tile.channels; ++c) {
            T some[lanes];
            for (int64_t k = 0; of_rows && k < number; ++k) some[k] = *x.at(row(k), c * tile.s);
            pivots[c] = of_rows ? pivot_of(some, number) : pivot_of(x.at(0, c * tile.s), tile.s);
        }
        return;
    }
    const Pack<double> inverse(1 / double(number));
    for (int64_t c = 0; c < tile.channels; c += lanes) {
        const int64_t count = std::min<int64_t>(lanes, tile.channels - c);
        Pack<double> some[lanes];
        for (int64_t k = 0; k < number; ++k) some[k] = load<double>(x.at(row(k), c), count);
        for (int64_t half = number / 2; half > 0; half /= 2)  // the sum of equal elements is exact
            for (int64_t k = 0; k < half; ++k) some[k] = some[k] + some[k + half];
        T stored[lanes];
        store(stored, some[0] * inverse);
        store(pivots + c, load<double>(stored), count);
    }
}

// Adds to each channel's total the sums of x - center and of its square, in E; a channel's center is one of E.
template <class E, class T>
[[gnu::flatten]] void add_deviations(RowsOf<const T> x, const Tile& tile, const double* centers, Sums* total,
                                     RowsOf<T> results = {}) {
    const Scratch<E> of_columns = by_columns<E>(tile, centers);
    const E* k = of_columns.data();
    ColumnSums sums(tile, results);
    sums.add<E>(
        [=](int64_t row, int64_t j, auto count) __attribute__((always_inline)) {
            const Pack<E> d = load<E>(x.at(row, j), count) - load<E>(k + j, count);
            return Terms{d, d, d};
        },
        x);
    sums.add_to(total);
}

// A gate that all of dy passes.
struct Ungated {
    template <class Dy, class Count>
    [[gnu::always_inline]] Dy operator()(Dy dy, int64_t, int64_t, Count) const {
        return dy;
    }
};

// Adds to each channel's total the sums of g and of g * (x - mean), in E, where g = gate(dy, row, j, count); a
// channel's mean is one of E.
template <class E, class T, class Gate>
[[gnu::flatten]] void add_products(RowsOf<const T> dy, RowsOf<const T> x, const Tile& tile, const double* means,
                                   Gate gate, Sums* total) {
    const Scratch<E> of_columns = by_columns<E>(tile, means);
    const E* k = of_columns.data();
    ColumnSums sums(tile);
    sums.add<E>(
        [=](int64_t row, int64_t j, auto count) __attribute__((always_inline)) {
            const Pack<E> g = gate(load<E>(dy.at(row, j), count), row, j, count);
            return Terms{g, g, load<E>(x.at(row, j), count) - load<E>(k + j, count)};
        },
        dy, x);
    sums.add_to(total);
}

// Some channels of a tile: [begin, end).
struct Span {
    int64_t begin, end;
    bool again = false;  // a second look at some, which must not depend on how many they are: of single rows

    Tile of(const Tile& tile) const { return {tile.row, tile.rows, tile.first + begin, end - begin, tile.s}; }
    // What widened() is to know where a first look at the whole tile would take rows that lie so far apart as one.
    int64_t distance(int64_t of_first_look) const { return again ? 0 : of_first_look; }
};

// visit(span) for all channels c with chosen[c]; those between near ones come along, for they share cache lines.
template <class Visit>
inline void over_spans(const std::vector<char>& chosen, Visit visit) {
    constexpr int64_t near = 16;
    const int64_t channels = int64_t(chosen.size());
    for (int64_t c = 0; c < channels; ++c) {
        if (!chosen[c]) continue;
        Span span{c, c + 1, true};
        for (int64_t k = c + 1; k < std::min(channels, span.end + near); ++k)
            if (chosen[k]) span.end = k + 1;
        visit(span);
        c = span.end;
    }
}

// The moments of the channels of a tile; take(c, moments) is told each one's.
//
// add(type, span, centers, sums) adds up the span's channels' sums about their centers, in the type of its first
// argument. The first look at all is in E, about pivots. Channels for which that does not do are looked at twice more,
// in double: about one of their elements, and then about the mean that this gives.
//
// Here and below, what is done for each channel stands in plain loops without branches, which compilers make vectors
// of: the divisions and roots of many channels, one by one, take longer than the elements of a small batch.
template <class E, class T, class Add, class Take>
inline void channel_moments(RowsOf<const T> x, const Tile& tile, Add add, Take take) {
    const int64_t channels = tile.channels;
    const double n = double(tile.rows * tile.s);
    if (n == 0) {
        for (int64_t c = 0; c < channels; ++c) take(c, Moments{});
        return;
    }
    std::vector<double> centers(channels);
    find_pivots(x, tile, centers.data());
    std::vector<Sums> sums(channels);
    add(E{}, Span{0, channels}, centers.data(), sums.data());
    std::vector<char> rest(channels);
    char any = false;
    for (int64_t c = 0; c < channels; ++c) any |= rest[c] = !is_reliable<E>(sums[c], n);
    std::vector<Moments> found(channels);
    for (int64_t c = 0; c < channels; ++c) found[c] = moments_about(centers[c], n, sums[c]);
    auto look_again = [&](Span span) {
        std::fill(sums.begin() + span.begin, sums.begin() + span.end, Sums{});
        add(double{}, span, centers.data() + span.begin, sums.data() + span.begin);
    };
    if (any)
        over_spans(rest, [&](Span span) {
            for (int64_t c = span.begin; c < span.end; ++c) centers[c] = to_float(*x.at(0, c * tile.s));
            look_again(span);
            for (int64_t c = span.begin; c < span.end; ++c) centers[c] += sums[c].first / n;
            look_again(span);
            for (int64_t c = span.begin; c < span.end; ++c)
                if (rest[c]) found[c] = moments_about(centers[c], n, sums[c]);
        });
    for (int64_t c = 0; c < channels; ++c) take(c, found[c]);
}

// The sums of g and of g * (x - mean) of channels, told and added up as those of channel_moments: about means as the
// type has them, in E and, of channels for which that is not tame or the sums are not what they should be, in double.
template <class E, class MeanOf, class IsTame, class Add, class Take>
inline void channel_products(int64_t channels, MeanOf mean_of, IsTame is_tame, Add add, Take take) {
    std::vector<double> means(channels);
    std::vector<Sums> sums(channels), found(channels);
    auto look = [&](auto type, Span span) {
        for (int64_t c = span.begin; c < span.end; ++c) {
            means[c] = double(Mean<decltype(type)>(mean_of(c)).rounded);
            sums[c] = {};
        }
        add(type, span, means.data() + span.begin, sums.data() + span.begin);
    };
    auto sums_about_mean = [&](auto type, int64_t c) -> Sums {
        const double first = sums[c].first;
        return {first, Mean<decltype(type)>(mean_of(c)).constant(first, sums[c].second)};
    };
    look(E{}, Span{0, channels});
    for (int64_t c = 0; c < channels; ++c) found[c] = sums_about_mean(E{}, c);
    std::vector<char> rest(channels);
    char any = false;
    for (int64_t c = 0; c < channels; ++c) any |= rest[c] = !(is_tame(c) & is_representable<E>(found[c]));
    if (any)
        over_spans(rest, [&](Span span) {
            look(double{}, span);
            for (int64_t c = span.begin; c < span.end; ++c)
                if (rest[c]) found[c] = sums_about_mean(double{}, c);
        });
    for (int64_t c = 0; c < channels; ++c) take(c, found[c]);
}

// -- writing --------------------------------------------------------------------------------------------------

// Vectors of a value per column, and zeros to the end of the four packs that the last ones are in.
template <class E, size_t number>
class ColumnValues {
public:
    using Element = E;
    explicit ColumnValues(int64_t width)
        : width_((width + 4 * lanes - 1) / (4 * lanes) * 4 * lanes), values_(number * width_) {
        for (size_t v = 0; v < number; ++v) std::fill_n(values_.data() + v * width_ + width, width_ - width, E(0));
    }
    // Of `some` columns from j on.
    void set(int64_t j, int64_t some, const std::array<double, number>& values) {
        for (size_t v = 0; v < number; ++v) {
            E* first = values_.data() + v * width_ + j;
            std::fill(first, first + some, E(values[v]));
        }
    }
    // The first columns again beside themselves, so that they stand there so often.
    void repeat(int64_t columns, int64_t times) {
        for (size_t v = 0; v < number; ++v) {
            E* first = values_.data() + v * width_;
            for (int64_t k = 1; k < times; ++k) std::copy_n(first, columns, first + k * columns);
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
    Scratch<E> values_;
};

// The values of the tile's columns, of(E{}, channel) for each; and whether E will do for all of the channels.
template <class E, class IsTame, class Of>
inline auto values_of(const Tile& tile, IsTame is_tame, Of of) {
    constexpr size_t number = std::tuple_size_v<decltype(of(E{}, tile.first))>;
    ColumnValues<E, number> values(tile.width());
    auto set_all = [&](auto columns) {
        for (int64_t c = 0; c < tile.channels; ++c) values.set(c * columns, columns, of(E{}, tile.first + c));
    };
    tile.s == 1 ? set_all(std::integral_constant<int64_t, 1>{}) : set_all(tile.s);
    values.repeat(tile.channels * tile.s, tile.repeat);
    char tame = true;
    for (int64_t c = 0; c < tile.channels; ++c) tame &= is_tame(tile.first + c);
    return std::pair(std::move(values), bool(tame));
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

// y at (row, j) = value(values of column j, row, j, count), which is read from the `streams`
template <class T, class Values, class Value, class... Streams>
[[gnu::always_inline]] inline void write_columns(RowsOf<T> y, const Tile& tile, bool streaming, const Values& values,
                                                 Value value, Streams... read) {
    // Rows of whole cache lines, or adjacent ones: those share lines, which are written whole all the same.
    const int64_t bytes = y.distance * int64_t(sizeof(T));
    const int64_t unit = y.distance == tile.width() ? 16 : 64;
    const bool stream_all = streaming && reinterpret_cast<uintptr_t>(y.start) % unit == 0 && bytes % unit == 0;
    auto write = [&](auto at_once, auto streams) __attribute__((always_inline)) {
        using P = decltype(values.at(0, Full{}));
        // Values that are loaded for some rows are to have room in the sixteen registers, beside what is computed.
        constexpr bool have_room = line_packs<T> * sizeof(P) <= 14 * register_bytes;
        over_rows<at_once.value, at_once.value == 1 || have_room ? line_packs<T> : 1>(
            tile, [&](int64_t row, auto number, int64_t j, auto packs, auto count) __attribute__((always_inline)) {
                if constexpr (streams.value) (read.fetch(row, j), ...);
                P of[packs.value];
                for (int p = 0; p < packs.value; ++p) of[p] = values.at(j + p * lanes, count);
                auto of_pack = [&](int k, int p) __attribute__((always_inline)) {
                    return value(of[p], row + k, j + p * lanes, count);
                };
                constexpr bool is_full = std::is_same_v<decltype(count), Full>;
                constexpr bool by_twos = is_stored_by_twos<T> && is_full && !streams.value && packs.value % 2 == 0;
                if constexpr (!streams.value)
                    for (int k = 0; k < number.value; ++k) (read.fetch_next(row + k, j), ...);
                for (int k = 0; k < number.value; ++k)
                    for (int p = 0; p < packs.value; p += by_twos ? 2 : 1) {
                        T* to = y.at(row + k, j + p * lanes);
                        if constexpr (by_twos)
                            put(to, of_pack(k, p), of_pack(k, p + 1), streams);
                        else if constexpr (streams.value && is_full)
                            stream<16>(to, of_pack(k, p));
                        else if constexpr (streams.value)
                            stream(to, of_pack(k, p), count);
                        else
                            store(to, of_pack(k, p), count);
                    }
            });
    };
    // Memory is fastest walked as it lies. In the cache some rows at a time save loads of the values.
    if (stream_all)
        write(std::integral_constant<int, 1>{}, std::true_type{});
    else
        write(std::integral_constant<int, 4>{}, std::false_type{});
    if (stream_all) finish_streaming();
}

}  // namespace arraynorm::ARRAYNORM_ISA
