"""Fit the constants of docs/cost_model.md to what bench_sync_batch_norm.py has measured, and apply the model.

    python benchmarks/fit_cost_model.py benchmarks/results/sync_batch_norm_*.json [--json FILE]

With L = ceil(log2 P), the collective part of a call with C channels, agreement included, costs in microseconds

    forward           g0 + g1 C     + alpha     + beta 8 (2 C + 5) (P - 1)   + (P - 1) (m0 + m1 C)
    backward          b0 + b1 C     + alpha     + beta 8 (2 C + 4) (P - 1)
    forward by sums   s0 + s1 C     + 5 alpha L + beta 8 (6 C + 9) L
    backward by sums  t0 + t1 C     + 3 alpha L + beta 8 (4 C + 7) L

The first columns are what the calls cost a rank alone, without a peer, and (m0, m1) what merging one more rank does:
measured on one rank, and fitted by lines. alpha (a round) and beta (a byte) are fitted to the calls over P ranks, to
the relative errors of all calls and C together.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CALLS = ("forward", "backward", "forward by sums", "backward by sums")

# Assumed, not measured: a message of an InfiniBand or Slingshot network takes some 2 us from process to process, and
# 100 Gbit/s are 12.5 bytes in a nanosecond.
NETWORK = {"alpha us": 2.0, "beta us": 1e-3 / 12.5}

MOST_RANKS = 4096


class Alone(NamedTuple):
    """What one rank spends on its own: (fixed, per channel) of each call, and of one more rank in the merge."""

    calls: dict[str, tuple[float, float]]
    merge: tuple[float, float]

    def us(self, call: str, ranks: int, channels: int) -> float:
        more = (ranks - 1) * _line(self.merge, channels) if call == "forward" else 0.0
        return _line(self.calls[call], channels) + more


def _line(constants: tuple[float, float], channels: int) -> float:
    return constants[0] + constants[1] * channels


def rounds_and_bytes(call: str, ranks: int, channels: int) -> tuple[float, float]:
    """What alpha and beta are multiplied with."""
    rounds = math.ceil(math.log2(ranks))
    return {
        "forward": (1, 8 * (2 * channels + 5) * (ranks - 1)),
        "backward": (1, 8 * (2 * channels + 4) * (ranks - 1)),
        "forward by sums": (5 * rounds, 8 * (6 * channels + 9) * rounds),
        "backward by sums": (3 * rounds, 8 * (4 * channels + 7) * rounds),
    }[call]


def fit_alone(rows: list[dict[str, Any]]) -> Alone:
    def fitted(points: list[tuple[float, float]]) -> tuple[float, float]:
        x, y = np.array(points).T
        fixed, slope = _least_squares(np.stack([np.ones_like(x), x], axis=1), y, y)
        return fixed, slope

    calls = {name: fitted([(row["channels"], row["us"][name]) for row in rows]) for name in CALLS}
    ranks = sorted(int(name.split()[1]) for name in rows[0]["us"] if name.startswith("merge "))
    first, last = ranks[0], ranks[-1]
    more = [
        (row["channels"], (row["us"][f"merge {last}"] - row["us"][f"merge {first}"]) / (last - first)) for row in rows
    ]
    return Alone(calls, fitted(more))


def _least_squares(factors: Any, values: Any, scale: Any) -> tuple[float, float]:
    """Two constants >= 0 with the least squares of (factors @ constants - values) / scale."""
    weighted, target = factors / scale[:, None], values / scale
    both = np.linalg.lstsq(weighted, target, rcond=None)[0]
    if both.min() >= 0:
        return float(both[0]), float(both[1])
    one_alone = [
        np.where(np.arange(2) == kept, max(0.0, column @ target / (column @ column)), 0.0)
        for kept, column in enumerate(weighted.T)
    ]
    best = min(one_alone, key=lambda constants: float(np.sum((weighted @ constants - target) ** 2)))
    return float(best[0]), float(best[1])


def fit(results: dict[str, Any], alone: Alone) -> dict[str, Any]:
    """alpha and beta from one file of the benchmark, given the constants of one rank."""
    ranks = results["ranks"]
    points = [
        (rounds_and_bytes(call, ranks, row["channels"]), alone.us(call, ranks, row["channels"]), row["us"][call])
        for row in results["collectives"]
        for call in CALLS
    ]
    factors, own, times = (np.array(column, float) for column in zip(*points, strict=True))
    alpha, beta = _least_squares(factors, times - own, times)
    errors = np.abs(own + factors @ np.array([alpha, beta]) - times) / times
    return {
        **{name: results[name] for name in ("mpi", "ranks", "oversubscribed", "commit")},
        "alpha us": round(alpha, 2),
        "beta us": round(beta, 6),
        "alone us": {name: [round(a, 2), round(b, 6)] for name, (a, b) in alone.calls.items()},
        "merge us": [round(value, 6) for value in alone.merge],
        "median error": round(float(np.median(errors)), 2),
        "largest error": round(float(errors.max()), 2),
    }


def predicted(constants: dict[str, Any], network: dict[str, float], call: str, ranks: int, channels: int) -> float:
    """Microseconds of a call by the model."""
    alone = Alone({name: tuple(line) for name, line in constants["alone us"].items()}, tuple(constants["merge us"]))
    rounds, sent = rounds_and_bytes(call, ranks, channels)
    return alone.us(call, ranks, channels) + network["alpha us"] * rounds + network["beta us"] * sent


def crossing(constants: dict[str, Any], network: dict[str, float], channels: int) -> int | None:
    """The number of ranks from which two sums are faster than gathering; None where it is beyond MOST_RANKS."""
    faster = (
        ranks
        for ranks in range(2, MOST_RANKS + 1)
        if predicted(constants, network, "forward by sums", ranks, channels)
        < predicted(constants, network, "forward", ranks, channels)
    )
    return next(faster, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--json", type=Path, help="write the constants there")
    options = parser.parse_args()
    files = [json.loads(file.read_text()) for file in options.files]
    files.sort(key=lambda results: (results["mpi"], results["ranks"]))
    alone = {results["mpi"]: fit_alone(results["alone"]) for results in files if "alone" in results}
    fits = [fit(results, alone[results["mpi"]]) for results in files]
    for constants in fits:
        print({name: value for name, value in constants.items() if name not in ("alone us", "merge us")})
    model = next(constants for constants in fits if not constants["oversubscribed"])
    print(f"alone, {model['mpi']}: {model['alone us']}; one more rank in the merge: {model['merge us']}")
    print(f"on a network of {NETWORK}, assumed; us by the model")
    for ranks in (2, 16, 64, MOST_RANKS):
        for channels in (64, 1024, 4096):
            us = {call: round(predicted(model, NETWORK, call, ranks, channels)) for call in CALLS}
            print(f"P = {ranks:4d}, C = {channels:4d}: {us}")
    for alpha in (NETWORK["alpha us"], 5.0, 20.0):
        crossings = {c: crossing(model, NETWORK | {"alpha us": alpha}, c) for c in (64, 256, 1024, 4096)}
        print(f"two sums are faster than gathering, C: from P, with alpha = {alpha:g} us: {crossings}")
    if options.json:
        options.json.write_text(json.dumps({"fits": fits, "assumed network": NETWORK}, indent=1) + "\n")


if __name__ == "__main__":
    main()
