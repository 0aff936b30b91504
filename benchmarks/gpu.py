"""All that needs a GPU, in one go (make gpu): the suite, compute-sanitizer, the benchmark; one JSON record of it.

python benchmarks/gpu.py [--results DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cuda_device import cupy_with_a_device, description

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def suite() -> dict[str, Any]:
    """The tests over CuPy's arrays, and those that need a device."""
    done = _run([sys.executable, "-m", "pytest", "-q", "-k", "cupy or gpu", "-p", "no:cacheprovider"], TESTS)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done[1])}
    return {"returncode": done[0], **counts}


def sanitizers() -> dict[str, Any]:
    """compute-sanitizer's tools over the runs of tests/gpu/on_device.py; it comes with the CUDA toolkit."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        print("compute-sanitizer is not on the PATH: not run")
        return {"not run": "compute-sanitizer is not on the PATH"}
    found = {}
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", "1", sys.executable, "-m", "gpu.on_device"]
        returncode, output = _run(command, TESTS)
        found[tool] = {"returncode": returncode, "summary": output.strip().splitlines()[-1:]}
    return found


def benchmark() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "record.json")
        returncode, _ = _run([sys.executable, str(HERE / "bench_cuda.py"), "--json", str(record)], HERE)
        if returncode:
            return {"returncode": returncode}
        found = json.loads(record.read_text())
        return {"returncode": 0, "copy GB/s": found["copy GB/s"], "rows": found["rows"]}


def _run(command: list[str], folder: Path) -> tuple[int, str]:
    """Exit status and output, which is shown as it comes."""
    print("+", " ".join(command), flush=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    for line in process.stdout or ():
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    record = {"what": "run on a device"} | description(cupy_with_a_device())
    record |= {"suite": suite(), "sanitizers": sanitizers(), "benchmark": benchmark()}
    options.results.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", record["device"].lower()).strip("_")
    (options.results / f"cuda_{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    failed = [key for key in ("suite", "benchmark") if record[key]["returncode"]]
    failed += [tool for tool, done in record["sanitizers"].items() if isinstance(done, dict) and done["returncode"]]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
