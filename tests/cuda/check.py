"""`make cuda-check`: every instance in the emulator and through NVRTC, and the records that README's table is made of.

    python -m cuda.check [--results DIR] [--jobs N] [--recorded]

What the records say was done to the same sources is not done again; they are committed, so that this holds for any
checkout. With --recorded nothing is run, and the exit status is 1 where something is left to do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from arraynorm.kernels.cuda import _loader, instances
from cuda import nvrtc
from cuda.test_every_instance import SCHEDULES

TESTS = Path(__file__).parents[1]
RESULTS = TESTS.parent / "benchmarks" / "results"
COMPILED, EMULATED = "cuda_compiled.json", "cuda_emulated.json"

RUN_NO_KERNEL = ("check.py", "nvrtc.py", "test_loader.py", "test_records.py")
"""Files of tests/cuda that the emulated kernels do not depend on."""


def inputs() -> str:
    """The hash of the kernels, their Python, the emulator and its tests.

    What they are held to is not in it (tests/oracle.py, tests/tolerances.py, ...): `make test` holds an instance of
    each template to that at every change.
    """
    package = Path(_loader.__file__).parent
    files = [file for file in sorted((TESTS / "cuda").glob("*.*")) if file.name not in RUN_NO_KERNEL]
    files += sorted(package.glob("*.py"))
    parts = [(file.name, file.read_text()) for file in files]
    return hashlib.sha256(repr((parts, _loader.source_hashes())).encode()).hexdigest()[:16]


def emulate(jobs: int) -> dict[str, Any]:
    """The record of the tests of tests/cuda, which run every instance; and the suite on CuPy's arrays, imitated."""
    of_what = inputs()
    # half an hour for a test: it may be paused for as long; deadlocks the emulator finds by itself
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", str(jobs), "-p", "no:cacheprovider", "--timeout", "1800"]
    others = [f"--ignore=cuda/{name}" for name in RUN_NO_KERNEL]  # that README is up to date shows only after this
    for command in (
        ["cuda", "-m", "not parity", *others],
        ["-p", "suite_on_imitated_cupy", "-k", "cupy or a_device_gives"],
    ):
        done = subprocess.run([*pytest, *command], cwd=TESTS, check=False)
        if done.returncode:
            sys.exit(done.returncode)
    return {
        "what": "run in the emulator",
        "sources": _loader.source_hashes(),
        "inputs": of_what,
        "schedules": len(SCHEDULES),
        "instances": [f"{one.source}: {one.name}" for one in instances()],
    }


def read(file: Path) -> dict[str, Any]:
    """A record, empty where there is none."""
    return dict(json.loads(file.read_text())) if file.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--recorded", action="store_true", help="run nothing; 1 where something is left to do")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    compiled, emulated = (read(options.results / name) for name in (COMPILED, EMULATED))
    changed = nvrtc.changed(compiled, nvrtc.ARCHITECTURES)
    current = emulated.get("inputs") == inputs()
    for file, digest in _loader.source_hashes().items():
        now = "not compiled yet" if file in changed else f"reused, compiled by {compiled['compilers'][file]}"
        print(f"NVRTC: {file} {digest}: {now} for {', '.join(nvrtc.ARCHITECTURES)}")
    print(f"emulator: {inputs()}: {'reused, all tests passed' if current else 'not run yet'}", flush=True)
    if options.recorded:
        sys.exit(bool(changed) or not current)
    if changed:
        record, faults = nvrtc.check(nvrtc.ARCHITECTURES, options.jobs, compiled)
        if faults:
            sys.exit("\n".join(faults))
        (options.results / COMPILED).write_text(json.dumps(record, indent=1) + "\n")
    if not current:
        (options.results / EMULATED).write_text(json.dumps(emulate(options.jobs), indent=1) + "\n")


if __name__ == "__main__":
    main()
