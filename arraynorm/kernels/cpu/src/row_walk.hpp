// How the memory of rows is walked, chosen by the strides of x: (rows, K) for layer and RMS norm, (N, A, C, B) for
// group and instance norm.
#pragma once

#include "arrays.hpp"

namespace arraynorm {

struct WalkedRows {
    Rows rows;
    int64_t repeat;      // neighbouring parameters of the walk that are one of the caller's
    int64_t n, a, c, b;  // as the caller sees them

    // `array` as this walk sees it, or nothing if its strides do not allow that.
    std::optional<Tensor> tensor(PyArrayObject* array) const;

    // The walk for x (rows, K), or nothing.
    static std::optional<WalkedRows> of_matrix(PyArrayObject* x);

    // The walk for x (N, A, C, B) in so many groups of channels, or nothing.
    static std::optional<WalkedRows> of_samples(PyArrayObject* x, int64_t groups);

    // That of x (N, 1, C, B) in C order; its arrays are in_c_order(data).
    static WalkedRows of_samples_in_c_order(int64_t n, int64_t c, int64_t b, int64_t groups);
    Tensor in_c_order(void* data) const {
        return {data, c * b,
                rows.layout == Rows::Layout::elements ? 1
                : rows.layout == Rows::Layout::planes ? b
                                                      : c * b};
    }
};

}  // namespace arraynorm
