"""What the tests of the layers share: each class with an input that fits, drawn values, and snapshots.

A test of one behaviour must not fail for another one, so layers are filled with drawn values: what a constructor
puts into weights and buffers is looked at by its own tests alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

import arraynorm as an
from namespaces import NUMPY, Namespace, numpy_dtype, to_numpy

COUNTED = 4
"""Batches that a filled layer has counted."""


def draw(*shape: int, seed: int = 0, dtype: str = "float32") -> np.ndarray[Any, Any]:
    """Standard normal values as a NumPy array."""
    return np.random.default_rng(seed).normal(size=shape).astype(numpy_dtype(dtype))


def tree(module: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, module) of the module and all below it: what named_modules gives, but not by it, for it is tested."""
    yield path, module
    for name, child in module._modules.items():
        yield from tree(child, f"{path}.{name}")


def filled(layer: Any, seed: int = 1) -> Any:
    """`layer`, with drawn values written into its parameters and buffers; variances are positive."""
    rng = np.random.default_rng(seed)
    for _, module in tree(layer):
        arrays = {**module._parameters, **module._buffers}
        for name in (name for name in FILLED if arrays.get(name) is not None):
            array = arrays[name]
            values = COUNTED if name == "num_batches_tracked" else rng.uniform(0.5, 2.0, array.shape)
            array[...] = array_namespace(array).asarray(values, dtype=array.dtype)
    return layer


FILLED = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
BUFFERS = FILLED[2:]


class Case(NamedTuple):
    """A class, positional arguments of its constructor, and the shape of an input."""

    cls: Any
    args: tuple[Any, ...]
    shape: tuple[int, ...]

    def new(self, *args: Any, **options: Any) -> Any:
        """A layer as constructed, of one rank."""
        if self.cls is an.SyncBatchNorm:
            options.setdefault("comm", an.distributed.SELF)
        return self.cls(*self.args, *args, **options)

    def layer(self, **options: Any) -> Any:
        """A filled layer of one rank, affine and tracking unless the options say otherwise."""
        return filled(self.new(**{**(SETTINGS if self in RUNNING else {}), **options}))

    def x(self, seed: int = 0, dtype: str = "float32", xp: Namespace = NUMPY) -> Any:
        return xp.asarray(draw(*self.shape, seed=seed), dtype)

    def __str__(self) -> str:
        return str(self.cls.__name__)


# Said and not left to the defaults, which are a behaviour of their own.
SETTINGS = {"eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True}
INSTANCE_CLASSES = (an.InstanceNorm1d, an.InstanceNorm2d, an.InstanceNorm3d)
BATCH_NORMS = [
    Case(an.BatchNorm, (3,), (6, 3)),
    Case(an.BatchNorm1d, (3,), (4, 3, 5)),
    Case(an.BatchNorm2d, (3,), (4, 3, 2, 3)),
    Case(an.BatchNorm3d, (3,), (2, 3, 2, 1, 3)),
]
SYNC_BATCH_NORMS = [Case(an.SyncBatchNorm, (3,), (4, 3, 2))]
FUSED_BATCH_NORMS = [
    Case(an.FusedBatchNorm, (3,), (6, 3)),
    Case(an.FusedBatchNorm1d, (3,), (4, 3, 5)),
    Case(an.FusedBatchNorm2d, (3,), (4, 3, 2, 3)),
    Case(an.FusedBatchNorm3d, (3,), (2, 3, 2, 1, 3)),
]
INSTANCE_NORMS = [
    Case(an.InstanceNorm1d, (3,), (4, 3, 5)),
    Case(an.InstanceNorm2d, (3,), (4, 3, 2, 3)),
    Case(an.InstanceNorm3d, (3,), (2, 3, 2, 1, 3)),
]
GROUP_NORM = Case(an.GroupNorm, (2, 6), (3, 6, 2, 2))
LAYER_NORM = Case(an.LayerNorm, ((4, 5),), (3, 4, 5))
RMS_NORM = Case(an.RMSNorm, ((4, 5),), (3, 4, 5))

BATCH_STATISTICS = BATCH_NORMS + SYNC_BATCH_NORMS + FUSED_BATCH_NORMS
RUNNING = BATCH_STATISTICS + INSTANCE_NORMS
"""Everything with running statistics."""
FLOATING = [*RUNNING, GROUP_NORM, LAYER_NORM, RMS_NORM]
FAMILIES = [BATCH_NORMS[2], *SYNC_BATCH_NORMS, FUSED_BATCH_NORMS[2], INSTANCE_NORMS[1], *FLOATING[-3:]]
"""One class for each way of computing."""


def backward(layer: Any, dy: Any) -> Any:
    """dx alone; a fused layer's daddend is None without an addend."""
    dx = layer.backward(dy)
    return dx.dx if isinstance(dx, tuple) else dx


def held(module: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every array of the tree, gradients included, bit for bit."""
    arrays = {
        f"{path}/{store}/{name}": array
        for path, owner in tree(module)
        for store in ("_parameters", "_buffers", "grads")
        for name, array in getattr(owner, store).items()
        if array is not None
    }
    return {
        key: (str(array.dtype), tuple(array.shape), to_numpy(array).tobytes()) for key, array in sorted(arrays.items())
    }


def values(layer: Any, *names: str) -> tuple[np.ndarray[Any, Any], ...]:
    """Copies of a layer's arrays."""
    return tuple(to_numpy(getattr(layer, name)).copy() for name in names)


def normalized(x: Any, axes: tuple[int, ...], eps: float = 1e-5) -> np.ndarray[Any, Any]:
    """(x - mean) / sqrt(biased variance + eps) in float64, by NumPy's own mean and var."""
    x = np.asarray(to_numpy(x), np.float64)
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


def per_channel(values: Any, ndim: int, axis: int = 1) -> np.ndarray[Any, Any]:
    """(C,) in float64, shaped to broadcast along `axis`."""
    shape = [1] * ndim
    shape[axis] = -1
    return np.asarray(to_numpy(values), np.float64).reshape(shape)


def affine(layer: Any, x_hat: np.ndarray[Any, Any], axis: int = 1) -> np.ndarray[Any, Any]:
    """x_hat * weight + bias in float64, where the layer has them."""
    if layer.weight is not None:
        x_hat = x_hat * per_channel(layer.weight, x_hat.ndim, axis)
    return x_hat if layer.bias is None else x_hat + per_channel(layer.bias, x_hat.ndim, axis)


def assert_close(actual: Any, expected: Any) -> None:
    """Equal to rounding: 16 units in the last place of the largest value.

    Layers compute in float64 and round once; in float64 itself sums of fewer than 100 terms in two orders differ by a
    few units. Data and statistics are of order 1.
    """
    actual, expected = to_numpy(actual), np.asarray(to_numpy(expected), np.float64)
    assert actual.shape == expected.shape
    unit = float(np.finfo(np.float64).eps if actual.dtype == np.float64 else _unit(actual.dtype))
    scale = max(1.0, float(np.max(np.abs(expected), initial=0.0)))
    np.testing.assert_allclose(actual.astype(np.float64), expected, rtol=0, atol=16 * unit * scale)


def _unit(dtype: Any) -> float:
    import ml_dtypes

    return float(ml_dtypes.finfo(dtype).eps)
