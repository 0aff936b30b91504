"""What the emulator needs of a machine."""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, where the emulator cannot run."""
    missing = _missing()
    for item in items:
        if missing and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"the CUDA emulator needs {missing}"))


def _missing() -> str | None:
    if platform.machine() not in ("x86_64", "AMD64") or not sys.platform.startswith("linux"):
        return "Linux on x86-64"
    return None if shutil.which("g++") else "g++"
