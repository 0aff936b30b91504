// Rows of adjacent elements, each with parameters of its own: layer and RMS norm, and group and instance norm where the
// channels of a sample are short runs that lie side by side.
#pragma once

#include <mutex>
#include <optional>

#include "columns.hpp"
#include "row_norm.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// -- parameters -----------------------------------------------------------------------------------------------

// A vector of parameters in E: the caller's, where that is in E, else a copy; of `otherwise` where there is none.
template <class E>
class ParametersIn {
public:
    ParametersIn(const Parameter& given, int64_t size, double otherwise) {
        if constexpr (std::is_same_v<E, double>)
            data_ = given.doubles;
        else
            data_ = given.floats;
        if (!data_) {
            own_.resize(size, E(otherwise));
            for (int64_t i = 0; given && i < size; ++i) own_[i] = E(given[i]);
            data_ = own_.data();
        }
        if (std::is_same_v<E, double> || !given) return;
        given.floats ? check(given.floats, size) : check(given.doubles, size);
    }
    ParametersIn(const ParametersIn&) = delete;

    const E* data() const { return data_; }
    bool tame() const { return tame_; }

private:
    // without branches, some at a time: of a small call this is a part
    template <class V>
    void check(const V* values, int64_t size) {
        std::conditional_t<sizeof(V) == 4, int32_t, int64_t> wild = 0;
        for (int64_t i = 0; i < size; ++i) wild |= !is_moderate(values[i]);
        tame_ = !wild;
    }

    Scratch<E> own_;
    const E* data_;
    bool tame_ = true;
};

// What only rows need that float will not do for: made when the first of them comes.
template <class V>
class Exact {
public:
    template <class... Arguments>
    const V& made_of(const Arguments&... arguments) const {
        std::call_once(once_, [&] { value_.emplace(arguments...); });
        return *value_;
    }

private:
    mutable std::once_flag once_;
    mutable std::optional<V> value_;
};

// So many rows at a time, up to `most`, that they take no more of the second-level cache than this.
inline constexpr int64_t cached_bytes = 128 * 1024;
template <class T>
inline int64_t rows_in_cache(int64_t width, int64_t most) {
    return std::clamp<int64_t>(cached_bytes / std::max<int64_t>(1, width * sizeof(T)), 1, most);
}

// -- forward --------------------------------------------------------------------------------------------------

template <class E>
struct Affine {
    ParametersIn<E> weight, bias;
    explicit Affine(const RowNormForward& call)
        : weight(call.weight, call.rows.parameters(), 1), bias(call.bias, call.rows.parameters(), 0) {}
    bool tame() const { return weight.tame() && bias.tame(); }
};

// Columns whose parameters stay in the first-level cache while some rows pass by, and backward their sums.
inline constexpr int64_t segment = 512;

// The elements [first, first + length) of a row. RMS norm is not `centered`: it has no mean, and no bias.
template <class T, class E, bool centered>
[[gnu::flatten]] void write_elements(const RowNormForward& call, const Affine<E>& affine, int64_t row, int64_t first,
                                     int64_t length, Next next) {
    const int64_t column = (call.rows.groups == 1 ? 0 : row % call.rows.groups) * call.rows.channels + first;
    const T* row_x = start_of<const T>(call.rows, call.x, row);
    const int64_t ahead = next.distance<T>(
        call.rows.channels, [&](int64_t sets) { return start_of<const T>(call.rows, call.x, row + sets) - row_x; });
    const T* x = row_x + first;
    T* y = start_of<T>(call.rows, call.y, row) + first;
    const E *weight = affine.weight.data() + column, *bias = affine.bias.data() + column;
    const Mean<E> mean(mean_of(call.mean, row));
    const Pack<E> pivot(mean.rounded), rstd(E(call.rstd[row])), shift(E(mean.constant(call.rstd[row], 0)));
    write_run(y, length, call.streaming, x, ahead, [=](int64_t j, auto count, auto) __attribute__((always_inline)) {
        if constexpr (!centered) return load<E>(x + j, count) * rstd * load<E>(weight + j, count);
        const Pack<E> x_hat = fma(load<E>(x + j, count) - pivot, rstd, shift);
        return fma(x_hat, load<E>(weight + j, count), load<E>(bias + j, count));
    });
}

// Rows that are reduced one after the other before the first of them is written.
inline constexpr int64_t most_rows = 16;

