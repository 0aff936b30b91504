"""What the tests of synchronized layers share: shards of one batch on simulated ranks, against one process.

The layer of one process on the concatenated batch is the reference throughout; what is right about that one stands in
layers/test_batch_norm_layers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed.threads import run_ranks
from layer_cases import SETTINGS, assert_close, backward, draw, filled

TIMEOUT = 10.0  # seconds, for a rank that waits in vain
SHAPE = (14, 3, 5)


class Kind(NamedTuple):
    """A class that synchronizes, and what it is in one process."""

    synchronized: Any
    single: Any

    def on(self, comm: Any, **options: Any) -> Any:
        """A filled layer that synchronizes."""
        return filled(self.synchronized(3, comm=comm, **{**SETTINGS, **options}))

    def alone(self, **options: Any) -> Any:
        """A filled layer of one process."""
        return filled(self.single(3, **{**SETTINGS, **options}))


SYNC = Kind(an.SyncBatchNorm, an.BatchNorm)
FUSED = Kind(an.FusedBatchNorm, an.FusedBatchNorm)
LAYERS = pytest.mark.parametrize("kind", [SYNC, FUSED], ids=["SyncBatchNorm", "FusedBatchNorm"])


def on_ranks(number: int, function: Callable[[Any], Any], **options: Any) -> list[Any]:
    return run_ranks(number, function, timeout=TIMEOUT, **options)


def shards(array: Any, counts: Sequence[int]) -> list[Any]:
    return np.split(array, np.cumsum(counts)[:-1])


class Trained(NamedTuple):
    """A layer after its steps, with what the last one gave."""

    y: Any
    dx: Any
    layer: Any


def trained(layer: Any, xs: Sequence[Any], dys: Sequence[Any]) -> Trained:
    for x, dy in zip(xs, dys, strict=True):
        y, dx = layer(x), backward(layer, dy)
    return Trained(y, dx, layer)


def train(
    kind: Kind, counts: Sequence[int], *, shape: tuple[int, ...] = SHAPE, steps: int = 1, **options: Any
) -> tuple[list[Trained], Trained]:
    """Every rank's layer, each trained on its shards, and one layer trained on all of it, in float64."""
    xs, dys = ([draw(*shape, seed=seed, dtype="float64") for seed in range(i, i + steps)] for i in (0, 100))

    def rank(comm: Any) -> Trained:
        layer = kind.on(comm, **options)
        return trained(layer, *([shards(array, counts)[comm.rank] for array in arrays] for arrays in (xs, dys)))

    return on_ranks(len(counts), rank), trained(kind.alone(**options), xs, dys)


def assert_equal_to_one_process(ranks: list[Trained], single: Trained) -> None:
    assert_close(np.concatenate([rank.y for rank in ranks]), single.y)
    assert_close(np.concatenate([rank.dx for rank in ranks]), single.dx)
