"""Layers whose input, attributes and state can be spoiled."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np

import arraynorm as an
from arraynorm.distributed import SELF
from bad_input.faults import (
    BY_ARGUMENT,
    LAYOUTS,
    MOMENTUM,
    NARROWER,
    NO_NUMBERS,
    NOT_ARRAYS,
    NOT_FLOATING,
    NOT_INTEGER,
    NOT_QUANTIZED,
    REQUIRED,
    SHAPES,
    SWAPPED,
    Fault,
    faults,
    one_element_for_all,
    values,
)

Shape = tuple[int, ...]


class Subject(NamedTuple):
    """A layer, a good input, and inputs of shapes that it refuses."""

    cls: str
    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    shape: Shape
    refused_shapes: tuple[Shape, ...]
    with_addend: bool = False

    @property
    def is_quantized(self) -> bool:
        return self.cls.startswith("Quantized")

    @property
    def speakers(self) -> str:
        """How the messages of its calls may begin: with the class, or with the op that it calls."""
        ops = "batch_norm|batch_norm_frozen|instance_norm|group_norm|layer_norm|rms_norm|quantized_batch_norm(_relu)?"
        return f"{self.cls}|({ops}|batch_norm_add_relu(_frozen)?)(_backward)?"

    def build(self) -> Any:
        """The layer, in float64 and with parameters and statistics that are not those of a new one."""
        layer = getattr(an, self.cls)(*self.positional, **self.keywords, dtype=np.float64)
        for name, array in layer.state_dict().items():
            if array.ndim:
                setattr(layer, name, drawn(name, array.shape))
        return layer

    def used(self, training: bool) -> Any:
        """A layer that has everything a call could change: gradients, a cache, hooks, a counter that has counted."""
        layer = self.build().train(training)
        layer.register_forward_pre_hook(lambda module, args: None)
        layer.register_forward_hook(lambda module, args, y: None)
        for _ in range(2):
            y = layer(**self.inputs())
        if not self.is_quantized:
            layer.backward(np.ones(y.shape))
            layer(**self.inputs())
        return layer

    def inputs(self) -> dict[str, Any]:
        if self.is_quantized:
            return {"xq": drawn("xq", self.shape, 60).astype(np.uint8), "x_scale": 0.05, "x_zero_point": 7}
        return {name: drawn(name, self.shape) for name in (("x", "addend") if self.with_addend else ("x",))}

    def input_faults(self, argument: str) -> list[Fault]:
        """The faults of an argument of forward; of an input's shapes those that it refuses whatever the batch."""
        if argument not in ("x", "xq"):
            return BY_ARGUMENT[argument]
        dtypes = NOT_QUANTIZED if self.is_quantized else [*NOT_FLOATING, *SWAPPED]
        shapes = {f"of shape {shape}": lambda x, shape=shape: np.ones(shape, x.dtype) for shape in self.refused_shapes}
        return [*NOT_ARRAYS, *REQUIRED, *dtypes, *LAYOUTS, *faults(shapes, ValueError)]

    def attributes(self) -> dict[str, list[Fault]]:
        """The attributes that forward uses, and their faults."""
        layer = self.build()
        found = {name: known for name, known in ATTRIBUTES.items() if hasattr(layer, name)}
        if self.is_quantized:
            del found["momentum"], found["num_batches_tracked"]  # kept for from_float, not used
        if self.cls == "RMSNorm":
            found["eps"] = BY_ARGUMENT["eps or None"]
        if self.cls.startswith(("GroupNorm", "InstanceNorm")):
            found["axis"] = [*found["axis"], *values({"the samples'": 0}, ValueError)]
        return found


def drawn(name: str, shape: Shape, largest: float = 2.0) -> Any:
    return np.random.default_rng(zlib.crc32(name.encode())).uniform(0.5, largest, shape)


