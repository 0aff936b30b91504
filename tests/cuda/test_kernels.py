"""The CUDA kernels in the emulator, held to the tolerances of the whole suite: one width to a dtype, one schedule."""

from __future__ import annotations

import numpy as np
import pytest

import arraynorm as an
from arraynorm.kernels.cuda._instances import C_TYPES, instances, widths
from cuda.emulated import SMALL, arguments, dry, emulated
from cuda.examples import DEVICES, RUNS, Run, packed
from norms import backward, forward
from tolerances import check

EACH_RUN = [(dtype, run) for dtype, runs in RUNS.items() for run in runs(dtype)]


@pytest.mark.parametrize(("dtype", "run"), EACH_RUN, ids=str)
def test_a_kernel_is_right_to_rounding(dtype, run: Run):
    with emulated(DEVICES[run.device], seed=1, resident=3):
        check(run.example, *run.arrays(dtype))


@pytest.mark.parametrize("dtype", RUNS)
def test_every_template_is_run_in_each_dtype(dtype):
    """With the width of its runs, and both flags where it has one; nothing else, which would have to be compiled."""
    launched = set()
    for run in RUNS[dtype](dtype):
        with dry(DEVICES[run.device]) as names:
            arrays, dy = run.arrays(dtype)
            _, cache = forward(run.example, arrays)
            backward(run.example, dy, cache)
        launched |= set(names)
    width = widths(dtype)[0] if RUNS[dtype] is packed else 1
    kinds = [(C_TYPES[dtype], str(width)), (C_TYPES[dtype],), ("",)]
    assert launched == {one for one in instances() if arguments(one) in kinds}


def quantized(dtype: str, shape: tuple[int, ...], relu: bool):
    """Arguments, options and function of a quantized norm."""
    rng = np.random.default_rng(0)
    limits = np.iinfo(dtype)
    xq = rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    parameters = rng.uniform(0.5, 2, (4, shape[1])).astype(np.float32)
    options = {"x_scale": 0.05, "x_zero_point": 3, "y_scale": 0.02, "y_zero_point": 7}
    return (xq, *parameters), options, an.quantized_batch_norm_relu if relu else an.quantized_batch_norm


QUANTIZED = [("uint8", (3, 4, 32)), ("int8", (19, 32)), ("uint8", (19, 7)), ("int8", (3, 5, 31))]


@pytest.mark.parametrize(("dtype", "shape"), QUANTIZED, ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_quantized_levels_are_those_of_the_reference(dtype, shape, relu):
    given, options, function = quantized(dtype, shape, relu)
    expected = function(*given, **options)
    with emulated(SMALL):
        actual = function(*given, **options)
    assert actual.dtype == given[0].dtype
    np.testing.assert_array_equal(actual, expected)
