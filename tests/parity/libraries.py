"""Both libraries behind one face, for tests that do the same to both."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

import arraynorm as an
from parity import torch_side
from parity.cases import Array


class Library(NamedTuple):
    """Where to find layers and arrays."""

    layers: Any
    asarray: Callable[[Array], Any]
    to_numpy: Callable[[Any], Array]

    def ones(self, *shape: int) -> Any:
        return self.asarray(np.ones(shape, dtype=np.float32))

    def state(self, version: int | None, **arrays: Array) -> Any:
        """A state_dict of that version."""
        state = OrderedDict((key, self.asarray(array)) for key, array in arrays.items())
        state._metadata = {"": {"version": version}}  # type: ignore[attr-defined]
        return state


OURS = Library(an, np.asarray, np.asarray)
TORCH = Library(torch.nn, torch_side.tensor, torch_side.array)
