#include "row_walk.hpp"

#include "walk.hpp"

namespace arraynorm {
namespace {

using Layout = Rows::Layout;

// Runs smaller than this are not worth walking one by one: a copy in order is faster.
constexpr int64_t tiny_run = 8;

}  // namespace

std::optional<Tensor> WalkedRows::tensor(PyArrayObject* array) const {
    Tensor t{PyArray_DATA(array), 0, 0};
    if (rows.elements() == 0) return t;
    const npy_intp size = PyArray_ITEMSIZE(array), *strides = PyArray_STRIDES(array);
    if (!PyArray_ISALIGNED(array)) return {};
    for (int axis = 0; axis < PyArray_NDIM(array); ++axis)
        if (strides[axis] % size) return {};
    const bool is_matrix = PyArray_NDIM(array) == 2;
    // the stride of a single element means nothing
    auto adjacent = [](int64_t length, int64_t stride, int64_t wanted) { return length == 1 || stride == wanted; };
    t.sample = strides[0] / size;
    if (is_matrix) {
        if (!adjacent(c, strides[1] / size, 1)) return {};
        t.channel = 1;
        return t;
    }
    int64_t of_a = strides[1] / size, of_b = strides[3] / size;
    const int64_t of_c = strides[2] / size;
    const bool one_run = a == 1 || b == 1 || of_a == b * of_b;
    const int64_t spatial = a * b, step = b == 1 ? of_a : of_b;  // all of A and B, where they are one run
    switch (rows.layout) {
        case Layout::elements:
            if (!one_run || !adjacent(spatial, step, 1) || !adjacent(c, of_c, spatial)) return {};
            t.channel = 1;
            return t;
        case Layout::planes:
            if (!one_run || !adjacent(spatial, step, 1)) return {};
            t.channel = of_c;
            return t;
        case Layout::columns:
            if (rows.size == 1) {  // channels last
                if (!one_run || !adjacent(c, of_c, 1)) return {};
                t.channel = step;
            } else {
                if (!adjacent(b, of_b, 1) || !adjacent(c, of_c, b)) return {};
                t.channel = of_a;
            }
            return t;
    }
    return {};
}

std::optional<WalkedRows> WalkedRows::of_matrix(PyArrayObject* x) {
    const int64_t n = PyArray_DIM(x, 0), k = PyArray_DIM(x, 1);
    const WalkedRows walked{{Layout::elements, n, 1, k, 1, 1}, 1, n, 1, k, 1};
    return walked.tensor(x) ? std::optional(walked) : std::nullopt;
}

std::optional<WalkedRows> WalkedRows::of_samples(PyArrayObject* x, int64_t groups) {
    const int64_t n = PyArray_DIM(x, 0), a = PyArray_DIM(x, 1), c = PyArray_DIM(x, 2), b = PyArray_DIM(x, 3);
    const int64_t channels = groups ? c / groups : 0, spatial = a * b;
    auto fits = [&](Layout layout, int64_t of_group, int64_t size, int64_t lines, int64_t repeat) {
        const WalkedRows walked{{layout, n, groups, of_group, size, lines}, repeat, n, a, c, b};
        return walked.tensor(x) ? std::optional(walked) : std::nullopt;
    };
    if (n * spatial * c == 0) return fits(Layout::elements, channels * spatial, 1, 1, spatial);
    if (are_short_runs(n, spatial))
        if (auto walked = fits(Layout::elements, channels * spatial, 1, 1, spatial)) return walked;
    if (spatial >= tiny_run)
        if (auto walked = fits(Layout::planes, channels, spatial, 1, 1)) return walked;
    // a matrix of one line would be planes
    if (auto walked = fits(Layout::columns, channels, 1, spatial, 1)) return walked;
    if (b > 1)
        if (auto walked = fits(Layout::columns, channels, b, a, 1)) return walked;
    return {};
}

WalkedRows WalkedRows::of_samples_in_c_order(int64_t n, int64_t c, int64_t b, int64_t groups) {
    const int64_t channels = c / groups;
    if (are_short_runs(n, b)) return {{Layout::elements, n, groups, channels * b, 1, 1}, b, n, 1, c, b};
    return {{b >= tiny_run ? Layout::planes : Layout::columns, n, groups, channels, b, 1}, 1, n, 1, c, b};
}

}  // namespace arraynorm
