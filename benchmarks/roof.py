"""The roof over a case: how long its memory traffic alone takes, in a loop that computes nothing.

Where a bar asks for less time than that, no kernel reaches it on this machine. The loop is C, with whatever helps:
prefetching, and stores that bypass the caches where they are the faster ones. Its arrays are as large as the case's, so
they sit in the same caches. What has to be looked at twice, once for the statistics and once for the results, is read
twice as far as the threads' level-2 caches do not hold it.
"""

from __future__ import annotations

import ctypes
import math
import os
import statistics
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import machine
from bandwidth import compiled
from cases import Case

LINE, PAGE = 64, 4096
BUDGET = 0.02  # seconds for each way of storing


class Roof:
    """Measures the traffic of one case after another, in memory of its own."""

    def __init__(self) -> None:
        self._routines, self.reason = compiled()
        self._block = np.ones(0, np.uint8)
        self._workers = ThreadPoolExecutor(os.cpu_count())

    def seconds(self, case: Case, threads: int) -> float | None:
        """The median of the faster way of storing; None without a C compiler."""
        if self._routines is None:
            return None
        ways = (False, True) if self._routines.has_streaming_stores() else (False,)
        return min(self._median(case, threads, streams) for streams in ways)

    def _median(self, case: Case, threads: int, streams: bool) -> float:
        estimate = min(self._run(case, threads, streams, 3))
        return statistics.median(self._run(case, threads, streams, max(3, min(200, int(BUDGET / estimate)))))

    def _run(self, case: Case, threads: int, streams: bool, repeats: int) -> list[float]:
        size = -(-case.nbytes // LINE) * LINE
        looked, again = read_again(case, threads)
        seconds, arrived = (ctypes.c_double * repeats)(), ctypes.c_int(0)
        first = (self._arrays(case.read + case.written, size), case.read, case.written, int(streams), looked)
        sizes = (ctypes.c_size_t(again), ctypes.c_size_t(size))

        def part(number: int) -> None:
            self._routines.traffic(*first, *sizes, number, threads, repeats, seconds, ctypes.byref(arrived))

        others = [self._workers.submit(part, number) for number in range(1, threads)]
        part(0)
        for other in others:
            other.result()
        return list(seconds)

    def _arrays(self, number: int, size: int) -> ctypes.Array[ctypes.c_void_p]:
        """Their addresses: at lines of their own in their pages, for loads wait for stores to the same place in one."""
        step = -(-size // PAGE) * PAGE + 17 * LINE
        if self._block.size < number * step + PAGE:
            self._block = np.ones(number * step + PAGE, np.uint8)
        start = self._block.ctypes.data + -self._block.ctypes.data % PAGE
        return (ctypes.c_void_p * number)(*(start + i * step for i in range(number)))


def read_again(case: Case, threads: int) -> tuple[int, int]:
    """The number of arrays that are looked at twice, and how many bytes of each have left the caches meanwhile."""
    sets = _sets(case)
    held = threads * _level_2_bytes()
    if sets is None or not held:
        return 0, 0
    looked = 1 if case.op.endswith("forward") else case.read
    itemsize = case.nbytes // math.prod(case.shape)
    lies_apart = case.layout == "channels last" or (case.norm.startswith("batch_norm") and len(case.shape) == 2)
    # the elements of a channel that lie apart come with those of the channels beside them
    together = min(sets, LINE // itemsize) if lies_apart else 1
    bytes_of_set = looked * case.nbytes * together // sets
    return looked, int(case.nbytes * max(0, 1 - held / bytes_of_set)) // LINE * LINE


def _sets(case: Case) -> int | None:
    """How many sets of elements have statistics of their own; None where they are given."""
    n, c = case.shape[:2]
    match case.norm:
        case "layer_norm" | "rms_norm":
            return n
        case "instance_norm":
            return n * c
        case "group_norm":
            return n * (case.groups or 1)
        case "batch_norm" | "batch_norm_add_relu" if not case.op.startswith("frozen"):
            return c
    return None


def _level_2_bytes() -> int:
    """Of one core; 0 where the system does not say."""
    return next((int(size[:-1]) << 10 for name, size in machine.caches().items() if name.startswith("L2")), 0)
