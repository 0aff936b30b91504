"""Every instance in the emulator, under several schedules: `make cuda-check`."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

import arraynorm as an
from arraynorm.kernels import only
from arraynorm.kernels.cuda._instances import C_TYPES, QUANTIZED_C_TYPES, instances
from cuda.emulated import LARGE, SMALL, arguments, dry, emulated, module_of
from cuda.examples import DEVICES, Run, aligned, every_width
from cuda.test_kernels import quantized
from namespaces import NUMPY
from norms import Example, backward, draw, draw_dy, forward, to_library
from tolerances import check

pytestmark = pytest.mark.cuda_check

SCHEDULES = [(0, 1), (1, 3), (11, 5)]
EACH_RUN = [(dtype, run) for dtype in C_TYPES for run in every_width(dtype)]


@pytest.mark.parametrize(("dtype", "run"), EACH_RUN, ids=str)
def test_an_instance_is_right_under_every_schedule(dtype, run: Run):
    arrays, dy = run.arrays(dtype)
    for seed, resident in SCHEDULES:
        with emulated(DEVICES[run.device], seed=seed, resident=resident):
            check(run.example, arrays, dy)


@pytest.mark.parametrize("dtype", C_TYPES)
def test_every_instance_is_run(dtype):
    launched = set()
    for run in every_width(dtype):
        with dry(DEVICES[run.device]) as names:
            arrays, dy = run.arrays(dtype)
            _, cache = forward(run.example, arrays)
            backward(run.example, dy, cache)
        launched |= set(names)
    assert launched == {one for one in instances() if arguments(one)[0] in (C_TYPES[dtype], "")}


@pytest.mark.parametrize("dtype", QUANTIZED_C_TYPES)
@pytest.mark.parametrize("to", [16, 8, 1])
@pytest.mark.parametrize("shape", [(3, 4, 48), (19, 48), (3, 48, 5)], ids=str)
def test_every_quantized_instance_is_right(dtype, to, shape):
    for relu in (False, True):
        (xq, *given), options, function = quantized(dtype, shape, relu)
        expected = function(xq, *given, **options)
        with emulated(SMALL) as launched:
            actual = function(aligned(xq, to), *given, **options)
        np.testing.assert_array_equal(actual, expected)
        width = 1 if shape[-1] == 5 else to
        assert [arguments(one)[1] for one in launched] == [str(width)]


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 1023, 1025])
@pytest.mark.parametrize("c", [1, 2, 33])
def test_sizes_next_to_tiles_and_teams_are_right(n, c):
    examples = [
        *(Example(op, (c, n), {"normalized_shape": (n,)}) for op in ("layer_norm", "rms_norm")),
        Example("group_norm", (2, c, n), {"num_groups": 1}),
        *(Example(op, shape) for op in ("batch_norm", "batch_norm_add_relu") for shape in ((n + 1, c), (2, c, n))),
    ]
    for example in examples:
        with emulated(SMALL, seed=1, resident=3):
            check(example, to_library(NUMPY, draw(example), "float32"), NUMPY.asarray(draw_dy(example), "float32"))


EXTREMES = [
    *(Example(op, (2, 1_000_003), {"normalized_shape": (1_000_003,)}) for op in ("layer_norm", "rms_norm")),
    *(Example("batch_norm", shape) for shape in ((3, 8192), (2, 8192, 1), (2, 1, 1_000_003))),
    Example("batch_norm_add_relu", (3, 8192)),
    Example("group_norm", (2, 8192, 3), {"num_groups": 32}),
    Example("instance_norm", (2, 8192, 3)),
]


@pytest.mark.parametrize("example", EXTREMES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_the_longest_rows_and_the_most_channels_are_right(example, device):
    with emulated(DEVICES[device]):
        check(example, to_library(NUMPY, draw(example), "float32"), NUMPY.asarray(draw_dy(example), "float32"))


def _far_apart(shape: tuple[int, ...], stride: int) -> np.ndarray:
    """A float32 view whose rows are `stride` elements apart, in memory of which only the rows are ever touched."""
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python names from 3.13 on
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 4 * stride * shape[0], flags=flags)
    inner = np.cumprod([1, *shape[:0:-1]])[::-1]
    strides = (4 * stride, *(4 * int(step) for step in inner[1:]))
    return np.ndarray(shape, np.float32, buffer=memory, strides=strides)


@pytest.mark.parametrize(
    "example",
    [
        Example("batch_norm", (3, 2, 64)),
        Example("batch_norm_add_relu", (3, 2, 64)),
        Example("batch_norm", (3, 8)),
        Example("group_norm", (3, 4, 16), {"num_groups": 2}),
        Example("layer_norm", (3, 64), {"normalized_shape": (64,)}),
    ],
    ids=str,
)
def test_offsets_beyond_32_bits_are_right(example: Example):
    """Elements 2^31 and more apart, and bytes beyond 2^32."""
    arrays, dy = to_library(NUMPY, draw(example), "float32"), NUMPY.asarray(draw_dy(example), "float32")
    with only("reference"):
        near_y, near_cache = forward(example, arrays)
        near = backward(example, dy, near_cache)
    far = {name: _far_apart(example.shape, 2**31 + 64) for name in ("x", "dy", "y", "dx")}
    far["x"][...], far["dy"][...] = arrays["x"], dy
    with emulated(LARGE):
        y, cache = forward(example, arrays | {"x": far["x"]}, out=far["y"])
        gradients = backward(example, far["dy"], cache, out=far["dx"])
    for actual, expected in ((y, near_y), (gradients.dx, near.dx), (gradients.dweight, near.dweight)):
        np.testing.assert_allclose(actual, expected, rtol=2e-7, atol=1e-7)  # an ulp of float32


def test_mask_of_more_elements_than_a_grid_has_threads():
    """Grid strides: a device of one processor takes its blocks many times."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 5, 4099), dtype=np.float32)
    with only("reference"):
        expected, theirs = an.batch_norm_add_relu_forward(x)
    with emulated(SMALL._replace(processors=1)):
        y, ours = an.batch_norm_add_relu_forward(x)
    np.testing.assert_allclose(y, expected, rtol=2e-7)
    assert ours.mask.tobytes() == theirs.mask.tobytes()


def test_all_instances_compile_with_g_plus_plus():
    for one in instances():
        assert module_of(one).kernel(one.name).signature
