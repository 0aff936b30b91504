"""The C++ kernels in tests: which levels of instructions there are, and what makes a call run on one of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import arraynorm as an
from arraynorm.kernels import cpu
from launching import FOREIGN

needs_native = pytest.mark.skipif(cpu.native is None, reason=f"no C++ kernels here: {cpu.reason}")
"""For what there is nothing to test of without the compiled module; ARRAYNORM_REQUIRE_NATIVE=1 makes sure there is."""

LEVELS: list[str] = cpu.native.isa_levels() if cpu.native is not None else ["none"]
"""The lowest first, the one in use last."""

each_level = pytest.mark.parametrize("level", LEVELS)


@contextmanager
def instructions(level: str) -> Iterator[None]:
    """Run the C++ kernels on this level of instructions."""
    assert cpu.native is not None
    before = cpu.native.isa()
    cpu.native.set_isa(level)
    try:
        yield
    finally:
        cpu.native.set_isa(before)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let the C++ kernels use so many threads."""
    before = an.get_num_threads()
    an.set_num_threads(number)
    try:
        yield
    finally:
        an.set_num_threads(before)


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, with these variables for arraynorm, and none that this process has."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ARRAYNORM_", *FOREIGN))}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parent,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,  # seconds: for a program that hangs; each takes about one
        check=False,
    )


def succeed(program: str, **environment: str) -> str:
    """What a program prints that must not fail."""
    process = run_python(program, **environment)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout
