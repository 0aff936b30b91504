"""Merging the moments of several ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

Float64Array = np.ndarray[Any, np.dtype[np.float64]]


def merge(parts: Iterable[tuple[int, Float64Array, Float64Array]]) -> tuple[int, Float64Array, Float64Array]:
    """(n, mean (C,), m2 (C,)) of the union of `parts`, added in their order.

    Pairwise update of Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979, equation 1.5: no square of a mean is ever subtracted, and equal constants merge to themselves.
    """
    n, mean, m2 = 0, np.zeros(()), np.zeros(())
    with np.errstate(all="ignore"):  # a rank may bring NaN or infinity: a value, not an event
        for n_part, mean_part, m2_part in parts:
            if n_part == 0:  # an empty rank has no mean
                mean, m2 = mean + np.zeros_like(mean_part), m2 + np.zeros_like(m2_part)
                continue
            total = n + n_part
            delta = mean_part - mean if n else np.zeros_like(mean_part)
            mean = mean + delta * (n_part / total) if n else mean_part
            m2 = m2 + m2_part + delta * delta * (n * n_part / total)
            n = total
    return n, mean, m2
