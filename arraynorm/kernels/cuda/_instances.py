"""The kernels by name: every instance of every template, so that all can be compiled ahead of time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

C_TYPES = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float", "float64": "double"}
"""The dtypes of x, and what numbers.cuh calls them."""

QUANTIZED_C_TYPES = {"uint8": "unsigned char", "int8": "signed char"}

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "uint8": 1, "int8": 1}

PARAMETER_CODES = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}
"""The enum Dtype of numbers.cuh."""


class Instance(NamedTuple):
    """A template instance of one source file, as an NVRTC name expression."""

    source: str
    name: str


def instance(template: str, dtype: str, width: int | None = None, flag: bool | None = None) -> Instance:
    """The instance for elements of `dtype`, `width` of them to a pack, and the template's flag if it has one."""
    c_type = (QUANTIZED_C_TYPES if dtype in QUANTIZED_C_TYPES else C_TYPES)[dtype]
    arguments = [c_type, *([] if width is None else [str(width)]), *([] if flag is None else [str(flag).lower()])]
    return Instance(_source(template, flag), f"{template}<{', '.join(arguments)}>")


PARAMETER_SUMS = Instance("row_norm.cu", "parameter_sums")


def widths(dtype: str) -> tuple[int, ...]:
    """Elements of a pack, widest first: 16 bytes, 8 bytes, one element."""
    item = ITEM_BYTES[dtype]
    return tuple(dict.fromkeys((16 // item, 8 // item, 1)))


ROW_TEMPLATES = ("row_forward", "row_backward", "long_row_means", "long_row_dx")
MOMENT_TEMPLATES = ("slab_moments", "column_moments")
RELU_TEMPLATES = tuple(f"{form}_{step}" for form in ("slab", "column") for step in ("products", "apply", "dx"))
QUANTIZED_TEMPLATES = ("slab_requantize", "column_requantize")


def instances() -> Iterator[Instance]:
    """All of them."""
    for dtype in C_TYPES:
        for width in widths(dtype):
            for template, flag in itertools.product((*ROW_TEMPLATES, *RELU_TEMPLATES), (False, True)):
                yield instance(template, dtype, width, flag)
            for template in (*MOMENT_TEMPLATES, "slab_backward"):
                yield instance(template, dtype, width)
        yield instance("flat_apply_add_relu", dtype)
    for dtype in QUANTIZED_C_TYPES:
        for template, width in itertools.product(QUANTIZED_TEMPLATES, widths(dtype)):
            yield instance(template, dtype, width)
    yield PARAMETER_SUMS


def _source(template: str, flag: bool | None) -> str:
    """The file that a template is compiled from; the flag of row templates is CENTERED, of the others RELU."""
    if template in ROW_TEMPLATES:
        return "row_norm.cu"
    if template in QUANTIZED_TEMPLATES:
        return "quantized_batch_norm.cu"
    return "batch_norm_add_relu.cu" if flag or template == "flat_apply_add_relu" else "batch_norm.cu"
