"""How far a result may be from the exact one, computed from the data, and the comparison with the oracle.

Everything is computed in float64 and rounded once, so a result may be off by

    half an ulp of itself in its dtype  +  C * eps64 * (1 + |mean| / std) * scale

since the mean is rounded to float64, and every deviation from it carries that error. With maxima over the set that is
normalized together, the scale is max|x_hat| * |weight| + |bias| + |addend| for y, and max|dy * weight * rstd| *
max|x_hat| for dx, where x_hat enters twice. A sum (dweight, dbias) is measured by the sum of its absolute terms.

The C++ kernels compute on float16, bfloat16 and float32 in float32, whose C * eps32 * scale comes on top; without the
condition number, for what a mean loses by being rounded is made up for in float64. Sums are added up in float32 eight
terms at a time and from there on in float64: C * eps32 of the sum of the terms' absolute values covers those seven
additions, and a mean's terms are deviations from one of the values.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import oracle
from arraynorm.kernels import _kernel, cpu
from arraynorm.kernels.reference.batch_norm import batch_norm_stats
from data import Host, limits
from namespaces import to_numpy
from norms import Example, backward, bare, exact, forward

C = 6
"""Of the roundings on the way (x - pivot, the two sums, the mean, var + eps, root, reciprocal, products), half an eps
each, which partly cancel. The largest value that this suite sees with NumPy is 2.9."""

EPS32 = 2.0**-23
EPS64 = 2.0**-52
TINY64 = 2.0**-1074


def check(example: Example, arrays: dict[str, Any], dy: Any) -> None:
    """Forward, backward and saved statistics of the package against the oracle, for arrays of any library."""
    host = {name: None if array is None else to_numpy(array) for name, array in arrays.items()}
    dtype, host_dy = dtype_name(arrays["x"]), to_numpy(dy)
    before = _bytes([*host.values(), host_dy])
    y, cache = forward(example, arrays)
    gradients = backward(example, dy, cache)
    norm = exact(example, host)
    bounds = _Bounds(norm, host_dy, single=in_float32(arrays["x"]))
    expected = norm.backward(host_dy)
    parameter_dtype = _widest(arrays)
    assert_near("y", y, norm.y, dtype, bounds.y)
    assert_near("dx", gradients.dx, expected.dx, dtype, bounds.dx)
    if getattr(gradients, "daddend", None) is not None:
        assert_near("daddend", gradients.daddend, expected.daddend, dtype, 0.0)
    for name, bound in (("dweight", bounds.dweight), ("dbias", bounds.dbias)):
        actual, wanted = getattr(gradients, name, None), getattr(expected, name)
        assert (actual is None) == (wanted is None), f"{name} is {actual}"
        if actual is not None:
            shape = arrays[name[1:]].shape
            assert_near(name, actual, wanted.reshape(shape), parameter_dtype, bound.reshape(shape))
    for name in ("mean", "var", "rstd"):
        if hasattr(cache, name) and not norm.given:
            table = getattr(norm, name)[:, 0].reshape(getattr(cache, name).shape)
            assert_near(name, getattr(cache, name), table, "float64", getattr(bounds, name).reshape(table.shape))
    assert to_numpy(bare(example, arrays)).tobytes() == to_numpy(y).tobytes(), "the op without a cache differs"
    assert _bytes([*host.values(), host_dy]) == before, "an input was written to"


def assert_near(name: str, actual: Any, wanted: oracle.Table, dtype: str, bound: Host | float) -> None:
    """|actual - wanted| is within half an ulp of `wanted` in `dtype` and the `bound`, element by element."""
    actual = to_numpy(actual)
    assert dtype_name(actual) == dtype, f"{name} has dtype {actual.dtype}, not {dtype}"
    assert actual.shape == wanted.shape, f"{name} has shape {actual.shape}, not {wanted.shape}"
    error = oracle.distance(actual, wanted)
    allowed = rounding(dtype) * np.abs(oracle.narrow(wanted)) + float(limits(dtype).smallest_subnormal) + bound
    if not np.all(error <= allowed):  # a NaN is not
        worst = np.unravel_index(np.argmax(np.where(error <= allowed, 0, error / allowed)), error.shape)
        raise AssertionError(
            f"{name}[{', '.join(map(str, worst))}] is {actual[worst]}, not {wanted[worst]}: "
            f"off by {error[worst]:.3g}, allowed {allowed[worst]:.3g}"
        )


def rounding(dtype: str) -> float:
    """Half an ulp of the dtype, relative to the value."""
    half_ulp = float(limits(dtype).eps) / 2
    return half_ulp + 2.0**-24 if dtype == "bfloat16" else half_ulp  # ml_dtypes gets to bfloat16 through float32


def in_float32(x: Any) -> bool:
    """Whether a kernel computes in float32 on such an x, not in float64: those in C++ do, emulated CUDA does not."""
    is_compiled = cpu.native is not None and batch_norm_stats.specialised.get("numpy") is cpu.native.batch_norm_stats
    runs = is_compiled and isinstance(x, np.ndarray) and _kernel.allowed_paths.get() != "reference"
    return runs and dtype_name(x) in ("float16", "bfloat16", "float32")


def dtype_name(array: Any) -> str:
    return str(array.dtype).rpartition(".")[2]


class _Bounds:
    """What float64, or float32, may lose on the way, in the shapes of the results."""

    def __init__(self, norm: oracle.Norm, dy: Host, *, single: bool) -> None:
        x, mean, var, rstd, x_hat, weight, bias, addend, g = (
            np.abs(oracle.narrow(t))
            for t in (
                *(norm.x, norm.mean, norm.var, norm.rstd, norm.x_hat),
                *(norm.weight, norm.bias, norm.addend, norm.gated(dy)),
            )
        )
        condition = np.ones_like(rstd) if norm.given else 1 + mean * rstd
        in_single = C * EPS32 * single
        elementwise = C * EPS64 * condition + in_single
        largest = np.maximum(1, _peak(x_hat))  # of any x_hat of the set, and of dy * x_hat
        underflow = C * TINY64 * rstd * weight

        def spread(table: Host) -> Host:
            return norm.unroll(np.broadcast_to(table, norm.x.shape))

        self.y = spread(elementwise * (_peak(x_hat) * weight + bias + addend) + underflow)
        self.dx = spread(elementwise * largest * _peak(g * weight * rstd) + underflow)
        self.dweight = _per_parameter(norm, elementwise * largest * g)
        self.dbias = _per_parameter(norm, (C * EPS64 + in_single) * g)
        self.mean = C * EPS64 * _peak(x) + in_single * _peak(x_hat) * np.sqrt(var)
        # a sum of n squares takes n roundings, of random sign, where NumPy cannot add in pairs
        of_squares = C * EPS64 * np.sqrt(x.shape[1]) + in_single
        self.var = of_squares * var
        self.rstd = of_squares * rstd


def _peak(table: Host) -> Host:
    """The largest of each set."""
    return table.max(axis=1, keepdims=True)


def _per_parameter(norm: oracle.Norm, table: Host) -> Host:
    return np.bincount(norm.owner.reshape(-1), np.broadcast_to(table, norm.owner.shape).reshape(-1))


def _widest(arrays: dict[str, Any]) -> str:
    """The dtype of the parameters' gradients: at least float32."""
    given = {dtype_name(arrays[name]) for name in ("x", "weight", "bias") if arrays.get(name) is not None}
    return "float64" if "float64" in given else "float32"


def _bytes(arrays: list[Host | None]) -> list[bytes | None]:
    return [None if array is None else array.tobytes() for array in arrays]
