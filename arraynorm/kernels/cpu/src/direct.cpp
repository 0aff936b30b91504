// Public calls on plain arrays in one step: the checks, the walk and the kernel.
//
// A layer of a thousand numbers is computed in less than a microsecond, and a check in Python takes a tenth of one. So
// the functional layer asks here first. Whatever is not plain (another type, strides, something wrong) is answered with
// None, and is then checked, refused in words, or computed step by step. Nothing is decided here but that a call is in
// order. A forward answers with y and the fields of its cache, a backward with the gradients.
#include <cfloat>
#include <cmath>
#include <cstring>
#include <memory>

#include "native.hpp"
#include "operands.hpp"
#include "walk.hpp"

namespace arraynorm {
namespace {

// Thrown where a call is not plain.
struct NotPlain {};

void require(bool plain) {
    if (!plain) throw NotPlain{};
}

template <class Body>
PyObject* or_none(Body body) {
    try {
        return body();
    } catch (const NotPlain&) {
        return none();
    }
}

// An array in C order with elements, of one of the four dtypes.
PyArrayObject* plain_array(PyObject* argument) {
    require(PyArray_CheckExact(argument));
    PyArrayObject* array = reinterpret_cast<PyArrayObject*>(argument);
    require(PyArray_ISCARRAY_RO(array) && PyArray_SIZE(array) > 0 && dtype_of(array));
    return array;
}

// The same, like `x`.
PyArrayObject* plain_like(PyObject* argument, PyArrayObject* x) {
    PyArrayObject* array = plain_array(argument);
    require(PyArray_TYPE(array) == PyArray_TYPE(x) && PyArray_SAMESHAPE(array, x));
    return array;
}

// A parameter in C order with x's last `ndim` dimensions from `axis` on, or null for None.
PyArrayObject* plain_parameter(PyObject* argument, PyArrayObject* x, int axis, int ndim) {
    if (argument == Py_None) return nullptr;
    PyArrayObject* array = plain_array(argument);
    require(PyArray_NDIM(array) == ndim &&
            !std::memcmp(PyArray_DIMS(array), PyArray_DIMS(x) + axis, sizeof(npy_intp) * size_t(ndim)));
    return array;
}

// Declines a NaN that comes together with an x of bfloat16: on the longer way it is made `quiet`.
template <class Values>
void require_no_nan(const Values& values, int64_t size, PyArrayObject* x) {
    if (*dtype_of(x) != DType::bfloat16) return;
    for (int64_t i = 0; i < size; ++i) require(!std::isnan(values[i]));
}

// A statistic: `size` doubles.
const double* plain_statistic(PyObject* argument, int64_t size, PyArrayObject* x) {
    require(PyArray_CheckExact(argument));
    PyArrayObject* array = reinterpret_cast<PyArrayObject*>(argument);
    require(PyArray_ISCARRAY_RO(array) && PyArray_TYPE(array) == NPY_DOUBLE && PyArray_SIZE(array) == size);
    const double* values = static_cast<const double*>(PyArray_DATA(array));
    require_no_nan(values, size, x);
    return values;
}

PyObject* given_or_none(PyObject* argument) { return argument ? argument : Py_None; }

// Where results go: `out`, an array like x that touches none of the `others`; or, for None, a new one, which is placed
// in memory for loops that read those `beside`.
Ref output(PyObject* out, PyArrayObject* x, const std::vector<const void*>& beside,
           std::initializer_list<PyObject*> others) {
    if (out == Py_None) return new_like(x, PyArray_DESCR(x), beside);
    PyArrayObject* array = plain_like(out, x);
    require(PyArray_ISWRITEABLE(array));
    const char *begin = PyArray_BYTES(array), *end = begin + PyArray_NBYTES(array);
    for (PyObject* argument : others) {
        if (argument == Py_None) continue;
        PyArrayObject* other = as_array(argument);
        require(end <= PyArray_BYTES(other) || PyArray_BYTES(other) + PyArray_NBYTES(other) <= begin);
    }
    return Ref::borrowed(out);
}

// One more reference.
PyObject* again(PyObject* argument) { return Ref::borrowed(argument).release(); }

double plain_epsilon(PyObject* argument) {
    require(PyFloat_CheckExact(argument));
    const double eps = PyFloat_AS_DOUBLE(argument);
    require(std::isfinite(eps) && eps >= 0);
    return eps;
}

int64_t plain_integer(PyObject* argument) {
    require(PyLong_CheckExact(argument));
    int overflow;
    const int64_t value = PyLong_AsLongLongAndOverflow(argument, &overflow);
    require(!overflow);
    return value;
}

// The numbers of a parameter in C order: in place or, of 16 bits, as floats.
class Numbers {
public:
    Numbers(PyArrayObject* array, PyArrayObject* x) {
        if (!array) return;
        const void* data = PyArray_DATA(array);
        switch (*dtype_of(array)) {
            case DType::float16: widen(static_cast<const float16*>(data), PyArray_SIZE(array)); break;
            case DType::bfloat16: widen(static_cast<const bfloat16*>(data), PyArray_SIZE(array)); break;
            case DType::float32: values_ = static_cast<const float*>(data); break;
            case DType::float64: values_ = static_cast<const double*>(data); break;
        }
        require_no_nan(values_, PyArray_SIZE(array), x);
    }
    const Parameter& values() const { return values_; }

private:
    template <class T>
    void widen(const T* from, npy_intp size) {
        copy_.reset(new float[size]);  // a vector would write zeros first
        float* copy = copy_.get();
        for (npy_intp i = 0; i < size; ++i) copy[i] = to_float(from[i]);
        values_ = copy;
    }

