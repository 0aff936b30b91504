"""`out=`: y, or dx and daddend, in memory of the caller's; or an error, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_strict
import numpy as np
import pytest

import arraynorm as an
from namespaces import DTYPES, NUMPY, STRICT, to_numpy
from norms import Example, backward, bare, draw, draw_dy, each_example, forward, to_library

SHAPE = (3, 4, 5)


class Call(NamedTuple):
    """One call that takes `out`, with everything else bound."""

    run: Callable[..., Any]
    """run(out=None) -> the array that `out` is for"""
    arrays: dict[str, Any]
    """What it reads."""


def _forward(example: Example, dtype: str = "float32") -> Call:
    arrays = to_library(NUMPY, draw(example), dtype)
    return Call(lambda out=None: forward(example, arrays, out=out)[0], arrays)


def _bare(example: Example, dtype: str = "float32") -> Call:
    arrays = to_library(NUMPY, draw(example), dtype)
    return Call(lambda out=None: bare(example, arrays, out=out), arrays)


def _backward(example: Example, dtype: str = "float32") -> Call:
    arrays = to_library(NUMPY, draw(example), dtype)
    cache, dy = forward(example, arrays)[1], NUMPY.asarray(draw_dy(example), dtype)
    return Call(lambda out=None: backward(example, dy, cache, out=out).dx, arrays | {"dy": dy})


each_call = pytest.mark.parametrize("make", [_forward, _bare, _backward], ids=["forward", "bare", "backward"])

_FRESH = {
    "contiguous": lambda a: np.full(a.shape, 77, dtype=a.dtype),
    "transposed": lambda a: np.full(a.shape[::-1], 77, dtype=a.dtype).T,
    "reversed": lambda a: np.flip(np.full(a.shape, 77, dtype=a.dtype)),
    "every second": lambda a: np.full((*a.shape[:-1], 2 * a.shape[-1]), 77, dtype=a.dtype)[..., ::2],
    "a corner of something larger": lambda a: np.full([n + 1 for n in a.shape], 77, dtype=a.dtype)[1:, :-1, 1:],
    "unaligned": lambda a: np.empty(a.nbytes + 1, dtype=np.uint8)[1:].view(a.dtype).reshape(a.shape),
}


# -- what is written -------------------------------------------------------------------------------------------


@each_example
@each_call
@pytest.mark.parametrize("layout", _FRESH.values(), ids=_FRESH)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_result_is_out_with_the_same_bits(example: Example, make, layout, dtype):
    call = make(example, dtype)
    wanted = call.run()
    out = layout(wanted)
    result = call.run(out=out)
    assert result is out
    np.testing.assert_array_equal(out, wanted)


@each_example
@pytest.mark.parametrize("place", [np.s_[..., ::2], np.s_[..., :5], np.s_[..., 5:]], ids=str)
def test_what_lies_around_out_is_not_written(example: Example, place):
    base = np.full((3, 4, 10), 77, dtype="float32")
    _bare(example).run(out=base[place])
    base[place] = 77
    assert (base == 77).all()


@each_example
def test_dx_may_take_the_place_of_dy(example: Example):
    call = _backward(example)
    wanted, dy = call.run(), call.arrays["dy"]
    assert call.run(out=dy) is dy
    np.testing.assert_array_equal(dy, wanted)


@each_example
def test_y_may_take_the_place_of_x_where_no_cache_is_kept(example: Example):
    call = _bare(example)
    wanted, x = call.run(), call.arrays["x"]
    assert call.run(out=x) is x
    np.testing.assert_array_equal(x, wanted)


@pytest.mark.parametrize("op", ["batch_norm_add_relu", "batch_norm_add_relu_frozen"])
@pytest.mark.parametrize("make", [_forward, _bare], ids=["forward", "bare"])
def test_y_may_take_the_place_of_the_addend(op, make):
    call = make(Example(op, SHAPE))
    wanted, addend = call.run(), call.arrays["addend"]
    assert call.run(out=addend) is addend
    np.testing.assert_array_equal(addend, wanted)


@pytest.mark.parametrize("op", ["batch_norm_add_relu", "batch_norm_add_relu_frozen"])
@pytest.mark.parametrize("places", ["fresh", "dx in dy", "daddend in dy", "daddend alone", "dx alone"])
def test_dx_and_daddend_have_a_place_each(op, places):
    example = Example(op, SHAPE)
    cache = forward(example, to_library(NUMPY, draw(example), "float32"))[1]
    dy = NUMPY.asarray(draw_dy(example), "float32")
    wanted = backward(example, dy, cache)
    a, b = np.empty_like(dy), np.empty_like(dy)
    out = {
        "fresh": (a, b),
        "dx in dy": (dy, b),
        "daddend in dy": (a, dy),
        "daddend alone": (None, b),
        "dx alone": (a, None),
    }[places]
    result = backward(example, dy, cache, out=out)
    for place, array, expected in zip(out, result[:2], wanted[:2], strict=True):
        assert place is None or array is place
        np.testing.assert_array_equal(array, expected)
    for array, expected in zip(result[2:], wanted[2:], strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("op", [an.quantized_batch_norm, an.quantized_batch_norm_relu])
@pytest.mark.parametrize("layout", [*_FRESH.values(), lambda xq: xq], ids=[*_FRESH, "xq itself"])
def test_a_quantized_result_is_out_with_the_same_bits(op, layout):
    xq = np.arange(60, dtype=np.int8).reshape(SHAPE)
    options = {"x_scale": 0.1, "x_zero_point": 3, "y_scale": 0.05, "y_zero_point": -4}
    wanted = op(xq, np.arange(4.0), np.ones(4), **options)
    out = layout(xq)
    assert op(xq, np.arange(4.0), np.ones(4), **options, out=out) is out
    np.testing.assert_array_equal(out, wanted)


# -- what is refused -------------------------------------------------------------------------------------------


def _read_only(like: np.ndarray) -> np.ndarray:
    out = np.empty_like(like)
    out.flags.writeable = False
    return out


def _strided(strides: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda like: np.lib.stride_tricks.as_strided(np.zeros(100, like.dtype), SHAPE, strides)


_REFUSED = {
    "the wrong shape": (lambda like: np.empty((3, 4, 6), like.dtype), ValueError, r"shape \(3, 4, 5\)"),
    "a shape that broadcasts": (lambda like: np.empty((2, *SHAPE), like.dtype), ValueError, "shape"),
    "the wrong dtype": (lambda like: np.empty(SHAPE, "float64"), TypeError, "dtype float32"),
    "an integer dtype": (lambda like: np.empty(SHAPE, "int32"), TypeError, "dtype float32"),
    "another byte order": (lambda like: np.empty(SHAPE, like.dtype.newbyteorder()), TypeError, "byte order"),
    "another library": (lambda like: STRICT.asarray(like), TypeError, "library of x"),
    "a list": (lambda like: like.tolist(), TypeError, "array"),
    "a masked array": (lambda like: np.ma.zeros(SHAPE, like.dtype), TypeError, "plain array"),
    "a read-only array": (_read_only, ValueError, "writeable"),
    "an array that overlaps itself": (_strided((16, 4, 4)), ValueError, "elements of its own"),
    "an array that repeats itself, with gaps": (_strided((0, 80, 8)), ValueError, "elements of its own"),
}


def _is_refused(call: Call, out: Any, error: type[Exception], match: str) -> None:
    """`out` raises, naming function and argument, and neither it nor an input changes."""
    watched = [a for a in (*call.arrays.values(), out) if isinstance(a, np.ndarray)]
    before = [a.tobytes() for a in watched]
    with pytest.raises(error, match=rf"^\w+: out must .*{match}"):
        call.run(out=out)
    assert [a.tobytes() for a in watched] == before


@each_example
@each_call
@pytest.mark.parametrize(("place", "error", "match"), _REFUSED.values(), ids=_REFUSED)
def test_a_place_that_cannot_take_the_result_is_refused(example: Example, make, place, error, match):
    call = make(example)
    _is_refused(call, place(call.arrays["x"]), error, match)


@each_example
def test_y_must_not_overlap_the_x_that_the_cache_refers_to(example: Example):
    call = _forward(example)
    for out in (call.arrays["x"], np.flip(call.arrays["x"])):
        _is_refused(call, out, ValueError, "overlap")


@each_example
def test_dx_must_not_overlap_the_x_that_the_cache_refers_to(example: Example):
    call = _backward(example)
    _is_refused(call, call.arrays["x"], ValueError, "overlap")


def _overlapping(call: Call, name: str) -> np.ndarray:
    """Replaces the named input by a part of a larger block; the same block one element on, as x's shape."""
    block = np.zeros(200, "float32")
    array = call.arrays[name]
    view = block[: array.size].reshape(array.shape)
    view[...] = array
    call.arrays[name] = view
    return block[1 : 1 + np.prod(SHAPE)].reshape(SHAPE)


