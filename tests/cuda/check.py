"""`make cuda-check`: every instance in the emulator and through NVRTC, and the records that README's table is made of.

python -m cuda.check [--results DIR] [--jobs N] [--without-nvrtc]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from arraynorm.kernels.cuda import _loader, instances
from cuda.test_every_instance import SCHEDULES

HERE = Path(__file__).parent
EMULATED = HERE.parents[1] / "build" / "emulated.json"


def emulate(jobs: int) -> dict[str, object]:
    """The record of the tests of tests/cuda, which run every instance; what passed before is not run again."""
    inputs = {"source_hash": _loader.source_hash(), "tests": _hash_of_tests()}
    if EMULATED.exists() and (kept := json.loads(EMULATED.read_text()))["inputs"] == inputs:
        print("emulator: unchanged since it last passed, reused")
        return dict(kept["record"])
    command = [
        sys.executable,
        "-m",
        "pytest",
        "cuda",
        "-q",
        "-n",
        str(jobs),
        "-m",
        "not parity",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=HERE.parent, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    record = {
        "what": "run in the emulator",
        "source_hash": _loader.source_hash(),
        "schedules": len(SCHEDULES),
        "instances": [f"{one.source}: {one.name}" for one in instances()],
    }
    EMULATED.parent.mkdir(parents=True, exist_ok=True)
    EMULATED.write_text(json.dumps({"inputs": inputs, "record": record}))
    return record


def _hash_of_tests() -> str:
    package = Path(_loader.__file__).parents[2]
    files = sorted([*HERE.glob("*.*"), *HERE.parent.glob("*.py"), *package.rglob("*.py")])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE.parents[1] / "benchmarks" / "results")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--without-nvrtc", action="store_true", help="emulate only")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    if not options.without_nvrtc:
        from cuda import nvrtc

        record, faults = nvrtc.check(nvrtc.ARCHITECTURES, options.jobs)
        if faults:
            sys.exit("\n".join(faults))
        (options.results / "cuda_compiled.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.results / "cuda_emulated.json").write_text(json.dumps(emulate(options.jobs), indent=1) + "\n")


if __name__ == "__main__":
    main()
