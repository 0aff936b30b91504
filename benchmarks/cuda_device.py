"""What the CUDA benchmark knows of its device: its name, its copy bandwidth, and how long a call takes on it."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from arraynorm.kernels.cuda import _loader

CALLS = 20
"""Between two events: launches of a few microseconds are timed back to back."""


def cupy_with_a_device() -> ModuleType:
    """CuPy, or an exit that says what is missing."""
    try:
        import cupy
    except ImportError:
        sys.exit("no CuPy here: pip install arraynorm[cuda13] (or cuda12)")
    if not cupy.cuda.is_available():
        sys.exit("no CUDA device here: CuPy found none, or no driver; nothing was run")
    return cupy


def description(cupy: ModuleType) -> dict[str, Any]:
    """Device, driver and versions, and the hashes of the CUDA sources: what a measurement is about."""
    number = cupy.cuda.Device().id
    found = cupy.cuda.runtime.getDeviceProperties(number)
    return {
        "device": found["name"].decode(),
        "compute_capability": f"{found['major']}.{found['minor']}",
        "processors": found["multiProcessorCount"],
        "driver": driver_version(),
        "driver's CUDA": cupy.cuda.runtime.driverGetVersion(),
        "runtime": cupy.cuda.runtime.runtimeGetVersion(),
        "versions": {name: _version(name) for name in ("arraynorm", "numpy", "torch")} | {"cupy": cupy.__version__},
        "python": platform.python_version(),
        "commit": commit(),
        "sources": _loader.source_hashes(),
    }


def driver_version() -> str | None:
    """NVIDIA's number of the driver, as nvidia-smi says it."""
    return _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0] or None


def commit() -> str:
    """Of the checkout that this file is in; "+" where it has changes, but for records."""
    git = ("git", "-C", str(Path(__file__).parent))
    changes = _said(*git, "status", "--porcelain", "--untracked-files=no", ":(top)", ":(top,exclude)benchmarks/results")
    return (_said(*git, "rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changes else "")


def _said(*command: str) -> str:
    """What a program prints, or nothing where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def interleaved(
    calls: Mapping[str, Callable[[], object]], stream: Any, events: Callable[[], Any], turns: int
) -> dict[str, float]:
    """Median seconds of each call on `stream`, over `turns` turns in which each competitor has one."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():  # compile, allocate
        call()
    for _ in range(turns):
        for name, call in calls.items():
            start, end = events(), events()
            start.record(stream)
            for _ in range(CALLS):
                call()
            end.record(stream)
            end.synchronize()
            times[name].append(_milliseconds(start, end) / CALLS / 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def _milliseconds(start: Any, end: Any) -> float:
    import cupy

    return float(cupy.cuda.get_elapsed_time(start, end))


def copy_bandwidth(cupy: ModuleType, stream: Any, turns: int) -> float:
    """Bytes read and written each second by the device's own copy of 1 GiB."""
    x = cupy.zeros(1 << 28, cupy.float32)
    y = cupy.empty_like(x)
    seconds = interleaved(
        {"copy": lambda: y.data.copy_from_device_async(x.data, x.nbytes, stream)}, stream, cupy.cuda.Event, turns
    )
    return 2 * x.nbytes / seconds["copy"]
