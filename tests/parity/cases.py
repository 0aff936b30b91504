"""A parity case: what to call, with which options, on which numbers.

`ours` and `torch_side` each have `results(case)`, which runs a case and returns named arrays; `exact.Truth` says what
they should be. The cases stand in `grid`, or are drawn (`draws`). `test_live` compares the three; `record` writes
torch's results of `grid.RECORDED` to a file, which `test_recorded` replays without torch.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

STEPS = 3
TRACKED = 2
"""Batches that a layer's buffers have seen before the first step."""
Array = np.ndarray[Any, Any]
Options = tuple[tuple[str, Any], ...]
Results = dict[str, Array]


class OpCase(NamedTuple):
    """One call of a functional op and its backward, with the running statistics where the op feeds them."""

    target: str
    shape: tuple[int, ...]
    options: Options
    """Keyword arguments of the op."""
    given: tuple[str, ...]
    """Which of weight, bias and addend there are."""
    dtype: str
    momentum: float = 0.3
    """Of the running statistics."""
    mean_over_std: float = 0.5


class LayerCase(NamedTuple):
    """Three steps of a layer: forward and backward on a new input each, gradients accumulated."""

    target: str
    shape: tuple[int, ...]
    options: Options
    """Arguments of the constructor."""
    dtype: str
    modes: str = "ttt"
    """For each step whether it is training (t) or eval (e)."""
    changed: Options = ()
    """Attributes assigned after construction."""
    addend: bool = False
    mean_over_std: float = 0.5


class QuantizedCase(NamedTuple):
    """One call of a quantized op or layer: every 8-bit level in every channel."""

    target: str
    channels: int
    dtype: str
    scales: tuple[float, float]
    """Of x and of y."""
    axis: int = 1
    """Of the channels: 1, or -1 for an op (torch's channels-last memory format)."""


Case = OpCase | LayerCase | QuantizedCase


def name(case: Case) -> str:
    """A test's name, and what the numbers are drawn from: "batch_norm-5x3-axis=1-weight+bias-float64"."""
    words = [case.target]
    if isinstance(case, QuantizedCase):
        words += [str(case.channels), f"axis={case.axis}", *map(str, case.scales), case.dtype]
        return "-".join(words)
    words.append("x".join(map(str, case.shape)))
    words += [f"{key}={_word(value)}" for key, value in case.options]
    if isinstance(case, OpCase):
        words.append("+".join(case.given) or "plain")
        words += [f"momentum={case.momentum}"] if case.momentum != 0.3 else []
    else:
        words.append(case.modes)
        words += [f"then-{key}={_word(value)}" for key, value in case.changed]
        words += ["addend"] if case.addend else []
    if case.mean_over_std != 0.5:
        words.append(f"mean={case.mean_over_std:g}std")
    return "-".join((*words, case.dtype))


