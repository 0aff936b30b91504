#include "arrays.hpp"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "memory.hpp"

namespace arraynorm {

PyArrayObject* as_array(PyObject* argument) {
    if (argument == Py_None) return nullptr;
    if (!PyArray_Check(argument)) {
        PyErr_Format(PyExc_TypeError, "a kernel takes NumPy arrays or None, got %s", Py_TYPE(argument)->tp_name);
        throw PythonError{};
    }
    return reinterpret_cast<PyArrayObject*>(argument);
}

std::optional<DType> dtype_of(PyArrayObject* array) {
    PyArray_Descr* descr = PyArray_DESCR(array);
    if (!PyArray_ISNBO(descr->byteorder)) return {};
    switch (descr->type_num) {
        case NPY_HALF: return DType::float16;
        case NPY_FLOAT: return DType::float32;
        case NPY_DOUBLE: return DType::float64;
    }
    // NumPy itself has no bfloat16; ml_dtypes registers one, under a number that differs from process to process
    if (descr->type_num >= NPY_USERDEF && PyDataType_ELSIZE(descr) == 2) {
        const std::string_view name = descr->typeobj->tp_name;
        if (name == "bfloat16" || name == "ml_dtypes.bfloat16") return DType::bfloat16;
    }
    return {};
}

namespace {

template <class T>
void append(std::vector<double>& values, PyArrayObject* array) {
    const char* p = PyArray_BYTES(array);
    const npy_intp size = PyArray_SIZE(array), stride = PyArray_NDIM(array) ? PyArray_STRIDE(array, 0) : 0;
    auto convert = [&](auto distance) {
        for (npy_intp i = 0; i < size; ++i) {
            T value;
            std::memcpy(&value, p + i * distance, sizeof value);
            values[i] = quiet(double(to_float(value)));
        }
    };
    if (stride == sizeof(T))
        convert(std::integral_constant<npy_intp, sizeof(T)>{});  // eight at a time
    else
        convert(stride);
}

// NumPy's allocator, replaced for as long as a result is made.
class OurMemory {
public:
    OurMemory(npy_intp bytes, std::span<const void* const> read_beside) {
        if (bytes < 4096) return;
        previous_ = Ref::checked(PyDataMem_SetHandler(memory_handler()));
        previous_beside_ = exchange_read_beside(read_beside);
    }
    ~OurMemory() {
        if (!previous_) return;
        exchange_read_beside(previous_beside_);
        Py_XDECREF(PyDataMem_SetHandler(previous_.get()));
    }

private:
    Ref previous_;
    std::span<const void* const> previous_beside_;
};

}  // namespace

std::vector<double> as_doubles(PyArrayObject* array) {
    if (!array) return {};
    std::vector<double> values(PyArray_SIZE(array));
    const std::optional<DType> dtype = dtype_of(array);
    if (!dtype || PyArray_NDIM(array) > 1) {
        PyErr_SetString(PyExc_TypeError, "a kernel's parameters are vectors of floating numbers");
        throw PythonError{};
    }
    switch (*dtype) {
        case DType::float16: append<float16>(values, array); break;
        case DType::bfloat16: append<bfloat16>(values, array); break;
        case DType::float32: append<float>(values, array); break;
        case DType::float64: append<double>(values, array); break;
    }
    return values;
}

Ref new_array(std::initializer_list<npy_intp> shape, int type_number) {
    return Ref::checked(PyArray_SimpleNew(int(shape.size()), const_cast<npy_intp*>(shape.begin()), type_number));
}

Ref new_zeros(npy_intp size, int type_number) { return Ref::checked(PyArray_ZEROS(1, &size, type_number, 0)); }

Ref new_like(PyArrayObject* prototype, PyArray_Descr* descr, std::span<const void* const> read_beside) {
    const OurMemory ours(PyArray_SIZE(prototype) * PyDataType_ELSIZE(descr), read_beside);
    Py_INCREF(descr);
    return Ref::checked(PyArray_NewLikeArray(prototype, NPY_KEEPORDER, descr, 0));
}

Ref new_vector(npy_intp size, double*& data) {
    Ref vector = new_array({size}, NPY_DOUBLE);
    data = static_cast<double*>(PyArray_DATA(vector.array()));
    return vector;
}

Ref copied_like(PyArrayObject* prototype, PyArrayObject* source, PyArray_Descr* descr) {
    Ref copy = new_like(prototype, descr, {PyArray_DATA(source)});
    copy_into(copy.array(), source);
    return copy;
}

void copy_into(PyArrayObject* target, PyArrayObject* source) {
    if (PyArray_CopyInto(target, source) < 0) throw PythonError{};
}

PyObject* not_implemented() {
    Py_INCREF(Py_NotImplemented);
    return Py_NotImplemented;
}

}  // namespace arraynorm
