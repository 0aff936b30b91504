"""From .cu files to running kernels: sources, compilation by CuPy, device properties, launches.

An instance takes about a third of a second of NVRTC. CuPy keeps it in its disk cache (CUPY_CACHE_DIR), keyed by the
source with all its includes, the options, the instance's name and the compiler; before CuPy 14.1 each process compiles
anew.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, cast

from arraynorm import _array
from arraynorm.kernels.cuda._instances import Instance, instances
from arraynorm.typing import Array

OPTIONS = ("-std=c++17", "-fmad=false")
"""No contraction but where a kernel says fma: the same bits from kernels that share a formula, and on the CPU."""

_FOLDER = Path(__file__).parent


class Device(NamedTuple):
    """What plans depend on."""

    processors: int
    """Streaming multiprocessors."""
    shared_bytes: int
    """Shared memory that one block may ask for."""


class Plan(NamedTuple):
    """One launch, but for its arguments."""

    instance: Instance
    blocks: int
    threads: int
    shared_bytes: int
    geometry: Any
    """The last argument: a struct Geometry, or None where the kernel has none."""


@functools.cache
def source(file: str) -> str:
    """The file with its includes in place, so that CuPy's cache sees all of it; errors point at the real lines."""
    return _inlined(file, set())


def code(file: str) -> str:
    """The source without comments, line markers and blank lines: what decides what is compiled."""
    lines = (re.sub(r"\s*//.*", "", line) for line in source(file).splitlines() if not line.startswith("#line"))
    return "\n".join(line for line in lines if line)


def source_hashes() -> dict[str, str]:
    """Of the code of each .cu file, and the options: what a record of a check or a measurement is about."""
    files = sorted({one.source for one in instances()})
    return {file: hashlib.sha256(repr((OPTIONS, code(file))).encode()).hexdigest()[:16] for file in files}


def _inlined(file: str, seen: set[str]) -> str:
    seen.add(file)
    lines = [f'#line 1 "{file}"']
    for number, line in enumerate((_FOLDER / file).read_text().splitlines(), 1):
        include = re.fullmatch(r'#include "(\w+\.cuh)"', line)
        if include is None:
            lines.append("" if line == "#pragma once" else line)  # it warns in a main file
        elif include[1] not in seen:
            lines += [_inlined(include[1], seen), f'#line {number + 1} "{file}"']
    return "\n".join(lines)


def launch(x: Array, plan: Plan, *arguments: Any) -> None:
    """Run a plan on x's device and the current stream of that device; nothing waits for it."""
    kernel = compiled(plan.instance, _device_number(x))
    given = arguments if plan.geometry is None else (*arguments, plan.geometry)
    kernel((plan.blocks,), (plan.threads,), given, shared_mem=plan.shared_bytes)


def device_of(x: Array) -> Device:
    """The properties of the device that x is on."""
    return properties(_device_number(x))


def on_device(x: Array) -> AbstractContextManager[Any]:
    """A context in which x's device is the current one, so that outputs and launches go there."""
    return cast("AbstractContextManager[Any]", x.device)


@functools.cache
def properties(number: int) -> Device:
    found = _array.cupy().cuda.runtime.getDeviceProperties(number)
    return Device(found["multiProcessorCount"], found["sharedMemPerBlockOptin"])


@functools.cache
def compiled(instance: Instance, number: int) -> Any:
    """A kernel of the current device, whose number is given."""
    module = _array.cupy().RawModule(
        code=source(instance.source), options=OPTIONS, backend="nvrtc", name_expressions=(instance.name,)
    )
    kernel = module.get_function(instance.name)
    # beyond 48 KiB only what was asked for beforehand; some is taken by the kernel's own arrays
    kernel.max_dynamic_shared_size_bytes = properties(number).shared_bytes - kernel.shared_size_bytes
    return kernel


def warm_up(chosen: Iterable[Instance] | None = None) -> int:
    """Compile kernels for the current device before they are needed; all of `instances()` by default.

    Parameters
    ----------
    chosen : iterable of Instance, optional

    Returns
    -------
    int
        How many. Each takes about a third of a second, or next to nothing when it is in CuPy's disk cache (14.1 on).
    """
    number = _array.cupy().cuda.Device().id
    wanted = tuple(instances() if chosen is None else chosen)
    for one in wanted:
        compiled(one, number)
    return len(wanted)


def _device_number(x: Array) -> int:
    return cast("int", x.device.id)
