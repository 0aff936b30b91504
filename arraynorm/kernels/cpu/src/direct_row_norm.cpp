// Layer, RMS, group and instance norm in one step: see direct.hpp.
#include <cfloat>

#include "caches.hpp"
#include "direct.hpp"
#include "row_walk.hpp"

namespace arraynorm {
namespace {

using namespace direct;

// -- layer and RMS norm ---------------------------------------------------------------------------------------

struct Matrix {
    int axis, ndim;  // of the normalized dimensions: the first, and how many
    Rows rows;
    Tensor tensor(PyArrayObject* array) const { return {PyArray_DATA(array), rows.channels, 1}; }
};

// `normalized_shape` is an integer or a tuple of integers that x ends with.
Matrix matrix_of(PyArrayObject* x, PyObject* normalized_shape) {
    const bool is_tuple = PyTuple_CheckExact(normalized_shape);
    const int ndim = is_tuple ? int(PyTuple_GET_SIZE(normalized_shape)) : 1, axis = PyArray_NDIM(x) - ndim;
    require(ndim >= 1 && axis >= 0);
    int64_t size = 1;
    for (int i = 0; i < ndim; ++i) {
        require(plain_integer(is_tuple ? PyTuple_GET_ITEM(normalized_shape, i) : normalized_shape) ==
                PyArray_DIM(x, axis + i));
        size *= PyArray_DIM(x, axis + i);
    }
    return {axis, ndim, {Rows::Layout::elements, PyArray_SIZE(x) / size, 1, size, 1, 1}};
}

// With a bias argument it is layer norm, without one RMS norm.
PyObject* row_norm_forward(PyObject* x_argument, PyObject* normalized_shape, PyObject* weight_argument,
                           PyObject* bias_argument, PyObject* eps, PyObject* out) {
    PyArrayObject* x = plain_array(x_argument);
    const Matrix matrix = matrix_of(x, normalized_shape);
    PyArrayObject *weight = plain_parameter(weight_argument, x, matrix.axis, matrix.ndim),
                  *bias = bias_argument ? plain_parameter(bias_argument, x, matrix.axis, matrix.ndim) : nullptr;
    const Numbers weights(weight, x), biases(bias, x);
    RowNormForward call{};
    call.dtype = *dtype_of(x);
    call.rows = matrix.rows;
    if (!bias_argument && eps == Py_None)
        call.eps = is_double(x) || is_double(weight) ? DBL_EPSILON : double(FLT_EPSILON);
    else
        call.eps = plain_epsilon(eps);
    call.x = matrix.tensor(x);
    Ref y = output(out, x, {PyArray_DATA(x)}, {x_argument, weight_argument, given_or_none(bias_argument)});
    call.y = matrix.tensor(y.array());
    call.weight = weights.values();
    call.bias = biases.values();
    Ref mean, rstd = new_vector(matrix.rows.samples, call.rstd);
    if (bias_argument) mean = new_vector(matrix.rows.samples, call.mean);
    call.streaming = exceeds_cache(2 * PyArray_NBYTES(x));
    {
        const WithoutGIL released(PyArray_SIZE(x));
        kernels().row_norm_forward(call);
    }
    Ref shape = PyTuple_CheckExact(normalized_shape) ? Ref::borrowed(normalized_shape)
                                                     : Ref::checked(PyTuple_Pack(1, normalized_shape));
    Ref fields(bias_argument ? tuple({again(x_argument), again(weight_argument), again(bias_argument), mean.release(),
                                      rstd.release(), shape.release()})
                             : tuple({again(x_argument), again(weight_argument), rstd.release(), shape.release()}));
    return tuple({y.release(), fields.release()});
}

PyObject* row_norm_backward(PyObject* dy_argument, PyObject* x_argument, PyObject* weight_argument,
                            PyObject* bias_argument, PyObject* mean, PyObject* rstd, PyObject* normalized_shape,
                            PyObject* out) {
    PyArrayObject *x = plain_array(x_argument), *dy = plain_like(dy_argument, x);
    const Matrix matrix = matrix_of(x, normalized_shape);
    PyArrayObject *weight = plain_parameter(weight_argument, x, matrix.axis, matrix.ndim),
                  *bias = bias_argument ? plain_parameter(bias_argument, x, matrix.axis, matrix.ndim) : nullptr;
    const Numbers weights(weight, x);
    std::vector<double> dweight(matrix.rows.channels), dbias(matrix.rows.channels);
    RowNormBackward call{};
    call.dtype = *dtype_of(x);
    call.rows = matrix.rows;
    call.dy = matrix.tensor(dy);
    call.x = matrix.tensor(x);
    call.weight = weights.values();
    if (mean) call.mean = plain_statistic(mean, matrix.rows.samples, x);
    call.rstd = plain_statistic(rstd, matrix.rows.samples, x);
    Ref dx =
        output(out, x, {PyArray_DATA(x), PyArray_DATA(dy)},
               {dy_argument, x_argument, weight_argument, given_or_none(bias_argument), given_or_none(mean), rstd});
    call.dx = matrix.tensor(dx.array());
    call.dweight = dweight.data(), call.dbias = dbias.data();
    call.streaming = exceeds_cache(3 * PyArray_NBYTES(x));
    {
        const WithoutGIL released(PyArray_SIZE(x));
        kernels().row_norm_backward(call);
    }
    const bool wide = is_double(x) || is_double(weight) || is_double(bias);
    Ref of_weight(gradient(weight, dweight, wide));
    if (!bias_argument) return tuple({dx.release(), of_weight.release()});
    Ref of_bias(gradient(bias, dbias, wide));
    return tuple({dx.release(), of_weight.release(), of_bias.release()});
}

PyObject* layer_norm_forward(Arguments a) {
    return or_none([&] { return row_norm_forward(a[0], a[1], a[2], a[3], a[4], a[5]); });
}
PyObject* layer_norm_backward(Arguments a) {
    return or_none([&] { return row_norm_backward(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]); });
}
PyObject* rms_norm_forward(Arguments a) {
    return or_none([&] { return row_norm_forward(a[0], a[1], a[2], nullptr, a[3], a[4]); });
}
PyObject* rms_norm_backward(Arguments a) {
    return or_none([&] { return row_norm_backward(a[0], a[1], a[2], nullptr, nullptr, a[3], a[4], a[5]); });
}

// -- group and instance norm ----------------------------------------------------------------------------------

// Channels are axis 1 of x, in `groups`; 0 for as many as there are channels.
struct Samples {
    WalkedRows walked;

