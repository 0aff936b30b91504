"""CUDA kernels through CuPy, registered on the reference functions by being imported.

`CASES` is what they take: every kernel here, in every dtype and layout; the reference runs for arrays without elements
and where dy or the addend is of another dtype than x. **Not run on a GPU yet**: compiled for sm_75 to sm_120, and run
in the emulator of tests/cuda.
"""

from __future__ import annotations

import importlib.util
import itertools
from typing import NamedTuple

from arraynorm.kernels._kernel import Kernel
from arraynorm.kernels.cuda import (
    batch_norm,
    batch_norm_add_relu,
    group_norm,
    instance_norm,
    layer_norm,
    quantized_batch_norm,
    rms_norm,
)
from arraynorm.kernels.cuda._instances import C_TYPES, QUANTIZED_C_TYPES, Instance, instances
from arraynorm.kernels.cuda._loader import warm_up

__all__ = ["CASES", "LAYOUTS", "Case", "Instance", "instances", "warm_up"]

LAYOUTS = ("channels first", "channels last", "a view of some channels", "any strides")
"""Of x, dy and the outputs, each of its own."""


class Case(NamedTuple):
    """One combination that a kernel takes."""

    kernel: str
    dtype: str
    layout: str


def _cases() -> tuple[Case, ...]:
    modules = (batch_norm, batch_norm_add_relu, group_norm, instance_norm, layer_norm, rms_norm, quantized_batch_norm)
    found = []
    for module in modules:
        dtypes = QUANTIZED_C_TYPES if module is quantized_batch_norm else C_TYPES
        kernels = [name for name, value in vars(module.reference).items() if _is_own(value, module.reference.__name__)]
        found += [Case(*case) for case in itertools.product(kernels, dtypes, LAYOUTS)]
    return tuple(found)


def _is_own(value: object, module: str) -> bool:
    return isinstance(value, Kernel) and value.__module__ == module and "cupy" in value.specialised


CASES = _cases()


def cases() -> dict[str, str]:
    """Kernel -> what the fast path takes of it, or why the reference runs."""
    if importlib.util.find_spec("cupy") is None:
        return dict.fromkeys((case.kernel for case in CASES), "reference: CuPy is not installed")
    dtypes: dict[str, dict[str, None]] = {}
    for case in CASES:
        dtypes.setdefault(case.kernel, {})[case.dtype] = None
    return {kernel: f"CUDA: {', '.join(names)}; {', '.join(LAYOUTS)}" for kernel, names in dtypes.items()}
