// Quantized batch norm in one step: see direct.hpp.
#include "direct.hpp"

namespace arraynorm {
namespace {

using namespace direct;

double plain_scale(PyObject* argument) {
    const double scale = plain_real(argument);
    require(std::isfinite(scale) && scale > 0);
    return scale;
}

double plain_zero_point(PyObject* argument, bool is_signed) {
    const int64_t point = plain_integer(argument), least = is_signed ? -128 : 0;
    require(least <= point && point <= least + 255);
    return double(point);
}

// x, mean, var, weight, bias, x_scale, x_zero_point, y_scale, y_zero_point, axis, eps, out
PyObject* run(Arguments a, bool with_relu) {
    PyArrayObject* x = plain_elements(a[0]);
    const int type = PyArray_TYPE(x);
    require(type == NPY_UINT8 || type == NPY_INT8);
    const bool is_signed = type == NPY_INT8;
    const Channels channels = channels_of(x, a[9], 1);
    auto parameter = [&](PyObject* argument) { return plain_parameter(argument, x, channels.axis, 1); };
    require(a[1] != Py_None && a[2] != Py_None);
    const Numbers mean(parameter(a[1]), x), var(parameter(a[2]), x), weight(parameter(a[3]), x),
        bias(parameter(a[4]), x);
    const double eps = plain_epsilon(a[10]);
    // folded_affine of the reference
    std::vector<double> of_x(channels.number), constant(channels.number);
    for (npy_intp c = 0; c < channels.number; ++c) {
        of_x[c] = reciprocal_std(var.values()[c], eps);
        if (weight.values()) of_x[c] = of_x[c] * weight.values()[c];
        constant[c] = -mean.values()[c] * of_x[c];
        if (bias.values()) constant[c] = bias.values()[c] + constant[c];
        require(std::isfinite(of_x[c]) && std::isfinite(constant[c]) && std::isfinite(var.values()[c]));
    }
    QuantizedBatchNorm call{.volume = channels.volume,
                            .x = channels.tensor(x),
                            .is_signed = is_signed,
                            .with_relu = with_relu,
                            .a = of_x.data(),
                            .b = constant.data(),
                            .x_scale = plain_scale(a[5]),
                            .x_zero_point = plain_zero_point(a[6], is_signed),
                            .y_scale = plain_scale(a[7]),
                            .y_zero_point = plain_zero_point(a[8], is_signed)};
    PyObject* apart_from_x = a[11] == a[0] ? Py_None : a[0];  // in place, or into other memory
    const Ref y = output(a[11], x, {PyArray_DATA(x)}, {apart_from_x, a[1], a[2], a[3], a[4]});
    call.y = channels.tensor(y.array());
    {
        const WithoutGIL released(PyArray_SIZE(x));
        kernels().quantized_batch_norm(call);
    }
    return again(y.get());
}

PyObject* quantized_batch_norm(Arguments a) {
    return or_none([&] { return run(a, false); });
}
PyObject* quantized_batch_norm_relu(Arguments a) {
    return or_none([&] { return run(a, true); });
}

#define PARAMETERS "x, mean, var, weight, bias, x_scale, x_zero_point, y_scale, y_zero_point, axis, eps, out"

}  // namespace

PyMethodDef direct_quantized_batch_norm_methods[] = {
    function<12, quantized_batch_norm>("direct_quantized_batch_norm", DIRECT_DOC(PARAMETERS)),
    function<12, quantized_batch_norm_relu>("direct_quantized_batch_norm_relu", DIRECT_DOC(PARAMETERS)),
    {},
};

}  // namespace arraynorm
