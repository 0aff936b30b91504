"""Layers whose arrays lie in the memory of their input or of each other: refused, or the right answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import arraynorm as an
from bad_input.witness import assert_documented, picture

LAYERS = {
    "BatchNorm2d": lambda: an.BatchNorm2d(3, dtype=np.float64),
    "FusedBatchNorm2d": lambda: an.FusedBatchNorm2d(3, dtype=np.float64),
    "InstanceNorm2d": lambda: an.InstanceNorm2d(3, affine=True, track_running_stats=True, dtype=np.float64),
}
EVERY = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
ARRAYS = ("weight", "bias", "running_mean", "running_var")


def input_and_view() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    x = np.random.default_rng(0).uniform(0.5, 2, (4, 3, 2, 5))
    return x, x[0, 0, 0, :3]


def run(layer: Any, x: Any) -> list[np.ndarray[Any, Any]]:
    """All that a step gives: y, dx, gradients, and the state after it."""
    y, dx = layer(x), layer.backward(np.arange(120.0).reshape(4, 3, 2, 5))
    results = [y, getattr(dx, "dx", dx), *layer.grads.values(), *layer.state_dict().values()]
    return [np.array(result) for result in results]


def run_or_refuse(layer: Any, x: Any, expected: list[np.ndarray[Any, Any]]) -> None:
    """A ValueError that changes nothing, or what arrays of their own would give."""
    held = [layer, x]
    before = picture(held)
    try:
        found = run(layer, x)
    except ValueError as error:
        assert_documented(error, (ValueError,), type(layer).__name__, "|".join(ARRAYS))
        assert picture(held) == before, "the layer or x has changed"
    else:
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)  # sums of 40 values


@pytest.mark.parametrize("name", ARRAYS)
@EVERY
def test_an_array_of_the_layer_in_the_memory_of_x_leaves_x_as_it_was(make: Any, name: str) -> None:
    x, view = input_and_view()
    plain = make()
    setattr(plain, name, view.copy())
    expected = run(plain, x.copy())
    layer = make()
    setattr(layer, name, view)
    untouched = x.copy()
    run_or_refuse(layer, x, expected)
    np.testing.assert_array_equal(x, untouched, err_msg="x was written to")


@EVERY
def test_one_array_for_both_running_statistics_gives_what_two_arrays_give(make: Any) -> None:
    x, view = input_and_view()
    plain, layer, shared = make(), make(), view.copy()
    for name in ("running_mean", "running_var"):
        setattr(plain, name, view.copy())
        setattr(layer, name, shared)
    run_or_refuse(layer, x, run(plain, x))
