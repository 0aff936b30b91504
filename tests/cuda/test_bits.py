"""The same bits: from schedule to schedule, from fused kernels and their parts, and exact where the CPU is exact."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import arraynorm as an
from arraynorm.testing import run_ranks
from cuda.emulated import LARGE, SMALL, emulated
from cuda.examples import RUNS, Run
from data import CONSTANTS, hard, limits, spread
from namespaces import NUMPY
from norms import Example, backward, draw, draw_dy, exact, forward, to_library
from tolerances import check

SCHEDULES = [(0, 1), (1, 3), (5, 2), (9, 7)]


def results(run: Run, dtype: str) -> list[bytes | None]:
    arrays, dy = run.arrays(dtype)
    y, cache = forward(run.example, arrays)
    found = (
        y,
        *backward(run.example, dy, cache),
        *(getattr(cache, name, None) for name in ("mean", "var", "rstd", "mask")),
    )
    return [None if array is None else array.tobytes() for array in found]


CUT = [run for run in RUNS["float32"]("float32") if run.device == "small"]


@pytest.mark.parametrize("run", CUT, ids=str)
def test_every_schedule_gives_the_same_bits(run: Run):
    """Which block comes last, and which thread first, does not matter."""
    wanted = None
    for seed, resident in SCHEDULES:
        with emulated(SMALL, seed=seed, resident=resident):
            found = results(run, "float32")
        wanted = found if wanted is None else wanted
        assert found == wanted


SYNCHRONIZED = [(4, 3, 16), (2, 3, 8192), (1, 2, 8192), (40, 16)]


@pytest.mark.parametrize("shape", SYNCHRONIZED, ids=str)
@pytest.mark.parametrize("device", [SMALL, LARGE], ids=["small", "large"])
def test_batch_norm_over_one_rank_has_the_bits_of_batch_norm(shape, device):
    """The fused kernels and stats, merge, apply; reduce, sum, apply."""
    example = Example("batch_norm", shape)
    arrays, dy = to_library(NUMPY, draw(example), "float32"), NUMPY.asarray(draw_dy(example), "float32")

    def both(comm):
        y, cache = forward(example, arrays, **({} if comm is None else {"comm": comm}))
        return [a.tobytes() for a in (y, cache.mean, cache.var, cache.rstd, *backward(example, dy, cache))]

    with emulated(device) as launched:
        alone = both(None)
        fused = len(launched)
        assert run_ranks(1, both) == [alone]
    assert len(launched) - fused >= 4, "stats, apply, reduce, apply"


@pytest.mark.parametrize("op", ["batch_norm", "layer_norm", "instance_norm", "group_norm"])
@pytest.mark.parametrize("value", CONSTANTS.values(), ids=CONSTANTS)
@pytest.mark.parametrize("n", [31, 8192])
def test_a_constant_set_gives_exactly_the_bias(op, value, n):
    options = {"layer_norm": {"normalized_shape": (n,)}, "group_norm": {"num_groups": 1}}.get(op, {})
    shape = (3, n) if op == "layer_norm" else (2, 1, n)
    given = to_library(NUMPY, {"x": np.full(shape, value)}, "float32")
    for device, eps in itertools.product((SMALL, LARGE), (1e-5, 0.0)):
        with emulated(device):
            y = getattr(an, op)(**given, **options, eps=eps)
        assert not y.any()


HARD = ["mean/std 1e6", "40000..40003", "subnormal", "an outlier of 1e30", "an outlier of 1e30 first"]
HARD_EXAMPLES = [
    Example("batch_norm", (3, 5, 11)),
    Example("batch_norm_add_relu", (33, 7)),
    Example("instance_norm", (2, 3, 31)),
    Example("group_norm", (2, 6, 11), {"num_groups": 2}),
    Example("layer_norm", (5, 33), {"normalized_shape": (33,)}),
    Example("rms_norm", (5, 33), {"normalized_shape": (33,)}),
]


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("example", HARD_EXAMPLES, ids=lambda example: example.op)
def test_hard_data_is_right_to_rounding(dtype, name, example: Example):
    """Subnormal numbers too: the kernels convert them by hand, since CuPy compiles with -ftz=true."""
    if not np.isfinite(hard(name, dtype, 2, 4)).all():
        pytest.skip(f"{dtype} cannot hold {name}")
    arrays = draw(example)
    sets = exact(example, arrays).sets
    arrays["x"] = spread(hard(name, dtype, *sets.shape), sets, example.shape)
    with emulated(SMALL):
        check(example, to_library(NUMPY, arrays, dtype), NUMPY.asarray(draw_dy(example), dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_number_of_a_dtype_passes_unchanged(dtype):
    """Given statistics 0 and 1: y is x, for subnormal numbers and infinities as for all others."""
    x = np.arange(1 << 16, dtype=np.uint16)
    x = (
        (x.astype(np.uint32) << 16 | 0x8001 * (x & 1)).view(np.float32)
        if dtype == "float32"
        else x.view(NUMPY.dtype(dtype))
    )
    with np.errstate(invalid="ignore"):  # signaling NaNs, which are left out
        x = x[~np.isnan(x.astype(np.float64))].reshape(1, 1, -1)
    with emulated(LARGE):
        y = an.batch_norm_frozen(x, np.zeros(1), np.ones(1), eps=0.0)
    assert y.tobytes() == np.where(x == 0, abs(x), x).astype(x.dtype).tobytes()  # -0 - 0 * 1 + 0 is 0
    assert (np.abs(x[x != 0]) < float(limits(dtype).smallest_normal)).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("example", HARD_EXAMPLES, ids=lambda example: example.op)
def test_a_nan_or_infinity_hurts_its_own_set_alone(example: Example, value):
    arrays, dy = draw(example), NUMPY.asarray(draw_dy(example), "float64")
    sets = exact(example, arrays).sets
    hurt = arrays["x"].copy()
    hurt.reshape(-1)[sets[1, 3]] = value
    found = []
    for x in (arrays["x"], hurt):
        with emulated(SMALL):
            y, cache = forward(example, arrays | {"x": x})
            found.append([a.reshape(-1)[sets] for a in (y, backward(example, dy, cache).dx)])
    (y, dx), (hurt_y, hurt_dx) = found
    others = np.arange(len(sets)) != 1
    np.testing.assert_array_equal(hurt_y[others], y[others])
    np.testing.assert_array_equal(hurt_dx[others], dx[others])
    assert np.isnan(hurt_dx[1]).all()
    if np.isinf(value) and example.op == "rms_norm":
        np.testing.assert_array_equal(np.isnan(hurt_y[1]), np.arange(sets.shape[1]) == 3)
    else:
        assert np.isnan(hurt_y[1]).all()


@pytest.mark.parametrize("op", ["batch_norm", "layer_norm"])
def test_outputs_may_be_the_inputs(op):
    """`out=x` without a cache, `out=dy` in the backward: each element is read before it is written."""
    for device, shape in itertools.product((SMALL, LARGE), [(3, 2, 8192), (40, 16)]):
        options = {"normalized_shape": shape[1:]} if op == "layer_norm" else {}
        x, dy = np.random.default_rng(0).standard_normal((2, *shape), dtype=np.float32)
        with emulated(device, seed=1, resident=3):
            y, cache = getattr(an, f"{op}_forward")(x, **options)
            dx = getattr(an, f"{op}_backward")(dy, cache).dx
            assert getattr(an, f"{op}_backward")(dy, cache, out=dy).dx is dy
            assert dy.tobytes() == dx.tobytes()
            assert getattr(an, op)(x, **options, out=x) is x
            assert x.tobytes() == y.tobytes()


def test_a_forward_here_and_a_backward_there_agree():
    """The cache holds arrays alone: either path takes what the other has left."""
    for op in ("batch_norm", "batch_norm_add_relu", "instance_norm"):
        example = Example(op, (3, 5, 31))
        arrays, dy = to_library(NUMPY, draw(example), "float64"), NUMPY.asarray(draw_dy(example), "float64")
        with emulated(SMALL):
            _, theirs = forward(example, arrays)
            crossed = backward(example, dy, forward(example, arrays)[1])
        _, ours = forward(example, arrays)
        wanted = backward(example, dy, ours)
        if op == "batch_norm_add_relu":
            assert theirs.mask.tobytes() == ours.mask.tobytes()
        for mixed in (crossed, backward(example, dy, theirs)):
            for actual, expected in zip(mixed, wanted, strict=True):
                np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)  # float64 sums in other orders
