// NumPy arrays on the way in and out of the kernels. Everything here needs the GIL.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_2_0_API_VERSION
#define PY_ARRAY_UNIQUE_SYMBOL arraynorm_ARRAY_API
#if !defined(ARRAYNORM_IMPORTS_NUMPY)
#define NO_IMPORT_ARRAY
#endif
#include <numpy/arrayobject.h>

#include <chrono>
#include <initializer_list>
#include <optional>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "calls.hpp"

namespace arraynorm {

// Thrown where Python's error is set already.
struct PythonError {};

// Owns a reference.
class Ref {
public:
    Ref() = default;
    explicit Ref(PyObject* owned) : object_(owned) {}
    Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
    Ref& operator=(Ref&& other) noexcept {
        std::swap(object_, other.object_);
        return *this;
    }
    ~Ref() { Py_XDECREF(object_); }

    static Ref checked(PyObject* owned) {
        if (!owned) throw PythonError{};
        return Ref(owned);
    }
    static Ref borrowed(PyObject* object) {
        Py_XINCREF(object);
        return Ref(object);
    }

    PyObject* get() const { return object_; }
    PyArrayObject* array() const { return reinterpret_cast<PyArrayObject*>(object_); }
    PyArray_Descr* descr() const { return reinterpret_cast<PyArray_Descr*>(object_); }
    PyObject* release() { return std::exchange(object_, nullptr); }
    explicit operator bool() const { return object_ != nullptr; }

private:
    PyObject* object_ = nullptr;
};

// Lets other Python threads run, where the work is worth the two switches.
class WithoutGIL {
public:
    explicit WithoutGIL(int64_t elements) : state_(elements >= 8192 ? PyEval_SaveThread() : nullptr) {}
    WithoutGIL(const WithoutGIL&) = delete;
    ~WithoutGIL() {
        if (!state_) return;
        try {
            PyEval_RestoreThread(state_);
        } catch (...) {
            // A daemon thread, while the interpreter ends. Before 3.14 Python exits it here, which unwinds the stack:
            // out of a destructor that is the end of the process, and further up references would be given back without
            // the lock. So it waits for that end, as Python itself makes it do from 3.14 on.
            for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
        }
    }

private:
    PyThreadState* state_;
};

// The array behind an argument, or null for None. TypeError for anything else.
PyArrayObject* as_array(PyObject* argument);

// The storage type of an array that kernels can read in place or after a copy, or nothing.
std::optional<DType> dtype_of(PyArrayObject* array);

// A vector of any storage type and stride as doubles; empty for null.
std::vector<double> as_doubles(PyArrayObject* array);
inline const double* data_or_null(const std::vector<double>& values, PyArrayObject* array) {
    return array ? values.data() : nullptr;
}

// New arrays, aligned to cache lines and recycled by the pool where they are large.
Ref new_array(std::initializer_list<npy_intp> shape, int type_number);
Ref new_zeros(npy_intp size, int type_number);
// In the prototype's order of strides; to be written while `read_beside` are read.
Ref new_like(PyArrayObject* prototype, PyArray_Descr* descr, std::span<const void* const> read_beside);
inline Ref new_like(PyArrayObject* prototype, PyArray_Descr* descr, std::initializer_list<const void*> read_beside) {
    return new_like(prototype, descr, std::span(read_beside.begin(), read_beside.size()));
}
Ref new_vector(npy_intp size, double*& data);  // float64

// Copies with a cast.
Ref copied_like(PyArrayObject* prototype, PyArrayObject* source, PyArray_Descr* descr);
void copy_into(PyArrayObject* target, PyArrayObject* source);

PyObject* not_implemented();

// Runs a binding's body: Python's errors and C++'s become a null result.
template <class F>
PyObject* guarded(F body) {
    try {
        return body();
    } catch (const PythonError&) {
        return nullptr;
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

}  // namespace arraynorm
