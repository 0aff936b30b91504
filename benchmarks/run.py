"""arraynorm against torch, NumPy and numba on the CPU, in one process, in turns.

    python benchmarks/run.py                 all cases, at 1 and 2 threads, under both settings of malloc
    python benchmarks/run.py --quick         float32 and float16, little time each
    python benchmarks/run.py --only layer    the cases whose names contain it
    python benchmarks/run.py --sweep         bytes per second over all shapes, and where they break down
    python benchmarks/run.py --memory        peak memory of each norm over its outputs
    python benchmarks/run.py --report        write the tables and the plot anew from the results that are there

Results go to benchmarks/results/: cpu.json, cpu-sweep.json, cpu-memory.json, and from them cpu.md and cpu.png. Absolute
times of a shared machine mean little: read the ratios, which are medians of ratios within a turn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PEERS = "torch,numpy,numba"

SETTINGS = {
    # As users have it: large results are new memory, page by page, in torch; arraynorm recycles dropped ones.
    "default": {},
    # Memory once taken stays with the process, so kernels are compared and not page faults.
    "no page faults": {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)},
}


def main() -> None:
    options = _options()
    if options.child:
        _child(options)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if not (options.sweep or options.memory or options.report):
        _write(options.out / "cpu.json", _all_settings())
    if options.sweep:
        _write(options.out / "cpu-sweep.json", _started("no page faults"))
    if options.memory:
        import peak_memory

        _write(options.out / "cpu-memory.json", peak_memory.measure(options.peers, shrink=options.shrink))
    import report

    report.write(options.out)
    print((options.out / "cpu.md").read_text())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="to try it out")
    parser.add_argument(
        "--shrink", action="store_true", help="tiny shapes: to try the machinery, the figures mean nothing"
    )
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cases (or norms, of a sweep) with this in their names"
    )
    parser.add_argument("--threads", type=_numbers, default=[1, 2], metavar="1,2")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=PEERS.split(","), metavar=PEERS)
    parser.add_argument("--budget", type=float, help="seconds for each case and number of threads (4; quick: 0.4)")
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="FOLDER")
    parser.add_argument("--child", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.budget is None:
        options.budget = 0.4 if options.quick else 4.0
    return options


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


# -- the process that was started by hand ----------------------------------------------------------------------


def _all_settings() -> dict[str, Any]:
    results = {setting: _started(setting) for setting in SETTINGS}
    settings = {setting: result.pop("setting") for setting, result in results.items()}
    first, last = (list(results.values())[i] for i in (0, -1))
    return first | {"load average at the end": last["load average at the end"], "settings": settings}


def _started(setting: str) -> dict[str, Any]:
    """This program again, under a setting that malloc reads when a process starts."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "result.json")
        command = [sys.executable, __file__, *sys.argv[1:], "--child", setting, "--json", str(file)]
        subprocess.run(command, env=os.environ | SETTINGS[setting], check=True)
        return json.loads(file.read_text())


def _write(path: Path, results: dict[str, Any]) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")


# -- the process that measures ---------------------------------------------------------------------------------


def _child(options: argparse.Namespace) -> None:
    import machine
    import measure
    from bandwidth import SIZE, Copy

    peers, missing = measure.available(options.peers)
    for name, reason in missing.items():
        print(f"{name} takes no part: {reason}", flush=True)
    copy = Copy(1 << 20 if options.shrink else SIZE)
    if not copy.streams:
        print(f"the copy is {copy.reason}", flush=True)
    results = machine.describe() | {"peers": peers, "missing peers": missing}
    if options.sweep:
        import shape_sweep

        results |= shape_sweep.measure(options, copy)
    else:
        results["setting"] = _cases(options, peers, copy)
    results["load average at the end"] = os.getloadavg()
    _write(options.json, results)


def _cases(options: argparse.Namespace, peers: list[str], copy: Any) -> dict[str, Any]:
    import machine
    import measure

    dtypes = ("float32", "float16", "uint8") if options.quick else ("float32", "float16", "bfloat16", "uint8")
    chosen = measure.cases(options.only, dtypes, shrink=options.shrink)
    runner = measure.Runner(peers, options.budget, 3 if options.quick else 5, copy, print)
    faults = machine.faults_of_fresh_memory()
    print(
        f"malloc: {options.child}; a fresh block of 64 MB takes {faults} page faults; {len(chosen)} cases", flush=True
    )
    start, records = time.perf_counter(), []
    for case in chosen:
        for record in runner.measure(case, options.threads):
            records.append(record)
            print(measure.line(record), flush=True)
    return {
        "environment": SETTINGS[options.child],
        "page faults of 64 MB": faults,
        "copy streams": copy.streams,
        "outputs": "arraynorm: fresh, its own recycling of memory as it comes; 'arraynorm out=': given",
        "cases": records,
        "minutes": (time.perf_counter() - start) / 60,
    }


if __name__ == "__main__":
    main()
