"""What a user of numba would write for float32: fused loops, parallel, with a serial twin for small arrays.

Rows are summed in float32, which fastmath lets vectorize, and the rows' sums in float64. numba has no float16
arithmetic on the CPU, and no bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

SMALL = 1 << 15  # elements up to which waking threads costs more than they save


class Kernel:
    """One function compiled twice; the size of the first argument says which is called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._parallel = numba.njit(parallel=True, fastmath=True, cache=True)(function)
        self._serial = numba.njit(fastmath=True, cache=True)(function)

    def variant(self, size: int) -> Callable[..., Any]:
        return self._serial if size <= SMALL else self._parallel
