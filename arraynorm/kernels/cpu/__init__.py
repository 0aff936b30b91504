"""Hot paths in C++ for NumPy arrays. The sources are in `src/`, a file per norm, named as in `reference/`.

Importing this module registers every function of the compiled module on the reference kernel of its name. Where that
module is missing, `native` is None, `reason` says why, and the reference kernels run.

ARRAYNORM_PURE=1 leaves it unused; ARRAYNORM_REQUIRE_NATIVE=1 makes its absence an ImportError; ARRAYNORM_ISA=baseline
takes a lower level of instructions than the processor has; ARRAYNORM_NUM_THREADS=n is the number of threads.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from arraynorm.kernels._kernel import Kernel, allowed_paths
from arraynorm.kernels.cpu._threads import default_threads
from arraynorm.kernels.reference import (
    batch_norm,
    batch_norm_add_relu,
    group_norm,
    instance_norm,
    layer_norm,
    quantized_batch_norm,
    rms_norm,
)

FLOATING = ("float16", "bfloat16", "float32", "float64")
QUANTIZED = ("uint8", "int8")
LAYOUTS = ("contiguous", "channels last", "padded or sliced", "any other strides, copied")

_MODULES = (
    batch_norm,
    batch_norm_add_relu,
    group_norm,
    instance_norm,
    layer_norm,
    quantized_batch_norm,
    rms_norm,
)


def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("ARRAYNORM_PURE", "0") not in ("", "0"):
        return None, "ARRAYNORM_PURE is set"
    try:
        return importlib.import_module("arraynorm.kernels.cpu._native"), ""
    except ImportError as error:
        if os.environ.get("ARRAYNORM_REQUIRE_NATIVE", "0") not in ("", "0"):
            raise
        return None, f"the compiled module is missing (it was installed without a C++ compiler?): {error}"


def _prepare(native: ModuleType) -> None:
    if isa := os.environ.get("ARRAYNORM_ISA"):
        native.set_isa(isa)
    native.set_num_threads(default_threads(os.environ))
    native.set_allowed_paths(allowed_paths)
    for name, kernel in _kernels().items():
        if hasattr(native, name):
            kernel.register("numpy")(getattr(native, name))
        if direct := getattr(native, f"direct_{name}", None):
            kernel.register_direct("numpy", direct)


def _kernels() -> dict[str, Kernel[..., object]]:
    """The reference kernels by name, in the order of their definition."""
    return {
        name: kernel
        for module in _MODULES
        for name, kernel in vars(module).items()
        if isinstance(kernel, Kernel) and kernel.__module__ == module.__name__  # and not imported there
    }


def cases() -> dict[str, str]:
    """Kernel -> what the fast path takes of it, or why the reference runs."""
    if native is None:
        return dict.fromkeys(_kernels(), f"reference: {reason}")
    return {
        name: f"C++: {', '.join(QUANTIZED if name.startswith('quantized') else FLOATING)}; {', '.join(LAYOUTS)}"
        for name in _kernels()
    }


native, reason = _load()
if native is not None:
    _prepare(native)
