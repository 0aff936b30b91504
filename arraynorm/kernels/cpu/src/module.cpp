// The extension module arraynorm.kernels.cpu._native.
//
// Plain C API: a call costs 0.1 us here, where nanobind's costs 0.3 to 1 for as many arguments, and small layers take
// less than that to compute.
#define ARRAYNORM_IMPORTS_NUMPY
#include <cstring>

#include "memory.hpp"
#include "native.hpp"
#include "parallel.hpp"

namespace arraynorm {
namespace {

// The levels that this processor has, the best last.
std::vector<const Kernels*> available() {
    std::vector<const Kernels*> levels{&baseline_kernels()};
#if defined(ARRAYNORM_HAS_V3)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        levels.push_back(&v3_kernels());
#endif
    return levels;
}

const Kernels* active = available().back();

}  // namespace

const Kernels& kernels() { return *active; }

namespace {

PyObject* allowed_paths = nullptr;  // a context variable

}  // namespace

bool is_reference_alone_allowed() {
    PyObject* paths = nullptr;
    if (!allowed_paths) return false;
    if (PyContextVar_Get(allowed_paths, nullptr, &paths) < 0) throw PythonError{};
    const Ref owned(paths);
    return paths && PyUnicode_Check(paths) && PyUnicode_CompareWithASCIIString(paths, "reference") == 0;
}

namespace {

PyObject* set_allowed_paths(PyObject*, PyObject* variable) {
    if (!PyContextVar_CheckExact(variable))
        return PyErr_Format(PyExc_TypeError, "set_allowed_paths: must be a ContextVar, got %R", variable);
    const Ref previous(std::exchange(allowed_paths, Ref::borrowed(variable).release()));
    Py_RETURN_NONE;
}

PyObject* isa_levels(PyObject*, PyObject*) {
    return guarded([&] {
        Ref list = Ref::checked(PyList_New(0));
        for (const Kernels* level : available()) {
            Ref name = Ref::checked(PyUnicode_FromString(level->isa));
            if (PyList_Append(list.get(), name.get()) < 0) throw PythonError{};
        }
        return list.release();
    });
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(active->isa); }

PyObject* set_isa(PyObject*, PyObject* name) {
    const char* wanted = PyUnicode_AsUTF8(name);
    if (!wanted) return nullptr;
    for (const Kernels* level : available())
        if (!std::strcmp(level->isa, wanted)) {
            active = level;
            Py_RETURN_NONE;
        }
    return PyErr_Format(PyExc_ValueError, "set_isa: must be a level of this processor, got %R", name);
}

PyObject* get_num_threads(PyObject*, PyObject*) { return PyLong_FromLong(num_threads()); }

PyObject* set_num_threads_(PyObject*, PyObject* number) {
    const long threads = PyLong_AsLong(number);
    if (threads == -1 && PyErr_Occurred()) return nullptr;
    set_num_threads(int(threads));
    Py_RETURN_NONE;
}

PyObject* set_memory_limit_(PyObject*, PyObject* number) {
    const long long bytes = PyLong_AsLongLong(number);
    if (bytes == -1 && PyErr_Occurred()) return nullptr;
    set_memory_limit(bytes);
    Py_RETURN_NONE;
}

PyObject* get_memory_limit(PyObject*, PyObject*) { return PyLong_FromLongLong(memory_limit()); }
PyObject* get_memory_kept(PyObject*, PyObject*) { return PyLong_FromLongLong(memory_kept()); }
PyObject* release_memory_(PyObject*, PyObject*) {
    release_memory();
    Py_RETURN_NONE;
}

PyMethodDef settings[] = {
    {"isa_levels", isa_levels, METH_NOARGS, "The instruction set levels that can be run here, the best last."},
    {"isa", isa, METH_NOARGS, "The level in use."},
    {"set_isa", set_isa, METH_O, "Use a level."},
    {"set_allowed_paths", set_allowed_paths, METH_O, "Where this ContextVar is \"reference\", decline public calls."},
    {"num_threads", get_num_threads, METH_NOARGS, "The most threads that a call uses."},
    {"set_num_threads", set_num_threads_, METH_O, "Use at most so many threads."},
    {"memory_limit", get_memory_limit, METH_NOARGS, "Bytes of dropped results that are kept for new ones, at most."},
    {"set_memory_limit", set_memory_limit_, METH_O, "Keep at most so many bytes."},
    {"memory_kept", get_memory_kept, METH_NOARGS, "Bytes kept now."},
    {"release_memory", release_memory_, METH_NOARGS, "Give back what is kept."},
    {},
};

int execute(PyObject* module) {
    for (PyMethodDef* methods :
         {settings, batch_norm_methods, row_norm_methods, quantized_batch_norm_methods, direct_batch_norm_methods,
          direct_row_norm_methods, direct_quantized_batch_norm_methods, moments_methods})
        if (PyModule_AddFunctions(module, methods) < 0) return -1;
    return 0;
}

PyModuleDef_Slot slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(execute)},
    {0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, 0, nullptr, slots, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace arraynorm

// By this threadpoolctl knows the library: see arraynorm/config.py.
extern "C" [[gnu::visibility("default")]] int arraynorm_num_threads() { return arraynorm::num_threads(); }

PyMODINIT_FUNC PyInit__native() {
    import_array();
    return PyModuleDef_Init(&arraynorm::definition);
}
