"""The sweep over numbers of ranks: a batch cut at random, trained on by all ranks together and by one process.

Simulated ranks (distributed/test_sweep.py) and those of mpiexec (mpi/test_sweep.py) run the same cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from layer_cases import BUFFERS, backward
from mpi.shards import (
    assert_close,
    assert_neighbours,
    assert_within_an_ulp,
    held_alike_bits,
    shard,
    sizes_before_cancellation,
)
from sync_cases import FUSED, SYNC, Kind

EXACT = 1e-12  # float64 on well-conditioned data, where the two differ in the order of some sums
EPS64 = 2.0**-52
ROUNDINGS = 12  # of half an eps each, which partly cancel: those of tests/tolerances.py, on both sides
STEPS = 2  # of up to MANY ranks; beyond, one
MANY = 16
THRESHOLDS = {"gathered": 1024, "summed": 1}
"""max_gathered_ranks: both ways of merging, on any number of ranks."""

LAYOUTS = {"1d": (5,), "2d": (2, 3), "3d": (2, 1, 3)}  # spatial axes
DTYPES = ("float16", "float32", "float64")
KINDS = {"plain": SYNC, "fused": FUSED}


class Case(NamedTuple):
    """One cell of the sweep."""

    kind: str
    layout: str
    dtype: str
    path: str

    def __str__(self) -> str:
        return "-".join(self)


CASES = [
    Case(kind, layout, dtype, path) for kind in KINDS for layout in LAYOUTS for dtype in DTYPES for path in THRESHOLDS
]


def cut(ranks: int, seed: int) -> list[int]:
    """Samples on each rank, drawn; on one of them none and on another, from three ranks on, a single one."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(2, 7, ranks)
    if ranks > 1:
        empty, single = rng.permutation(ranks)[:2]
        counts[empty] = 0
        counts[single] = 1 if ranks > 2 else counts[single]
    return [int(count) for count in counts]


class Batch(NamedTuple):
    """The samples of all ranks, for every step, and how they lie on the ranks."""

    counts: list[int]
    xs: list[Any]
    dys: list[Any]

    def condition(self) -> float:
        """The greatest |mean| / std of a channel in a step."""
        channels = [np.moveaxis(x, 1, -1).reshape(-1, x.shape[1]) for x in self.xs]
        return max(float(np.max(abs(x.mean(axis=0)) / x.std(axis=0))) for x in channels)


def batch(ranks: int, case: Case, *, mean: float = 3.0, std: float = 2.0, apart: float = 0.0) -> Batch:
    """Normal values; the mean of each rank is `apart` deviations from that of the one before."""
    counts = cut(ranks, seed=ranks)
    rng = np.random.default_rng(ranks)
    shape = (sum(counts), 3, *LAYOUTS[case.layout])
    offsets = np.repeat(apart * np.arange(ranks), counts).reshape(-1, *[1] * (len(shape) - 1))
    steps = STEPS if ranks <= MANY else 1
    xs = [(mean + std * (offsets + rng.standard_normal(shape))).astype(case.dtype) for _ in range(steps)]
    return Batch(counts, xs, [rng.standard_normal(shape).astype(case.dtype) for _ in range(steps)])


class Held(NamedTuple):
    """What a rank has after its steps."""

    y: Any
    dx: Any
    gradients: dict[str, Any]
    buffers: dict[str, Any]
    sizes: tuple[Any, Any]  # of y and of dx before cancellation


def on_rank(case: Case, data: Batch, comm: Any) -> Held:
    """The steps of one rank of `comm`."""
    kind = KINDS[case.kind]
    xs, dys = ([shard(array, data.counts, comm.rank) for array in arrays] for arrays in (data.xs, data.dys))
    return _trained(kind.on(comm, dtype=_parameters(case)), xs, dys)


def in_one_process(case: Case, data: Batch) -> Held:
    kind: Kind = KINDS[case.kind]
    return _trained(kind.alone(dtype=_parameters(case)), data.xs, data.dys)


def _parameters(case: Case) -> Any:
    return np.float64 if case.dtype == "float64" else np.float32


def _trained(layer: Any, xs: Sequence[Any], dys: Sequence[Any]) -> Held:
    for x, dy in zip(xs, dys, strict=True):
        y, dx = layer(x), backward(layer, dy)
    sizes = sizes_before_cancellation(layer, x, dy) if len(x) else (0, 0)
    return Held(y, dx, dict(layer.grads), {name: getattr(layer, name) for name in BUFFERS}, sizes)


def assert_one_batch(case: Case, ranks: Sequence[Held], whole: Held, *, condition: float = 0.0) -> None:
    """The ranks hold together what the one process holds.

    float64 is good to 1e-12, or, if the data has a `condition` |mean| / std, to the roundings that this magnifies;
    narrower dtypes are the same to an ulp before cancellation, and buffers, which are rounded once from float64, are
    the same number or the next.
    """
    assert held_alike_bits([list(rank.buffers.values()) for rank in ranks])
    y, dx = (np.concatenate(arrays) for arrays in zip(*((rank.y, rank.dx) for rank in ranks), strict=True))
    running = [(ranks[0].buffers[name], whole.buffers[name], None) for name in BUFFERS[:2]]
    pairs = [(y, whole.y, whole.sizes[0]), (dx, whole.dx, whole.sizes[1]), *running]
    bound = max(EXACT, ROUNDINGS * EPS64 * (1 + condition) * _PEAK) if condition else EXACT
    for value, reference, size in pairs:
        if case.dtype == "float64":
            assert_close(value, reference, bound)
        elif size is not None:
            assert_within_an_ulp(value, reference, size)
        else:
            assert_neighbours(value, reference)
    assert ranks[0].buffers[BUFFERS[2]] == whole.buffers[BUFFERS[2]]
    for name, gradient in whole.gradients.items():
        parts = np.array([rank.gradients[name] for rank in ranks], np.float64)
        # A rank's gradient is rounded at every step that is added to it, and so is that of the one process.
        rounding = STEPS * np.finfo(gradient.dtype).eps * np.abs(parts).sum(axis=0)
        assert np.all(np.abs(parts.sum(axis=0) - gradient) <= rounding + bound * data_scale(whole))


_PEAK = 5  # no normal value of these batches is further from its mean, in deviations


def data_scale(whole: Held) -> float:
    """The size of a sum over all samples of dy * x_hat, which a relative error of x_hat makes absolute."""
    return float(whole.y.size) * _PEAK
