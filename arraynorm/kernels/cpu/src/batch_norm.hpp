// Batch norm over a volume (N, C, S), alone or with addend and ReLU. The formulas are those of reference/batch_norm.py
// and reference/batch_norm_add_relu.py.
//
// How sums are cut up depends on the volume and the strides of inputs alone: which thread takes what, where results go,
// and whether statistics and results come in one call or in two, changes no bit.
#pragma once

#include <array>
#include <vector>

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

// What a map is computed in. Ranks that hold parts of a batch find statistics that differ in the last bits, and are to
// agree with the whole to an ulp: so float32 results are rounded once, from double.
template <class T>
using MapType = std::conditional_t<std::is_same_v<T, float>, double, Computation<T>>;

// f(E{}) with what the sums of a channel of n values begin in. Of so few the rounding errors of float would not be
// small against an ulp of the results: there are too few sums of eight for them to cancel.
template <class T, class F>
inline auto summed(int64_t n, F f) {
    if constexpr (std::is_same_v<T, float>)
        if (n < 64) return f(double{});
    return f(Computation<T>{});
}

template <class E, size_t number>
inline std::array<Pack<E>, number> packs_of(const std::array<double, number>& values) {
    std::array<Pack<E>, number> packs;
    for (size_t i = 0; i < number; ++i) packs[i] = Pack<E>(E(values[i]));
    return packs;
}

// y = (x - v[0]) * v[1] + v[2]
template <class E>
inline std::array<double, 3> coefficients(const BatchNormForward& call, int64_t c) {
    const Mean<E> mean(call.mean[c]);
    const double scale = forward_scale(call, c);
    return {double(mean.rounded), scale, mean.constant(scale, call.bias.value_or(c, 0))};
}
template <class Elements, class E>
[[gnu::always_inline]] inline Elements y_of(Elements x, const std::array<Pack<E>, 3>& v) {
    return fma(x - v[0], v[1], v[2]);
}

// dx = g * v[1] + (x - v[0]) * v[2] + v[3], or g * v[1] alone
template <class E>
inline std::array<double, 4> coefficients(const BatchNormBackward& call, int64_t c) {
    const BackwardCoefficients k = backward_coefficients(call, c);
    const Mean<E> mean(call.mean_dy ? call.mean[c] : 0);
    return {double(mean.rounded), k.of_dy, k.of_deviation, mean.constant(k.of_deviation, k.constant)};
}
template <class Elements, class E>
[[gnu::always_inline]] inline Elements dx_of(Elements g, Elements x, const std::array<Pack<E>, 4>& v) {
    return fma(g, v[1], fma(x - v[0], v[2], v[3]));
}
template <class Elements, class E>
[[gnu::always_inline]] inline Elements dx_of(Elements g, const std::array<Pack<E>, 4>& v) {
    return g * v[1];
}

// Whether a channel's y can be computed in E, and its dx.
template <class E>
inline bool is_tame(const BatchNormForward& call, int64_t c) {
    return is_tame<E>(call.mean[c], forward_scale(call, c));
}
template <class E>
inline bool is_tame(const BatchNormBackward& call, int64_t c) {
    const BackwardCoefficients k = backward_coefficients(call, c);
    return is_tame<E>(call.mean_dy ? call.mean[c] : 0, k.of_dy) & is_tame<E>(k.constant, k.of_deviation);
}

// A channel's map: the coefficients of y or of dx, for E where that will do.
template <size_t number>
struct Map {
    std::array<double, number> coefficients;
    bool tame;
};
template <class E, class Call>
inline auto map_of(const Call& call, int64_t c) {
    const bool tame = is_tame<E>(call, c);
    return Map{tame ? coefficients<E>(call, c) : coefficients<double>(call, c), tame};
}
// Those of all channels side by side, for a walk from one channel's run to the next one's: read at each from the
// call's own arrays instead, they took up to 1.1 of the time (see over_runs).
template <class E, class Call>
inline auto maps_of(const Call& call) {
    std::vector<decltype(map_of<E>(call, 0))> maps(call.volume.c);
    for (int64_t c = 0; c < call.volume.c; ++c) maps[c] = map_of<E>(call, c);
    return maps;
}

inline void keep_statistics(const BatchNormForward& call, int64_t c, const Moments& moments) {
    call.mean[c] = moments.mean();
    call.m2[c] = moments.m2;
    call.rstd[c] = reciprocal_std(moments.m2 / std::max(moments.n, 1.0), call.eps);
}

// `sums` are those of g and of g * (x - mean), where g is dy past the mask.
inline void keep_sums(const BatchNormBackward& call, int64_t c, Sums sums) {
    const double n = double(std::max<int64_t>(call.volume.plane_size(), 1)), of_x_hat = sums.second * call.rstd[c];
    call.dbias[c] = sums.first;
    call.dweight[c] = of_x_hat;
    if (!call.mean_dy) return;
    call.mean_dy[c] = sums.first / n;
    call.mean_dy_x_hat[c] = of_x_hat / n;
}

}  // namespace arraynorm::ARRAYNORM_ISA
