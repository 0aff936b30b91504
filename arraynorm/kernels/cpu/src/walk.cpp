#include "walk.hpp"

namespace arraynorm {
namespace {

Volume volume_of(Walk walk, int64_t n, int64_t c, int64_t s) {
    using Layout = Volume::Layout;
    switch (walk) {
        case Walk::nothing: return {Layout::planes, 0, c, 0};
        case Walk::planes: return {Layout::planes, n, c, s};
        case Walk::one_channel: return {Layout::planes, 1, 1, n * s};
        case Walk::samples: return {Layout::planes, 1, c, n};
        case Walk::rows: return {Layout::columns, n, c, 1};
        case Walk::small_planes: return {Layout::columns, n, c, s};
        case Walk::channels_last: return {Layout::columns, n * s, c, 1};
    }
    return {};
}

}  // namespace

std::optional<Tensor> Walked::tensor(PyArrayObject* array) const {
    Tensor t{PyArray_DATA(array), 0, 0};
    if (walk == Walk::nothing) return t;
    const npy_intp size = PyArray_ITEMSIZE(array), *strides = PyArray_STRIDES(array);
    if (!PyArray_ISALIGNED(array)) return {};
    for (int axis = 0; axis < 3; ++axis)
        if (strides[axis] % size) return {};
    const int64_t of_n = strides[0] / size, of_c = strides[1] / size, of_s = strides[2] / size;
    // the stride of a single element means nothing
    const bool s_adjacent = s == 1 || of_s == 1, c_adjacent = c == 1 || of_c == 1, n_adjacent = n == 1 || of_n == 1;
    const bool one_run = s == 1 || n == 1 || of_n == s * of_s;
    switch (walk) {
        case Walk::nothing: return t;
        case Walk::planes:
            if (!s_adjacent) return {};
            t.sample = of_n, t.channel = of_c;
            return t;
        case Walk::one_channel:
            if (!(s == 1 ? n_adjacent : s_adjacent && one_run)) return {};
            return t;
        case Walk::samples:
            if (!n_adjacent) return {};
            t.channel = of_c;
            return t;
        case Walk::rows:
            if (!c_adjacent) return {};
            t.sample = of_n, t.channel = 1;
            return t;
        case Walk::small_planes:
            if (!s_adjacent || !(c == 1 || of_c == s)) return {};
            t.sample = of_n, t.channel = s;
            return t;
        case Walk::channels_last:
            if (!c_adjacent || !one_run) return {};
            t.sample = s > 1 ? of_s : of_n, t.channel = 1;
            return t;
    }
    return {};
}

std::optional<Walked> Walked::of(PyArrayObject* x, bool with_mask) {
    const int64_t n = PyArray_DIM(x, 0), c = PyArray_DIM(x, 1), s = PyArray_DIM(x, 2);
    auto fits = [&](Walk walk) -> std::optional<Walked> {
        const Walked walked{walk, volume_of(walk, n, c, s), n, c, s};
        return walked.tensor(x) ? std::optional(walked) : std::nullopt;
    };
    if (n * c * s == 0) return fits(Walk::nothing);
    if (c == 1)
        if (auto walked = fits(Walk::one_channel)) return walked;
    if (s == 1) {
        if (auto walked = fits(Walk::rows)) return walked;
        if (!with_mask)
            if (auto walked = fits(Walk::samples)) return walked;
        return {};
    }
    if (are_short_runs(n, s))
        if (auto walked = fits(Walk::small_planes)) return walked;
    if (auto walked = fits(Walk::planes)) return walked;
    if (!with_mask)
        if (auto walked = fits(Walk::channels_last)) return walked;
    return {};
}

Volume volume_in_c_order(int64_t n, int64_t c, int64_t s) {
    const Walk walk = c == 1                 ? Walk::one_channel
                      : s == 1               ? Walk::rows
                      : are_short_runs(n, s) ? Walk::small_planes
                                             : Walk::planes;
    return volume_of(walk, n, c, s);
}

}  // namespace arraynorm
