// Batch norm, from Python's arguments to a call.
#include "caches.hpp"
#include "native.hpp"
#include "operands.hpp"
#include "walk.hpp"

namespace arraynorm {
namespace {

// -- forward --------------------------------------------------------------------------------------------------

struct ForwardArguments {
    PyArrayObject *x, *addend, *mean, *rstd, *weight, *bias, *out;
    double eps;
    bool with_relu;
};

struct ForwardResult {
    Ref y, mask, mean, m2, rstd;
};

// With `mean` and `rstd`, y for those; else the statistics, and y if it `writes`.
ForwardResult forward(const ForwardArguments& a, bool writes) {
    const auto way = [&](PyArrayObject* x) { return Walked::of(x, a.with_relu); };
    Operands<Walked> operands({a.x, a.addend}, way);
    BatchNormForward call{};
    call.dtype = operands.dtype;
    const int64_t size = PyArray_SIZE(a.x);
    call.volume = operands.way().volume;
    call.x = operands.input(0);
    call.addend = operands.input(1);
    if (writes) call.y = operands.output(a.out);
    ForwardResult result;
    if (a.with_relu) {
        result.mask = new_zeros((size + 7) / 8, NPY_UINT8);
        call.mask = static_cast<uint8_t*>(PyArray_DATA(result.mask.array()));
    }
    const std::vector<double> weight = as_doubles(a.weight), bias = as_doubles(a.bias);
    call.weight = data_or_null(weight, a.weight);
    call.bias = data_or_null(bias, a.bias);
    call.eps = a.eps;
    std::vector<double> mean, rstd;
    if (a.mean) {
        mean = as_doubles(a.mean), rstd = as_doubles(a.rstd);
        call.mean = mean.data(), call.rstd = rstd.data();
    } else {
        call.takes_statistics = true;
        const npy_intp channels = PyArray_DIM(a.x, 1);
        result.mean = new_vector(channels, call.mean);
        result.m2 = new_vector(channels, call.m2);
        result.rstd = new_vector(channels, call.rstd);
    }
    call.writes = writes;
    call.streaming = exceeds_cache((a.addend ? 3 : 2) * size * item_size(operands.dtype));
    {
        const WithoutGIL released(size);
        kernels().batch_norm_forward(call);
    }
    if (writes) result.y = operands.result(0);
    return result;
}

// m2 -> var, in place
Ref variance(Ref m2, PyArrayObject* x) {
    const int64_t n = std::max<int64_t>(1, PyArray_DIM(x, 0) * PyArray_DIM(x, 2));
    double* values = static_cast<double*>(PyArray_DATA(m2.array()));
    for (npy_intp c = 0; c < PyArray_DIM(x, 1); ++c) values[c] /= double(n);
    return m2;
}

PyObject* batch_norm_stats(Arguments a) {
    return or_decline([&] {
        ForwardResult r = forward({.x = as_array(a[0])}, false);
        return tuple({r.mean.release(), r.m2.release()});
    });
}

PyObject* batch_norm_apply(Arguments a) {
    return or_decline([&] {
        return forward({.x = as_array(a[0]),
                        .mean = as_array(a[1]),
                        .rstd = as_array(a[2]),
                        .weight = as_array(a[3]),
                        .bias = as_array(a[4]),
                        .out = as_array(a[5])},
                       true)
            .y.release();
    });
}

PyObject* batch_norm_forward(Arguments a) {
    return or_decline([&] {
        PyArrayObject* x = as_array(a[0]);
        ForwardResult r = forward(
            {.x = x, .weight = as_array(a[1]), .bias = as_array(a[2]), .out = as_array(a[4]), .eps = as_double(a[3])},
            true);
        return tuple({r.y.release(), r.mean.release(), variance(std::move(r.m2), x).release(), r.rstd.release()});
    });
}

PyObject* batch_norm_add_relu_apply(Arguments a) {
    return or_decline([&] {
        ForwardResult r = forward({.x = as_array(a[0]),
                                   .addend = as_array(a[1]),
                                   .mean = as_array(a[2]),
                                   .rstd = as_array(a[3]),
                                   .weight = as_array(a[4]),
                                   .bias = as_array(a[5]),
                                   .out = as_array(a[6]),
                                   .with_relu = true},
                                  true);
        return tuple({r.y.release(), r.mask.release()});
    });
}

PyObject* batch_norm_add_relu_forward(Arguments a) {
    return or_decline([&] {
        PyArrayObject* x = as_array(a[0]);
        ForwardResult r = forward({.x = x,
                                   .addend = as_array(a[1]),
                                   .weight = as_array(a[2]),
                                   .bias = as_array(a[3]),
                                   .out = as_array(a[5]),
                                   .eps = as_double(a[4]),
                                   .with_relu = true},
                                  true);
        return tuple({r.y.release(), r.mask.release(), r.mean.release(), variance(std::move(r.m2), x).release(),
                      r.rstd.release()});
    });
}

// -- backward -------------------------------------------------------------------------------------------------

struct BackwardArguments {
    PyArrayObject *dy, *mask, *x, *mean, *rstd, *weight, *mean_dy, *mean_dy_x_hat, *out, *out_addend;
    bool with_addend, reduces, writes;
};

struct BackwardResult {
    Ref dx, daddend, dweight, dbias;
};

BackwardResult backward(const BackwardArguments& a) {
    const auto way = [&](PyArrayObject* x) { return Walked::of(x, a.mask); };
    Operands<Walked> operands({a.x, a.dy}, way);
    BatchNormBackward call{};
    call.dtype = operands.dtype;
    const int64_t size = PyArray_SIZE(a.x);
    call.volume = operands.way().volume;
    call.x = operands.input(0);
    call.dy = operands.input(1);
    if (a.writes) call.dx = operands.output(a.out);
    if (a.with_addend) call.daddend = operands.output(a.out_addend);
    if (a.mask) call.mask = static_cast<const uint8_t*>(PyArray_DATA(a.mask));
    const std::vector<double> weight = as_doubles(a.weight), mean = as_doubles(a.mean), rstd = as_doubles(a.rstd);
    call.weight = data_or_null(weight, a.weight);
    call.mean = data_or_null(mean, a.mean);
    call.rstd = rstd.data();
    std::vector<double> mean_dy, mean_dy_x_hat;
    BackwardResult result;
    if (a.reduces) {
        const npy_intp channels = PyArray_DIM(a.x, 1);
        result.dbias = new_vector(channels, call.dbias);
        result.dweight = new_vector(channels, call.dweight);
        mean_dy.resize(channels), mean_dy_x_hat.resize(channels);
    } else {
        mean_dy = as_doubles(a.mean_dy), mean_dy_x_hat = as_doubles(a.mean_dy_x_hat);
    }
    if (a.reduces || a.mean_dy) call.mean_dy = mean_dy.data(), call.mean_dy_x_hat = mean_dy_x_hat.data();
    call.reduces = a.reduces;
    call.writes = a.writes;
    call.streaming = exceeds_cache(3 * size * item_size(operands.dtype));
    {
        const WithoutGIL released(size);
        kernels().batch_norm_backward(call);
    }
    if (a.writes) result.dx = operands.result(0);
    result.daddend = a.with_addend ? operands.result(1) : Ref(none());
    return result;
}

PyObject* batch_norm_backward_reduce(Arguments a) {
    return or_decline([&] {
        BackwardResult r = backward({.dy = as_array(a[0]),
                                     .x = as_array(a[1]),
                                     .mean = as_array(a[2]),
                                     .rstd = as_array(a[3]),
                                     .reduces = true});
        return tuple({r.dbias.release(), r.dweight.release()});
    });
}

PyObject* batch_norm_backward_apply(Arguments a) {
    return or_decline([&] {
        return backward({.dy = as_array(a[0]),
                         .x = as_array(a[1]),
                         .mean = as_array(a[2]),
                         .rstd = as_array(a[3]),
                         .weight = as_array(a[4]),
                         .mean_dy = as_array(a[5]),
                         .mean_dy_x_hat = as_array(a[6]),
                         .out = as_array(a[7]),
                         .writes = true})
            .dx.release();
    });
}

PyObject* batch_norm_frozen_backward_apply(Arguments a) {
    return or_decline([&] {
        return backward({.dy = as_array(a[0]),
                         .x = as_array(a[1]),
                         .rstd = as_array(a[2]),
                         .weight = as_array(a[3]),
                         .out = as_array(a[4]),
                         .writes = true})
            .dx.release();
    });
}

PyObject* batch_norm_backward(Arguments a) {
    return or_decline([&] {
        BackwardResult r = backward({.dy = as_array(a[0]),
                                     .x = as_array(a[1]),
                                     .mean = as_array(a[2]),
                                     .rstd = as_array(a[3]),
                                     .weight = as_array(a[4]),
                                     .out = as_array(a[5]),
                                     .reduces = true,
                                     .writes = true});
        return tuple({r.dx.release(), r.dweight.release(), r.dbias.release()});
    });
}

PyObject* batch_norm_add_relu_backward_reduce(Arguments a) {
    return or_decline([&] {
        BackwardResult r = backward({.dy = as_array(a[0]),
                                     .mask = as_array(a[1]),
                                     .x = as_array(a[2]),
                                     .mean = as_array(a[3]),
                                     .rstd = as_array(a[4]),
                                     .reduces = true});
        return tuple({r.dbias.release(), r.dweight.release()});
    });
}

PyObject* batch_norm_add_relu_backward_apply(Arguments a) {
    return or_decline([&] {
        BackwardResult r = backward({.dy = as_array(a[0]),
                                     .mask = as_array(a[1]),
                                     .x = as_array(a[2]),
                                     .mean = as_array(a[3]),
                                     .rstd = as_array(a[4]),
                                     .weight = as_array(a[5]),
                                     .mean_dy = as_array(a[6]),
                                     .mean_dy_x_hat = as_array(a[7]),
                                     .out = as_array(a[9]),
                                     .out_addend = as_array(a[10]),
                                     .with_addend = PyObject_IsTrue(a[8]) == 1,
                                     .writes = true});
        return tuple({r.dx.release(), r.daddend.release()});
    });
}

PyObject* batch_norm_add_relu_frozen_backward_apply(Arguments a) {
    return or_decline([&] {
        BackwardResult r = backward({.dy = as_array(a[0]),
                                     .mask = as_array(a[1]),
                                     .x = as_array(a[2]),
                                     .rstd = as_array(a[3]),
                                     .weight = as_array(a[4]),
                                     .out = as_array(a[6]),
                                     .out_addend = as_array(a[7]),
                                     .with_addend = PyObject_IsTrue(a[5]) == 1,
                                     .writes = true});
        return tuple({r.dx.release(), r.daddend.release()});
    });
}

PyObject* batch_norm_add_relu_backward(Arguments a) {
    return or_decline([&] {
        BackwardResult r = backward({.dy = as_array(a[0]),
                                     .mask = as_array(a[1]),
                                     .x = as_array(a[2]),
                                     .mean = as_array(a[3]),
                                     .rstd = as_array(a[4]),
                                     .weight = as_array(a[5]),
                                     .out = as_array(a[7]),
                                     .out_addend = as_array(a[8]),
                                     .with_addend = PyObject_IsTrue(a[6]) == 1,
                                     .reduces = true,
                                     .writes = true});
        return tuple({r.dx.release(), r.daddend.release(), r.dweight.release(), r.dbias.release()});
    });
}

}  // namespace

PyMethodDef batch_norm_methods[] = {
    function<1, batch_norm_stats>("batch_norm_stats", SIGNATURE(batch_norm_stats, "x")),
    function<6, batch_norm_apply>("batch_norm_apply", SIGNATURE(batch_norm_apply, "x, mean, rstd, weight, bias, out")),
    function<5, batch_norm_forward>("batch_norm_forward", SIGNATURE(batch_norm_forward, "x, weight, bias, eps, out")),
    function<4, batch_norm_backward_reduce>("batch_norm_backward_reduce",
                                            SIGNATURE(batch_norm_backward_reduce, "dy, x, mean, rstd")),
    function<8, batch_norm_backward_apply>(
        "batch_norm_backward_apply",
        SIGNATURE(batch_norm_backward_apply, "dy, x, mean, rstd, weight, mean_dy, mean_dy_x_hat, out")),
    function<5, batch_norm_frozen_backward_apply>(
        "batch_norm_frozen_backward_apply", SIGNATURE(batch_norm_frozen_backward_apply, "dy, x, rstd, weight, out")),
    function<6, batch_norm_backward>("batch_norm_backward",
                                     SIGNATURE(batch_norm_backward, "dy, x, mean, rstd, weight, out")),
    function<7, batch_norm_add_relu_apply>(
        "batch_norm_add_relu_apply", SIGNATURE(batch_norm_add_relu_apply, "x, addend, mean, rstd, weight, bias, out")),
    function<6, batch_norm_add_relu_forward>(
        "batch_norm_add_relu_forward", SIGNATURE(batch_norm_add_relu_forward, "x, addend, weight, bias, eps, out")),
    function<5, batch_norm_add_relu_backward_reduce>(
        "batch_norm_add_relu_backward_reduce",
        SIGNATURE(batch_norm_add_relu_backward_reduce, "dy, mask, x, mean, rstd")),
    function<11, batch_norm_add_relu_backward_apply>(
        "batch_norm_add_relu_backward_apply",
        SIGNATURE(batch_norm_add_relu_backward_apply,
                  "dy, mask, x, mean, rstd, weight, mean_g, mean_g_x_hat, with_addend, out, out_addend")),
    function<8, batch_norm_add_relu_frozen_backward_apply>(
        "batch_norm_add_relu_frozen_backward_apply",
        SIGNATURE(batch_norm_add_relu_frozen_backward_apply,
                  "dy, mask, x, rstd, weight, with_addend, out, out_addend")),
    function<9, batch_norm_add_relu_backward>(
        "batch_norm_add_relu_backward",
        SIGNATURE(batch_norm_add_relu_backward, "dy, mask, x, mean, rstd, weight, with_addend, out, out_addend")),
    {},
};

}  // namespace arraynorm
