// Layer, RMS, group and instance norm over rows: statistics per row, parameters per channel. The formulas are those of
// reference/layer_norm.py, rms_norm.py, group_norm.py and instance_norm.py.
//
// How sums are cut up depends on the shape and the strides of inputs alone: no bit depends on the number of threads, or
// on where results go.
#pragma once

#include "blocks.hpp"
#include "calls.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// -- statistics -----------------------------------------------------------------------------------------------

// For RMS norm, moments about zero: the sum of squares, infinite where it is beyond double.
template <class T, class Runs>
inline Moments squares_of(const Runs& runs) {
    using E = Computation<T>;
    Sums sums = sums_about<E, T, false>(0, runs);
    if (!is_reliable<E>(sums, 1)) sums = sums_about<double, T, false>(0, runs);
    return {1, 0, 0, sums.second};
}

// The first element of row (sample, group).
template <class T>
inline T* start_of(const Rows& rows, const Tensor& tensor, int64_t row) {
    if (rows.groups == 1) return tensor.at<T>(row, 0);
    return tensor.at<T>(row / rows.groups, row % rows.groups * rows.channels);
}

// What memory is to bring while sums are taken of what is in the cache mostly: what results will replace, for it would
// otherwise be waited for when they are written, with the next rows. Or x, which is fetched anyway: where results
// bypass the cache, and for short planes, whose next ones' results that would be.
template <class T>
inline const T* fetched_with(const T* x, const T* result, const Rows& rows, bool streaming) {
    const bool is_short = rows.layout == Rows::Layout::planes && rows.row_size() * int64_t(sizeof(T)) <= bytes_ahead;
    return streaming || is_short ? x : result;
}

// runs(f) calls f(x, length, fetched) for the pieces of a part of a row.
template <class T>
inline auto runs_of(const RowNormForward& call, const Blocks& blocks, int64_t row, int64_t part) {
    const T* x = start_of<const T>(call.rows, call.x, row);
    const T* fetched = fetched_with(x, start_of<const T>(call.rows, call.y, row), call.rows, call.streaming);
    const int64_t of_x = call.x.channel, of_fetched = fetched == x ? of_x : call.y.channel;
    return [=, &blocks](auto f) __attribute__((always_inline)) {
        blocks.pieces_of(part, [&](int64_t run, int64_t i, int64_t length) __attribute__((always_inline)) {
            f(x + run * of_x + i, length, fetched + run * of_fetched + i);
        });
    };
}

template <class T>
Moments row_moments(const RowNormForward& call, const Blocks& blocks, int64_t row, int64_t part) {
    const auto runs = runs_of<T>(call, blocks, row, part);
    return call.mean ? moments_of<T>(runs) : squares_of<T>(runs);
}

// Of a whole row, of which the pivot is known.
template <class T, bool centered>
Moments row_moments_about(const RowNormForward& call, const Blocks& blocks, int64_t row, double pivot) {
    using E = Computation<T>;
    const auto runs = runs_of<T>(call, blocks, row, 0);
    if constexpr (!centered) return squares_of<T>(runs);
    return moments_by<E>(sums_about<E, T>(E(pivot), runs), pivot, double(call.rows.channels),
                         start_of<const T>(call.rows, call.x, row), runs);
}

// has_infinity() tells whether the row has an infinite element.
template <class HasInfinity>
inline void keep_statistics(const RowNormForward& call, int64_t row, Moments moments, HasInfinity has_infinity) {
    // squares beyond double: as infinity they would make y quietly zero. RMS norm does make zeros of what shares a row
    // with infinity.
    if (std::isinf(moments.m2) && (call.mean || !has_infinity())) moments.m2 = std::numeric_limits<double>::quiet_NaN();
    const double var = moments.m2 / double(std::max<int64_t>(call.rows.row_size(), 1));
    if (call.mean) call.mean[row] = moments.mean();
    if (call.var) call.var[row] = var;
    call.rstd[row] = reciprocal_std(var, call.eps);
}

inline double mean_of(const double* mean, int64_t row) { return mean ? mean[row] : 0; }

// -- backward -------------------------------------------------------------------------------------------------

// dx = dy * weight * rstd + x_hat * of_x_hat + constant
struct RowCoefficients {
    double mean, rstd, of_x_hat, constant;
    double of_deviation() const { return rstd * of_x_hat; }  // of x - mean
};

// `sums` are those of g = dy * weight and of g * (x - mean) over the row.
inline RowCoefficients row_coefficients(const RowNormBackward& call, int64_t row, Sums sums) {
    const double n = double(std::max<int64_t>(call.rows.row_size(), 1));
    // a row of one value does not depend on it
    const double rstd = call.mean && n == 1 ? 0 : call.rstd[row];
    const double mean_g_x_hat = sums.second * rstd / n;
    return {mean_of(call.mean, row), rstd, -rstd * mean_g_x_hat, call.mean ? -rstd * (sums.first / n) : 0};
}

// Whether the dx of a row's elements with some weight can be computed in E.
template <class E>
inline bool is_tame(const RowCoefficients& k, double weight = 1) {
    return is_tame<E>(k.mean, k.rstd * weight) && is_tame<E>(k.constant, k.of_deviation());
}

}  // namespace arraynorm::ARRAYNORM_ISA
