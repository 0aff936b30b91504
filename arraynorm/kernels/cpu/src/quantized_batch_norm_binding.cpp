// Quantized batch norm, from Python's arguments to a call.
#include "native.hpp"
#include "operands.hpp"
#include "walk.hpp"

namespace arraynorm {
namespace {

// x, a, b, x_scale, x_zero_point, y_scale, y_zero_point, out
PyObject* run(Arguments a, bool with_relu) {
    PyArrayObject *x = as_array(a[0]), *out = as_array(a[7]);
    const int type = PyArray_TYPE(x);
    if (type != NPY_UINT8 && type != NPY_INT8) return not_implemented();
    // the array that decides on the walk: x or, where its strides allow none that a new array has too, a copy
    Ref source = Ref::borrowed(a[0]), y;
    std::optional<Walked> walked = Walked::of(x, false);
    if (walked) y = new_like(x, PyArray_DESCR(x), {PyArray_DATA(x)});
    if (!walked || !walked->tensor(y.array())) {
        source = Ref::checked(PyArray_NewCopy(x, NPY_CORDER));
        walked = Walked::of(source.array(), false);
        y = new_like(source.array(), PyArray_DESCR(x), {PyArray_DATA(source.array())});
    }
    const bool in_place = out && PyArray_TYPE(out) == type && walked->tensor(out);
    if (in_place) y = Ref::borrowed(a[7]);
    const std::vector<double> of_x = as_doubles(as_array(a[1])), constant = as_doubles(as_array(a[2]));
    const QuantizedBatchNorm call{.volume = walked->volume,
                                  .x = *walked->tensor(source.array()),
                                  .y = *walked->tensor(y.array()),
                                  .is_signed = type == NPY_INT8,
                                  .with_relu = with_relu,
                                  .a = of_x.data(),
                                  .b = constant.data(),
                                  .x_scale = as_double(a[3]),
                                  .x_zero_point = as_double(a[4]),
                                  .y_scale = as_double(a[5]),
                                  .y_zero_point = as_double(a[6])};
    {
        const WithoutGIL released(PyArray_SIZE(x));
        kernels().quantized_batch_norm(call);
    }
    if (!out || in_place) return y.release();
    copy_into(out, y.array());
    return Ref::borrowed(a[7]).release();
}

PyObject* quantized_batch_norm(Arguments a) { return run(a, false); }
PyObject* quantized_batch_norm_relu(Arguments a) { return run(a, true); }

}  // namespace

PyMethodDef quantized_batch_norm_methods[] = {
    function<8, quantized_batch_norm>(
        "quantized_batch_norm",
        SIGNATURE(quantized_batch_norm, "x, a, b, x_scale, x_zero_point, y_scale, y_zero_point, out")),
    function<8, quantized_batch_norm_relu>(
        "quantized_batch_norm_relu",
        SIGNATURE(quantized_batch_norm_relu, "x, a, b, x_scale, x_zero_point, y_scale, y_zero_point, out")),
    {},
};

}  // namespace arraynorm
