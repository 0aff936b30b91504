"""Results as Markdown: the bars first, then every case; and as a plot."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import bars
import plot
from cases import TOLERANCE

_HOW = """\
Every time is a median over turns; in a turn each competitor runs once, in a new order, after untimed calls of its own.
Ratios are medians of the ratios within a turn, and say how many times as long as `arraynorm` another takes. `arraynorm`
is the plain public call with fresh outputs, under both settings of malloc, its own recycling of dropped results as it
comes; `out=` is the same with given ones. Torch runs its native operators without autograd, with given outputs where it
has such a variant, and in place for add + ReLU; numba's outputs are always given; numpy is the formula as a user writes
it, in float32, with one thread. All agreed with float64 before they were timed; torch's layer norm backward in 16 bits,
marked *, does not (see bench_layer_norm.py). GB/s counts x's size as often as the column *bytes* says, for example
2R+1W; *of copy* is that over the bandwidth of a copy with non-temporal stores at the same number of threads, timed in
the same turns. Above 100 % the data sat in a cache. *of roof* is how much of our time a loop takes that reads as many
arrays of that size and writes as many, and computes nothing (see roof.py); a bar is *out of memory's reach* for a case
where that loop would miss it, too.
"""

_MARKS = {True: "met", False: "**not met**", None: "not measured"}


def write(folder: Path) -> None:
    """cpu.md and cpu.png from what JSON there is."""
    results, sweep, memory = (_read(folder / name) for name in ("cpu.json", "cpu-sweep.json", "cpu-memory.json"))
    lines = ["# The CPU paths against torch, NumPy and numba", ""]
    lines += [
        "Made by `python benchmarks/run.py`, with `--sweep` and `--memory`, from the JSON files beside this one.",
        "",
    ]
    if results:
        lines += [*_machine(results), "", _HOW, "## Bars", "", *_bars(results, sweep), ""]
        for setting in results["settings"]:
            lines += [f"## malloc: {setting}", "", *_setting(results["settings"][setting]), ""]
        plot.ratios(results, folder / "cpu.png")
        lines += ["![Torch's time over arraynorm's](cpu.png)", ""]
    if sweep:
        lines += ["## Shape sweep", "", *_sweep(sweep), ""]
    if memory:
        lines += ["## Peak memory", "", *_memory(memory), ""]
    (folder / "cpu.md").write_text("\n".join(lines).rstrip() + "\n")


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    head = list(head)
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _machine(results: dict[str, Any]) -> Iterator[str]:
    machine, versions = results["machine"], results["versions"]
    where = "virtual machine" if machine["virtual"] else "machine"
    caches = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    yield (
        f"{machine['processor']}, {machine['usable']} cores of a {where}; {caches}; {machine['libc']}. "
        f"{', '.join(f'{name} {number}' for name, number in versions.items())}. "
        f"Commit {results['commit']}, {results['date']}. Load average {results['load average'][0]:.1f} at the start, "
        f"{results['load average at the end'][0]:.1f} at the end."
    )
    for name, reason in results["missing peers"].items():
        yield f"{name} took no part: {reason}."


def _bars(results: dict[str, Any], sweep: dict[str, Any] | None) -> Iterator[str]:
    found = list(bars.verdicts(results, sweep))
    met, unknown = (sum(verdict.met is value for verdict in found) for value in (True, None))
    yield (
        f"{met} of {len(found)} are met, {unknown} not measured. A bar is met where its worst case at any number of "
        "threads is. float32, and malloc without page faults, unless said."
    )
    yield ""
    yield from _table(("bar", "at least", "", "found"), ((v.bar, v.asked, _MARKS[v.met], v.found) for v in found))


def _setting(setting: dict[str, Any]) -> Iterator[str]:
    environment = " ".join(f"{name}={value}" for name, value in setting["environment"].items()) or "no variables"
    copies: dict[int, list[float]] = {}
    for record in setting["cases"]:
        copies.setdefault(record["threads"], []).append(record["copy GB/s"])
    middles = ", ".join(f"{sorted(v)[len(v) // 2]:.1f} GB/s with {n} thr" for n, v in copies.items())
    streams = "non-temporal copy" if setting["copy streams"] else "copy (memcpy: it may not stream)"
    faults = setting["page faults of 64 MB"]
    yield f"{environment}; a fresh block of 64 MB takes {faults} page faults. {streams}: {middles}."
    yield ""
    head = (
        "case",
        "thr",
        "ms",
        "quartiles",
        "bytes",
        "GB/s",
        "of copy",
        "of roof",
        "best peer",
        "torch",
        "numpy",
        "numba",
        "out=",
    )
    yield from _table(head, map(_row, setting["cases"]))


def _row(record: dict[str, Any]) -> Iterator[str]:
    seconds, ratios = record["seconds"]["arraynorm"], record["ratios"]
    tolerance = TOLERANCE.get(record["dtype"], 1)  # of quantized results the errors are in levels

    def ratio(name: str | None) -> str:
        if name not in ratios:
            return "-"
        return f"{ratios[name]['median']:.2f}x{'*' if record['errors'][name] > tolerance else ''}"

    best = record["best peer"]
    yield record["case"]
    yield str(record["threads"])
    yield f"{1e3 * seconds['median']:.4g}"
    yield f"{1e3 * seconds['q1']:.4g}-{1e3 * seconds['q3']:.4g}"
    yield f"{record['read']}R+{record['written']}W"
    yield f"{record['GB/s']:.1f}"
    yield f"{record['fraction of copy']:.0%}"
    share = bars.of_roof(record)
    yield f"{share:.0%}" if share else "-"
    yield f"{ratio(best)} {best}" if best else "-"
    yield ratio(record["best torch"])
    yield ratio("numpy")
    yield ratio("numba")
    yield ratio("arraynorm out=")


def _sweep(sweep: dict[str, Any]) -> Iterator[str]:
    points, cliffs = sweep["points"], sweep["cliffs"]
    copy = ", ".join(f"{rate:.1f} GB/s with {threads} thr" for threads, rate in sweep["copy GB/s"].items())
    yield (
        f"{len(points)} points, float32, given outputs, commit {sweep['commit']}; copy: {copy}. Neighbours hold about "
        "as many elements and differ by one step between two dimensions, or by odd sizes. A point that is less than "
        f"half as fast as a neighbour was timed again, in turns with it: {len(cliffs)} stayed."
    )
    yield ""
    head = ("norm", "op", "shape", "thr", "GB/s", "faster neighbour", "GB/s", "times", "reason")
    rows = (
        (
            cliff["norm"],
            cliff["op"],
            "x".join(map(str, cliff["shape"])),
            str(cliff["threads"]),
            f"{cliff['GB/s']:.2f}",
            "x".join(map(str, cliff["neighbour"])),
            f"{cliff['neighbour GB/s']:.2f}",
            f"{cliff['times']:.1f}",
            cliff["reason"] or "none known",
        )
        for cliff in sorted(cliffs, key=lambda cliff: bool(cliff["reason"]))
    )
    if cliffs:
        yield from _table(head, rows)
        yield ""
    ranges: dict[tuple[str, str, int, int], list[float]] = {}
    for point in points:
        ranges.setdefault((point["norm"], point["op"], point["elements"], point["threads"]), []).append(point["GB/s"])
    yield from _table(
        ("norm", "op", "elements", "thr", "least GB/s", "median", "most"),
        (
            (*key[:2], f"{key[2]:,}", str(key[3]), f"{min(v):.2f}", f"{sorted(v)[len(v) // 2]:.1f}", f"{max(v):.1f}")
            for key, v in ranges.items()
        ),
    )


def _memory(memory: dict[str, Any]) -> Iterator[str]:
    yield (
        "Growth of the peak of the resident memory during one call in a process of its own, over the size of its "
        f"outputs: 1.00 is no temporary at all. Commit {memory['commit']}."
    )
    yield ""
    competitors = sorted({record["competitor"] for record in memory["records"]})
    cases = dict.fromkeys(record["case"] for record in memory["records"])
    found = {(record["case"], record["competitor"]): record for record in memory["records"]}

    def cell(case: str, competitor: str) -> str:
        record = found.get((case, competitor))
        return f"{record['peak over outputs']:.2f}" if record else "-"

    yield from _table(("case", *competitors), ((case, *(cell(case, name) for name in competitors)) for case in cases))
