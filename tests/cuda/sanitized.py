"""Run emulated kernels under a sanitizer: in a process of its own, for the sanitizer must be loaded first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FLAGS = {"address": ("-fsanitize=address",), "thread": ("-fsanitize=thread",)}
_LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "TSAN_OPTIONS": "report_signal_unsafe=0:exitcode=66:ignore_noninstrumented_modules=1",
}


def run(sanitizer: str, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The finished process of a Python script, given as text, that compiles its kernels with FLAGS[sanitizer]."""
    found = subprocess.run(
        ["g++", f"-print-file-name={_LIBRARIES[sanitizer]}"], capture_output=True, text=True, check=True
    )
    tests = str(Path(__file__).parents[1])
    environment = os.environ | _OPTIONS | {"LD_PRELOAD": found.stdout.strip()}
    environment["PYTHONPATH"] = os.pathsep.join([tests, *sys.path])
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False, env=environment
    )
