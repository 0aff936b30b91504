// Batch norm over a volume (N, C, S), alone or with addend and ReLU. The formulas are those of reference/batch_norm.py
// and reference/batch_norm_add_relu.py.
//
// How sums are cut up depends on the volume and the strides of inputs alone: which thread takes what, where results go,
// and whether statistics and results come in one call or in two, changes no bit.
#pragma once

#include "calls.hpp"
#include "relu_mask.hpp"
#include "runs.hpp"

namespace arraynorm::ARRAYNORM_ISA {

// The type that maps are computed in. Ranks that hold parts of a batch agree with the whole to an ulp, for float32
// results are right to half of one; for large arrays memory takes longer than that arithmetic.
template <class T>
using Mapping = std::conditional_t<sizeof(T) == 2, float, double>;

// Of y, for a given x - mean.
template <class Call>
inline double forward_scale(const Call& call, int64_t c) {
    return call.weight ? call.rstd[c] * call.weight[c] : call.rstd[c];
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
