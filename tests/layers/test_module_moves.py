"""Section K of the contract: casting a module, and moving it between array libraries and devices."""

from __future__ import annotations

import sys
from typing import Any

import array_api_strict
import numpy as np
import pytest

import arraynorm as an
from layer_cases import FLOATING, Case, filled, held
from namespaces import NAMESPACES, STRICT

pytestmark = pytest.mark.behaviour(46)
CASES = pytest.mark.parametrize("case", FLOATING, ids=str)


@pytest.mark.parametrize(("method", "dtype"), [("half", np.float16), ("float", np.float32), ("double", np.float64)])
@CASES
def test_parameters_are_cast_and_the_counter_is_not(case: Case, method: str, dtype: Any) -> None:
    layer = case.layer(dtype=np.float64 if method != "double" else np.float32)
    counter = getattr(layer, "num_batches_tracked", None)
    model = an.Sequential(layer)
    assert getattr(model, method)() is model
    assert {array.dtype for array in layer.parameters()} <= {np.dtype(dtype)}
    if counter is not None:
        assert layer.num_batches_tracked.dtype == counter.dtype
    if method != "half":
        floating = [array for array in layer.buffers() if array.ndim]
        assert all(array.dtype == dtype for array in floating)
    assert layer(case.x()).dtype == np.float32  # x's, whatever the parameters' is


@pytest.mark.parametrize(("method", "dtype"), [("half", np.float32), ("float", np.float32), ("double", np.float64)])
@CASES
def test_gradients_are_cast_to_no_less_than_float32(case: Case, method: str, dtype: Any) -> None:
    layer = case.layer()
    layer(case.x())
    layer.backward(case.x(1))
    getattr(layer, method)()
    assert {gradient.dtype for gradient in layer.grads.values() if gradient is not None} <= {np.dtype(dtype)}


@CASES
def test_to_a_dtype_is_that_cast(case: Case) -> None:
    assert held(case.layer().to(dtype=np.float64)) == held(case.layer().double())


@CASES
def test_to_another_library_moves_every_array_there_and_back(case: Case) -> None:
    layer = case.layer()
    layer(case.x())
    layer.backward(case.x(1))
    before = held(layer)
    assert layer.to(array_api_strict) is layer
    moved = [*layer.parameters(), *layer.buffers(), *(g for g in layer.grads.values() if g is not None)]
    assert {type(array) for array in moved} == {type(STRICT.asarray(0.0))}
    assert layer(STRICT.asarray(case.x())).shape == case.shape
    layer.to(np)
    assert held(layer).keys() == before.keys()
    assert {type(array) for array in layer.parameters()} <= {np.ndarray}


def test_to_a_device_of_the_same_library_changes_nothing() -> None:
    layer = filled(an.BatchNorm1d(3))
    before = held(layer)
    assert held(layer.to("cpu")) == before
    assert held(layer.to()) == before


@CASES
def test_cpu_moves_to_numpy(case: Case) -> None:
    layer = case.layer(xp=array_api_strict).cpu()
    assert {type(array) for array in (*layer.parameters(), *layer.buffers())} == {np.ndarray}
    assert held(layer) == held(case.layer())


CUPY = [namespace for namespace in NAMESPACES if namespace.name == "cupy"]


@CASES
def test_cuda_moves_to_cupy_or_says_why_it_cannot(case: Case) -> None:
    layer = case.layer()
    before = held(layer)
    if CUPY:
        moved = [*layer.cuda().parameters(), *layer.buffers()]
        assert all(isinstance(array, CUPY[0].module.ndarray) for array in moved)
        layer.cpu()
    else:
        with pytest.raises(RuntimeError, match=r"CuPy is not installed|cuda"):  # CUDA's own text without a device
            layer.cuda()
    assert held(layer) == before


def test_cuda_without_cupy_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match=r"CuPy is not installed; pip install arraynorm\[cuda1"):
        an.LayerNorm(3).cuda()
