// What the ranks of a communicator bring: distributed/_moments.py, operation by operation, for the same bits.
#include <algorithm>
#include <cmath>

#include "native.hpp"

namespace arraynorm {
namespace {

// A contiguous float64 vector.
PyArrayObject* vector_of(PyObject* object) {
    if (PyArray_Check(object)) {
        auto* array = reinterpret_cast<PyArrayObject*>(object);
        if (PyArray_TYPE(array) == NPY_DOUBLE && PyArray_NDIM(array) == 1 && PyArray_ISCARRAY_RO(array)) return array;
    }
    PyErr_Format(PyExc_TypeError, "a payload must be a contiguous float64 vector, got %R", object);
    throw PythonError{};
}
const double* data_of(PyArrayObject* array) { return static_cast<const double*>(PyArray_DATA(array)); }

[[noreturn]] void refuse(const char* rule) {
    PyErr_SetString(PyExc_ValueError, rule);
    throw PythonError{};
}

// The payloads of all ranks.
struct Payloads {
    explicit Payloads(PyObject* sequence) : owned(Ref::checked(PySequence_Fast(sequence, "payloads: a sequence"))) {
        const npy_intp ranks = PySequence_Fast_GET_SIZE(owned.get());
        for (npy_intp rank = 0; rank < ranks; ++rank) {
            PyArrayObject* payload = vector_of(PySequence_Fast_GET_ITEM(owned.get(), rank));
            if (rank && PyArray_SIZE(payload) != size) refuse("payloads must be of one size");
            of_rank.push_back(data_of(payload)), size = PyArray_SIZE(payload);
        }
        if (!ranks) refuse("there must be a payload");
    }

    Ref owned;
    std::vector<const double*> of_rank;
    npy_intp size = 0;
};

// A number or an array among the parts of a payload.
class Part {
public:
    explicit Part(PyObject* object) {
        if (PyFloat_CheckExact(object) || PyLong_CheckExact(object)) {  // numbers need no array
            number_ = PyFloat_AsDouble(object);
            if (number_ == -1 && PyErr_Occurred()) throw PythonError{};
        } else {
            const Ref any = Ref::checked(PyArray_FROM_O(object)),
                      type(Ref::checked(reinterpret_cast<PyObject*>(PyArray_DescrFromType(NPY_DOUBLE))));
            if (!PyArray_CanCastArrayTo(any.array(), type.descr(), NPY_SAME_KIND_CASTING)) {
                PyErr_Format(PyExc_TypeError, "pack_payload: parts must be of real numbers, got %R", object);
                throw PythonError{};
            }
            array_ = Ref::checked(PyArray_FROM_OTF(any.get(), NPY_DOUBLE, NPY_ARRAY_CARRAY_RO | NPY_ARRAY_FORCECAST));
        }
    }
    npy_intp size() const { return array_ ? PyArray_SIZE(array_.array()) : 1; }
    const double* data() const { return array_ ? data_of(array_.array()) : &number_; }

private:
    double number_ = 0;
    Ref array_;
};

PyObject* pack_payload(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
    return guarded([&] {
        if (given < 1) refuse("pack_payload: there must be a payload");
        PyArrayObject* payload = vector_of(arguments[0]);
        if (!PyArray_ISWRITEABLE(payload)) refuse("pack_payload: the payload must not be read-only");
        std::vector<Part> parts(arguments + 1, arguments + given);
        npy_intp size = 0;
        for (const Part& part : parts) size += part.size();
        if (size != PyArray_SIZE(payload)) refuse("pack_payload: the parts must fill the payload");
        double* end = static_cast<double*>(PyArray_DATA(payload));
        for (const Part& part : parts) end = std::copy_n(part.data(), part.size(), end);
        Py_RETURN_NONE;
    });
}

PyObject* add_payloads(PyObject*, PyObject* argument) {
    return guarded([&] {
        const Payloads payloads(argument);
        double* total;
        Ref result = new_vector(payloads.size, total);
        std::copy_n(payloads.of_rank[0], payloads.size, total);
        for (size_t rank = 1; rank < payloads.of_rank.size(); ++rank)
            for (npy_intp i = 0; i < payloads.size; ++i) total[i] += payloads.of_rank[rank][i];
        return result.release();
    });
}

PyObject* merge_moments(PyObject*, PyObject* argument) {
    return guarded([&] {
        const Payloads payloads(argument);
        if (payloads.size % 2 == 0) refuse("merge_moments: a payload must be n and as many means as sums of squares");
        const npy_intp channels = payloads.size / 2;
        double n = 0, *mean, *m2;
        Ref means = new_vector(channels, mean), squares = new_vector(channels, m2);
        for (const double* part : payloads.of_rank) {
            const double n_part = part[0], *mean_part = part + 1, *m2_part = mean_part + channels;
            if (!(n_part >= 0 && n_part < 0x1p53) || n_part != std::floor(n_part))
                refuse("merge_moments: n must be a number of samples");
            if (n == 0) {  // an empty rank has no mean
                n = n_part;
                std::copy_n(mean_part, channels, mean);
                std::copy_n(m2_part, channels, m2);
            } else if (n_part > 0) {
                const double share = n_part / (n + n_part), weight = n * share;
                for (npy_intp c = 0; c < channels; ++c) {
                    const double delta = mean_part[c] - mean[c];
                    mean[c] += delta * share;
                    m2[c] = (m2[c] + m2_part[c]) + delta * delta * weight;
                }
                n += n_part;
            }
        }
        if (n == 0) {
            std::fill_n(mean, channels, 0.0);
            std::fill_n(m2, channels, 0.0);
        }
        const Ref count = Ref::checked(PyLong_FromDouble(n));
        return Ref::checked(PyTuple_Pack(3, count.get(), means.get(), squares.get())).release();
    });
}

}  // namespace

PyMethodDef moments_methods[] = {
    {"pack_payload", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(pack_payload)), METH_FASTCALL,
     "Write numbers and arrays, one after the other, to a payload."},
    {"add_payloads", add_payloads, METH_O, "The sum of payloads, in their order."},
    {"merge_moments", merge_moments, METH_O, "The moments of the union of payloads [n, mean, m2], in their order."},
    {},
};

}  // namespace arraynorm