    static Samples of(PyArrayObject* x, PyObject* axis_argument, int64_t groups) {
        const int ndim = PyArray_NDIM(x);
        const int64_t axis = plain_integer(axis_argument);
        require(ndim >= 2 && (axis == 1 || axis == 1 - ndim));
        const int64_t n = PyArray_DIM(x, 0), c = PyArray_DIM(x, 1), count = groups ? groups : c;
        require(count > 0 && c % count == 0);
        return {WalkedRows::of_samples_in_c_order(n, c, PyArray_SIZE(x) / (n * c), count)};
    }
    const Rows& rows() const { return walked.rows; }
    Tensor tensor(PyArrayObject* array) const { return walked.in_c_order(PyArray_DATA(array)); }
    // A statistic per row, (N, groups).
    Ref new_statistic(double*& data) const {
        Ref table = new_array({npy_intp(rows().samples), npy_intp(rows().groups)}, NPY_DOUBLE);
        data = static_cast<double*>(PyArray_DATA(table.array()));
        return table;
    }
};

// A parameter per channel, as often as the walk wants each.
class RepeatedNumbers {
public:
    RepeatedNumbers(PyArrayObject* array, PyArrayObject* x, int64_t repeat) : own_(array, x), values_(own_.values()) {
        if (!array || repeat == 1) return;
        values_.floats ? fill(floats_, values_.floats, PyArray_SIZE(array), repeat)
                       : fill(doubles_, values_.doubles, PyArray_SIZE(array), repeat);
    }
    RepeatedNumbers(const RepeatedNumbers&) = delete;
    const Parameter& values() const { return values_; }

private:
    template <class V>
    void fill(std::unique_ptr<V[]>& all, const V* each, npy_intp size, int64_t repeat) {
        all.reset(new V[size * repeat]);
        for (npy_intp c = 0; c < size; ++c) std::fill_n(all.get() + c * repeat, repeat, each[c]);
        values_ = all.get();
    }

