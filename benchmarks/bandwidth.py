"""The yardstick: how fast this machine copies memory to memory with non-temporal stores.

These write full cache lines without reading them first, which is the least that a norm of an array larger than the
caches has to move. `numpy.copyto` is no yardstick: it calls memcpy, and glibc's turns to such stores only above a
threshold that it derives from the cache size that the processor reports: 192 MB on a virtual EPYC with 32 MB of cache,
and half as fast below. So a C routine is compiled here; without a compiler memcpy is used, and `streams` says so.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SIZE = 128 << 20  # bytes copied: several times the last-level cache; and 50 us to wake a thread are 1 % of it

_SOURCE = """
#include <emmintrin.h>
#include <stddef.h>

void copy(char *to, const char *from, size_t size) {
    for (size_t i = 0; i < size; i += 64) {
        const __m128i *in = (const __m128i *)(from + i);
        __m128i *out = (__m128i *)(to + i);
        __m128i a = _mm_load_si128(in), b = _mm_load_si128(in + 1);
        __m128i c = _mm_load_si128(in + 2), d = _mm_load_si128(in + 3);
        _mm_stream_si128(out, a);
        _mm_stream_si128(out + 1, b);
        _mm_stream_si128(out + 2, c);
        _mm_stream_si128(out + 3, d);
    }
    _mm_sfence();
}
"""


class Copy:
    """Copies `size` bytes between two blocks of its own, on so many threads."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size // 4096 * 4096
        routine, self.reason = _compile()
        self.streams = routine is not None
        self._copy: Callable[[int, int, int], object] = routine or ctypes.memmove
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


def _compile() -> tuple[Callable[[int, int, int], object] | None, str]:
    """The C routine, or why there is none."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "cc", "gcc", "clang"))), None)
    if compiler is None:
        return None, "no C compiler: memcpy, which may not stream"
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "copy.c"), Path(folder, "copy.so")
        source.write_text(_SOURCE)
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)]
        if subprocess.run(command, capture_output=True).returncode:
            return None, "the C routine does not compile here (it needs SSE2): memcpy, which may not stream"
        routine = ctypes.CDLL(str(library)).copy  # stays loaded when the file is gone
    routine.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    routine.restype = None
    return routine, ""
