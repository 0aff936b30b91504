"""All that needs a GPU (make gpu): the suite on CuPy, compute-sanitizer, the benchmark; one JSON record of it.

    python benchmarks/gpu.py [--only suite|sanitizers|benchmark] [--results DIR] [--jobs N] [--tool-seconds N]

With --only a part is run, and added to the record of the others if that is of the same device, versions and sources:
so the whole can be done in several sittings. On an H200 each part is meant to end within ten minutes.
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
import threading
from pathlib import Path
from typing import Any

import arraynorm
from cuda_device import cupy_with_a_device, description

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TOOLKITS = ("/usr/local/cuda", "/opt/cuda")


def suite(jobs: int) -> dict[str, Any]:
    """The tests over CuPy's arrays, and those that need a device."""
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cupy or gpu", "-n", str(jobs), "-p", "no:cacheprovider"]
    # CuPy's own: what of ours is deprecated the suite finds on the CPU
    command += ["-W", "ignore:CUDA path could not be detected:UserWarning", "-W", "ignore::DeprecationWarning"]
    returncode, output = _run(command, TESTS)
    last = output.strip().splitlines()[-1:]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", "".join(last))}
    failures = re.findall(r"^(?:FAILED|ERROR) (\S.*)$", output, re.MULTILINE)
    return {"returncode": returncode, **counts, "failures": failures[:100]}


def sanitizers(tool_seconds: float) -> dict[str, Any]:
    """compute-sanitizer's tools over the runs of tests/gpu/on_device.py; it comes with the CUDA toolkit."""
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), *TOOLKITS]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{folder}/bin" for folder in toolkits if folder)])
    program = shutil.which("compute-sanitizer", path=path)
    if program is None:
        print("not run: compute-sanitizer, which is on no path and comes with the CUDA toolkit")
        return {"not run": "compute-sanitizer was not found"}
    found: dict[str, Any] = {}
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", "1", sys.executable, "-m", "gpu.on_device"]
        returncode, output = _run(command, TESTS, tool_seconds)
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


def _run(command: list[str], folder: Path, seconds: float | None = None) -> tuple[int, str]:
    """Exit status and output, which is shown as it comes."""
    print("+", " ".join(command), flush=True)
    paths = [str(TESTS), str(Path(arraynorm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    timer = threading.Timer(seconds, process.kill) if seconds else None
    if timer:
        timer.start()
    lines = []
    for line in process.stdout or ():
        print(line, end="", flush=True)
        lines.append(line)
    returncode = process.wait()
    if timer:
        timer.cancel()
        if returncode < 0:
            lines.append(f"ended after {seconds:.0f} s\n")
    return returncode, "".join(lines)


def failures(record: dict[str, Any]) -> list[str]:
    """What of a record did not pass."""
    found = [part for part in ("suite", "benchmark") if record.get(part, {}).get("returncode")]
    tools = record.get("sanitizers", {})
    return found + [tool for tool in TOOLS if tools.get(tool, {}).get("returncode")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--only", choices=("suite", "sanitizers", "benchmark"), help="this part alone")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="of the suite (%(default)s)")
    parser.add_argument("--tool-seconds", type=float, default=140, help="for one of the sanitizers (%(default)s)")
    options = parser.parse_args()
    record = {"what": "run on a device"} | description(cupy_with_a_device())
    options.results.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", record["device"].lower()).strip("_")
    file = options.results.resolve() / f"cuda_{name}.json"
    earlier = json.loads(file.read_text()) if file.exists() else {}
    if options.only and {key: earlier.get(key) for key in record} == record:
        record = earlier
    parts = {
        "suite": lambda: suite(options.jobs),
        "sanitizers": lambda: sanitizers(options.tool_seconds),
        "benchmark": benchmark,
    }
    for part, run in parts.items():
        if options.only in (None, part):
            record[part] = run()
            file.write_text(json.dumps(record, indent=1) + "\n")  # what is done stays if the next part is cut off
    if failed := failures(record):
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