    std::unique_ptr<float[]> copy_;
    Parameter values_;
};

bool is_double(PyArrayObject* array) { return array && PyArray_TYPE(array) == NPY_DOUBLE; }

// A parameter's gradient in the parameter's shape, in float64 where that is the widest dtype of all, else in float32.
PyObject* gradient(PyArrayObject* parameter, const std::vector<double>& sums, bool wide) {
    if (!parameter) return none();
    Ref result = Ref::checked(
        PyArray_SimpleNew(PyArray_NDIM(parameter), PyArray_DIMS(parameter), wide ? NPY_DOUBLE : NPY_FLOAT));
    void* data = PyArray_DATA(result.array());
    if (wide)
        std::memcpy(data, sums.data(), sums.size() * sizeof(double));
    else
        for (size_t i = 0; i < sums.size(); ++i) static_cast<float*>(data)[i] = float(sums[i]);
    return result.release();
}

// -- batch norm -----------------------------------------------------------------------------------------------

struct Channels {
    int axis;
    Volume volume;
    Tensor tensor(PyArrayObject* array) const { return {PyArray_DATA(array), volume.c * volume.s, volume.s}; }
};

Channels channels_of(PyArrayObject* x, PyObject* axis_argument) {
    const int ndim = PyArray_NDIM(x);
    int64_t axis = plain_integer(axis_argument);
    require(ndim >= 2 && -ndim <= axis && axis < ndim);
    if (axis < 0) axis += ndim;
    Volume v{Volume::Layout::planes, 1, PyArray_DIM(x, int(axis)), 1};
    for (int i = 0; i < ndim; ++i) (i < axis ? v.n : i > axis ? v.s : v.c) *= i == axis ? 1 : PyArray_DIM(x, i);
    require(v.n * v.s > 1);
    return {int(axis), volume_in_c_order(v.n, v.c, v.s)};
}

PyObject* batch_norm_forward(Arguments a) {
    return or_none([&] {
        PyArrayObject* x = plain_array(a[0]);
        const Channels channels = channels_of(x, a[3]);
        PyArrayObject *weight = plain_parameter(a[1], x, channels.axis, 1),
                      *bias = plain_parameter(a[2], x, channels.axis, 1);
        const Numbers weights(weight, x), biases(bias, x);
        BatchNormForward call{};
        call.dtype = *dtype_of(x);
        call.volume = channels.volume;
        call.eps = plain_epsilon(a[4]);
        call.x = channels.tensor(x);
        Ref y = output(a[5], x, {PyArray_DATA(x)}, {a[0], a[1], a[2]});
        call.y = channels.tensor(y.array());
        call.weight = weights.values();
        call.bias = biases.values();
        const npy_intp c = PyArray_DIM(x, channels.axis);
        Ref mean = new_vector(c, call.mean), var = new_vector(c, call.m2), rstd = new_vector(c, call.rstd);
        call.takes_statistics = call.writes = true;
        call.streaming = exceeds_cache(2 * PyArray_NBYTES(x));
        {
            const WithoutGIL released(PyArray_SIZE(x));
            kernels().batch_norm_forward(call);
        }
        const int64_t n = PyArray_SIZE(x) / c;
        for (npy_intp i = 0; i < c; ++i) call.m2[i] /= double(n);
        Ref count = Ref::checked(PyLong_FromLongLong(n)), axis = Ref::checked(PyLong_FromLong(channels.axis));
        Ref fields(tuple({again(a[0]), again(a[1]), again(a[2]), mean.release(), var.release(), rstd.release(),
                          count.release(), axis.release(), none()}));
        return tuple({y.release(), fields.release()});
    });
}

PyObject* batch_norm_backward(Arguments a) {
    return or_none([&] {
        PyArrayObject *x = plain_array(a[1]), *dy = plain_like(a[0], x);
        const Channels channels = channels_of(x, a[7]);
        const npy_intp c = PyArray_DIM(x, channels.axis);
        PyArrayObject *weight = plain_parameter(a[2], x, channels.axis, 1),
                      *bias = plain_parameter(a[3], x, channels.axis, 1);
        const Numbers weights(weight, x);
        std::vector<double> dweight(c), dbias(c), mean_dy(c), mean_dy_x_hat(c);
        BatchNormBackward call{};
        call.dtype = *dtype_of(x);
        call.volume = channels.volume;
        call.dy = channels.tensor(dy);
        call.x = channels.tensor(x);
        call.weight = weights.values();
        call.mean = plain_statistic(a[4], c, x);
        plain_statistic(a[5], c, x);  // the variance: of use to nobody here, but not to be written over
        call.rstd = plain_statistic(a[6], c, x);
        Ref dx = output(a[8], x, {PyArray_DATA(x), PyArray_DATA(dy)}, {a[0], a[1], a[2], a[3], a[4], a[5], a[6]});
        call.dx = channels.tensor(dx.array());
        call.dbias = dbias.data(), call.dweight = dweight.data();
        call.mean_dy = mean_dy.data(), call.mean_dy_x_hat = mean_dy_x_hat.data();
        call.reduces = call.writes = true;
        call.streaming = exceeds_cache(3 * PyArray_NBYTES(x));
        {
            const WithoutGIL released(PyArray_SIZE(x));
            kernels().batch_norm_backward(call);
        }
        const bool wide = is_double(x) || is_double(weight) || is_double(bias);
        Ref of_weight(gradient(weight, dweight, wide)), of_bias(gradient(bias, dbias, wide));
        return tuple({dx.release(), of_weight.release(), of_bias.release()});
    });
}

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

}  // namespace

#define DOC(parameters) "The public call for plain arguments (" parameters "), or None."

PyMethodDef direct_methods[] = {
    function<6, batch_norm_forward>("direct_batch_norm_forward", DOC("x, weight, bias, axis, eps, out")),
    function<9, batch_norm_backward>("direct_batch_norm_backward",
                                     DOC("dy, x, weight, bias, mean, var, rstd, axis, out")),
    function<6, layer_norm_forward>("direct_layer_norm_forward", DOC("x, normalized_shape, weight, bias, eps, out")),
    function<8, layer_norm_backward>("direct_layer_norm_backward",
                                     DOC("dy, x, weight, bias, mean, rstd, normalized_shape, out")),
    function<5, rms_norm_forward>("direct_rms_norm_forward", DOC("x, normalized_shape, weight, eps, out")),
    function<6, rms_norm_backward>("direct_rms_norm_backward", DOC("dy, x, weight, rstd, normalized_shape, out")),
    {},
};

}  // namespace arraynorm
