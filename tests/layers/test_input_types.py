"""Section B of the contract, behaviour 16: dtypes, libraries, kinds and layouts of arrays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import array_api_strict
import numpy as np
import pytest

import arraynorm as an
from layer_cases import BATCH_NORMS, FAMILIES, FLOATING, RUNNING, Case, backward, draw, filled, held

Spoil = Callable[[np.ndarray[Any, Any]], Any]

NOT_FLOATING: dict[str, Spoil] = {
    "int64": lambda x: x.astype(np.int64),
    "uint8": lambda x: x.astype(np.uint8),
    "bool": lambda x: x > 0,
    "complex64": lambda x: x.astype(np.complex64),
    "object": lambda x: x.astype(object),
    "longdouble": lambda x: x.astype(np.longdouble),
    "str": lambda x: x.astype(str),
}
NO_ARRAY: dict[str, Spoil] = {
    "list": lambda x: x.tolist(),
    "float": lambda x: 1.5,
    "scalar of NumPy": lambda x: np.float32(1.5),
    "None": lambda x: None,
    "masked array": lambda x: np.ma.MaskedArray(x, mask=x > 0),
    "subclass": lambda x: x.view(type("Unit", (np.ndarray,), {})),
}

WRONG_ARRAYS: dict[str, Spoil] = {
    **{name: NOT_FLOATING[name] for name in ("int64", "complex64", "longdouble")},
    **{name: NO_ARRAY[name] for name in ("list", "float", "masked array")},
    "another library": array_api_strict.asarray,
}


@pytest.mark.behaviour(16)
@pytest.mark.parametrize("spoil", (NOT_FLOATING | NO_ARRAY).values(), ids=(NOT_FLOATING | NO_ARRAY).keys())
@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_what_is_no_plain_floating_array_is_a_type_error(case: Case, spoil: Spoil) -> None:
    layer = case.layer()
    for training in (False, True):
        with pytest.raises(TypeError, match=r"\bx\b"):
            layer.train(training)(spoil(case.x()))
    layer(case.x())
    with pytest.raises(TypeError, match="dy"):
        layer.backward(spoil(case.x(1)))


@pytest.mark.behaviour(16)
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("layer", [an.BatchNorm1d(3), an.LayerNorm(3), an.RMSNorm(3), an.GroupNorm(3, 3)])
def test_a_matrix_is_a_type_error(layer: Any) -> None:
    with pytest.raises(TypeError, match="matrix"):
        layer(np.matrix(draw(4, 3)))


ARRAYS = [
    (case, name)
    for case in FAMILIES
    for name in ("weight", "bias", "running_mean", "running_var")
    if getattr(case.layer(), name, None) is not None
]


@pytest.mark.behaviour(16)
@pytest.mark.parametrize("spoil", WRONG_ARRAYS.values(), ids=WRONG_ARRAYS.keys())
@pytest.mark.parametrize(("case", "name"), ARRAYS, ids=str)
def test_a_parameter_or_buffer_of_a_wrong_kind_is_a_type_error_that_names_it(
    case: Case, name: str, spoil: Spoil
) -> None:
    layer = case.layer().train(name in ("weight", "bias"))
    setattr(layer, name, spoil(getattr(layer, name)))
    with pytest.raises(TypeError, match=name.removeprefix("running_")):
        layer(case.x())


@pytest.mark.behaviour(16)
@pytest.mark.parametrize("case", FLOATING, ids=str)
def test_an_input_of_another_library_than_the_parameters_is_a_type_error(case: Case) -> None:
    with pytest.raises(TypeError, match="library"):
        case.layer()(array_api_strict.asarray(case.x()))


@pytest.mark.behaviour(16)
@pytest.mark.parametrize("case", BATCH_NORMS, ids=str)
def test_byte_swapped_values_are_converted_or_refused_but_never_misread(case: Case) -> None:
    x, dy = case.x(), case.x(1)
    y = case.layer()(x)
    swapped = np.dtype(np.float32).newbyteorder()
    layer = case.layer()
    _equal_or_refused(lambda: layer(x.astype(swapped)), y)
    layer(x)
    dx = layer.backward(dy)
    layer(x)
    _equal_or_refused(lambda: layer.backward(dy.astype(swapped)), dx)
    layer = case.layer()
    layer.weight = layer.weight.astype(swapped)
    _equal_or_refused(lambda: layer(x), y)
    layer = case.layer().eval()
    y = layer(x)
    layer.running_var = layer.running_var.astype(swapped)
    _equal_or_refused(lambda: layer(x), y)


def _equal_or_refused(call: Callable[[], Any], expected: np.ndarray[Any, Any]) -> None:
    try:
        result = call()
    except TypeError:
        return  # refused
    np.testing.assert_array_equal(result, expected)


def _unaligned(x: np.ndarray[Any, Any], folder: Path) -> np.ndarray[Any, Any]:
    raw = np.empty(x.nbytes + 1, np.uint8)
    view = raw[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    assert not view.flags.aligned
    return view


def _memmap(x: np.ndarray[Any, Any], folder: Path) -> np.ndarray[Any, Any]:
    mapped = np.memmap(folder / f"{x.flat[0]}", x.dtype, "w+", shape=x.shape)
    mapped[...] = x
    return mapped


def _negative_strides(x: np.ndarray[Any, Any], folder: Path) -> np.ndarray[Any, Any]:
    return np.flip(np.flip(x).copy())


def _transposed(x: np.ndarray[Any, Any], folder: Path) -> np.ndarray[Any, Any]:
    return x.T.copy().T


def _read_only(x: np.ndarray[Any, Any], folder: Path) -> np.ndarray[Any, Any]:
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.mark.behaviour(16)
@pytest.mark.parametrize("layout", [_unaligned, _memmap, _negative_strides, _transposed, _read_only])
@pytest.mark.parametrize("case", FLOATING, ids=str)
def test_the_layout_in_memory_does_not_matter(case: Case, layout: Any, tmp_path: Path) -> None:
    plain, layer = case.layer(), case.layer()
    # an order of axes is an order of sums too: as exact, but not the same bits
    tolerance = 4 * float(np.finfo(np.float32).eps) if layout is _transposed else 0.0

    def assert_same(actual: Any, expected: Any) -> None:
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.max(np.abs(expected), initial=0))

    assert_same(layer(layout(case.x(), tmp_path)), plain(case.x()))
    assert_same(backward(layer, layout(case.x(1), tmp_path)), backward(plain, case.x(1)))
    for name, gradient in plain.grads.items():
        if gradient is not None:
            assert_same(layer.grads[name], gradient)
    for (name, buffer), (_, expected) in zip(layer.named_buffers(), plain.named_buffers(), strict=True):
        assert (buffer is None) == (expected is None), name
        if buffer is not None:
            assert_same(buffer, expected)
    if not tolerance:
        assert held(layer) == held(plain)


@pytest.mark.behaviour(16)
@pytest.mark.parametrize("case", FLOATING, ids=str)
def test_zero_strides_are_values_repeated(case: Case) -> None:
    plain, layer = case.layer(), case.layer()
    x = np.broadcast_to(case.x()[:1], case.shape)
    assert x.strides[0] == 0
    np.testing.assert_array_equal(layer(x), plain(x.copy()))
    np.testing.assert_array_equal(backward(layer, x), backward(plain, x.copy()))


@pytest.mark.behaviour(16)
@pytest.mark.parametrize("case", RUNNING, ids=str)
def test_buffers_of_any_layout_move(case: Case) -> None:
    plain, layer = case.layer(), case.layer()
    layer.running_mean = np.flip(np.flip(layer.running_mean).copy())
    layer.running_var = np.repeat(layer.running_var, 2)[::2]
    for module in (plain, layer):
        module(case.x())
    assert held(layer) == held(plain)


@pytest.mark.behaviour(16)
def test_parameters_of_another_floating_dtype_than_the_input_are_taken() -> None:
    for dtype in (np.float16, np.float64):
        layer = filled(an.BatchNorm1d(3, dtype=dtype))
        assert layer(draw(4, 3)).dtype == np.float32
