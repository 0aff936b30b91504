"""NumPy arrays as torch tensors, and back, without a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from cases import Data, dtype_of

aten = torch.ops.aten


def tensor(array: Any, axis: int = 1) -> torch.Tensor:
    """The channels stand at dimension 1, as torch has it; the memory stays as it is."""
    if array.dtype.name == "bfloat16":
        made = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        made = torch.from_numpy(array)
    return made.movedim(-1, 1) if axis == -1 and made.ndim > 2 else made


def array(made: torch.Tensor, axis: int) -> Any:
    if axis == -1 and made.ndim > 2:
        made = made.movedim(1, -1)
    if made.dtype == torch.bfloat16:
        return made.contiguous().view(torch.int16).numpy().view(dtype_of("bfloat16"))
    return made.detach().numpy()


def tensors(data: Data, *names: str) -> list[torch.Tensor]:
    return [tensor(getattr(data, name), data.axis) for name in names]


def every(data: Data) -> Callable[[Iterable[torch.Tensor]], list[Any]]:
    """All results, for a comparison."""
    return lambda raw: [array(made, data.axis) for made in raw]


def first(data: Data) -> Callable[[Any], list[Any]]:
    return lambda raw: [array(raw[0], data.axis)]


def alone(data: Data) -> Callable[[torch.Tensor], list[Any]]:
    return lambda raw: [array(raw, data.axis)]