    Numbers own_;
    std::unique_ptr<float[]> floats_;
    std::unique_ptr<double[]> doubles_;
    Parameter values_;
};

struct SampleForward {
    Ref y, mean, var, rstd;
    int64_t values;  // per row
};

SampleForward forward(PyObject* x_argument, int64_t groups, PyObject* weight_argument, PyObject* bias_argument,
                      PyObject* axis, PyObject* eps, PyObject* out) {
    PyArrayObject* x = plain_array(x_argument);
    const Samples samples = Samples::of(x, axis, groups);
    require(groups || PyArray_SIZE(x) > samples.rows().count());
    const int64_t repeat = samples.walked.repeat;
    const RepeatedNumbers weights(plain_parameter(weight_argument, x, 1, 1), x, repeat),
        biases(plain_parameter(bias_argument, x, 1, 1), x, repeat);
    RowNormForward call{};
    call.dtype = *dtype_of(x);
    call.rows = samples.rows();
    call.eps = plain_epsilon(eps);
    call.x = samples.tensor(x);
    SampleForward result;
    result.y = output(out, x, {PyArray_DATA(x)}, {x_argument, weight_argument, bias_argument});
    call.y = samples.tensor(result.y.array());
    call.weight = weights.values();
    call.bias = biases.values();
    result.mean = samples.new_statistic(call.mean);
    result.var = samples.new_statistic(call.var);
    result.rstd = samples.new_statistic(call.rstd);
    result.values = samples.rows().row_size();
    call.streaming = exceeds_cache(2 * PyArray_NBYTES(x));
    {
        const WithoutGIL released(PyArray_SIZE(x));
        kernels().row_norm_forward(call);
    }
    return result;
}

// A table with a row for each sample.
PyArrayObject* plain_table(PyObject* argument, PyArrayObject* x) {
    require(PyArray_CheckExact(argument));
    PyArrayObject* array = reinterpret_cast<PyArrayObject*>(argument);
    require(PyArray_NDIM(array) == 2 && PyArray_DIM(array, 0) == PyArray_DIM(x, 0) && PyArray_DIM(array, 1) > 0);
    return array;
}

// `var` is null where the cache has none.
PyObject* backward(PyObject* dy_argument, PyObject* x_argument, PyObject* weight_argument, PyObject* bias_argument,
                   PyObject* mean, PyObject* var, PyObject* rstd, PyObject* axis, PyObject* out) {
    PyArrayObject *x = plain_array(x_argument), *dy = plain_like(dy_argument, x), *means = plain_table(mean, x);
    const Samples samples = Samples::of(x, axis, PyArray_DIM(means, 1));
    PyArrayObject *weight = plain_parameter(weight_argument, x, 1, 1), *bias = plain_parameter(bias_argument, x, 1, 1);
    const int64_t repeat = samples.walked.repeat, count = samples.rows().count();
    const RepeatedNumbers weights(weight, x, repeat);
    std::vector<double> dweight(samples.rows().parameters()), dbias(dweight.size());
    RowNormBackward call{};
    call.dtype = *dtype_of(x);
    call.rows = samples.rows();
    call.dy = samples.tensor(dy);
    call.x = samples.tensor(x);
    call.weight = weights.values();
    call.mean = plain_statistic(mean, count, x, 2);
    if (var) plain_statistic(var, count, x, 2);
    call.rstd = plain_statistic(rstd, count, x, 2);
    Ref dx = output(out, x, {PyArray_DATA(x), PyArray_DATA(dy)},
                    {dy_argument, x_argument, weight_argument, bias_argument, mean, given_or_none(var), rstd});
    call.dx = samples.tensor(dx.array());
    call.dweight = dweight.data(), call.dbias = dbias.data();
    call.streaming = exceeds_cache(3 * PyArray_NBYTES(x));
    {
        const WithoutGIL released(PyArray_SIZE(x));
        kernels().row_norm_backward(call);
    }
    auto of_channels = [&](const std::vector<double>& values) {
        std::vector<double> sums(values.size() / repeat);
        const double* next = values.data();
        for (double& sum : sums)
            for (int64_t i = 0; i < repeat; ++i) sum += *next++;
        return sums;
    };
    const bool wide = is_double(x) || is_double(weight) || is_double(bias);
    Ref of_weight(gradient(weight, of_channels(dweight), wide)), of_bias(gradient(bias, of_channels(dbias), wide));
    return tuple({dx.release(), of_weight.release(), of_bias.release()});
}

PyObject* group_norm_forward(Arguments a) {
    return or_none([&] {
        const int64_t groups = plain_integer(a[1]);
        require(groups > 0);
        SampleForward r = forward(a[0], groups, a[2], a[3], a[4], a[5], a[6]);
        Ref axis = Ref::checked(PyLong_FromLong(1));
        Ref fields(tuple({again(a[0]), again(a[2]), again(a[3]), r.mean.release(), r.rstd.release(), axis.release()}));
        return tuple({r.y.release(), fields.release()});
    });
}
PyObject* group_norm_backward(Arguments a) {
    return or_none([&] { return backward(a[0], a[1], a[2], a[3], a[4], nullptr, a[5], a[6], a[7]); });
}

PyObject* instance_norm_forward(Arguments a) {
    return or_none([&] {
        SampleForward r = forward(a[0], 0, a[1], a[2], a[3], a[4], a[5]);
        Ref count = Ref::checked(PyLong_FromLongLong(r.values)), axis = Ref::checked(PyLong_FromLong(1));
        Ref fields(tuple({again(a[0]), again(a[1]), again(a[2]), r.mean.release(), r.var.release(), r.rstd.release(),
                          count.release(), axis.release()}));
        return tuple({r.y.release(), fields.release()});
    });
}
PyObject* instance_norm_backward(Arguments a) {
    return or_none([&] { return backward(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]); });
}

}  // namespace

