"""The runs of tests/cuda/examples.py on a device; python -m gpu.on_device is what compute-sanitizer watches."""

from __future__ import annotations

from typing import Any

import numpy as np

from arraynorm.kernels import only
from cuda.examples import RUNS, Run
from norms import backward, forward


def to_device(array: Any) -> Any:
    """A copy on the device, with the strides of the array."""
    import cupy

    order = np.argsort([-abs(step) for step in array.strides], kind="stable")
    moved = np.ascontiguousarray(array.transpose(order))
    if str(array.dtype) == "bfloat16":  # by its bits: CuPy has no conversions of its own
        return cupy.asarray(moved.view(np.uint16)).view(array.dtype).transpose(np.argsort(order).tolist())
    return cupy.asarray(moved).transpose(np.argsort(order).tolist())


def results(run: Run, arrays: dict[str, Any], dy: Any) -> dict[str, Any]:
    """All that an op and its backward give, by name."""
    y, cache = forward(run.example, arrays)
    gradients = backward(run.example, dy, cache)
    found = {"y": y, **{name: getattr(cache, name, None) for name in ("mean", "var", "rstd", "mask")}}
    found |= gradients._asdict()
    return {name: value for name, value in found.items() if value is not None}


def main() -> None:
    count = 0
    for dtype, runs in RUNS.items():
        for run in runs(dtype):
            arrays, dy = run.arrays(dtype)
            with only("specialised"):
                results(run, {name: to_device(array) for name, array in arrays.items()}, to_device(dy))
            count += 1
    print(f"{count} runs")


if __name__ == "__main__":
    main()
