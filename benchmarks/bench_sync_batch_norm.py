"""What synchronizing batch norm costs, against plain batch norm and against a bare mpi4py Allreduce.

    mpiexec -n P python benchmarks/bench_sync_batch_norm.py [--json FILE]

All competitors run in one process per rank, in turn, on the same input; a time is the slowest rank's, the figure the
median over the turns. Absolute times of a shared machine mean little: read the ratios.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from mpi4py import MPI

import arraynorm as an
from arraynorm.distributed import MPICommunicator

CHANNELS = (64, 256, 1024, 4096)


def interleaved(world: Any, calls: Mapping[str, Callable[[], object]], turns: int, repeats: int) -> dict[str, float]:
    """Median seconds of each call over `turns` turns of `repeats` calls, the slowest rank's."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            world.Barrier()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            times[name].append(world.allreduce((time.perf_counter() - start) / repeats, MPI.MAX))
    return {name: statistics.median(values) for name, values in times.items()}


def collectives(world: Any, turns: int) -> list[dict[str, Any]]:
    """One forward's collective part for several C: agreement and payload, over the bare sum of as many bytes."""
    gathered, summed = (MPICommunicator(world.Dup(), max_gathered_ranks=ranks) for ranks in (1024, 1))
    rows = []
    for channels in CHANNELS:
        seconds = interleaved(world, _calls(world, gathered, summed, channels), turns, repeats=50)
        rows.append({"channels": channels} | {f"{name} us": 1e6 * value for name, value in seconds.items()})
    return rows


def _calls(
    world: Any, gathered: MPICommunicator, summed: MPICommunicator, channels: int
) -> dict[str, Callable[[], object]]:
    mean, m2 = np.ones(channels), np.ones(channels)
    payload, total = np.ones(2 * channels + 1), np.empty(2 * channels + 1)
    return {
        "bare Allreduce": lambda: world.Allreduce(payload, total),
        "agreement": lambda: gathered.agree(b""),
        "gather": lambda: gathered.merge_moments(8, mean, m2),
        "two sums": lambda: summed.merge_moments(8, mean, m2),
        "backward": lambda: gathered.allreduce_sum(payload),
    }


def training(world: Any, turns: int) -> dict[str, float]:
    """Forward and backward of (32, 64, 56, 56) float32 per rank."""
    rng = np.random.default_rng(world.rank)
    x, dy = (rng.standard_normal((32, 64, 56, 56), dtype=np.float32) for _ in range(2))
    layers = {
        "plain": an.BatchNorm(64),
        "synchronized": an.SyncBatchNorm(64, comm=MPICommunicator(world.Dup())),
        "without agreement": an.SyncBatchNorm(64, comm=MPICommunicator(world.Dup(), validate=False)),
    }

    def step(layer: an.BatchNorm) -> Callable[[], object]:
        return lambda: (layer(x), layer.backward(dy))

    return interleaved(world, {name: step(layer) for name, layer in layers.items()}, turns, repeats=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results there")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    world = MPI.COMM_WORLD
    rows, steps = collectives(world, options.turns), training(world, options.turns)
    if world.rank:
        return
    print(f"{world.size} ranks, {MPI.get_vendor()[0]}; us, and (times the bare Allreduce)")
    for row in rows:
        bare = row["bare Allreduce us"]
        cells = (f"{name} {row[name + ' us']:.0f} ({row[name + ' us'] / bare:.1f})" for name in _names(row))
        print(f"C = {row['channels']:4d}: bare {bare:.0f}; " + "; ".join(cells))
    for name in ("synchronized", "without agreement"):
        print(
            f"step of (32, 64, 56, 56), {name}: {100 * (steps[name] / steps['plain'] - 1):+.1f} % over plain batch norm"
        )
    if options.json:
        results = {"ranks": world.size, "mpi": MPI.get_vendor()[0], "machine": platform.machine()}
        with open(options.json, "w") as file:
            json.dump(results | {"collectives": rows, "training seconds": steps}, file, indent=1)


def _names(row: Mapping[str, Any]) -> list[str]:
    return [key.removesuffix(" us") for key in row if key.endswith(" us") and not key.startswith("bare")]


if __name__ == "__main__":
    main()
