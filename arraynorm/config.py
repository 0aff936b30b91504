"""What the package runs on here, and the settings of its compiled kernels."""

from __future__ import annotations

import functools
import importlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from arraynorm import _check
from arraynorm.kernels import cpu
from arraynorm.kernels._kernel import BACKENDS

__all__ = [
    "get_num_threads",
    "register_with_threadpoolctl",
    "release_memory",
    "set_memory_limit",
    "set_num_threads",
    "show_config",
]


def set_num_threads(threads: int) -> None:
    """Let a call on NumPy arrays use at most so many threads, the caller's among them. Results do not depend on it.

    At the start it is ARRAYNORM_NUM_THREADS or, without it, the number of processors that the process may run on; under
    an MPI launcher that binds no rank, this rank's share of them. Without the compiled kernels it has no effect.

    Parameters
    ----------
    threads : int
        At least 1.

    Raises
    ------
    ValueError, TypeError
        `threads` is below 1, or no integer.
    """
    number = _check.integer("set_num_threads", "threads", threads)
    if number < 1:
        raise ValueError(f"set_num_threads: threads must be >= 1, got {number}")
    if cpu.native is not None:
        cpu.native.set_num_threads(min(number, 2**20))


def get_num_threads() -> int:
    """The most threads that a call on NumPy arrays uses; 1 without the compiled kernels."""
    return 1 if cpu.native is None else int(cpu.native.num_threads())


@functools.cache
def register_with_threadpoolctl() -> None:
    """Let `threadpoolctl.threadpool_limits` and `threadpool_info` cover the threads of the compiled kernels too.

    It is for the whole process, and to be called once; further calls, and those without the compiled kernels, change
    nothing. A limit is that of `set_num_threads`, for all threads of Python, and ends with the context.

    Raises
    ------
    ImportError
        threadpoolctl, 3.2 or newer, is not installed.
    """
    import threadpoolctl  # type: ignore[import-untyped,import-not-found,unused-ignore]

    if cpu.native is None:
        return
    filename = Path(str(cpu.native.__file__)).name

    class Controller(threadpoolctl.LibController):  # type: ignore[misc]
        user_api = internal_api = "arraynorm"
        filename_prefixes = (filename,)
        check_symbols = ("arraynorm_num_threads",)  # of all libraries of that name it is the one with this function

        def get_num_threads(self) -> int:
            return get_num_threads()

        def set_num_threads(self, num_threads: int) -> None:
            set_num_threads(num_threads)

        def get_version(self) -> str:
            return version("arraynorm")

    threadpoolctl.register(Controller)


def set_memory_limit(nbytes: int) -> None:
    """Keep at most so many bytes of dropped results for new ones; 0 keeps none. It is 512 MiB at the start.

    A large result would otherwise be new memory, which the system has to clear page by page: that takes as long as the
    norm. Only results of 1 MiB and more are kept, each for results of about its size.

    Raises
    ------
    ValueError, TypeError
        `nbytes` is negative, or no integer.
    """
    number = _check.integer("set_memory_limit", "nbytes", nbytes)
    if number < 0:
        raise ValueError(f"set_memory_limit: nbytes must be >= 0, got {number}")
    if cpu.native is not None:
        cpu.native.set_memory_limit(min(number, 2**62))


def release_memory() -> None:
    """Give back the memory of dropped results that is kept for new ones."""
    if cpu.native is not None:
        cpu.native.release_memory()


def show_config(mode: str = "text") -> dict[str, Any] | None:
    """Which code runs for each kernel and array library, and why not the fast one.

    Parameters
    ----------
    mode : "text" or "dicts"
        Print it, or return it as a dictionary.

    Raises
    ------
    ValueError
        Another mode.
    """
    if mode not in ("text", "dicts"):
        raise ValueError(f'show_config: mode must be "text" or "dicts", got {mode!r}')
    config = {
        "arraynorm": version("arraynorm"),
        "numpy": version("numpy"),
        "C++": _compiled(),
        "kernels": {library: _paths(module) for library, module in BACKENDS.items()},
    }
    if mode == "dicts":
        return config
    print("\n".join(_lines(config)))
    return None


def _compiled() -> dict[str, Any]:
    """The state of the compiled module."""
    if cpu.native is None:
        return {"used": False, "reason": cpu.reason}
    return {
        "used": True,
        "instructions": cpu.native.isa(),
        "available": cpu.native.isa_levels(),
        "threads": cpu.native.num_threads(),
        "memory limit": cpu.native.memory_limit(),
        "memory kept": cpu.native.memory_kept(),
    }


def _paths(module: str) -> dict[str, str]:
    """Kernel -> the cases that a backend's fast path takes, or why it takes none."""
    try:
        backend = importlib.import_module(module)
    except ImportError as error:
        return {"all": f"reference: {error}"}
    cases: dict[str, str] = backend.cases()
    return cases


def _lines(config: dict[str, Any]) -> list[str]:
    lines = [f"arraynorm {config['arraynorm']}, NumPy {config['numpy']}"]
    compiled = ", ".join(f"{name} {value}" for name, value in config["C++"].items())
    lines.append(f"C++ kernels: {compiled}")
    for library, paths in config["kernels"].items():
        for path in dict.fromkeys(paths.values()):
            lines.append(f"{library} arrays, {path}")
            lines.extend(f"    {name}" for name in paths if paths[name] == path)
    lines.append("other libraries, reference")
    return lines
