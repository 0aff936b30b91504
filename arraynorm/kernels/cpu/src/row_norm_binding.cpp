// Layer, RMS, group and instance norm, from Python's arguments to a call.
#include "caches.hpp"
#include "native.hpp"
#include "operands.hpp"
#include "row_walk.hpp"

namespace arraynorm {
namespace {

using Choose = std::optional<WalkedRows> (*)(PyArrayObject*, int64_t groups);

std::optional<WalkedRows> matrix(PyArrayObject* x, int64_t) { return WalkedRows::of_matrix(x); }
std::optional<WalkedRows> samples(PyArrayObject* x, int64_t groups) { return WalkedRows::of_samples(x, groups); }

// A parameter per channel, as often as the walk wants each.
std::vector<double> repeated(PyArrayObject* array, int64_t repeat) {
    std::vector<double> values = as_doubles(array);
    if (repeat == 1 || !array) return values;
    std::vector<double> all;
    all.reserve(values.size() * repeat);
    for (double value : values) all.insert(all.end(), repeat, value);
    return all;
}

// Statistics, one per row, in C order.
std::vector<double> flattened(PyArrayObject* array) {
    if (!array) return {};
    return as_doubles(Ref::checked(PyArray_Ravel(array, NPY_CORDER)).array());
}

// -- forward --------------------------------------------------------------------------------------------------

struct ForwardArguments {
    PyArrayObject *x, *weight, *bias, *out;
    double eps;
    Choose choose;
    int64_t groups;
    bool with_mean, with_var;
};

struct ForwardResult {
    Ref y, mean, var, rstd;
};

Ref new_statistics(PyArrayObject* x, int64_t groups, double*& data) {
    if (PyArray_NDIM(x) == 2) return new_vector(PyArray_DIM(x, 0), data);
    Ref table = new_array({PyArray_DIM(x, 0), groups}, NPY_DOUBLE);
    data = static_cast<double*>(PyArray_DATA(table.array()));
    return table;
}

ForwardResult forward(const ForwardArguments& a) {
    const auto way = [&](PyArrayObject* x) { return a.choose(x, a.groups); };
    Operands<WalkedRows> operands({a.x}, way);
    RowNormForward call{};
    call.dtype = operands.dtype;
    call.rows = operands.way().rows;
    call.x = operands.input(0);
    call.y = operands.output(a.out);
    const std::vector<double> weight = repeated(a.weight, operands.way().repeat),
                              bias = repeated(a.bias, operands.way().repeat);
    call.weight = data_or_null(weight, a.weight);
    call.bias = data_or_null(bias, a.bias);
    call.eps = a.eps;
    ForwardResult result;
    if (a.with_mean) result.mean = new_statistics(a.x, a.groups, call.mean);
    if (a.with_var) result.var = new_statistics(a.x, a.groups, call.var);
    result.rstd = new_statistics(a.x, a.groups, call.rstd);
    const int64_t size = PyArray_SIZE(a.x);
    call.streaming = exceeds_cache(2 * size * item_size(operands.dtype));
    {
        const WithoutGIL released(size);
        kernels().row_norm_forward(call);
    }
    result.y = operands.result(0);
    return result;
}

// -- backward -------------------------------------------------------------------------------------------------

struct BackwardArguments {
    PyArrayObject *dy, *x, *mean, *rstd, *weight, *out;
    Choose choose;
    int64_t groups;
};

struct BackwardResult {
    Ref dx, dweight, dbias;
};

// Gradients of parameters, those that are one of the caller's added up.
Ref new_gradient(const std::vector<double>& values, npy_intp size, int64_t repeat) {
    double* data;
    Ref gradient = new_vector(size, data);
    std::fill(data, data + size, 0.0);
    const double* next = values.data();
    for (npy_intp c = 0; c < size; ++c)
        for (int64_t i = 0; i < repeat; ++i) data[c] += *next++;
    return gradient;
}

BackwardResult backward(const BackwardArguments& a) {
    const auto way = [&](PyArrayObject* x) { return a.choose(x, a.groups); };
    Operands<WalkedRows> operands({a.x, a.dy}, way);
    const WalkedRows& walked = operands.way();
    RowNormBackward call{};
    call.dtype = operands.dtype;
    call.rows = walked.rows;
    call.x = operands.input(0);
    call.dy = operands.input(1);
    call.dx = operands.output(a.out);
    const std::vector<double> weight = repeated(a.weight, walked.repeat), mean = flattened(a.mean),
                              rstd = flattened(a.rstd);
    call.weight = data_or_null(weight, a.weight);
    call.mean = data_or_null(mean, a.mean);
    call.rstd = rstd.data();
    std::vector<double> dweight(call.rows.parameters()), dbias(dweight.size());
    call.dweight = dweight.data(), call.dbias = dbias.data();
    const int64_t size = PyArray_SIZE(a.x);
    call.streaming = exceeds_cache(3 * size * item_size(operands.dtype));
    {
        const WithoutGIL released(size);
        kernels().row_norm_backward(call);
    }
    BackwardResult result;
    result.dx = operands.result(0);
    result.dweight = new_gradient(dweight, walked.c, walked.repeat);
    if (a.mean) result.dbias = new_gradient(dbias, walked.c, walked.repeat);
    return result;
}

// -- functions ------------------------------------------------------------------------------------------------

PyObject* layer_norm_forward(Arguments a) {
    return or_decline([&] {
        ForwardResult r = forward({.x = as_array(a[0]),
                                   .weight = as_array(a[1]),
                                   .bias = as_array(a[2]),
                                   .out = as_array(a[4]),
                                   .eps = as_double(a[3]),
                                   .choose = matrix,
                                   .with_mean = true});
        return tuple({r.y.release(), r.mean.release(), r.rstd.release()});
    });
}

PyObject* layer_norm_backward(Arguments a) {
    return or_decline([&] {
        BackwardResult r = backward({.dy = as_array(a[0]),
                                     .x = as_array(a[1]),
                                     .mean = as_array(a[2]),
                                     .rstd = as_array(a[3]),
                                     .weight = as_array(a[4]),
                                     .out = as_array(a[5]),
                                     .choose = matrix});
        return tuple({r.dx.release(), r.dweight.release(), r.dbias.release()});
    });
}

PyObject* rms_norm_forward(Arguments a) {
    return or_decline([&] {
        ForwardResult r = forward({.x = as_array(a[0]),
                                   .weight = as_array(a[1]),
                                   .out = as_array(a[3]),
                                   .eps = as_double(a[2]),
                                   .choose = matrix});
        return tuple({r.y.release(), r.rstd.release()});
    });
}

PyObject* rms_norm_backward(Arguments a) {
    return or_decline([&] {
        BackwardResult r = backward({.dy = as_array(a[0]),
                                     .x = as_array(a[1]),
                                     .rstd = as_array(a[2]),
                                     .weight = as_array(a[3]),
                                     .out = as_array(a[4]),
                                     .choose = matrix});
        return tuple({r.dx.release(), r.dweight.release()});
    });
}

PyObject* grouped_forward(PyArrayObject* x, int64_t groups, Arguments weight_bias_eps_out) {
    Arguments a = weight_bias_eps_out;
    ForwardResult r = forward({.x = x,
                               .weight = as_array(a[0]),
                               .bias = as_array(a[1]),
                               .out = as_array(a[3]),
                               .eps = as_double(a[2]),
                               .choose = samples,
                               .groups = groups,
                               .with_mean = true,
                               .with_var = true});
    return tuple({r.y.release(), r.mean.release(), r.var.release(), r.rstd.release()});
}

PyObject* group_norm_forward(Arguments a) {
    return or_decline([&] {
        const int64_t groups = PyLong_AsLongLong(a[1]);
        if (groups == -1 && PyErr_Occurred()) throw PythonError{};
        return grouped_forward(as_array(a[0]), groups, a + 2);
    });
}

PyObject* instance_norm_forward(Arguments a) {
    return or_decline([&] {
        PyArrayObject* x = as_array(a[0]);
        return grouped_forward(x, PyArray_DIM(x, 2), a + 1);
    });
}

// The number of groups is that of the statistics' columns.
PyObject* grouped_backward(Arguments a) {
    return or_decline([&] {
        PyArrayObject* mean = as_array(a[2]);
        BackwardResult r = backward({.dy = as_array(a[0]),
                                     .x = as_array(a[1]),
                                     .mean = mean,
                                     .rstd = as_array(a[3]),
                                     .weight = as_array(a[4]),
                                     .out = as_array(a[5]),
                                     .choose = samples,
                                     .groups = PyArray_DIM(mean, 1)});
        return tuple({r.dx.release(), r.dweight.release(), r.dbias.release()});
    });
}

}  // namespace

PyMethodDef row_norm_methods[] = {
    function<5, layer_norm_forward>("layer_norm_forward", SIGNATURE(layer_norm_forward, "x, weight, bias, eps, out")),
    function<6, layer_norm_backward>("layer_norm_backward",
                                     SIGNATURE(layer_norm_backward, "dy, x, mean, rstd, weight, out")),
    function<4, rms_norm_forward>("rms_norm_forward", SIGNATURE(rms_norm_forward, "x, weight, eps, out")),
    function<5, rms_norm_backward>("rms_norm_backward", SIGNATURE(rms_norm_backward, "dy, x, rstd, weight, out")),
    function<6, group_norm_forward>("group_norm_forward",
                                    SIGNATURE(group_norm_forward, "x, num_groups, weight, bias, eps, out")),
    function<6, grouped_backward>("group_norm_backward",
                                  SIGNATURE(group_norm_backward, "dy, x, mean, rstd, weight, out")),
    function<5, instance_norm_forward>("instance_norm_forward",
                                       SIGNATURE(instance_norm_forward, "x, weight, bias, eps, out")),
    function<6, grouped_backward>("instance_norm_backward",
                                  SIGNATURE(instance_norm_backward, "dy, x, mean, rstd, weight, out")),
    {},
};

}  // namespace arraynorm
