"""Caches: documented arrays and settings, no backend blobs, so that a backward may run elsewhere than its forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import arraynorm as an
from arraynorm.kernels import Kernel, only
from namespaces import DTYPES, NUMPY, STRICT, to_numpy
from norms import EXAMPLES, Example, backward, draw, draw_dy, each_example, forward, kernels, specialise, to_library

FUSED = ["batch_norm_add_relu", "batch_norm_add_relu_frozen"]

FIELDS = {
    "batch_norm": "x weight bias mean var rstd n axis comm",
    "batch_norm_frozen": "x weight bias mean rstd axis",
    "batch_norm_add_relu": "x weight bias has_addend mean var rstd mask n axis comm",
    "batch_norm_add_relu_frozen": "x weight bias has_addend mean rstd mask axis",
    "instance_norm": "x weight bias mean var rstd n axis",
    "group_norm": "x weight bias mean rstd axis",
    "layer_norm": "x weight bias mean rstd normalized_shape",
    "rms_norm": "x weight rstd normalized_shape",
}
"""The contract between code paths: whoever renames one of these breaks backwards of other people's forwards."""

STATISTICS = {
    "instance_norm": (3, 4),  # samples, channels
    "group_norm": (3, 2),  # samples, groups
    "layer_norm": (3,),  # rows
    "rms_norm": (12,),
}
"""Shapes for the examples, all (3, 4, 5); of the batch norms it is (channels,)."""


@each_example
def test_the_fields_are_the_documented_ones(example: Example):
    _, cache = forward(example, draw(example))
    assert cache._fields == tuple(FIELDS[example.op].split())
    assert type(cache).__name__ in an.functional.__all__


@each_example
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_float64_in_their_documented_shape(example: Example, dtype):
    _, cache = forward(example, to_library(NUMPY, draw(example), dtype))
    for name in {"mean", "var", "rstd"} & set(cache._fields):
        statistic = getattr(cache, name)
        assert (statistic.dtype, statistic.shape) == (np.float64, STATISTICS.get(example.op, (4,))), name


@each_example
def test_settings_are_plain_python_values(xp, example: Example):
    """An axis counts from the front, and a normalized shape is a tuple, however they were given."""
    options = dict(example.options)
    if "normalized_shape" in options:
        options["normalized_shape"] = list(options["normalized_shape"])
    else:
        options["axis"] = -2
    _, cache = forward(example._replace(options=options), to_library(xp, draw(example), "float32"))
    wanted = {"axis": 1, "normalized_shape": example.options.get("normalized_shape"), "comm": None, "has_addend": True}
    wanted["n"] = 5 if example.op == "instance_norm" else 15
    for name in wanted.keys() & set(cache._fields):
        assert getattr(cache, name) == wanted[name], name
        assert type(getattr(cache, name)) is type(wanted[name]), name


@each_example
def test_x_and_the_parameters_are_referred_to_and_not_copied(xp, example: Example):
    given = to_library(xp, draw(example), "float32")
    _, cache = forward(example, given)
    for name in {"x", "weight", "bias"} & given.keys():
        assert getattr(cache, name) is given[name]


@pytest.mark.parametrize("op", ["batch_norm_frozen", "batch_norm_add_relu_frozen"])
def test_given_statistics_may_be_updated_in_place_before_the_backward(op):
    example = Example(op, (3, 4, 5))
    given, dy = draw(example), draw_dy(example)
    _, cache = forward(example, given)
    wanted = backward(example, dy, cache)
    given["mean"] += 1
    given["var"] *= 2
    for before, after in zip(wanted, backward(example, dy, cache), strict=True):
        np.testing.assert_array_equal(before, after)


# -- elsewhere -------------------------------------------------------------------------------------------------


