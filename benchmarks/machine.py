"""What a result depends on: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import re
import resource
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import arraynorm as an

_HERE = Path(__file__).parent


def describe() -> dict[str, Any]:
    return {
        "machine": _machine(),
        "versions": _versions(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "load average": os.getloadavg(),
        "arraynorm": {key: value for key, value in an.show_config("dicts").items() if key == "C++"}
        | {"file": Path(an.__file__).parent.parent.name},
    }


def page_faults(call: Any) -> int:
    """How often this process touched memory that the system had to provide, during the call."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def faults_of_fresh_memory() -> int:
    """Page faults of a second block of 64 MB, after a first one was freed: none where malloc keeps its memory."""
    for _ in range(2):
        faults = page_faults(lambda: np.zeros(1 << 26, np.uint8).fill(1))
    return faults


def caches() -> dict[str, str]:
    """The sizes of a core's caches, such as 2048K of "L2 Unified"; none where the system does not say."""
    return {
        f"L{_text(index / 'level').strip()} {_text(index / 'type').strip()}": _text(index / "size").strip()
        for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    }


def _machine() -> dict[str, Any]:
    info = _text("/proc/cpuinfo")
    model = re.search(r"^model name\s*: (.*)$", info, re.MULTILINE)
    return {
        "processor": model[1] if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": caches(),
        "virtual": "hypervisor" in info,
        "system": f"{platform.system()} {platform.release()}",
        "libc": " ".join(platform.libc_ver()),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("arraynorm", "numpy", "torch", "numba", "ml_dtypes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def _commit() -> str:
    """Of the checkout that these files are in, with a + where files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=_HERE, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!results")
    except FileNotFoundError:
        return "unknown: no git"
    return (commit + "+" * bool(changed)) or "unknown: no checkout"


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
