"""What synchronizing batch norm costs, against plain batch norm and against a bare mpi4py Allreduce.

    mpiexec -n P python benchmarks/bench_sync_batch_norm.py [--json benchmarks/results/sync_batch_norm_MPI_P_ranks.json]

All competitors run in one process per rank, in turn, on the same input; a time is the slowest rank's. The figure is the
tenth percentile over many short turns, for other processes of the machine only ever add to a time, and for a training
step the median of the turns' ratios. A forward and a backward are their collective parts here, agreement and payload,
as for few ranks (one message) and as for many (sums). Where there are more ranks than cores, a message costs a turn of
the scheduler. fit_cost_model.py fits the constants of docs/cost_model.md to the results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mpi4py
import numpy as np
from mpi4py import MPI

import arraynorm as an
from arraynorm import _fields
from arraynorm.distributed import MPICommunicator
from arraynorm.distributed._communicator import _payloads

CHANNELS = (64, 256, 1024, 4096)
MERGED_RANKS = (2, 4, 8, 16)
SHAPE = (32, 64, 56, 56)

Call = Callable[[], object]
Times = Mapping[str, list[float]]  # seconds of every turn


def interleaved(world: Any, calls: Mapping[str, Call], turns: int, repeats: int) -> Times:
    """Seconds of each call in each turn of `repeats` calls, the slowest rank's. The first turn only warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            world.Barrier()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            seconds = world.allreduce((time.perf_counter() - start) / repeats, MPI.MAX)
            if turn:
                times[name].append(seconds)
    return times


def microseconds(times: Times) -> dict[str, float]:
    return {name: round(1e6 * float(np.quantile(seconds, 0.1)), 2) for name, seconds in times.items()}


# -- the collective part ---------------------------------------------------------------------------------------


def collectives(world: Any, turns: int, repeats: int) -> list[dict[str, Any]]:
    """For several C: a forward's and a backward's collective part, and the bare sum of as many bytes."""
    rows = []
    for channels in CHANNELS:
        us = microseconds(interleaved(world, _collectives(world, channels), turns, repeats))
        ways = ("forward", "backward", "forward by sums", "backward by sums")
        over = {name: round(us[name] / us["bare Allreduce"], 2) for name in ways}
        rows.append({"channels": channels, "us": us, "times bare": over})
    return rows


def _collectives(world: Any, channels: int) -> dict[str, Call]:
    mean, m2, sums = np.ones(channels), np.ones(channels), np.ones((2, channels))
    payload, total = np.ones(2 * channels + 1), np.empty(2 * channels + 1)
    calls: dict[str, Call] = {"bare Allreduce": lambda: world.Allreduce(payload, total)}
    ways = {"": {}, ", nothing compared": {"validate": False}, " by sums": {"max_gathered_ranks": 0}}
    for way, settings in ways.items():
        comm = MPICommunicator(world.Dup(), **settings)

        def forward(comm: MPICommunicator = comm) -> None:
            _agree(comm, channels)
            comm.merge_moments(8, mean, m2)

        def backward(comm: MPICommunicator = comm) -> None:
            _agree(comm, channels)
            comm.allreduce_sum(sums)

        calls |= {f"forward{way}": forward, f"backward{way}": backward}
    return calls


def _agree(comm: MPICommunicator, channels: int) -> None:
    """What a layer says of its forward, packed."""
    layer = _fields.pack({"layer": "SyncBatchNorm", "name": "", "index": 3, "momentum": 0.1})
    call = {
        "operation": "batch_norm",
        "channels": channels,
        "axis": 1,
        "dtype": "float32",
        "ndim": 4,
        "eps": 1e-5,
        "weight": True,
        "bias": True,
        "cache": True,
    }
    comm.agree(layer + _fields.pack(call))


