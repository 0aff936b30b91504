"""What the CUDA path takes, how many launches it needs, and that plans stay within what a device has."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import arraynorm.kernels.cuda
from arraynorm.kernels.cuda import CASES, LAYOUTS, _loader, _plan
from arraynorm.kernels.cuda._instances import C_TYPES, ITEM_BYTES, QUANTIZED_C_TYPES, instances, widths
from arraynorm.kernels.cuda._plan import GEOMETRY, Layout
from cuda.emulated import LARGE, SMALL, dry
from norms import kernels

DEVICES = {"small": SMALL, "large": LARGE, "one processor": _loader.Device(1, 48 << 10)}

SHAPES = [(3, 16, 8), (5, 7, 31), (2, 1, 4097), (64, 32, 1)]
"""(N, C, S); for the row norms (N * S, C)."""

_PLACED = {
    "channels first": lambda a: a,
    "channels last": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, -2, -1)), -1, -2),
    "a view of some channels": lambda a: np.concatenate([a, a], axis=-2)[..., : a.shape[-2], :],
    "any strides": lambda a: np.repeat(np.repeat(a, 2, axis=-1), 3, axis=-2)[..., ::3, ::-2],
}


def _arguments(kernel: str, dtype: str, layout: str, shape: tuple[int, int, int]) -> list[object]:
    """Arguments of a reference kernel by their names, of the right shapes and dtypes."""
    (n, c, s), place = shape, _PLACED[layout]
    x = np.ones(shape, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    statistics = (c,)
    if kernel.startswith(("layer", "rms")):
        x, statistics = place(np.moveaxis(x, 1, 2).reshape(n * s, c)), (n * s,)
    elif kernel.startswith("group"):
        x, statistics = place(x)[:, None], (n, 1)
    elif kernel.startswith("instance"):
        x, statistics = place(x)[:, None], (n, c)
    else:
        x = place(x)
    per_channel, per_set = np.ones(c), np.ones(statistics)
    values = dict.fromkeys(("x", "dy", "addend"), x)
    values |= dict.fromkeys(
        ("weight", "bias", "mean_dy", "mean_dy_x_hat", "mean_g", "mean_g_x_hat", "a", "b"), per_channel
    )
    values |= dict.fromkeys(("mean", "rstd"), per_set) | dict.fromkeys(("out", "out_addend"))
    values |= {"mask": np.zeros(-(-x.size // 8), np.uint8), "eps": 1e-5, "num_groups": 1, "with_addend": True}
    values |= {"x_scale": 0.1, "x_zero_point": 1, "y_scale": 0.1, "y_zero_point": 1}
    return [values[name] for name in kernels()[kernel].__wrapped__.__code__.co_varnames[: _parameters(kernel)]]


def _parameters(kernel: str) -> int:
    return kernels()[kernel].__wrapped__.__code__.co_argcount


def test_every_kernel_has_cuda_cases_in_every_dtype_and_layout():
    quantized = {name for name in kernels() if name.startswith("quantized")}
    wanted = {(k, d, p) for k in kernels() for d in (QUANTIZED_C_TYPES if k in quantized else C_TYPES) for p in LAYOUTS}
    assert set(CASES) == wanted
    assert set(C_TYPES) == {"float16", "bfloat16", "float32", "float64"}
    assert set(_PLACED) == set(LAYOUTS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case))
def test_no_case_is_declined_and_none_needs_more_than_two_launches(case):
    known = set(instances())
    for shape, device in itertools.product(SHAPES, (SMALL, LARGE)):
        arguments = _arguments(*case, shape)
        with dry(device) as launched:
            kernels()[case.kernel](*arguments)  # a decline would raise
        assert 1 <= len(launched) <= 2
        assert set(launched) <= known, "an instance that could not be compiled ahead of time"


def test_what_is_declined_goes_to_the_reference():
    x = np.ones((2, 3, 4), np.float32)
    with dry() as launched:
        for arguments in ((x[:0],), (x.astype(np.complex64),)):
            with pytest.raises(NotImplementedError, match="no specialisation"):
                kernels()["batch_norm_stats"](*arguments)
        with pytest.raises(NotImplementedError, match="no specialisation"):
            kernels()["batch_norm_backward_reduce"](x.astype(np.float64), x, np.ones(3), np.ones(3))
    assert not launched


# -- plans -----------------------------------------------------------------------------------------------------

_SIZES = [1, 2, 7, 8, 31, 49, 64, 257, 1024, 3136, 65536, 1_000_000]


def _layouts(dtype: str):
    for n in (1, 2, 33, 4096):
        for c in (1, 3, 64, 8192):
            for s in _SIZES:
                yield Layout(dtype, (1, n, c, s), ((0, c * s, s, 1),) * 2 + (None, None), 16)
                yield Layout(dtype, (n, 1, c, s), ((c * s, 0, s, 1),) * 2 + (None, None), 16)
                yield Layout(dtype, (1, n, c, s), ((0, c * s, 1, c),) * 2 + (None, None), 16)
                yield Layout(dtype, (n, s, c, 1), ((c * s, c, 1, 0),) * 2 + (None, None), 16)


def _plans(layout: Layout, device: _loader.Device):
    group = layout.shape[2] if layout.shape[2] % 2 else layout.shape[2] // 2
    for k in {1, group}:
        yield _plan.moments(layout, k, device).plan, "part"
        yield _plan.products(layout, k, False, device).plan, "part"
        yield _plan.apply(layout, k, False, device), "part"
        yield _plan.dx(layout, k, False, 0, device), "part"
    yield _plan.apply(layout, 1, True, device), "flat"
    if not _plan.by_tiles(layout):
        yield _plan.row_forward(layout, 1, True, False, device), "row"
        yield _plan.row_forward(layout, group, True, True, device), "row"
        yield _plan.slab_backward(layout, False, device), "row"


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("dtype", C_TYPES)
def test_plans_stay_within_the_device_and_cover_every_element_once(dtype, device):
    for layout in _layouts(dtype):
        for plan, kind in _plans(layout, device):
            g = plan.geometry[0]
            limit = 256 if "Tile" in plan.instance.name else 512
            assert 32 <= plan.threads <= limit
            assert plan.threads % 32 == 0
            assert 1 <= plan.blocks < 2**31
            assert plan.shared_bytes <= device.shared_bytes
            width = int((re.search(r", (\d+)[,>]", plan.instance.name) or [0, 1])[1])
            if kind == "part":
                assert _covered(g, plan.instance.name, width) == int(np.prod(layout.shape))


def _covered(g, name: str, width: int) -> int:
    """Elements that the parts of a plan visit: every part has some, and the last one ends with the unit."""
    whole = int(g["A"] * g["B"]) if "Tile" in name else int(g["A"] * g["U"] * g["B"]) // width
    parts, size = int(g["parts"]), int(g["size"])
    assert (parts - 1) * size < whole <= parts * size
    lasts = [min((part + 1) * size, whole) - part * size for part in range(parts)]
    return (
        int(g["N"] * g["C"]) * sum(lasts) * (1 if "Tile" in name else width) // (1 if "Tile" in name else int(g["U"]))
    )


def test_a_plan_depends_on_nothing_but_layout_and_device():
    layout = Layout("float32", (1, 32, 64, 3136), ((0, 200704, 3136, 1), None, None, None), 16)
    first = _plan.moments(layout, 1, LARGE)
    assert _plan.moments(layout, 1, LARGE) is first, "cached"
    _plan.moments.cache_clear()
    again = _plan.moments(layout, 1, LARGE)
    assert again.plan[:4] == first.plan[:4]
    assert again.plan.geometry.tobytes() == first.plan.geometry.tobytes()


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_packs_are_as_wide_as_address_strides_and_sizes_allow(dtype):
    item = ITEM_BYTES[dtype]
    for alignment in (1, 2, 4, 8, 16):
        for run in (1, 2, 4, 6, 8, 16, 48):
            layout = Layout(dtype, (1, 3, 5, run), ((0, 5 * run, run, 1), None, None, None), max(alignment, item))
            fitting = [w for w in widths(dtype) if run % w == 0 and max(alignment, item) % (w * item) == 0]
            assert _plan.slab_width(layout, 1) == max(fitting)
    gap = Layout(dtype, (1, 3, 5, 16), ((0, 81, 16, 1), None, None, None), 16)
    assert _plan.slab_width(gap, 1) == 1, "runs that begin between packs"
    two = Layout(dtype, (3, 1, 4, 2), ((8, 0, 2, 1), None, None, None), 16)
    assert _plan.slab_width(two, 4) <= 2, "a pack over two channels has two weights"


# -- sources ---------------------------------------------------------------------------------------------------

FOLDER = Path(arraynorm.kernels.cuda.__file__).parent


def test_the_struct_geometry_has_the_fields_of_the_plans_in_their_order():
    code = (FOLDER / "geometry.cuh").read_text()
    struct = re.search(r"struct Geometry \{(.*?)\n\n", code, re.DOTALL)[1]
    fields = [name for line in re.findall(r"(?:int64|Strides) ([\w, ]+);", struct) for name in line.split(", ")]
    assert tuple(fields) == GEOMETRY.names
    assert GEOMETRY.itemsize == 8 * (len(fields) - 4) + 4 * 4 * 8


@pytest.mark.parametrize("file", sorted({one.source for one in instances()}))
def test_a_source_is_whole_and_says_where_each_line_comes_from(file):
    code, found = _loader.source(file), {}
    for line in code.splitlines():
        if marker := re.fullmatch(r'#line (\d+) "([\w.]+)"', line):
            name, number = marker[2], int(marker[1])
            continue
        found.setdefault(name, {})[number] = line
        number += 1
    assert '#include "' not in code
    for name, lines in found.items():
        for number, text in enumerate((FOLDER / name).read_text().splitlines(), 1):
            assert lines.get(number, "") == ("" if text.startswith(('#include "', "#pragma once")) else text)


def test_a_comment_does_not_change_what_the_records_are_about(monkeypatch):
    before = _loader.source_hashes()
    whole = _loader.source.__wrapped__
    for added, same in (("// a remark\n", True), ("int more;\n", False)):
        monkeypatch.setattr(_loader, "source", lambda file, added=added: added + whole(file))
        found = _loader.source_hashes()
        assert all((found[file] == before[file]) == same for file in before)


def test_kernel_files_are_short():
    for file in [*FOLDER.glob("*.cu"), *FOLDER.glob("*.cuh"), *FOLDER.glob("*.py")]:
        assert len(file.read_text().splitlines()) <= 400, file.name
