"""The C++ kernels take every case that they list: dtype x layout x op, forward and backward, and into any `out`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed import SELF
from arraynorm.kernels import cpu, only
from compiled import needs_native
from data import Host
from namespaces import DTYPES, NUMPY, numpy_dtype
from norms import GIVEN, Example, backward, bare, draw, draw_dy, forward, kernels, specialise, to_library
from tolerances import check

pytestmark = needs_native

Layout = Callable[[Host], Host]


def _within(place: tuple[slice, ...], margin: int = 2) -> Layout:
    """A view of the middle of something larger along the axes that `place` cuts; -1 lies around it."""

    def lay_out(a: Host) -> Host:
        larger = np.full([n + 2 * margin if s != np.s_[:] else n for n, s in zip(a.shape, place, strict=True)], -1.0)
        view = larger.astype(a.dtype)[place]
        view[...] = a
        return view

    return lay_out


def _every_second(axis: int) -> Layout:
    def lay_out(a: Host) -> Host:
        return np.repeat(a, 2, axis=axis)[tuple(np.s_[::2] if i == axis % a.ndim else np.s_[:] for i in range(a.ndim))]

    return lay_out


def _reversed(*axes: int) -> Layout:
    return lambda a: np.flip(np.ascontiguousarray(np.flip(a, axes)), axes)


def _misaligned(a: Host) -> Host:
    view = np.empty(a.nbytes + 1, dtype=np.uint8)[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


_MIDDLE = np.s_[2:-2]
LAYOUTS: dict[str, dict[str, Layout]] = {
    "contiguous": {"C order": np.ascontiguousarray},
    "channels last": {
        "channels last in memory": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1)
    },
    "padded or sliced": {
        "padded planes": _within(np.s_[:, :, :, _MIDDLE]),
        "padded on all sides": _within(np.s_[_MIDDLE, _MIDDLE, _MIDDLE, _MIDDLE]),
        "sliced channels": _within(np.s_[:, _MIDDLE, :, :]),
        "sliced samples": _within(np.s_[_MIDDLE, :, :, :]),
        "sliced channels, last in memory": lambda a: np.moveaxis(
            _within(np.s_[:, :, :, _MIDDLE])(np.moveaxis(a, 1, -1)), -1, 1
        ),
    },
    "any other strides, copied": {
        "Fortran order": np.asfortranarray,
        "every second element": _every_second(-1),
        "every second channel": _every_second(1),
        "every second sample": _every_second(0),
        "reversed": _reversed(0, 1, 2, 3),
        "reversed channels": _reversed(1),
        "reversed elements": _reversed(3),
        "misaligned": _misaligned,
    },
}
"""Under the words of `cases()`: views with the values of an array in four dimensions."""

EVERY_LAYOUT = {name: layout for group in LAYOUTS.values() for name, layout in group.items()}
each_layout = pytest.mark.parametrize("layout", EVERY_LAYOUT.values(), ids=EVERY_LAYOUT)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)

_OPTIONS: dict[str, dict[str, Any]] = {
    "group_norm": {"num_groups": 3},
    "layer_norm": {"normalized_shape": (3, 23)},
    "rms_norm": {"normalized_shape": (23,)},
}
# Planes of 69 elements are walked one by one, and those of 15 together with their neighbours.
EXAMPLES = [Example(op, (2, 6, 3, 23), _OPTIONS.get(op, {})) for op in GIVEN]
SMALL = [Example(op, (4, 6, 3, 5), _OPTIONS.get(op, {})) for op in GIVEN if op not in ("layer_norm", "rms_norm")]
LAST = [
    Example(op, shape, _OPTIONS.get(op, {}) | {"axis": -1})
    for op in GIVEN
    if op not in ("layer_norm", "rms_norm")
    for shape in ((2, 3, 23, 6), (2, 2, 1, 30), (2, 5, 3, 9))
]
each_example = pytest.mark.parametrize("example", EXAMPLES, ids=str)


def _laid_out(example: Example, layout: Layout, dtype: str) -> dict[str, Host]:
    """Parameters lie as they like, too: here every second number of something longer."""
    arrays = to_library(NUMPY, draw(example), dtype)
    return {name: layout(a) if a.ndim == 4 else _every_second(-1)(a) for name, a in arrays.items()}


# -- what is taken ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", EXAMPLES + SMALL, ids=str)
@each_layout
@each_dtype
@only("specialised")
def test_no_layout_is_declined_and_all_are_right_to_rounding(example, layout, dtype):
    given = _laid_out(example, layout, dtype)
    for dy_dtype in dict.fromkeys((dtype, "float32", "bfloat16")):
        check(example, given, layout(NUMPY.asarray(draw_dy(example), dy_dtype)))


@pytest.mark.parametrize("example", LAST, ids=str)
@each_dtype
@only("specialised")
def test_channels_on_the_last_axis_are_not_declined(example, dtype):
    for layout in (np.ascontiguousarray, _within(np.s_[:, :, :, _MIDDLE]), _within(np.s_[:, :, _MIDDLE, :])):
        check(example, _laid_out(example, layout, dtype), layout(NUMPY.asarray(draw_dy(example), dtype)))


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
@pytest.mark.parametrize("axes", [(0,), (3,), (2, 3), (0, 2, 3)], ids=str)
@each_dtype
@only("specialised")
def test_zero_strides_are_not_declined(example, axes, dtype):
    """Batch statistics of equal samples, or of equal elements: the latter have no variance."""

    def repeated(a: Host) -> Host:
        return np.broadcast_to(a[tuple(np.s_[:1] if i in axes else np.s_[:] for i in range(4))], a.shape)

    given = {name: repeated(a) if a.ndim == 4 else a for name, a in to_library(NUMPY, draw(example), dtype).items()}
    check(example, given, repeated(NUMPY.asarray(draw_dy(example), dtype)))
    check(example, given, NUMPY.asarray(draw_dy(example), dtype))


@each_example
@each_layout
@only("specialised")
def test_x_and_dy_may_lie_in_any_two_layouts(example, layout):
    given, dy = _laid_out(example, layout, "float32"), NUMPY.asarray(draw_dy(example), "float32")
    for other in EVERY_LAYOUT.values():
        check(example, given, other(dy))
        if "addend" in given:
            check(example, given | {"addend": other(given["addend"])}, dy)


@each_example
@each_layout
@each_dtype
@only("specialised")
def test_any_out_receives_the_bits_of_a_new_array(example, layout, dtype):
    given, dy = _laid_out(example, layout, dtype), layout(NUMPY.asarray(draw_dy(example), dtype))
    y, cache = forward(example, given)
    dx = backward(example, dy, cache).dx
    for place in EVERY_LAYOUT.values():
        out = place(np.full(example.shape, 77, numpy_dtype(dtype)))
        assert forward(example, given, out=out)[0] is out
        assert out.tobytes() == y.tobytes()
        out[...] = 77
        assert bare(example, given, out=out) is out
        assert out.tobytes() == y.tobytes()
        out[...] = 77
        assert backward(example, dy, cache, out=out).dx is out
        assert out.tobytes() == dx.tobytes()


@pytest.mark.parametrize("layout", LAYOUTS["padded or sliced"].values(), ids=LAYOUTS["padded or sliced"])
@each_example
@only("specialised")
def test_nothing_is_written_around_an_out(example, layout):
    given, dy = to_library(NUMPY, draw(example), "float32"), NUMPY.asarray(draw_dy(example), "float32")
    out = layout(np.zeros(example.shape, "float32"))
    whole = out
    while whole.base is not None:
        whole = whole.base
    around = whole.size - out.size
    assert around > 0
    _, cache = forward(example, given, out=out)
    backward(example, dy, cache, out=out)
    out[...] = 77
    assert np.count_nonzero(whole == -1) == around


@pytest.mark.parametrize("op", ["batch_norm_add_relu", "batch_norm_add_relu_frozen"])
@each_layout
@only("specialised")
def test_dx_and_daddend_may_lie_in_any_two_layouts(op, layout):
    example = Example(op, (2, 6, 3, 23))
    given, dy = _laid_out(example, layout, "float32"), NUMPY.asarray(draw_dy(example), "float32")
    cache = forward(example, given)[1]
    wanted = backward(example, dy, cache)
    for place in EVERY_LAYOUT.values():
        dx, daddend = layout(np.zeros_like(dy)), place(np.zeros_like(dy))
        backward(example, dy, cache, out=(dx, daddend))
        assert dx.tobytes() == wanted.dx.tobytes()
        assert daddend.tobytes() == wanted.daddend.tobytes()


@pytest.mark.parametrize("op", ["quantized_batch_norm", "quantized_batch_norm_relu"])
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("shape", [(2, 6, 3, 23), (4, 6, 3, 5)], ids=str)
@each_layout
def test_quantized_values_may_lie_in_any_layout(op, dtype, shape, layout):
    """The levels of the reference, for here no value lies next to a tie."""
    rng = np.random.default_rng(0)
    xq = rng.integers(0, 128, shape, dtype)
    options = {"x_scale": 0.05, "x_zero_point": 60, "y_scale": 0.04, "y_zero_point": 70}
    for parameter_dtype in DTYPES:
        drawn = [rng.standard_normal(6), rng.uniform(0.5, 2, 6), rng.standard_normal(6), rng.standard_normal(6)]
        given = [a.astype(numpy_dtype(parameter_dtype)) for a in drawn]
        with only("reference"):
            wanted = getattr(an, op)(xq, *given, **options)
        with only("specialised"):
            np.testing.assert_array_equal(getattr(an, op)(layout(xq), *given, **options), wanted)
            for place in EVERY_LAYOUT.values():
                out = place(np.zeros_like(xq))
                assert getattr(an, op)(layout(xq), *given, **options, out=out) is out
                np.testing.assert_array_equal(out, wanted)


# -- what is said of it ----------------------------------------------------------------------------------------


def test_the_layouts_tested_are_those_that_are_listed():
    assert list(LAYOUTS) == list(cpu.LAYOUTS)
    assert sorted(DTYPES) == sorted(cpu.FLOATING)


@pytest.mark.parametrize("name", kernels())
def test_a_kernel_is_said_to_run_in_cpp_if_it_does(name):
    case = an.show_config(mode="dicts")["kernels"]["numpy"][name]
    dtypes = ("uint8", "int8") if name.startswith("quantized") else DTYPES
    assert "numpy" in kernels()[name].specialised
    assert case.startswith("C++: ")
    assert case == cpu.cases()[name]
    for word in (*dtypes, *LAYOUTS):
        assert word in case


def test_the_ops_of_this_file_call_every_kernel(monkeypatch):
    """So that a kernel which is added, and that none of them calls, does not go untested."""
    called = set()
    for name, kernel in kernels().items():

        def remember(*args, name=name):
            called.add(name)
            return NotImplemented

        specialise(monkeypatch, kernel, remember)
    for example in EXAMPLES:
        arrays, dy = draw(example), draw_dy(example)
        for more in ({}, {"comm": SELF}) if example.op in ("batch_norm", "batch_norm_add_relu") else ({},):
            backward(example, dy, forward(example, arrays, **more)[1])
    xq, unit = np.zeros((2, 3), np.int8), {"mean": np.zeros(3), "var": np.ones(3)}
    for op in (an.quantized_batch_norm, an.quantized_batch_norm_relu):
        op(xq, **unit, x_scale=1.0, x_zero_point=0, y_scale=1.0, y_zero_point=0)
    assert called == set(kernels())


@pytest.mark.parametrize("kind", ["integers", "another byte order", "complex"])
def test_what_is_not_listed_is_declined_and_not_misread(kind):
    """The functional ops refuse these before; a kernel that is handed one still must not take it for a float."""
    x = np.ones((2, 3, 4)).astype({"integers": "int32", "another byte order": ">f4", "complex": "complex64"}[kind])
    with only("specialised"), pytest.raises(NotImplementedError, match="no specialisation for numpy took"):
        kernels()["batch_norm_stats"](x)
