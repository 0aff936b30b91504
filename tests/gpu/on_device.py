"""The runs of tests/cuda/examples.py on a device; python -m gpu.on_device is what compute-sanitizer watches."""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy as np

from arraynorm.kernels import only
from cuda.examples import RUNS, Run
from norms import backward, forward


@functools.cache
def held_dtypes() -> tuple[str, ...]:
    """The dtypes of RUNS that this CuPy carries: bfloat16 from 14 on, by its bits perhaps before."""
    try:
        bits = to_device(np.ones((2, 3), ml_dtypes.bfloat16))
        import cupy

        held = cupy.empty_like(bits).dtype == ml_dtypes.bfloat16 and bits.get().tobytes() == b"\x80\x3f" * 6
    except (TypeError, ValueError):  # each version has its own
        held = False
    return tuple(dtype for dtype in RUNS if held or dtype != "bfloat16")


def to_device(array: np.ndarray[Any, Any]) -> Any:
    """A copy on the device, strides and distance from a multiple of 16 bytes as in the array: so plans are alike."""
    import cupy

    low, high = np.lib.array_utils.byte_bounds(array)
    memory = np.zeros(low % 16 + high - low, np.uint8)
    first = array.ctypes.data - low + low % 16
    np.ndarray(array.shape, array.dtype, memory, first, array.strides)[...] = array
    end = first + (memory.size - first) // array.itemsize * array.itemsize
    elements = cupy.asarray(memory)[first:end].view(array.dtype)  # bfloat16 by its bits: CuPy 13 has no conversions
    return cupy.lib.stride_tricks.as_strided(elements, array.shape, array.strides)


def results(run: Run, arrays: dict[str, Any], dy: Any) -> dict[str, Any]:
    """All that an op and its backward give, by name."""
    y, cache = forward(run.example, arrays)
    gradients = backward(run.example, dy, cache)
    found = {"y": y, **{name: getattr(cache, name, None) for name in ("mean", "var", "rstd", "mask")}}
    found |= gradients._asdict()
    return {name: value for name, value in found.items() if value is not None}


def main() -> None:
    import cupy

    cupy.cuda.set_allocator(None)  # memory of its own for each array: what is written beside it is seen
    count = 0
    for dtype in held_dtypes():
        for run in RUNS[dtype](dtype):
            arrays, dy = run.arrays(dtype)
            with only("specialised"):
                results(run, {name: to_device(array) for name, array in arrays.items()}, to_device(dy))
            count += 1
    cupy.cuda.Device().synchronize()
    print(f"{count} runs, {', '.join(held_dtypes())}")


if __name__ == "__main__":
    main()
