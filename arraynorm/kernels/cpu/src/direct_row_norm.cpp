// Layer and RMS norm in one step: see direct.hpp.
#include <cfloat>

#include "direct.hpp"

namespace arraynorm {
namespace {

using namespace direct;

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

}  // namespace

PyMethodDef direct_row_norm_methods[] = {
    function<6, layer_norm_forward>("direct_layer_norm_forward",
                                    DIRECT_DOC("x, normalized_shape, weight, bias, eps, out")),
    function<8, layer_norm_backward>("direct_layer_norm_backward",
                                     DIRECT_DOC("dy, x, weight, bias, mean, rstd, normalized_shape, out")),
    function<5, rms_norm_forward>("direct_rms_norm_forward", DIRECT_DOC("x, normalized_shape, weight, eps, out")),
    function<6, rms_norm_backward>("direct_rms_norm_backward",
                                   DIRECT_DOC("dy, x, weight, rstd, normalized_shape, out")),
    {},
};

}  // namespace arraynorm