// The statistics of some short rows. What is made of their sums stands in plain loops without branches, which compilers
// make vectors of: one by one, roots and divisions take longer than 64 elements. Rows for which the sums will not do
// are left to keep_again(row).
template <class T, bool centered, class KeepAgain>
inline void keep_statistics_together(const RowNormForward& call, const Blocks& blocks, int64_t row, int64_t number,
                                     const double* pivots, KeepAgain keep_again) {
    using E = Computation<T>;
    const double n = double(call.rows.channels);
    const int64_t padded = std::min((number + 3) / 4 * 4, most_rows);  // whole vectors
    Sums sums[most_rows];
    for (int64_t k = 0; k < number; ++k)
        sums[k] = sums_about<E, T, centered>(E(pivots[k]), runs_of<T>(call, blocks, row + k, 0));
    int64_t rest[most_rows], any = false;
    for (int64_t k = 0; k < padded; ++k) any |= rest[k] = !is_reliable<E>(sums[k], centered ? n : 1);
    double means[most_rows], vars[most_rows], rstds[most_rows];
    for (int64_t k = 0; k < padded; ++k) {
        const Moments found = centered ? moments_about(pivots[k], n, sums[k]) : Moments{1, 0, 0, sums[k].second};
        means[k] = found.mean();
        vars[k] = found.m2 / n;
        rstds[k] = reciprocal_std(vars[k], call.eps);
    }
    if (call.mean) std::copy_n(means, number, call.mean + row);
    if (call.var) std::copy_n(vars, number, call.var + row);
    std::copy_n(rstds, number, call.rstd + row);
    for (int64_t k = 0; any && k < number; ++k)  // those that pad are zero, and not asked for
        if (rest[k]) keep_again(row + k);
}

template <class T, bool centered>
void forward_elements(const RowNormForward& call) {
    using E = Computation<T>;
    const Rows& rows = call.rows;
    const Blocks blocks(1, rows.channels);
    const Affine<E> affine(call);
    Exact<Affine<double>> exact;
    auto reduce = [&](int64_t row, int64_t part) { return row_moments<T>(call, blocks, row, part); };
    auto keep = [&](int64_t row, const Moments& moments) {
        keep_statistics(call, row, moments, [&] {
            const T* x = start_of<const T>(rows, call.x, row);
            return std::any_of(x, x + rows.channels, [](T v) { return std::isinf(to_float(v)); });
        });
    };
    auto write = [&](int64_t row, int64_t first, int64_t length, Next next) {
        if (affine.tame() && is_tame<E>(mean_of(call.mean, row), call.rstd[row]))
            write_elements<T, E, centered>(call, affine, row, first, length, next);
        else
            write_elements<T, double, centered>(call, exact.made_of(call), row, first, length, next);
    };
    const int64_t bytes = 2 * rows.elements() * sizeof(T);
    if (blocks.parts() > 1 || rows.channels == 0) {  // rows too long for what follows, or without a pivot
        over_sets<Moments>(rows.count(), MemoryOrder::by_sets, blocks.parts(), bytes, true, reduce, keep,
                           [&](int64_t row, int64_t part, Next next) {
                               blocks.pieces_of(
                                   part, [&](int64_t, int64_t i, int64_t length) { write(row, i, length, next); });
                           });
        return;
    }
    const bool are_short = rows.channels * int64_t(sizeof(T)) <= 512;
    const int64_t bundle = rows_in_cache<T>(rows.channels, rows.channels <= 256 ? most_rows : 4);
    const int64_t width = rows.channels <= 2 * segment ? 2 * segment : segment;  // not a second call for the rest
    const int64_t share = sets_per_item(rows.count(), bundle, bytes);
    const bool early = is_fetched_early(bytes / 2, bytes / 2, !call.streaming);
    parallel_for((rows.count() + share - 1) / share, bytes, [&](int64_t item) {
        const int64_t end = std::min(rows.count(), (item + 1) * share),
                      fetched = end_of_fetched(bytes, end, rows.count());
        for (int64_t row = item * share; row < end; row += bundle) {
            const int64_t number = std::min(bundle, end - row);
            // the sums of a row wait for its pivot; those of all can be found meanwhile
            double pivots[most_rows] = {};
            for (int64_t k = 0; centered && k < number; ++k)
                pivots[k] = pivot_of(start_of<const T>(rows, call.x, row + k), rows.channels);
            if (are_short) {
                keep_statistics_together<T, centered>(call, blocks, row, number, pivots,
                                                      [&](int64_t other) { keep(other, reduce(other, 0)); });
            } else {
                Moments found[most_rows];
                for (int64_t k = 0; k < number; ++k)
                    found[k] = row_moments_about<T, centered>(call, blocks, row + k, pivots[k]);
                for (int64_t k = 0; k < number; ++k) keep(row + k, found[k]);
            }
            for (int64_t first = 0; first < rows.channels; first += width)
                for (int64_t r = row; r < row + number; ++r) {
                    // cut where y has a line's end: what is streamed of a line is to be streamed at once
                    const int64_t shift = rows.channels > width ? to_line(start_of<T>(rows, call.y, r)) : 0;
                    const int64_t from = first ? std::min(first + shift, rows.channels) : 0,
                                  to = std::min(first + width + shift, rows.channels);
                    write(r, from, to - from, Next{early && r + bundle < fetched ? bundle : 0});
                }
        }
        if (call.streaming) finish_streaming();
    });
}

}  // namespace arraynorm::ARRAYNORM_ISA
