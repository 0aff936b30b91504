"""Bytes per second over all shapes: nowhere should they break down.

Each class holds about the same number of elements in all shapes (N, C, S) that batch 1..4096, channels 1..8192 and
spatial size 1..1e6 allow, in steps of 4: so bytes per second should be about equal, whichever dimension is the large
one. Every shape has a twin of odd sizes, one less in each dimension that is more than 2. Left out are shapes whose
statistics have one value each. Layer and RMS norm: rows of 4 to 1e6 elements.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import arraynorm as an
from bandwidth import Copy
from timing import interleave

CLASSES = (1 << 18, 1 << 22, 1 << 25)  # 1 MB; 16 MB, about a last-level cache; 128 MB
BATCHES = tuple(4**i for i in range(7))
CHANNELS = (1, 2, *(2 * 4**i for i in range(1, 7)))
MOST_SPATIAL = 1 << 20
CLIFF = 2.0
GROUPS = 8  # or the largest divisor of it that divides the channels
SHORT = 512  # elements of a set or of a run that its fixed cost, some 30 to 150 ns, weighs on

_PLANES, _ROWS = ("batch_norm", "instance_norm", "group_norm"), ("layer_norm", "rms_norm")
_OPS = ("forward", "backward")


class Point(NamedTuple):
    norm: str
    op: str
    elements: int
    place: tuple[int, int, bool]
    """Steps of batch and of channels, and whether it is the odd twin."""
    shape: tuple[int, int, int]

    @property
    def bytes(self) -> int:
        """Those of x and y; or of dy, x and dx."""
        return math.prod(self.shape) * 4 * (2 if self.op == "forward" else 3)

    @property
    def sets(self) -> int:
        """How many means there are."""
        n, c, _ = self.shape
        groups = {"batch_norm": c, "instance_norm": n * c, "group_norm": n * math.gcd(GROUPS, c)}
        return groups.get(self.norm, n)


def measure(options: argparse.Namespace, copy: Copy) -> dict[str, Any]:
    classes = (1 << 10,) if options.shrink else CLASSES
    points = [point for point in _points(classes) if options.only in f"{point.norm} {point.op}"]
    arrays = _Arrays(max(classes))
    records, cliffs = [], []
    for threads in options.threads:
        an.set_num_threads(threads)
        rates = {}
        for point in points:
            rates[point] = _rates({"it": point}, arrays, options.budget / 40)["it"]
            records.append(point._asdict() | {"shape": list(point.shape), "threads": threads, "GB/s": rates[point]})
        print(f"{threads} threads: {len(points)} points", flush=True)
        for cliff in _confirmed(rates, arrays, options.budget / 4):
            cliffs.append(cliff | {"threads": threads})
            print(cliffs[-1], flush=True)
    rates = {}
    for threads in options.threads:
        times = interleave({"copy": partial(copy, threads)}, "copy", budget=options.budget)
        rates[threads] = copy.moved / times.summary()["copy"]["median"] / 1e9
    return {"points": records, "cliffs": cliffs, "copy GB/s": rates}


def _points(classes: tuple[int, ...]) -> Iterator[Point]:
    for elements, (i, batch), (j, channels) in itertools.product(classes, enumerate(BATCHES), enumerate(CHANNELS)):
        spatial = elements // (batch * channels)
        if not 1 <= spatial <= MOST_SPATIAL:
            continue
        for odd in (False, True):
            shape = tuple(size - 1 if odd and size > 2 else size for size in (batch, channels, spatial))
            for norm, op in itertools.product(("batch_norm", "instance_norm", "group_norm"), ("forward", "backward")):
                per_statistic = {"batch_norm": shape[0] * shape[2], "instance_norm": shape[2]}.get(
                    norm, shape[1] * shape[2]
                )
                if per_statistic > 1:
                    yield Point(norm, op, elements, (i, j, odd), shape)
    for elements in classes:
        for j in range(1, 11):
            for odd in (False, True):
                row = 4**j - odd
                shape = (max(1, elements // 4**j - odd), row, 1)
                if 4**j <= elements:
                    for norm, op in itertools.product(("layer_norm", "rms_norm"), ("forward", "backward")):
                        yield Point(norm, op, elements, (0, j, odd), shape)


class _Arrays:
    """Random memory that all points look at."""

    def __init__(self, elements: int) -> None:
        rng = np.random.default_rng(0)
        self.x, self.dy = (rng.standard_normal(elements, np.float32) for _ in range(2))
        self.out = np.zeros(elements, np.float32)
        self.weight, self.bias = (
            rng.uniform(0.5, 1.5, MOST_SPATIAL).astype(np.float32),
            np.zeros(MOST_SPATIAL, np.float32),
        )

    def call(self, point: Point) -> Callable[[], object]:
        shape = point.shape[:2] if point.norm in _ROWS else point.shape
        x, dy, out = (a[: math.prod(shape)].reshape(shape) for a in (self.x, self.dy, self.out))
        given: tuple[Any, ...] = (self.weight[: shape[1]], self.bias[: shape[1]])
        if point.norm == "layer_norm":
            given = (shape[1], *given)
        elif point.norm == "rms_norm":
            given = (shape[1], given[0])
        elif point.norm == "group_norm":
            given = (math.gcd(GROUPS, shape[1]), *given)
        forward, backward = (getattr(an, f"{point.norm}_{op}") for op in ("forward", "backward"))
        if point.op == "forward":
            return lambda: forward(x, *given, out=out)
        cache = forward(x, *given)[1]
        return lambda: backward(dy, cache, out=out)


def _rates(points: dict[str, Point], arrays: _Arrays, budget: float) -> dict[str, float]:
    """GB/s."""
    times = interleave({name: arrays.call(point) for name, point in points.items()}, next(iter(points)), budget=budget)
    found = times.summary()
    return {name: point.bytes / found[name]["median"] / 1e9 for name, point in points.items()}


def _confirmed(rates: dict[Point, float], arrays: _Arrays, budget: float) -> Iterator[dict[str, Any]]:
    """Points that are less than half as fast as a neighbour, and still are when timed in turns with it."""
    at = {(point.norm, point.op, point.elements, point.place): point for point in rates}
    for point in rates:
        near = (at.get((*point[:3], place)) for place in _neighbours(point.place))
        faster = max((other for other in near if other), key=rates.__getitem__, default=point)
        if rates[faster] < CLIFF * rates[point]:
            continue
        again = _rates({"it": point, "neighbour": faster}, arrays, budget)
        times = again["neighbour"] / again["it"]
        if times >= CLIFF:
            yield {
                "reason": _reason(point, point.bytes / again["it"]),
                "norm": point.norm,
                "op": point.op,
                "shape": list(point.shape),
                "GB/s": again["it"],
                "neighbour": list(faster.shape),
                "neighbour GB/s": again["neighbour"],
                "times": times,
            }


def _reason(point: Point, nanoseconds: float) -> str:
    """Why a point is slow, where that can't be helped: what has a fixed cost is short in it."""
    size, run = math.prod(point.shape) // point.sets, point.shape[2]
    if size < SHORT:
        return f"sets of {size}: {nanoseconds / point.sets:.0f} ns for each, most of it for its statistics"
    if point.norm not in _ROWS and run < SHORT:
        runs = math.prod(point.shape) // run
        return f"runs of {run}: {nanoseconds / runs:.0f} ns for each"
    if point.norm in _ROWS and (rows := point.shape[0]) <= 4:
        of_x = "as large as x" if rows == 1 else f"a {('half', 'third', 'quarter')[rows - 2]} of x"
        return f"parameters {of_x} are read and checked; backward, their gradients are summed in double"
    return ""


def _neighbours(place: tuple[int, int, bool]) -> Iterator[tuple[int, int, bool]]:
    """One step of batch or channels against spatial size, or against each other; and the odd twin."""
    i, j, odd = place
    for step in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, -1), (-1, 1)):
        yield i + step[0], j + step[1], odd
    yield i, j, not odd
