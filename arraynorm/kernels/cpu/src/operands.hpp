// The arrays of a call in the shape of x, and what all bindings need.
#pragma once

#include "arrays.hpp"

namespace arraynorm {

// Thrown where a call has to be left to the reference kernel.
struct Declined {};

// The arrays of one call in the shape of x: inputs as they are or, where their strides or dtype do not fit, as copies;
// outputs in place or, where they do not fit, copied when the work is done.
//
// A Way is one of going through memory: way.tensor(array) is the array as that sees it, or nothing if its strides do
// not allow that.
template <class Way>
class Operands {
public:
    // `inputs` are those of x's shape, x first; null where there is none. choose(array) is the way for x, or nothing;
    // for an array in C order there is always one. Throws Declined.
    template <class Choose>
    Operands(std::initializer_list<PyArrayObject*> inputs, Choose choose) {
        PyArrayObject* x = *inputs.begin();
        result_descr_ = Ref::borrowed(reinterpret_cast<PyObject*>(PyArray_DESCR(x)));
        descr_ = Ref::borrowed(result_descr_.get());
        const std::optional<DType> own = dtype_of(x);
        if (!own) throw Declined{};
        dtype = *own;
        for (PyArrayObject* input : inputs) {
            if (!input) continue;
            beside_.push_back(PyArray_DATA(input));
            const std::optional<DType> other = dtype_of(input);
            if (!other) throw Declined{};
            if (*other != dtype) {  // double holds any two of them
                dtype = DType::float64;
                descr_ = Ref::checked(reinterpret_cast<PyObject*>(PyArray_DescrFromType(NPY_DOUBLE)));
            }
        }
        if (auto found = dtype == *own ? choose(x) : std::nullopt) {
            way_ = *found;
            prototype_ = Ref::borrowed(reinterpret_cast<PyObject*>(x));
            // a result with x's order of strides may not allow the way of x, where those overlap
            Ref probe = empty_like();
            if (way_.tensor(probe.array())) {
                spare_ = std::move(probe);
            } else {
                prototype_ = Ref();
            }
        }
        if (!prototype_) {
            Ref copy = Ref::checked(PyArray_Empty(PyArray_NDIM(x), PyArray_DIMS(x), new_descr(), 0));
            copy_into(copy.array(), x);
            way_ = *choose(copy.array());
            prototype_ = std::move(copy);
            x_is_copy_ = true;
        }
        for (PyArrayObject* input : inputs) tensors_.push_back(input ? read(input, input == x) : Tensor{});
    }
    Operands(const Operands&) = delete;

    DType dtype;
    const Way& way() const { return way_; }
    const Tensor& input(size_t i) const { return tensors_[i]; }

    // An output of x's shape: `out`, or a new array.
    Tensor output(PyArrayObject* out) {
        Output o;
        o.given = Ref::borrowed(reinterpret_cast<PyObject*>(out));
        std::optional<Tensor> tensor;
        if (out && dtype_of(out) == dtype) tensor = way_.tensor(out);
        if (tensor) {
            o.written = Ref::borrowed(reinterpret_cast<PyObject*>(out));
        } else {
            o.written = spare_ ? std::move(spare_) : empty_like();
            spare_ = Ref();
            beside_.push_back(PyArray_DATA(o.written.array()));
            tensor = way_.tensor(o.written.array());
        }
        outputs_.push_back(std::move(o));
        return *tensor;
    }

    // The outputs' arrays in the order of the calls of output().
    Ref result(size_t i) {
        Output& o = outputs_[i];
        if (o.given.get() == o.written.get() && o.given) return std::move(o.given);
        if (!o.given && PyArray_DESCR(o.written.array())->type_num == result_descr_.descr()->type_num)
            return std::move(o.written);
        if (!o.given) return copied_like(o.written.array(), o.written.array(), result_descr_.descr());
        copy_into(o.given.array(), o.written.array());
        return std::move(o.given);
    }

private:
    struct Output {
        Ref given, written;
    };

    PyArray_Descr* new_descr() const {
        Py_INCREF(descr_.get());
        return descr_.descr();
    }
    Ref empty_like() const { return new_like(prototype_.array(), descr_.descr(), beside_); }
    Tensor read(PyArrayObject* input, bool is_x) {
        if (is_x && x_is_copy_) return *way_.tensor(prototype_.array());
        if (dtype_of(input) == dtype)
            if (auto tensor = way_.tensor(input)) return *tensor;
        Ref copy = empty_like();
        copy_into(copy.array(), input);
        copies_.push_back(std::move(copy));
        return *way_.tensor(copies_.back().array());
    }

    Way way_{};
    Ref result_descr_, descr_, prototype_, spare_;
    std::vector<const void*> beside_;  // the data of all arrays of x's shape
    bool x_is_copy_ = false;
    std::vector<Ref> copies_;
    std::vector<Tensor> tensors_;
    std::vector<Output> outputs_;
};

inline PyObject* tuple(std::initializer_list<PyObject*> owned) {
    Ref result = Ref::checked(PyTuple_New(Py_ssize_t(owned.size())));
    Py_ssize_t i = 0;
    for (PyObject* object : owned) PyTuple_SET_ITEM(result.get(), i++, object);
    return result.release();
}

inline PyObject* none() { return Ref::borrowed(Py_None).release(); }

inline int64_t item_size(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

template <class Body>
PyObject* or_decline(Body body) {
    try {
        return body();
    } catch (const Declined&) {
        return not_implemented();
    }
}

inline double as_double(PyObject* number) {
    const double value = PyFloat_AsDouble(number);
    if (value == -1 && PyErr_Occurred()) throw PythonError{};
    return quiet(value);
}

#define SIGNATURE(name, parameters) #name "($module, " parameters ", /)\n--\n\nSee arraynorm.kernels.reference."

}  // namespace arraynorm