def _word(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


# -- numbers ---------------------------------------------------------------------------------------------------


def dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


class Numbers:
    """Pseudo-random arrays, the same under every version of NumPy and on every machine.

    The bits are splitmix64 of a counter (Steele, Lea & Flood 2014), in integers. A deviate is the sum of four
    uniform ones, scaled to variance 1: additions and one product in float64, no libm, and never beyond 3.5.
    """

    def __init__(self, seed: str) -> None:
        self._state = np.uint64(zlib.crc32(seed.encode()) << 20)

    def bits(self, count: int) -> Array:
        counter = self._state + np.arange(1, count + 1, dtype=np.uint64)
        self._state += np.uint64(count)
        z = counter * np.uint64(0x9E3779B97F4A7C15)  # array products wrap, as they must here
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Array:
        size = int(np.prod(shape))
        return (low + (high - low) * ((self.bits(size) >> np.uint64(11)) * 2.0**-53)).reshape(shape)

    def normal(self, shape: tuple[int, ...], mean: float = 0.0) -> Array:
        a, b, c, d = self.uniform((4, *shape))
        return mean + ((a + b) + (c + d) - 2) * 1.7320508075688772


class Inputs(NamedTuple):
    """What a case is computed from; None is not given."""

    x: list[Array]
    """One per step."""
    dy: list[Array]
    addend: list[Array] | None
    weight: Array | None
    bias: Array | None
    running_mean: Array
    running_var: Array


def inputs(case: OpCase | LayerCase) -> Inputs:
    """The numbers of a case. Weights are away from 0; running variances, too."""
    numbers, kind = Numbers(name(case)), dtype(case.dtype)
    # parameters and buffers of a half-precision x are float32: torch's batch norm takes no others
    wide = np.promote_types(kind, np.float32) if case.dtype in ("float32", "float64") else np.dtype(np.float32)
    steps, shape = (1 if isinstance(case, OpCase) else STEPS), parameter_shape(case)
    x, dy, addend = (
        [numbers.normal(case.shape, mean).astype(kind) for _ in range(steps)] for mean in (case.mean_over_std, 0, 0)
    )
    weight = (numbers.uniform(shape, 0.5, 1.5) * np.where(numbers.uniform(shape) < 0.3, -1, 1)).astype(wide)
    bias = numbers.normal(shape).astype(wide)
    running_mean = numbers.normal(shape, case.mean_over_std).astype(wide)
    running_var = numbers.uniform(shape, 0.5, 2.0).astype(wide)
    given = parameters(case)
    return Inputs(
        x,
        dy,
        addend if has_addend(case) else None,
        weight if "weight" in given else None,
        bias if "bias" in given else None,
        running_mean,
        running_var,
    )


def parameter_shape(case: OpCase | LayerCase) -> tuple[int, ...]:
    options = dict(case.options)
    if "normalized_shape" in options:
        return tuple(options["normalized_shape"])
    if isinstance(case, OpCase):
        return (case.shape[options.get("axis", 1)],)
    return (options.get("num_features", options.get("num_channels")),)


def has_addend(case: OpCase | LayerCase) -> bool:
    return case.addend if isinstance(case, LayerCase) else "addend" in case.given


def parameters(case: OpCase | LayerCase) -> tuple[str, ...]:
    """Which of weight and bias there are; for a layer, by its constructor's arguments and their defaults."""
    if isinstance(case, OpCase):
        return tuple(name for name in ("weight", "bias") if name in case.given)
    options = dict(case.options)
    affine = options.get("affine", options.get("elementwise_affine", not case.target.startswith("InstanceNorm")))
    if not affine:
        return ()
    return ("weight",) if case.target == "RMSNorm" or not options.get("bias", True) else ("weight", "bias")


def tracks(case: LayerCase) -> bool:
    """Whether the layer is built with running statistics, by the constructor's arguments and their defaults."""
    has_buffers = "BatchNorm" in case.target or "InstanceNorm" in case.target
    return has_buffers and dict(case.options).get("track_running_stats", "BatchNorm" in case.target)


def state(case: LayerCase) -> dict[str, Array]:
    """The state_dict that a case's layer starts from, as torch would save it, in NumPy arrays."""
    given = inputs(case)
    arrays = {key: getattr(given, key) for key in parameters(case)}
    if tracks(case):
        arrays |= {"running_mean": given.running_mean, "running_var": given.running_var}
        arrays["num_batches_tracked"] = np.asarray(TRACKED, dtype=np.int64)
    return arrays


# -- quantized -------------------------------------------------------------------------------------------------


class QuantizedInputs(NamedTuple):
    xq: Array
    """(1, C, 16, 16), for a 3-D layer (1, C, 4, 8, 8), for axis -1 (1, 16, 16, C): all 256 levels in every channel."""
    mean: Array
    var: Array
    weight: Array
    bias: Array
    x_zero_point: int
    y_zero_point: int


def quantized_inputs(case: QuantizedCase) -> QuantizedInputs:
    """Statistics and parameters (C,) float32, as trained nets have them, and zero points inside the range."""
    numbers, shape = Numbers(name(case)), (case.channels,)
    limits = np.iinfo(case.dtype)
    levels = np.arange(limits.min, limits.max + 1, dtype=case.dtype)
    spatial = (4, 8, 8) if case.target.endswith("3d") else (16, 16)
    xq = np.broadcast_to(levels, (1, case.channels, 256)).reshape(1, case.channels, *spatial)
    return QuantizedInputs(
        np.ascontiguousarray(np.moveaxis(xq, 1, case.axis)),
        numbers.normal(shape).astype(np.float32),
        numbers.uniform(shape, 0.5, 2.0).astype(np.float32),
        numbers.uniform(shape, -1.5, 1.5).astype(np.float32),
        numbers.normal(shape).astype(np.float32),
        limits.min + 120,
        limits.min + 131,
    )


def quantized_state(case: QuantizedCase) -> dict[str, Array]:
    """The state_dict of a quantized layer, as torch would save it, in NumPy arrays."""
    given = quantized_inputs(case)
    return {
        "weight": given.weight,
        "bias": given.bias,
        "running_mean": given.mean,
        "running_var": given.var,
        "num_batches_tracked": np.asarray(TRACKED, dtype=np.int64),
        "scale": np.asarray(case.scales[1], dtype=np.float32),
        "zero_point": np.asarray(given.y_zero_point, dtype=np.int64),
    }
