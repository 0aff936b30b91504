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


def to_device(array: Any) -> Any:
    """A copy on the device, with the strides of the array."""
    import cupy

    order = np.argsort([-abs(step) for step in array.strides], kind="stable")
    back = np.argsort(order).tolist()
    moved = np.ascontiguousarray(array.transpose(order))
    if str(array.dtype) == "bfloat16":  # by its bits: CuPy 13 has no conversions of its own
        return cupy.asarray(moved.view(np.uint16)).view(array.dtype).transpose(back)
    return cupy.asarray(moved).transpose(back)


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
