"""How much memory a call takes beyond its outputs: the peak of the resident memory, in a process for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import machine
import measure as measuring
from cases import Case, Competitor, Data

SHAPES = {"layer_norm": (4096, 4096), "rms_norm": (4096, 4096)}  # 64 MB, and of the others
SHAPE = (16, 64, 128, 128)


def cases(*, shrink: bool) -> list[Case]:
    """Forward and backward of every norm, float32 (or uint8), the first layout of it."""
    found = {}
    for norm in measuring.NORMS:
        for case in measuring.bench_of(norm).CASES:
            if case.dtype in ("float32", "uint8") and (norm, case.op) not in found:
                made = Case(norm, case.op, SHAPES.get(norm, SHAPE), case.dtype, groups=case.groups)
                found[norm, case.op] = made.shrunk() if shrink else made
    return list(found.values())


def measure(peers: Sequence[str], *, shrink: bool) -> dict[str, Any]:
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("peak memory is measured on Linux alone: it needs /proc/self/clear_refs")
    libraries = ["arraynorm", *measuring.available([peer for peer in peers if peer != "numba"])[0]]
    records = []
    for position, case in enumerate(cases(shrink=shrink)):
        for library in libraries:
            command = [sys.executable, __file__, str(position), library, str(int(shrink))]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            record = json.loads(done.stdout.splitlines()[-1])
            records.append({"case": case.name, "competitor": library} | record)
            print(f"{case.name:60s} {library:10s} {record['peak over outputs']:.2f} of its outputs", flush=True)
    return machine.describe() | {"records": records}


def _one(case: Case, library: str) -> dict[str, float]:
    """The growth of the peak during a large call; tiny ones before it have loaded what is loaded once."""
    measuring.set_threads([library], os.cpu_count() or 1)
    with_library = getattr(measuring.bench_of(case.norm), f"with_{library}")
    tiny = with_library(Data(case.shrunk(), np.random.default_rng(0)))[library]
    for _ in range(3):
        tiny.run()
    data = Data(case, np.random.default_rng(0))
    for array in (data.x, data.dy):  # drawn now, not during the call
        array.ravel()[:1]
    if case.norm == "batch_norm_add_relu":
        data.addend.ravel()[:1]
    competitor = with_library(data)[library]
    # of several calls the most: once in some hundred the kernel missed the temporaries of NumPy's formula
    calls = [_growth(competitor) for _ in range(3)]
    grown, outputs = max(calls)
    return {"outputs": outputs, "grown": grown, "peak over outputs": grown / outputs}


def _growth(competitor: Competitor) -> tuple[int, int]:
    """Bytes by which the peak grows during a call, and bytes of its outputs."""
    measuring.an.release_memory()  # of calls before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
    before = _kilobytes("VmRSS")
    raw = competitor.run()
    grown = 1024 * (_kilobytes("VmHWM") - before)
    return grown, sum(array.nbytes for array in competitor.results(raw))


def _kilobytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])


if __name__ == "__main__":
    position, library, shrink = sys.argv[1:]
    print(json.dumps(_one(cases(shrink=shrink == "1")[int(position)], library)))