PARAMETER = [*NOT_ARRAYS, *NOT_FLOATING, *SWAPPED, *SHAPES, *LAYOUTS, *NARROWER]
SHARED = faults({"one element for all": one_element_for_all}, plain=np.array)
COUNTER = [
    *NOT_ARRAYS,
    *faults(NO_NUMBERS, TypeError),
    *faults({"one dimension": lambda a: np.ones(1, a.dtype), "no elements": lambda a: np.ones(0, a.dtype)}, ValueError),
    *faults({"int32": lambda a: a.astype(np.int32), "uint64": lambda a: a.astype(np.uint64)}, plain=np.array),
    Fault("byte-swapped", lambda a: a.astype(a.dtype.newbyteorder()), (TypeError,), lambda a: a.astype(np.int64)),
    *faults({"read-only": lambda a: np.broadcast_to(a, ())}, plain=np.array),
]
SIZE = values({"a string": "3", "a list": [3], "None": None, "a float": 2.5}, ValueError, TypeError)
SIZE += values({"another": 7, "negative": -3, "huge": 10**30}, ValueError)
ATTRIBUTES: dict[str, list[Fault]] = {
    "weight": PARAMETER,
    "bias": PARAMETER,
    "running_mean": [*PARAMETER, *SHARED, *values({"None": None}, ValueError, TypeError)],
    "running_var": [*PARAMETER, *SHARED, *values({"None": None}, ValueError, TypeError)],
    "num_batches_tracked": COUNTER,
    "eps": BY_ARGUMENT["eps"],
    "momentum": MOMENTUM,
    "axis": [*NOT_INTEGER, *values({"too large": 9, "too small": -9, "huge": 10**30}, ValueError)],
    "num_features": SIZE,
    "num_channels": SIZE,
    "num_groups": BY_ARGUMENT["num_groups"],
    "normalized_shape": BY_ARGUMENT["normalized_shape"],
    "scale": BY_ARGUMENT["y_scale"],
    "zero_point": BY_ARGUMENT["y_zero_point"],
}

TRACKED = {"affine": True, "track_running_stats": True}
FEW: tuple[Shape, ...] = ((), (3,))
NOT_2D: tuple[Shape, ...] = (*FEW, (4, 3), (4, 3, 5), (4, 3, 2, 5, 2), (4, 5, 2, 3))
NOT_3D: tuple[Shape, ...] = (*FEW, (4, 3), (4, 3, 5), (4, 3, 2, 5), (4, 5, 2, 3, 2))
SUBJECTS = [
    Subject("BatchNorm", (3,), {}, (4, 3, 2, 5, 1, 2), (*FEW, (4, 5), (1, 4, 3, 2, 5))),
    Subject("BatchNorm1d", (3,), {}, (4, 3, 5), (*FEW, (4, 5), (4, 5, 3), (4, 3, 5, 2))),
    Subject("BatchNorm2d", (3,), {}, (4, 3, 2, 5), NOT_2D),
    Subject("BatchNorm3d", (3,), {}, (4, 3, 2, 5, 2), NOT_3D),
    Subject("SyncBatchNorm", (3,), {"comm": SELF}, (4, 3, 2, 5), (*FEW, (4, 5), (1, 4, 3, 2))),
    Subject("FusedBatchNorm", (3,), {}, (4, 3, 2, 5), (*FEW, (4, 5), (1, 4, 3, 2)), with_addend=True),
    Subject("FusedBatchNorm1d", (3,), {}, (4, 3), (*FEW, (4, 5), (4, 5, 3), (4, 3, 5, 2)), with_addend=True),
    Subject("FusedBatchNorm2d", (3,), {}, (4, 3, 2, 5), NOT_2D, with_addend=True),
    Subject("FusedBatchNorm3d", (3,), {}, (4, 3, 2, 5, 2), NOT_3D),
    Subject("InstanceNorm1d", (3,), TRACKED, (4, 3, 5), (*FEW, (4, 5), (4, 5, 3), (4, 3, 5, 2))),
    Subject("InstanceNorm2d", (3,), TRACKED, (4, 3, 2, 5), (*FEW, (4, 3), (4, 5, 3), (4, 5, 3, 2))),
    Subject("InstanceNorm3d", (3,), TRACKED, (4, 3, 2, 5, 2), (*FEW, (4, 3, 5), (4, 3, 5, 2), (4, 5, 3, 2, 2))),
    Subject("GroupNorm", (3, 6), {}, (4, 6, 2, 5), (*FEW, (4, 3), (6, 4, 2, 5))),
    Subject("LayerNorm", ((2, 5),), {}, (4, 3, 2, 5), ((), (5,), (4, 5), (4, 3, 5, 2))),
    Subject("RMSNorm", ((2, 5),), {}, (4, 3, 2, 5), ((), (5,), (4, 5), (4, 3, 5, 2))),
    Subject("QuantizedBatchNorm2d", (3,), {}, (4, 3, 2, 5), NOT_2D),
    Subject("QuantizedBatchNorm3d", (3,), {}, (4, 3, 2, 5, 2), NOT_3D),
    Subject("QuantizedBNReLU2d", (3,), {}, (4, 3, 2, 5), NOT_2D),
    Subject("QuantizedBNReLU3d", (3,), {}, (4, 3, 2, 5, 2), NOT_3D),
]