def _same_bits(actual: Any, wanted: Any) -> None:
    for a, b in zip(actual, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert to_numpy(a).dtype == to_numpy(b).dtype
            assert to_numpy(a).tobytes() == to_numpy(b).tobytes()


@each_example
@pytest.mark.parametrize("dtype", STRICT.dtypes)
@pytest.mark.parametrize("absent", [(), ("weight", "addend"), ("bias",)], ids=str)
def test_a_cache_moves_to_another_library_and_back(example: Example, dtype, absent):
    """array-api-strict computes with NumPy, so by the reference kernels the gradients there have the same bits."""
    arrays = draw(example)
    given = to_library(NUMPY, arrays | dict.fromkeys(arrays.keys() & set(absent)), dtype)
    dy = NUMPY.asarray(draw_dy(example), dtype)
    _, cache = forward(example, given)
    there = cache.to(STRICT.module)
    back = there.to(np)
    assert type(there) is type(back) is type(cache)
    _same_bits(backward(example, dy, back), backward(example, dy, cache))
    with only("reference"):
        wanted = backward(example, dy, cache)
        _same_bits(backward(example, STRICT.asarray(dy), there), wanted)
    for moved, field in zip(there, cache, strict=True):
        if isinstance(field, np.ndarray):
            assert isinstance(moved, type(STRICT.asarray(0.0)))
            assert to_numpy(moved).tobytes() == field.tobytes()
        else:
            assert moved is field


@each_example
def test_a_cache_that_is_there_already_keeps_its_arrays(xp, example: Example):
    _, cache = forward(example, to_library(xp, draw(example), "float32"))
    for moved, field in zip(cache.to(xp.module), cache, strict=True):
        assert moved is field


@each_example
def test_the_dy_of_another_library_is_refused(example: Example):
    _, cache = forward(example, draw(example))
    with pytest.raises(TypeError, match="dy must come from the library of x, numpy, got array_api_strict"):
        backward(example, STRICT.asarray(draw_dy(example)), cache)
    with pytest.raises(TypeError, match="dy must come from the library of x, array_api_strict, got numpy"):
        backward(example, draw_dy(example), cache.to(STRICT.module))


@pytest.fixture
def other_path(monkeypatch) -> list[str]:
    """A specialisation of every kernel for NumPy, which also notes that it ran; there may be no other one here."""
    ran: list[str] = []

    def noting(kernel: Kernel) -> Any:
        def specialisation(*args: Any) -> Any:
            ran.append(kernel.__name__)
            return kernel.reference(*args)

        return specialisation

    for kernel in kernels().values():
        specialise(monkeypatch, kernel, noting(kernel))
    return ran


@each_example
def test_forward_and_backward_may_take_different_paths(example: Example, other_path: list[str]):
    given, dy = to_library(NUMPY, draw(example), "float32"), NUMPY.asarray(draw_dy(example), "float32")
    caches = {}
    for path in ("reference", "specialised"):
        with only(path):
            _, caches[path] = forward(example, given)
    with only("reference"):
        wanted = backward(example, dy, caches["reference"])
    for first, second in (("specialised", "reference"), ("reference", "specialised")):
        other_path.clear()
        with only(second):
            found = backward(example, dy, caches[first])
        assert bool(other_path) == (second == "specialised")
        for actual, exact in zip(found, wanted, strict=True):
            np.testing.assert_allclose(actual, exact, rtol=2**-22, atol=2**-22 * np.abs(exact).max())


@each_example
def test_a_backward_takes_the_cache_of_its_own_forward_only(example: Example):
    caches = [forward(other, draw(other))[1] for other in EXAMPLES if other.op != example.op]
    for other in (None, (), {"x": 1}, *caches):
        with pytest.raises(TypeError, match=rf"^{example.op}_backward: cache must be a \w+Cache, got \w+$"):
            backward(example, draw_dy(example), other)


# -- the mask of a ReLU ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", FUSED)
@pytest.mark.parametrize("shape", [(3, 4, 5), (31, 33), (2, 3), (2, 2, 2, 1), (3, 1, 1023)], ids=str)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_mask_is_little_endian_bits_in_c_order_padded_with_zeros(xp, op, shape, axis):
    example = Example(op, shape, {"axis": axis})
    y, cache = forward(example, to_library(xp, draw(example), "float32"))
    mask = to_numpy(cache.mask)
    positive = [bool(v > 0) for v in to_numpy(y).reshape(-1)]
    assert (mask.dtype, mask.shape) == (np.uint8, (-(-len(positive) // 8),))
    padded = positive + [False] * (-len(positive) % 8)
    assert [bool(mask[i // 8] >> (i % 8) & 1) for i in range(len(padded))] == padded


@pytest.mark.parametrize("op", FUSED)
def test_a_mask_is_in_logical_order_whatever_the_memory_layout(op):
    example = Example(op, (3, 4, 5))
    arrays = draw(example)
    _, cache = forward(example, arrays)
    turned = {name: np.ascontiguousarray(a.T).T for name, a in arrays.items()}
    np.testing.assert_array_equal(forward(example, turned)[1].mask, cache.mask)


@pytest.mark.parametrize("op", FUSED)
def test_a_mask_made_by_hand_gates_the_gradient(xp, op):
    """The first, the tenth and the last of 60 elements, as any code path may have written it."""
    example = Example(op, (3, 4, 5))
    _, cache = forward(example, to_library(xp, draw(example), "float64"))
    mask = np.zeros(8, np.uint8)
    mask[[0, 1, 7]] = 1, 1 << 1, 1 << 3
    daddend = backward(example, xp.asarray(np.ones((3, 4, 5))), cache._replace(mask=xp.asarray(mask))).daddend
    np.testing.assert_array_equal(np.flatnonzero(to_numpy(daddend)), [0, 9, 59])
