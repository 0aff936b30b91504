// Batch norm in one step, alone and with addend and ReLU: see direct.hpp.
#include "caches.hpp"
#include "direct.hpp"

namespace arraynorm {
namespace {

using namespace direct;

// -- forward --------------------------------------------------------------------------------------------------

struct ForwardArguments {
    PyObject *x, *addend = Py_None, *mean = nullptr, *var = nullptr, *weight, *bias, *axis, *eps, *out = Py_None;
    bool with_relu = false;
};

// Of given mean and var, or of those of x.
struct ForwardResult {
    Ref y, mask, mean, var, rstd;
    Channels channels;

    PyObject* count() const { return Ref::checked(PyLong_FromLongLong(channels.values)).release(); }
    PyObject* axis() const { return Ref::checked(PyLong_FromLong(channels.axis)).release(); }
};

ForwardResult forward(const ForwardArguments& a) {
    PyArrayObject* x = plain_array(a.x);
    PyArrayObject* addend = a.addend == Py_None ? nullptr : plain_like(a.addend, x);
    ForwardResult result{.channels = channels_of(x, a.axis, a.mean ? 1 : 2)};
    const Channels& channels = result.channels;
    auto parameter = [&](PyObject* argument) { return plain_parameter(argument, x, channels.axis, 1); };
    const Numbers weights(parameter(a.weight), x), biases(parameter(a.bias), x);
    BatchNormForward call{};
    call.dtype = *dtype_of(x);
    call.volume = channels.volume;
    call.eps = plain_epsilon(a.eps);
    call.x = channels.tensor(x);
    if (addend) call.addend = channels.tensor(addend);
    call.weight = weights.values();
    call.bias = biases.values();
    result.mean = new_vector(channels.number, call.mean);
    result.rstd = new_vector(channels.number, call.rstd);
    if (a.mean) {
        require(a.mean != Py_None && a.var != Py_None);
        const Numbers means(parameter(a.mean), x), variances(parameter(a.var), x);
        for (npy_intp c = 0; c < channels.number; ++c) {
            call.mean[c] = means.values()[c];
            call.rstd[c] = reciprocal_std(variances.values()[c], call.eps);
        }
        require_no_nan(call.rstd, channels.number, x);
    } else {
        result.var = new_vector(channels.number, call.m2);
        call.takes_statistics = true;
    }
    result.y = output(a.out, x, {PyArray_DATA(x), addend ? PyArray_DATA(addend) : PyArray_DATA(x)},
                      {a.x, a.weight, a.bias, given_or_none(a.mean), given_or_none(a.var)});
    call.y = channels.tensor(result.y.array());
    if (a.with_relu) {
        result.mask = new_zeros((PyArray_SIZE(x) + 7) / 8, NPY_UINT8);
        call.mask = static_cast<uint8_t*>(PyArray_DATA(result.mask.array()));
    }
    call.writes = true;
    call.streaming = exceeds_cache((addend ? 3 : 2) * PyArray_NBYTES(x));
    {
        const WithoutGIL released(PyArray_SIZE(x));
        kernels().batch_norm_forward(call);
    }
    if (!a.mean)
        for (npy_intp c = 0; c < channels.number; ++c) call.m2[c] /= double(channels.values);
    return result;
}

PyObject* batch_norm_forward(Arguments a) {
    return or_none([&] {
        ForwardResult r = forward({.x = a[0], .weight = a[1], .bias = a[2], .axis = a[3], .eps = a[4], .out = a[5]});
        Ref fields(tuple({again(a[0]), again(a[1]), again(a[2]), r.mean.release(), r.var.release(), r.rstd.release(),
                          r.count(), r.axis(), none()}));
        return tuple({r.y.release(), fields.release()});
    });
}

PyObject* batch_norm_apply(Arguments a) {
    return or_none([&] {
        ForwardResult r = forward({.x = a[0],
                                   .mean = a[1],
                                   .var = a[2],
                                   .weight = a[3],
                                   .bias = a[4],
                                   .axis = a[5],
                                   .eps = a[6],
                                   .out = a[7]});
        Ref fields(tuple({again(a[0]), again(a[3]), again(a[4]), r.mean.release(), r.rstd.release(), r.axis()}));
        return tuple({r.y.release(), fields.release()});
    });
}

PyObject* batch_norm_add_relu_forward(Arguments a) {
    return or_none([&] {
        ForwardResult r = forward(
            {.x = a[0], .addend = a[1], .weight = a[2], .bias = a[3], .axis = a[4], .eps = a[5], .with_relu = true});
        Ref fields(tuple({again(a[0]), again(a[2]), again(a[3]), PyBool_FromLong(a[1] != Py_None), r.mean.release(),
                          r.var.release(), r.rstd.release(), r.mask.release(), r.count(), r.axis(), none()}));
        return tuple({r.y.release(), fields.release()});
    });
}

PyObject* batch_norm_add_relu_apply(Arguments a) {
    return or_none([&] {
        ForwardResult r = forward({.x = a[0],
                                   .addend = a[1],
                                   .mean = a[2],
                                   .var = a[3],
                                   .weight = a[4],
                                   .bias = a[5],
                                   .axis = a[6],
                                   .eps = a[7],
                                   .with_relu = true});
        Ref fields(tuple({again(a[0]), again(a[4]), again(a[5]), PyBool_FromLong(a[1] != Py_None), r.mean.release(),
                          r.rstd.release(), r.mask.release(), r.axis()}));
        return tuple({r.y.release(), fields.release()});
    });
}

// -- backward -------------------------------------------------------------------------------------------------

// Without var: of given statistics, which do not depend on x.
struct BackwardArguments {
    PyObject *dy, *mask = nullptr, *x, *weight, *bias, *has_addend = Py_False, *mean, *var = nullptr, *rstd, *axis,
                  *out = Py_None;
};

// dx; with a mask daddend, perhaps None; dweight and dbias.
PyObject* backward(const BackwardArguments& a) {
    require(PyBool_Check(a.has_addend));
    PyArrayObject *x = plain_array(a.x), *dy = plain_like(a.dy, x);
    const bool is_frozen = !a.var;
    const Channels channels = channels_of(x, a.axis, is_frozen ? 1 : 2);
    PyArrayObject *weight = plain_parameter(a.weight, x, channels.axis, 1),
                  *bias = plain_parameter(a.bias, x, channels.axis, 1);
    const Numbers weights(weight, x);
    std::vector<double> dweight(channels.number), dbias(channels.number), mean_dy(is_frozen ? 0 : channels.number),
        mean_dy_x_hat(mean_dy.size());
    BatchNormBackward call{};
    call.dtype = *dtype_of(x);
    call.volume = channels.volume;
    call.dy = channels.tensor(dy);
    call.x = channels.tensor(x);
    call.weight = weights.values();
    call.mean = plain_statistic(a.mean, channels.number, x);
    if (a.var) plain_statistic(a.var, channels.number, x);  // of use to nobody here, but not to be written over
    call.rstd = plain_statistic(a.rstd, channels.number, x);
    if (a.mask) call.mask = plain_bits(a.mask, PyArray_SIZE(x));
    Ref dx = output(a.out, x, {PyArray_DATA(x), PyArray_DATA(dy)},
                    {a.dy, a.x, a.weight, a.bias, a.mean, given_or_none(a.var), a.rstd});
    call.dx = channels.tensor(dx.array());
    Ref daddend;
    if (a.has_addend == Py_True) {
        daddend = new_like(x, PyArray_DESCR(x), {PyArray_DATA(x), PyArray_DATA(dy), PyArray_DATA(dx.array())});
        call.daddend = channels.tensor(daddend.array());
    }
    call.dbias = dbias.data(), call.dweight = dweight.data();
    if (!is_frozen) call.mean_dy = mean_dy.data(), call.mean_dy_x_hat = mean_dy_x_hat.data();
    call.reduces = call.writes = true;
    call.streaming = exceeds_cache(3 * PyArray_NBYTES(x));
    {
        const WithoutGIL released(PyArray_SIZE(x));
        kernels().batch_norm_backward(call);
    }
    const bool wide = is_double(x) || is_double(weight) || is_double(bias);
    Ref of_weight(gradient(weight, dweight, wide)), of_bias(gradient(bias, dbias, wide));
    if (!a.mask) return tuple({dx.release(), of_weight.release(), of_bias.release()});
    return tuple({dx.release(), daddend ? daddend.release() : none(), of_weight.release(), of_bias.release()});
}

PyObject* batch_norm_backward(Arguments a) {
    return or_none([&] {
        return backward({.dy = a[0],
                         .x = a[1],
                         .weight = a[2],
                         .bias = a[3],
                         .mean = a[4],
                         .var = a[5],
                         .rstd = a[6],
                         .axis = a[7],
                         .out = a[8]});
    });
}

PyObject* batch_norm_frozen_backward(Arguments a) {
    return or_none([&] {
        return backward({.dy = a[0],
                         .x = a[1],
                         .weight = a[2],
                         .bias = a[3],
                         .mean = a[4],
                         .rstd = a[5],
                         .axis = a[6],
                         .out = a[7]});
    });
}

PyObject* batch_norm_add_relu_frozen_backward(Arguments a) {
    return or_none([&] {
        return backward({.dy = a[0],
                         .mask = a[7],
                         .x = a[1],
                         .weight = a[2],
                         .bias = a[3],
                         .has_addend = a[4],
                         .mean = a[5],
                         .rstd = a[6],
                         .axis = a[8]});
    });
}

PyObject* batch_norm_add_relu_backward(Arguments a) {
    return or_none([&] {
        return backward({.dy = a[0],
                         .mask = a[8],
                         .x = a[1],
                         .weight = a[2],
                         .bias = a[3],
                         .has_addend = a[4],
                         .mean = a[5],
                         .var = a[6],
                         .rstd = a[7],
                         .axis = a[9]});
    });
}

}  // namespace

PyMethodDef direct_batch_norm_methods[] = {
    function<6, batch_norm_forward>("direct_batch_norm_forward", DIRECT_DOC("x, weight, bias, axis, eps, out")),
    function<9, batch_norm_backward>("direct_batch_norm_backward",
                                     DIRECT_DOC("dy, x, weight, bias, mean, var, rstd, axis, out")),
    function<8, batch_norm_apply>("direct_batch_norm_apply", DIRECT_DOC("x, mean, var, weight, bias, axis, eps, out")),
    function<6, batch_norm_add_relu_forward>("direct_batch_norm_add_relu_forward",
                                             DIRECT_DOC("x, addend, weight, bias, axis, eps")),
    function<8, batch_norm_add_relu_apply>("direct_batch_norm_add_relu_apply",
                                           DIRECT_DOC("x, addend, mean, var, weight, bias, axis, eps")),
    function<10, batch_norm_add_relu_backward>(
        "direct_batch_norm_add_relu_backward",
        DIRECT_DOC("dy, x, weight, bias, has_addend, mean, var, rstd, mask, axis")),
    // the whole backward of given statistics, of which their kernel is the last step
    function<8, batch_norm_frozen_backward>("direct_batch_norm_frozen_backward_apply",
                                            DIRECT_DOC("dy, x, weight, bias, mean, rstd, axis, out")),
    function<9, batch_norm_add_relu_frozen_backward>(
        "direct_batch_norm_add_relu_frozen_backward_apply",
        DIRECT_DOC("dy, x, weight, bias, has_addend, mean, rstd, mask, axis")),
    {},
};

}  // namespace arraynorm
