"""Timing competitors against each other: in one process, in turns, in a new order every turn."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Call = Callable[[], Any]

SAMPLE = 200e-6  # seconds: a shorter call is repeated within its sample, far above the clock's 50 ns
# Seconds of untimed calls before a sample. A thread of libgomp, which torch and numba use, spins through 300000 pauses
# before it sleeps: 1 ms on an EPYC, 4 to 7 ms on a Xeon, whose pauses are longer. Until then it holds the core that a
# call on two threads would have: with 2 ms, calls that came after another library's took up to 1.8 times as long there.
SETTLE = 10e-3
# And calls at least: a last-level cache that can hold what a call reads holds it after some of them only. On a Xeon,
# batch norm of 33 MB took 5.3 ms after an array of 400 MB had been written, and then 4.9, 4.2, 3.7, 3.3, 3.2 and 3.2.
SETTLE_CALLS = 6
LONG = 200e-3  # seconds: a call of that length is not disturbed by what was before, and has no untimed calls
LEAST_TURNS = 5
MOST_TURNS = 101


class Quartiles(NamedTuple):
    q1: float
    median: float
    q3: float


class Times:
    """Seconds per call of every competitor in every turn; nan in turns that a slow one sat out."""

    def __init__(self, subject: str, seconds: Mapping[str, Sequence[float]], repeats: Mapping[str, int]) -> None:
        self.subject = subject
        self.seconds = seconds
        self.repeats = repeats

    def summary(self) -> dict[str, dict[str, float]]:
        """Name -> quartiles, turns and calls per turn."""
        return {
            name: quartiles(taken)._asdict() | {"turns": len(_present(taken)), "repeats": self.repeats[name]}
            for name, taken in self.seconds.items()
        }

    def ratio(self, name: str) -> Quartiles:
        """How many times as long as the subject: the quartiles of the ratios within a turn.

        What slows the machine down for a while slows both, so these are steadier than ratios of medians.
        """
        subject = self.seconds[self.subject]
        return quartiles([theirs / ours for theirs, ours in zip(self.seconds[name], subject, strict=True)])


def quartiles(values: Sequence[float]) -> Quartiles:
    present = _present(values)
    if len(present) == 1:
        return Quartiles(*present * 3)
    return Quartiles(*statistics.quantiles(present, n=4, method="inclusive"))


def interleave(
    calls: Mapping[str, Call], subject: str, *, budget: float, least: int = LEAST_TURNS, seed: int = 0
) -> Times:
    """Time all calls in about `budget` seconds, an equal share for each; a slow one sits out most turns.

    The subject takes part in every turn. Each call is warmed up before the first turn and, unless it is long, before
    each sample: so it is timed with the caches and the memory as its own last calls left them, and after threads that
    another competitor's library keeps spinning have gone to sleep. One call alone follows nothing but itself.
    """
    share = budget / len(calls)
    estimates = {name: _estimate(call, share) for name, call in calls.items()}
    repeats = {name: max(1, math.ceil(SAMPLE / estimate)) for name, estimate in estimates.items()}
    turns = {name: _turns(estimates[name], repeats[name], share, least) for name in calls}
    total = turns[subject]
    seconds: dict[str, list[float]] = {name: [math.nan] * total for name in calls}
    order = random.Random(seed)
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(total):
            due = [name for name in calls if _takes_part(turn, min(turns[name], total), total)]
            for name in order.sample(due, len(due)):
                if len(calls) > 1 and estimates[name] < LONG:
                    _settle(calls[name])
                seconds[name][turn] = _sample(calls[name], repeats[name])
    finally:
        if enabled:
            gc.enable()
    return Times(subject, seconds, repeats)


def _estimate(call: Call, share: float) -> float:
    """Seconds of one call: the least of a few, after a first one that may compile, start threads or map memory."""
    call()
    taken = [_sample(call, 1)]
    while len(taken) < 5 and sum(taken) < share / 10:
        taken.append(_sample(call, 1))
    return max(min(taken), 1e-7)


def _turns(estimate: float, repeats: int, share: float, least: int) -> int:
    """How many samples, and the untimed calls before them, fit into the share."""
    untimed = max(SETTLE_CALLS * estimate, SETTLE) if estimate < LONG else 0
    return min(MOST_TURNS, max(least, int(share / (estimate * repeats + untimed))))


def _takes_part(turn: int, turns: int, total: int) -> bool:
    """Whether one of `turns` evenly spread turns is this one."""
    return turn * turns // total < (turn + 1) * turns // total


def _settle(call: Call) -> None:
    end = time.perf_counter() + SETTLE
    calls = 0
    while calls < SETTLE_CALLS or time.perf_counter() < end:
        call()
        calls += 1


def _sample(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _present(values: Sequence[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]
