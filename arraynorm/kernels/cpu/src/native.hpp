// The Python functions of the extension module, and the ISA level they run on.
#pragma once

#include "arrays.hpp"

namespace arraynorm {

const Kernels& kernels();

// Whether the caller has restricted calls to the reference: see only() in _kernel.py.
bool is_reference_alone_allowed();

using Arguments = PyObject* const*;

// One function for each specialised kernel, with the reference's parameters; NotImplemented declines.
extern PyMethodDef batch_norm_methods[], row_norm_methods[], quantized_batch_norm_methods[];

// For arraynorm.distributed: see moments.cpp.
extern PyMethodDef moments_methods[];

// direct_NAME for some of them: see direct.hpp.
extern PyMethodDef direct_batch_norm_methods[], direct_row_norm_methods[], direct_quantized_batch_norm_methods[];

// The body of a METH_FASTCALL function with a fixed number of parameters.
template <size_t number, PyObject* (*body)(Arguments)>
PyObject* positional(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
    if (given != Py_ssize_t(number)) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", Py_ssize_t(number), given);
        return nullptr;
    }
    return guarded([&] { return body(arguments); });
}

// A module function NAME with the parameters SIGNATURE, "(x, eps)": inspect reads them from the docstring.
template <size_t number, PyObject* (*body)(Arguments)>
constexpr PyMethodDef function(const char* name, const char* signature_and_doc) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(positional<number, body>)), METH_FASTCALL,
            signature_and_doc};
}

}  // namespace arraynorm