@each_example
@pytest.mark.parametrize("make", [_forward, _bare], ids=["forward", "bare"])
def test_y_must_not_overlap_an_input_in_part(example: Example, make):
    for name in make(example).arrays:
        call = make(example)
        _is_refused(call, _overlapping(call, name), ValueError, "overlap")


@each_example
def test_dx_must_not_overlap_dy_in_part_nor_the_weight(example: Example):
    arrays = to_library(NUMPY, draw(example), "float32")
    for name in ("dy", "weight"):
        call = Call(None, arrays | {"dy": NUMPY.asarray(draw_dy(example), "float32")})
        out = _overlapping(call, name)
        given = {key: call.arrays[key] for key in arrays}
        cache = forward(example, given)[1]
        run = lambda out, call=call, cache=cache: backward(example, call.arrays["dy"], cache, out=out)  # noqa: E731
        _is_refused(call._replace(run=run), out, ValueError, "overlap")


@pytest.mark.parametrize("op", ["batch_norm_add_relu", "batch_norm_add_relu_frozen"])
@pytest.mark.parametrize("case", ["both in dy", "overlapping each other", "three", "no addend", "read-only daddend"])
def test_a_pair_that_cannot_take_both_gradients_is_refused(op, case):
    example = Example(op, SHAPE)
    arrays = to_library(NUMPY, draw(example) | ({"addend": None} if case == "no addend" else {}), "float32")
    cache, dy = forward(example, arrays)[1], NUMPY.asarray(draw_dy(example), "float32")
    a, b = np.zeros((2, *SHAPE), "float32")
    out = {
        "both in dy": (dy, dy),
        "overlapping each other": (a, np.flip(a)),
        "three": (a, b, dy),
        "no addend": (a, b),
        "read-only daddend": (a, _read_only(b)),
    }[case]
    before = dy.tobytes()
    with pytest.raises(ValueError, match=rf"^{op}_backward: out must "):
        backward(example, dy, cache, out=out)
    assert dy.tobytes() == before
    assert not a.any()
    assert not b.any()


