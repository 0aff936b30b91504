"""The yardstick: how fast this machine copies memory to memory with non-temporal stores.

These write full cache lines without reading them first, which is the least that a norm of an array larger than the
caches has to move. `numpy.copyto` is no yardstick: it calls memcpy, and glibc's turns to such stores only above a
threshold that it derives from the cache size that the processor reports: 192 MB on a virtual EPYC with 32 MB of cache,
and half as fast below. So a C routine is compiled here (bandwidth.c); without a compiler memcpy is used, and `streams`
says so.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np

SIZE = 128 << 20  # bytes copied: several times the last-level cache; and 50 us to wake a thread are 1 % of it

_SOURCE = Path(__file__).with_suffix(".c")


class Copy:
    """Copies `size` bytes between two blocks of its own, on so many threads."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size // 4096 * 4096
        routines, reason = compiled()
        self.streams = routines is not None and bool(routines.has_streaming_stores())
        self.reason = "" if self.streams else f"memcpy, which may not stream: {reason or 'no such stores here'}"
        self._copy: Callable[[int, int, int], object] = ctypes.memmove
        if self.streams:
            self._copy = routines.copy
            self._copy.argtypes, self._copy.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], None
        self._block = np.ones(2 * self.size + 4096, np.uint8)
        self._start = self._block.ctypes.data + (-self._block.ctypes.data) % 4096
        self._workers = ThreadPoolExecutor(os.cpu_count())

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return 2 * self.size

    def __call__(self, threads: int) -> None:
        cuts = [self.size * i // threads // 64 * 64 for i in range(threads + 1)]
        parts = [(cuts[i], cuts[i + 1] - cuts[i]) for i in range(threads)]
        others = [self._workers.submit(self._part, *part) for part in parts[1:]]
        self._part(*parts[0])
        for other in others:
            other.result()

    def _part(self, offset: int, size: int) -> None:
        self._copy(self._start + self.size + offset, self._start + offset, size)


@cache
def compiled() -> tuple[ctypes.CDLL | None, str]:
    """The routines of bandwidth.c; or None, and why."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "cc", "gcc", "clang"))), None)
    if compiler is None:
        return None, "no C compiler"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "bandwidth.so")
        command = [compiler, "-O2", "-march=native", "-shared", "-fPIC", "-o", str(library), str(_SOURCE)]
        if subprocess.run(command, capture_output=True).returncode:
            return None, f"{_SOURCE.name} does not compile here"
        return ctypes.CDLL(str(library)), ""  # stays loaded when the file is gone
