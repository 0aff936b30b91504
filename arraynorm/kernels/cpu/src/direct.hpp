// Public calls on plain arrays in one step: the checks, the walk and the kernel.
//
// A layer of a thousand numbers is computed in less than a microsecond, and a check in Python takes a tenth of one. So
// the functional layer asks here first. Whatever is not plain (another type, strides, something wrong) is answered with
// None, and is then checked, refused in words, or computed step by step; and so is everything where the reference alone
// may run. Nothing else is decided here. A forward answers with y and the fields of its cache, a backward with the
// gradients.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>

#include "native.hpp"
#include "operands.hpp"
#include "walk.hpp"

namespace arraynorm::direct {

// Thrown where a call is not plain.
struct NotPlain {};

inline void require(bool plain) {
    if (!plain) throw NotPlain{};
}

template <class Body>
PyObject* or_none(Body body) {
    if (is_reference_alone_allowed()) return none();
    try {
        return body();
    } catch (const NotPlain&) {
        return none();
    }
}

// An array in C order with elements.
inline PyArrayObject* plain_elements(PyObject* argument) {
    require(PyArray_CheckExact(argument));
    PyArrayObject* array = reinterpret_cast<PyArrayObject*>(argument);
    require(PyArray_ISCARRAY_RO(array) && PyArray_SIZE(array) > 0);
    return array;
}

// The same, of one of the four dtypes.
inline PyArrayObject* plain_array(PyObject* argument) {
    PyArrayObject* array = plain_elements(argument);
    require(bool(dtype_of(array)));
    return array;
}

// The same, like `x`.
inline PyArrayObject* plain_like(PyObject* argument, PyArrayObject* x) {
    PyArrayObject* array = plain_elements(argument);
    require(PyArray_TYPE(array) == PyArray_TYPE(x) && PyArray_SAMESHAPE(array, x));
    return array;
}

// A parameter in C order with x's last `ndim` dimensions from `axis` on, or null for None.
inline PyArrayObject* plain_parameter(PyObject* argument, PyArrayObject* x, int axis, int ndim) {
    if (argument == Py_None) return nullptr;
    PyArrayObject* array = plain_array(argument);
    require(PyArray_NDIM(array) == ndim &&
            !std::memcmp(PyArray_DIMS(array), PyArray_DIMS(x) + axis, sizeof(npy_intp) * size_t(ndim)));
    return array;
}

// Declines a NaN that comes together with an x of bfloat16: on the longer way it is made `quiet`.
template <class Values>
void require_no_nan(const Values& values, int64_t size, PyArrayObject* x) {
    if (dtype_of(x) != DType::bfloat16) return;
    for (int64_t i = 0; i < size; ++i) require(!std::isnan(values[i]));
}

// A statistic: `size` doubles in so many dimensions.
inline const double* plain_statistic(PyObject* argument, int64_t size, PyArrayObject* x, int ndim = 1) {
    require(PyArray_CheckExact(argument));
    PyArrayObject* array = reinterpret_cast<PyArrayObject*>(argument);
    require(PyArray_ISCARRAY_RO(array) && PyArray_TYPE(array) == NPY_DOUBLE && PyArray_NDIM(array) == ndim &&
            PyArray_SIZE(array) == size);
    const double* values = static_cast<const double*>(PyArray_DATA(array));
    require_no_nan(values, size, x);
    return values;
}

// As many bits, eight to a byte.
inline const uint8_t* plain_bits(PyObject* argument, int64_t size) {
    require(PyArray_CheckExact(argument));
    PyArrayObject* array = reinterpret_cast<PyArrayObject*>(argument);
    require(PyArray_ISCARRAY_RO(array) && PyArray_TYPE(array) == NPY_UINT8 && PyArray_SIZE(array) == (size + 7) / 8);
    return static_cast<const uint8_t*>(PyArray_DATA(array));
}

inline PyObject* given_or_none(PyObject* argument) { return argument ? argument : Py_None; }

// Where results go: `out`, an array like x that touches none of the `others`; or, for None, a new one, which is placed
// in memory for loops that read those `beside`.
inline Ref output(PyObject* out, PyArrayObject* x, std::initializer_list<const void*> beside,
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
inline PyObject* again(PyObject* argument) { return Ref::borrowed(argument).release(); }

inline double plain_real(PyObject* argument) {
    require(PyFloat_CheckExact(argument));
    return PyFloat_AS_DOUBLE(argument);
}

inline double plain_epsilon(PyObject* argument) {
    const double eps = plain_real(argument);
    require(std::isfinite(eps) && eps >= 0);
    return eps;
}

inline int64_t plain_integer(PyObject* argument) {
    require(PyLong_CheckExact(argument));
    int overflow;
    const int64_t value = PyLong_AsLongLongAndOverflow(argument, &overflow);
    require(!overflow);
    return value;
}

// Channels at any axis of an array in C order.
struct Channels {
    int axis;
    npy_intp number;
    int64_t values;  // per channel
    Volume volume;
    Tensor tensor(PyArrayObject* array) const { return {PyArray_DATA(array), volume.c * volume.s, volume.s}; }
};

// `least` values per channel are needed.
inline Channels channels_of(PyArrayObject* x, PyObject* axis_argument, int64_t least) {
    const int ndim = PyArray_NDIM(x);
    int64_t axis = plain_integer(axis_argument);
    require(ndim >= 2 && -ndim <= axis && axis < ndim);
    if (axis < 0) axis += ndim;
    int64_t n = 1, s = 1;
    for (int i = 0; i < axis; ++i) n *= PyArray_DIM(x, i);
    for (int i = int(axis) + 1; i < ndim; ++i) s *= PyArray_DIM(x, i);
    require(n * s >= least);
    const npy_intp number = PyArray_DIM(x, int(axis));
    return {int(axis), number, n * s, volume_in_c_order(n, number, s)};
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

inline bool is_double(PyArrayObject* array) { return array && PyArray_TYPE(array) == NPY_DOUBLE; }

// A parameter's gradient in the parameter's shape, in float64 where that is the widest dtype of all, else in float32.
inline PyObject* gradient(PyArrayObject* parameter, const std::vector<double>& sums, bool wide) {
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

#define DIRECT_DOC(parameters) "The public call for plain arguments (" parameters "), or None."

}  // namespace arraynorm::direct
