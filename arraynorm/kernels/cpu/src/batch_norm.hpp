// Batch norm over a volume (N, C, S), alone or with addend and ReLU. The formulas are those of reference/batch_norm.py
// and reference/batch_norm_add_relu.py.
//
// How sums are cut up depends on the volume and the strides of inputs alone: which thread takes what, where results go,
// and whether statistics and results come in one call or in two, changes no bit.
#pragma once

#include <array>

#include "calls.hpp"
#include "relu_mask.hpp"
#include "runs.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// Of y, for a given x - mean.
template <class Call>
inline double forward_scale(const Call& call, int64_t c) {
    return call.rstd[c] * call.weight.value_or(c, 1);
}

// dx = dy * of_dy + (x - mean) * of_deviation + constant
struct BackwardCoefficients {
    double of_dy, of_deviation = 0, constant = 0;
};

inline BackwardCoefficients backward_coefficients(const BatchNormBackward& call, int64_t c) {
    const double of_dy = forward_scale(call, c);
    if (!call.mean_dy) return {of_dy};
    return {of_dy, -of_dy * call.rstd[c] * call.mean_dy_x_hat[c], -of_dy * call.mean_dy[c]};
}

// -- maps -----------------------------------------------------------------------------------------------------

// The coefficients of a map, of which the first is what is subtracted from x. For float32 in float each of the others
// is the sum of two, whose second ones follow.
//
// Ranks that hold parts of a batch find statistics that differ in the last bits, and are to agree with the whole to an
// ulp. So the first ones, and with them nearly all roundings, have few bits and are the same on all ranks. (In double a
// map would be shorter, and take up to twice as long.)
template <class T, class E>
inline constexpr bool in_two = std::is_same_v<T, float> && std::is_same_v<E, float>;

// The first 12 bits of a number.
inline float leading(double value) {
    const float all = float(value), few = as_float((as_bits(all) + 0x800) & ~0xfffu);
    return std::isfinite(few) ? few : all;
}

template <class T, class E, size_t number>
inline auto coefficients(const std::array<double, number>& values) {
    std::array<double, in_two<T, E> ? 2 * number - 1 : number> all;
    std::copy(values.begin(), values.end(), all.begin());
    if constexpr (in_two<T, E>)
        for (size_t i = 1; i < number; ++i) {
            all[i] = leading(values[i]);
            const double rest = values[i] - all[i];
            all[number - 1 + i] = std::isfinite(rest) ? rest : 0;
        }
    return all;
}

// What is subtracted from x. Where a mean lies within the data a difference is rounded, and should be alike on all
// ranks; where it lies far outside, the difference is exact, and what a mean of few bits leaves out would be too much.
// A mean that is a float is subtracted as it is: an x that equals it gives exactly the bias.
template <class T, class E>
inline Mean<E> pivot_of_map(double mean, double rstd) {
    const Mean<E> nearest(mean);
    if constexpr (in_two<T, E>)
        if (nearest.rest != 0 && std::abs(mean * rstd) < 16) return Mean<E>(mean, leading(mean));
    return nearest;
}

template <class E, size_t number>
inline std::array<Pack<E>, number> packs_of(const std::array<double, number>& values) {
    std::array<Pack<E>, number> packs;
    for (size_t i = 0; i < number; ++i) packs[i] = Pack<E>(E(values[i]));
    return packs;
}

// y = (x - v[0]) * v[1] + v[2]
template <class T, class E>
inline auto forward_coefficients(const BatchNormForward& call, int64_t c) {
    const auto mean = pivot_of_map<T, E>(call.mean[c], call.rstd[c]);
    const double scale = forward_scale(call, c);
    return coefficients<T, E, 3>({double(mean.rounded), scale, mean.constant(scale, call.bias.value_or(c, 0))});
}
template <class E, size_t number>
[[gnu::always_inline]] inline Pack<E> y_of(Pack<E> x, const std::array<Pack<E>, number>& v) {
    const Pack<E> d = x - v[0], y = fma(d, v[1], v[2]);
    if constexpr (number == 3)
        return y;
    else  // an infinite x has an infinite y, whatever the sign of v[3]
        return y + finite(fma(d, v[3], v[4]));
}

// dx = g * v[1] + (x - v[0]) * v[2] + v[3], or g * v[1] alone
template <class T, class E>
inline auto backward_coefficients(const BatchNormBackward& call, int64_t c) {
    const BackwardCoefficients k = backward_coefficients(call, c);
    const auto mean = pivot_of_map<T, E>(call.mean_dy ? call.mean[c] : 0, call.rstd[c]);
    return coefficients<T, E, 4>(
        {double(mean.rounded), k.of_dy, k.of_deviation, mean.constant(k.of_deviation, k.constant)});
}
template <class E, size_t number>
[[gnu::always_inline]] inline Pack<E> dx_of(Pack<E> g, Pack<E> x, const std::array<Pack<E>, number>& v) {
    const Pack<E> d = x - v[0], dx = fma(g, v[1], fma(d, v[2], v[3]));
    if constexpr (number == 4)
        return dx;
    else
        return dx + fma(g, v[4], fma(d, v[5], v[6]));
}

template <class E, size_t number>
[[gnu::always_inline]] inline Pack<E> dx_of(Pack<E> g, const std::array<Pack<E>, number>& v) {
    if constexpr (number == 4)
        return g * v[1];
    else
        return g * v[1] + finite(g * v[4]);
}

// Whether a channel's y can be computed in E, and its dx.
template <class E>
inline bool is_tame(const BatchNormForward& call, int64_t c) {
    return is_tame<E>(call.mean[c], forward_scale(call, c));
}
template <class E>
inline bool is_tame(const BatchNormBackward& call, int64_t c) {
    const BackwardCoefficients k = backward_coefficients(call, c);
    return is_tame<E>(call.mean_dy ? call.mean[c] : 0, k.of_dy) && is_tame<E>(k.constant, k.of_deviation);
}

inline void keep_statistics(const BatchNormForward& call, int64_t c, const Moments& moments) {
    call.mean[c] = moments.mean();
    call.m2[c] = moments.m2;
    call.rstd[c] = reciprocal_std(moments.m2 / std::max(moments.n, 1.0), call.eps);
}

// `sums` are those of g and of g * (x - mean), where g is dy past the mask.
inline void keep_sums(const BatchNormBackward& call, int64_t c, Sums sums) {
    call.dbias[c] = sums.first;
    call.dweight[c] = sums.second * call.rstd[c];
    if (!call.mean_dy) return;
    const double n = double(std::max<int64_t>(call.volume.plane_size(), 1));
    call.mean_dy[c] = call.dbias[c] / n;
    call.mean_dy_x_hat[c] = call.dweight[c] / n;
}

}  // namespace arraynorm::ARRAYNORM_ISA
