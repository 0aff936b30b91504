"""What was set out to be reached, as data, and whether results reach it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

Record = dict[str, Any]

WARM, FRESH = "no page faults", "default"  # the settings of malloc


class Bar(NamedTuple):
    """The least ratio of torch's time to ours, over cases of the table in float32, at every number of threads."""

    name: str
    norm: str
    op: str
    least: float
    layout: str = "contiguous"
    ndims: range = range(2, 6)
    dtypes: tuple[str, ...] = ("float32",)
    tag: str = "table"

    def covers(self, record: Record) -> bool:
        return (
            self.tag in record["tags"]
            and (record["norm"], record["op"]) == (self.norm, self.op)
            and (self.layout in (record["layout"], "any"))
            and len(record["shape"]) in self.ndims
            and record["dtype"] in self.dtypes
        )


class Verdict(NamedTuple):
    bar: str
    asked: str
    met: bool | None
    """None: not measured."""
    found: str


_PLANES, _MATRIX, _HALVES = range(4, 6), range(2, 3), ("float16", "bfloat16")
_OPS = (
    ("batch_norm", "forward"),
    ("batch_norm", "backward"),
    ("batch_norm", "frozen forward"),
    *((norm, op) for norm in ("batch_norm_add_relu", "layer_norm", "rms_norm") for op in ("forward", "backward")),
    *((norm, op) for norm in ("group_norm", "instance_norm") for op in ("forward", "backward")),
)

BARS = [
    Bar("BN training forward, 4-D and 5-D", "batch_norm", "forward", 5, ndims=_PLANES),
    Bar("BN training forward, 2-D", "batch_norm", "forward", 1.2, ndims=_MATRIX),
    Bar("BN backward, 4-D and 5-D", "batch_norm", "backward", 1.4, ndims=_PLANES),
    Bar("BN backward, 2-D", "batch_norm", "backward", 1.2, ndims=_MATRIX),
    Bar("BN + add + ReLU forward (torch in place)", "batch_norm_add_relu", "forward", 5),
    Bar("BN + add + ReLU backward (torch in place)", "batch_norm_add_relu", "backward", 2),
    Bar("BN with given statistics", "batch_norm", "frozen forward", 1),
    Bar("BN channels last forward", "batch_norm", "forward", 1.6, layout="channels last"),
    Bar("BN channels last backward", "batch_norm", "backward", 1.2, layout="channels last"),
    Bar("LN forward", "layer_norm", "forward", 1.5),
    Bar("LN backward", "layer_norm", "backward", 1.5),
    Bar("RMS forward", "rms_norm", "forward", 3),
    Bar("RMS backward", "rms_norm", "backward", 6),
    Bar("GN forward", "group_norm", "forward", 1.5),
    Bar("GN backward", "group_norm", "backward", 1.5),
    Bar("IN forward", "instance_norm", "forward", 4.5),
    Bar("IN backward", "instance_norm", "backward", 1.4),
    *(
        Bar(f"{norm.replace('_', ' ')} {op}, float16 and bfloat16", norm, op, 1.5, layout="any", dtypes=_HALVES)
        for norm, op in _OPS
    ),
    *(
        Bar(f"one small call: {norm.replace('_', ' ')} {op}", norm, op, 2, tag="small")
        for norm in ("layer_norm", "batch_norm")
        for op in ("forward", "backward")
    ),
]

# Of the bandwidth of a non-temporal copy, for x of 100 MB and more; (read, written) -> threads -> least.
LARGE = 100_000_000
FRACTIONS = {(1, 1): {1: 0.65, 2: 0.85}, (2, 1): {1: 0.50, 2: 0.75}}


def verdicts(results: dict[str, Any], sweep: dict[str, Any] | None) -> Iterator[Verdict]:
    """Every bar on its own. A bar is met where its worst case meets it."""
    warm, fresh = (results["settings"].get(name, {"cases": []})["cases"] for name in (WARM, FRESH))
    for bar in BARS:
        covered = [record for record in warm if bar.covers(record)]
        yield _least(bar.name, f"{bar.least:g}x torch", bar.least, covered, _torch)
    table = [record for record in warm if "table" in record["tags"]]
    yield _least("every case of the table, any dtype", "1x the best peer", 1, table, _peer)
    for (read, written), fractions in FRACTIONS.items():
        for threads, least in fractions.items():
            large = [
                record
                for record in warm
                if (record["read"], record["written"], record["threads"]) == (read, written, threads)
                and record["bytes"] >= LARGE * (read + written)
            ]
            name = f"arrays of 100 MB and more, {read} read + {written} written, {threads} threads"
            yield _least(
                name, f"{least:.0%} of a copy", least, large, lambda record: record["fraction of copy"], "{:.0%}"
            )
    ratios = [r for r in map(_torch, (r for r in fresh if "table" in r["tags"] and r["dtype"] == "float32")) if r]
    mean = geometric_mean(ratios)
    yield Verdict(
        "default malloc, fresh outputs in both: geometric mean over the table, float32",
        "3x torch",
        mean >= 3 if ratios else None,
        f"{mean:.2f}x over {len(ratios)} cases" if ratios else "not measured",
    )
    name = "no point of the sweep 2x off its neighbours' bytes/s"
    if sweep is None:
        yield Verdict(name, "none, or the reason", None, "not measured")
    else:
        cliffs = sweep["cliffs"]
        without = [cliff for cliff in cliffs if not cliff["reason"]]
        found = f"{len(cliffs)} of {len(sweep['points'])} points, {len(without)} of them without a reason"
        yield Verdict(name, "none, or the reason", not without, found)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def of_roof(record: Record) -> float | None:
    """The share of our time that the case's memory traffic alone takes (see roof.py); None where it was not timed."""
    roof = record.get("roof")
    return roof / record["seconds"]["arraynorm"]["median"] if roof else None


def _least(
    name: str,
    asked: str,
    least: float,
    records: Sequence[Record],
    value: Callable[[Record], float | None],
    form: str = "{:.2f}x",
) -> Verdict:
    """Whether the least of the values is at least that; names the case it is of, and how many fail.

    Values are speeds: a case fails for its memory traffic alone where the value would be too low at the roof, too.
    """
    known = [(found, record) for record in records if (found := value(record)) is not None]
    if not known:
        return Verdict(name, asked, None, "not measured")
    worst, record = min(known, key=lambda pair: pair[0])
    below = [(found, record) for found, record in known if found < least]
    out_of_reach = sum(found / share < least for found, record in below if (share := of_roof(record)))
    where = f"{record['case']}, {record['threads']} thr"
    middle = form.format(geometric_mean([found for found, _ in known]))
    found = f"worst {form.format(worst)} ({where}), mean {middle}; {len(below)} of {len(known)} below"
    if out_of_reach:
        found += f", {out_of_reach} of these out of memory's reach"
    return Verdict(name, asked, not below, found)


def _torch(record: Record) -> float | None:
    return record["ratios"][record["best torch"]]["median"] if record["best torch"] else None


def _peer(record: Record) -> float | None:
    return record["ratios"][record["best peer"]]["median"] if record["best peer"] else None