def alone(turns: int, repeats: int) -> list[dict[str, Any]]:
    """The same calls in a world of one rank, which waits for nobody; and the work on P ranks' messages."""
    rows = []
    for channels in CHANNELS:
        calls = _collectives(MPI.COMM_SELF, channels)
        calls |= {f"merge {ranks}": _merge(channels, ranks) for ranks in MERGED_RANKS}
        rows.append({"channels": channels, "us": microseconds(interleaved(MPI.COMM_SELF, calls, turns, repeats))})
    return rows


def _merge(channels: int, ranks: int) -> Call:
    table = np.ones((ranks, 2 * channels + 1))
    table[:, 1] = np.arange(ranks)
    rows = list(table)
    return lambda: _payloads.merge_moments(rows)


# -- a training step -------------------------------------------------------------------------------------------


def training(world: Any, turns: int) -> dict[str, Any]:
    """Forward and backward of SHAPE float32 per rank."""
    rng = np.random.default_rng(world.rank)
    x, dy = (rng.standard_normal(SHAPE, dtype=np.float32) for _ in range(2))
    layers = {
        "plain": an.BatchNorm(64),
        "synchronized": an.SyncBatchNorm(64, comm=MPICommunicator(world.Dup())),
        "without agreement": an.SyncBatchNorm(64, comm=MPICommunicator(world.Dup(), validate=False)),
    }

    def step(layer: an.BatchNorm) -> Call:
        return lambda: (layer(x), layer.backward(dy))

    times = interleaved(world, {name: step(layer) for name, layer in layers.items()}, turns, repeats=1)
    over = {name: statistics.median(np.divide(times[name], times["plain"])) for name in list(layers)[1:]}
    per_cent = {name: round(100 * (value - 1), 1) for name, value in over.items()}
    return {"shape": SHAPE, "us": microseconds(times), "per cent over plain": per_cent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=10, help="calls in a turn")
    parser.add_argument("--steps", type=int, default=25, help="turns of the training step, 0 for none")
    options = parser.parse_args()
    world = MPI.COMM_WORLD
    results = _circumstances(world)
    results["collectives"] = collectives(world, options.turns, options.repeats)
    if not results["oversubscribed"]:
        results["alone"] = alone(options.turns, options.repeats)
    if options.steps:
        results["training"] = training(world, options.steps)
    if world.rank == 0:
        _show(results)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")


def _circumstances(world: Any) -> dict[str, Any]:
    ranks_here = world.Split_type(MPI.COMM_TYPE_SHARED).size
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {
        "mpi": " ".join([MPI.get_vendor()[0], ".".join(map(str, MPI.get_vendor()[1]))]),
        "mpi4py": mpi4py.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "ranks": world.size,
        "oversubscribed": ranks_here > (os.cpu_count() or 1),
        "load before": round(os.getloadavg()[0], 1),
        "commit": commit.stdout.strip() or "unknown",
    }


def _show(results: Mapping[str, Any]) -> None:
    more = "more ranks than cores" if results["oversubscribed"] else "a core for each"
    print(f"{results['ranks']} ranks, {more}, {results['mpi']}; us, and times the bare Allreduce of as many bytes")
    for row in results["collectives"]:
        us = "; ".join(f"{name} {value:.1f}" for name, value in row["us"].items())
        times = "; ".join(f"{name} {value:.1f} x" for name, value in row["times bare"].items())
        print(f"C = {row['channels']:4d}: {us}\n    {times}")
    if "training" not in results:
        return
    step, collective = results["training"], results["collectives"][0]["us"]
    for name, per_cent in step["per cent over plain"].items():
        print(f"step of {SHAPE}, {name}: {per_cent:+.1f} % over plain batch norm")
    for way in ("", ", nothing compared"):
        us = collective[f"forward{way}"] + collective[f"backward{way}"]
        print(f"its collective part{way}: {us:.0f} us, {100 * us / step['us']['plain']:.2f} % of the plain step")


if __name__ == "__main__":
    main()
