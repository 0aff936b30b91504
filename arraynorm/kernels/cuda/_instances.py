"""The kernels by name: every instance of every template, so that all can be compiled ahead of time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

C_TYPES = {"float16": "__half", "bfloat16": "bfloat16", "float32": "float", "float64": "double"}
"""The dtypes of x, and what numbers.cuh calls them; no typedefs, which CuPy 14.1 does not find again in its cache."""

QUANTIZED_C_TYPES = {"uint8": "unsigned char", "int8": "signed char"}

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "uint8": 1, "int8": 1}

PARAMETER_CODES = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}
"""The enum Dtype of numbers.cuh."""


class Instance(NamedTuple):
    """A template instance of one source file, as an NVRTC name expression."""

    source: str
    name: str


def instance(
    template: str, dtype: str, width: int | None = None, flag: bool | None = None, *, form: str | None = None
) -> Instance:
    """The instance for elements of `dtype`, `width` of them to a pack, and form and flag of those that have them."""
    given = (form, (QUANTIZED_C_TYPES | C_TYPES)[dtype], width, None if flag is None else str(flag).lower())
    arguments = ", ".join(str(one) for one in given if one is not None)
    return Instance(_source(template, flag), f"{template}<{arguments}>")


PARAMETER_SUMS = Instance("row_norm.cu", "parameter_sums")


def widths(dtype: str) -> tuple[int, ...]:
    """Elements of a pack, widest first: 16 bytes, 8 bytes, one element."""
    item = ITEM_BYTES[dtype]
    return tuple(dict.fromkeys((16 // item, 8 // item, 1)))


ROW_TEMPLATES = ("row_forward", "row_backward", "long_row_means", "long_row_dx")
FORMS = ("Slab", "Tile")
"""Of parts.cuh: what a block visits in NCHW and in NHWC."""
FORM_TEMPLATES = ("products", "apply", "dx")
"""Those that have a form and a flag."""


def instances() -> Iterator[Instance]:
    """All of them."""
    for dtype in C_TYPES:
        for width, flag in itertools.product(widths(dtype), (False, True)):
            for template in ROW_TEMPLATES:
                yield instance(template, dtype, width, flag)
            for template, form in itertools.product(FORM_TEMPLATES, FORMS):
                yield instance(template, dtype, width, flag, form=form)
        for width in widths(dtype):
            yield instance("slab_backward", dtype, width)
            for form in FORMS:
                yield instance("moments", dtype, width, form=form)
        yield instance("flat_apply_add_relu", dtype)
    for dtype in QUANTIZED_C_TYPES:
        for width, form in itertools.product(widths(dtype), FORMS):
            yield instance("requantize", dtype, width, form=form)
    yield PARAMETER_SUMS


def _source(template: str, flag: bool | None) -> str:
    """The file that a template is compiled from; the flag of row templates is CENTERED, of those with a form RELU."""
    if template in ROW_TEMPLATES:
        return "row_norm.cu"
    if template == "requantize":
        return "quantized_batch_norm.cu"
    return "batch_norm_add_relu.cu" if flag or template == "flat_apply_add_relu" else "batch_norm.cu"
