"""The functional norms as a table: what all of them promise is tested once, over this."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import arraynorm as an
import oracle
from arraynorm.kernels import Kernel, reference
from data import Host, hard_names
from namespaces import EVERY_PATH, Namespace


class Example(NamedTuple):
    """An op on an x of this shape."""

    op: str
    shape: tuple[int, ...]
    options: dict[str, Any] = {}  # noqa: RUF012 (a NamedTuple's default; nobody writes to it)

    def __str__(self) -> str:
        options = "".join(f" {name}={value}" for name, value in self.options.items())
        return f"{self.op} {'x'.join(map(str, self.shape))}{options}"


GIVEN: dict[str, tuple[str, ...]] = {
    "batch_norm": ("weight", "bias"),
    "batch_norm_frozen": ("mean", "var", "weight", "bias"),
    "batch_norm_add_relu": ("addend", "weight", "bias"),
    "batch_norm_add_relu_frozen": ("addend", "mean", "var", "weight", "bias"),
    "instance_norm": ("weight", "bias"),
    "group_norm": ("weight", "bias"),
    "layer_norm": ("weight", "bias"),
    "rms_norm": ("weight",),
}
"""The arrays that an op takes besides x."""

EXAMPLES = [
    Example("batch_norm", (3, 4, 5)),
    Example("batch_norm_frozen", (3, 4, 5)),
    Example("batch_norm_add_relu", (3, 4, 5)),
    Example("batch_norm_add_relu_frozen", (3, 4, 5)),
    Example("instance_norm", (3, 4, 5)),
    Example("group_norm", (3, 4, 5), {"num_groups": 2}),
    Example("layer_norm", (3, 4, 5), {"normalized_shape": (4, 5)}),
    Example("rms_norm", (3, 4, 5), {"normalized_shape": (5,)}),
]
"""Each op once, on more than one set and with more than one value in each."""

each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.op)

_TYPES = [(xp, dtype) for xp in EVERY_PATH for dtype in xp.dtypes]
each_dtype = pytest.mark.parametrize(("xp", "dtype"), _TYPES, ids=[f"{xp.name}-{dtype}" for xp, dtype in _TYPES])
"""Every dtype of every library, on every path."""

_HARD = [(xp, dtype, name) for xp, dtype in _TYPES for name in hard_names(dtype)]
each_hard_data = pytest.mark.parametrize(
    ("xp", "dtype", "name"), _HARD, ids=[f"{xp.name}-{dtype}-{name}" for xp, dtype, name in _HARD]
)
"""Every hard data set that a dtype can hold, in every library."""


def draw(example: Example, seed: int = 0) -> dict[str, Host]:
    """Easy numbers for every array that the op takes, in float64."""
    rng = np.random.default_rng(seed)
    op, shape, options = example
    parameter_shape = options.get("normalized_shape") or (shape[options.get("axis", 1)],)
    arrays = {"x": rng.standard_normal(shape)}
    for name in GIVEN[op]:
        arrays[name] = rng.standard_normal(shape if name == "addend" else parameter_shape)
    if "var" in arrays:
        arrays["var"] = rng.uniform(0.5, 2, parameter_shape)
    return arrays


def draw_dy(example: Example, seed: int = 1) -> Host:
    return np.random.default_rng(seed).standard_normal(example.shape)


def to_library(xp: Namespace, arrays: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {name: None if array is None else xp.asarray(array, dtype) for name, array in arrays.items()}


def forward(example: Example, arrays: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    """(y, cache) of the package."""
    return getattr(an, f"{example.op}_forward")(**arrays, **example.options, **more)


def bare(example: Example, arrays: dict[str, Any], **more: Any) -> Any:
    """y alone, of the op that keeps no cache."""
    return getattr(an, example.op)(**arrays, **example.options, **more)


def backward(example: Example, dy: Any, cache: Any, **more: Any) -> Any:
    """The gradients of the package."""
    return getattr(an, f"{example.op}_backward")(dy, cache, **more)


def exact(example: Example, arrays: dict[str, Any], **more: Any) -> oracle.Norm:
    """The oracle's norm of NumPy arrays."""
    norm: oracle.Norm = getattr(oracle, example.op)(**arrays, **example.options, **more)
    return norm


def specialise(monkeypatch: pytest.MonkeyPatch, kernel: Kernel, function: Callable[..., Any]) -> None:
    """Let NumPy arrays take `function`, and no public call an answer past it."""
    monkeypatch.setitem(kernel.specialised, "numpy", function)
    monkeypatch.setattr(kernel, "direct", lambda *_: None)


def kernels() -> dict[str, Kernel]:
    """All kernels of the package, by name."""
    modules = [
        importlib.import_module(f"{reference.__name__}.{m.name}") for m in pkgutil.iter_modules(reference.__path__)
    ]
    return {name: value for module in modules for name, value in vars(module).items() if isinstance(value, Kernel)}