PyMethodDef direct_row_norm_methods[] = {
    function<6, layer_norm_forward>("direct_layer_norm_forward",
                                    DIRECT_DOC("x, normalized_shape, weight, bias, eps, out")),
    function<8, layer_norm_backward>("direct_layer_norm_backward",
                                     DIRECT_DOC("dy, x, weight, bias, mean, rstd, normalized_shape, out")),
    function<5, rms_norm_forward>("direct_rms_norm_forward", DIRECT_DOC("x, normalized_shape, weight, eps, out")),
    function<6, rms_norm_backward>("direct_rms_norm_backward",
                                   DIRECT_DOC("dy, x, weight, rstd, normalized_shape, out")),
    function<7, group_norm_forward>("direct_group_norm_forward",
                                    DIRECT_DOC("x, num_groups, weight, bias, axis, eps, out")),
    function<8, group_norm_backward>("direct_group_norm_backward",
                                     DIRECT_DOC("dy, x, weight, bias, mean, rstd, axis, out")),
    function<6, instance_norm_forward>("direct_instance_norm_forward", DIRECT_DOC("x, weight, bias, axis, eps, out")),
    function<9, instance_norm_backward>("direct_instance_norm_backward",
                                        DIRECT_DOC("dy, x, weight, bias, mean, var, rstd, axis, out")),
    {},
};

}  // namespace arraynorm
