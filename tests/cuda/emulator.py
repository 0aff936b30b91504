"""Compile kernels with g++ and emulator.h; call them as CuPy calls its kernels, on NumPy arrays."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
BUILT = Path(os.environ.get("ARRAYNORM_EMULATOR_CACHE", HERE.parents[1] / "build/emulator"))  # by hash of all inputs
FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas")


class EmulatedError(RuntimeError):
    """What CUDA would not report: a deadlock, a divergent barrier, a shuffle with lanes that are not there."""


class Module:
    """The named instances of a source, compiled; `flags` may ask for a sanitizer."""

    def __init__(self, source: str, names: Iterable[str], flags: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        exports = "".join(f"EXPORT_KERNEL({i}, {name})\n" for i, name in enumerate(self.names))
        code = f'#include "emulator.h"\n#line 1 "kernels"\n{source}\n{exports}'
        inputs = (code, (HERE / "emulator.cpp").read_text(), (HERE / "emulator.h").read_text(), *FLAGS, *flags)
        self.library = BUILT / f"{hashlib.sha256(repr(inputs).encode()).hexdigest()[:24]}.so"
        BUILT.mkdir(parents=True, exist_ok=True)
        with open(self.library.with_suffix(".lock"), "w") as lock, tempfile.TemporaryDirectory(dir=BUILT) as folder:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one builds, the others wait
            if not self.library.exists():
                Path(folder, "kernels.cpp").write_text(code)
                _compile("-c", HERE / "emulator.cpp", "-o", f"{folder}/scheduler.o")  # never instrumented
                objects = (f"{folder}/kernels.cpp", f"{folder}/scheduler.o", "-o", f"{folder}/library.so")
                _compile(*flags, "-I", HERE, "-shared", *objects)
                os.replace(f"{folder}/library.so", self.library)  # whole or not at all
        self._handle = ctypes.CDLL(str(self.library))

    def kernel(self, name: str) -> Kernel:
        return Kernel(self._handle, self.names.index(name), name)


class Kernel:
    """One instance. `seed` chooses the order of threads, see emulator.cpp; so many blocks are `resident` at a time."""

    seed, resident = 0, 1

    def __init__(self, library: ctypes.CDLL, index: int, name: str) -> None:
        self.name, self._run, found = name, getattr(library, f"run_{index}"), (ctypes.c_int * 64)()
        self._run.restype = ctypes.c_char_p
        count = getattr(library, f"signature_{index}")(found)
        self.signature = [(chr(code >> 16), code & 0xFFFF) for code in found[:count]]

    def __call__(self, grid: tuple[int], block: tuple[int], arguments: Sequence[Any], shared_mem: int = 0) -> None:
        if len(arguments) != len(self.signature):
            raise TypeError(f"{self.name}: {len(arguments)} arguments for {len(self.signature)} parameters")
        values = [self._value(*both) for both in zip(arguments, self.signature, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        shared, seed = ctypes.c_size_t(shared_mem), ctypes.c_uint64(self.seed)
        error = self._run(*(ctypes.c_uint(n) for n in (*grid, *block)), shared, pointers, seed, self.resident)
        if error:
            raise EmulatedError(f"{self.name}: {error.decode()}")

    def _value(self, argument: Any, parameter: tuple[str, int]) -> Any:
        """The bytes of one argument, whose kind and size are checked: CuPy does not."""
        if argument is None:
            kind, data = "P", bytes(8)
        elif isinstance(argument, np.ndarray) and argument.dtype.names is None:
            kind, data = "P", np.uint64(argument.ctypes.data).tobytes()
        else:
            kind, data = {"i": "i", "u": "i", "f": "f", "V": "V"}[argument.dtype.kind], argument.tobytes()
        if (kind, len(data)) != parameter:
            raise TypeError(f"{self.name}: {argument!r} where {parameter} is expected")
        return (ctypes.c_char * len(data)).from_buffer_copy(data)


def _compile(*arguments: Any) -> None:
    done = subprocess.run(["g++", *FLAGS, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