@each_example
def test_libraries_without_writable_views_refuse_out(example: Example):
    arrays = to_library(STRICT, draw(example), "float32")
    dy = STRICT.asarray(draw_dy(example), "float32")
    with STRICT.its_kernels():
        cache = forward(example, arrays)[1]
    for run in (
        lambda out: forward(example, arrays, out=out),
        lambda out: bare(example, arrays, out=out),
        lambda out: backward(example, dy, cache, out=out),
    ):
        out = array_api_strict.zeros(SHAPE, dtype=array_api_strict.float32)
        with pytest.raises(TypeError, match=r"^\w+: out is supported for NumPy and CuPy arrays, got array_api_strict"):
            run(out)
        assert not to_numpy(out).any()


@pytest.mark.parametrize("op", [an.quantized_batch_norm, an.quantized_batch_norm_relu])
def test_a_quantized_result_needs_a_place_of_its_dtype(op):
    xq, out = np.zeros(SHAPE, np.int8), np.full(SHAPE, 77, np.uint8)
    options = {"x_scale": 0.1, "x_zero_point": 3, "y_scale": 0.05, "y_zero_point": -4}
    with pytest.raises(TypeError, match="out must have dtype int8, got uint8"):
        op(xq, np.arange(4.0), np.ones(4), **options, out=out)
    assert (out == 77).all()


def test_out_may_be_x_with_another_stride_of_a_single_element():
    x = np.arange(6.0)[None]
    assert an.layer_norm(x, 6, out=x[0][None]).base is x.base
