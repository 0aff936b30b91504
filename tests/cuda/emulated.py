"""The package's CUDA path on NumPy arrays: the same Python, plans and sources, with the emulator in CuPy's place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np

from arraynorm.kernels import cuda, only
from arraynorm.kernels.cuda import _loader, _steps
from arraynorm.kernels.cuda._instances import FORMS, Instance, instances
from cuda import emulator
from norms import kernels

SMALL = _loader.Device(processors=3, shared_bytes=32 << 10)
"""So few and so small that plans for small arrays cut units into parts, leave the chip, and walk grids by strides."""

LARGE = _loader.Device(processors=132, shared_bytes=227 << 10)
"""An H200's."""

GUARD = 64
"""Bytes before and after each output, which nothing may write."""


@contextmanager
def emulated(
    device: _loader.Device = SMALL, *, seed: int = 0, resident: int = 1, flags: Sequence[str] = ()
) -> Iterator[list[Instance]]:
    """In this context NumPy arrays go through the CUDA kernels, and nothing else; yields the instances launched."""

    def compiled(instance: Instance) -> emulator.Kernel:
        kernel = module_of(instance, tuple(flags)).kernel(instance.name)
        kernel.seed, kernel.resident = seed, resident
        return kernel

    with _in_cupys_place(device, compiled) as launched:
        yield launched


@contextmanager
def dry(device: _loader.Device = SMALL) -> Iterator[list[Instance]]:
    """As `emulated`, without running the kernels: outputs stay NaN, and nothing is compiled."""
    with _in_cupys_place(device, lambda instance: lambda grid, block, arguments, shared_mem: None) as launched:
        yield launched


@contextmanager
def _in_cupys_place(device: _loader.Device, compile_one: Callable[[Instance], Any]) -> Iterator[list[Instance]]:
    launched: list[Instance] = []
    guarded: list[np.ndarray[Any, Any]] = []

    def compiled(instance: Instance, number: int) -> Any:
        launched.append(instance)
        return compile_one(instance)

    def fresh(like: Any, shape: tuple[int, ...] | None, dtype: str) -> Any:
        """NaN in every float, with guards around."""
        pattern = np.empty_like(like) if shape is None else np.empty(shape, dtype)
        memory = np.full(pattern.nbytes + 2 * GUARD, 0xFF, np.uint8)
        guarded.append(memory)
        inside = memory[GUARD : GUARD + pattern.nbytes].view(pattern.dtype)
        order = np.argsort([-abs(step) for step in pattern.strides], kind="stable")
        return inside.reshape([pattern.shape[axis] for axis in order]).transpose(np.argsort(order))

    replaced = {name: kernel.specialised["cupy"] for name, kernel in kernels().items() if "cupy" in kernel.specialised}
    assert {case.kernel for case in cuda.CASES} == set(replaced)
    patches = [mock.patch.dict(kernels()[name].specialised, numpy=function) for name, function in replaced.items()]
    patches += [mock.patch.object(kernels()[name], "direct", return_value=None) for name in replaced]
    patches.append(mock.patch.object(_steps, "fresh", fresh))
    patches.append(mock.patch.multiple(_loader, compiled=compiled, properties=lambda number: device))
    patches.append(mock.patch.multiple(_loader, on_device=lambda x: nullcontext(), _device_number=lambda x: 0))
    for patch in patches:
        patch.start()
    try:
        with only("specialised"):
            yield launched
    finally:
        for patch in reversed(patches):
            patch.stop()
    for memory in guarded:
        assert (memory[:GUARD] == 0xFF).all(), "a kernel wrote before an output"
        assert (memory[-GUARD:] == 0xFF).all(), "a kernel wrote after an output"


def module_of(instance: Instance, flags: tuple[str, ...] = ()) -> emulator.Module:
    """The compiled module that holds an instance, with all others of its source that have its dtype and width."""
    return _module(instance.source, arguments(instance), flags)


@functools.cache
def _module(source: str, kind: tuple[str, ...], flags: tuple[str, ...]) -> emulator.Module:
    names = [one.name for one in instances() if (one.source, arguments(one)) == (source, kind)]
    return emulator.Module(_loader.source(source), names, flags)


def arguments(instance: Instance) -> tuple[str, ...]:
    """Type and width of an instance: its arguments but for form and flag."""
    given = instance.name.rstrip(">").partition("<")[2].split(", ")
    return tuple(a for a in given if a not in (*FORMS, "true", "false"))
