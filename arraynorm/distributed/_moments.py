"""Merging the moments of several ranks, and adding their sums: two ways, for few ranks and for many."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

Float64Array = np.ndarray[Any, np.dtype[np.float64]]
Moments = tuple[int, Float64Array, Float64Array]
"""n, mean (C,), sum of squared deviations m2 (C,)."""


def merge(parts: Iterable[Moments]) -> Moments:
    """The moments of the union of `parts`, added in their order.

    Pairwise update of Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979, equation 1.5: no square of a mean is ever subtracted, and equal constants merge to themselves.
    A rank may bring NaN or infinity, a value, not an event: the caller silences NumPy, here and below.
    """
    n, mean, m2 = 0, np.zeros(()), np.zeros(())
    is_ours = False  # or a part's own memory
    for n_part, mean_part, m2_part in parts:
        if n == 0:  # an empty rank has no mean
            n, mean, m2 = n_part, mean_part, m2_part
        elif n_part > 0:
            total = n + n_part
            delta = mean_part - mean
            if is_ours:  # in place: with many channels half of the time is new memory
                mean += delta * (n_part / total)
                m2 += m2_part
            else:
                mean, m2, is_ours = mean + delta * (n_part / total), m2 + m2_part, True
            delta *= delta
            delta *= n * n_part / total
            m2 += delta
            n = total
    if n == 0:
        return 0, np.zeros_like(mean), np.zeros_like(m2)
    return (n, mean, m2) if is_ours else (n, mean.copy(), m2.copy())


def merge_by_sums(part: Moments, allreduce: Callable[[Float64Array], Float64Array]) -> Moments:
    """The moments of the union of all ranks' parts by two sums over the ranks, for O(log P) messages.

    The first sum gives a mean g that is good to rounding of n * mean, the second the deviations from it:
    with d = sum(n (mean - g)) / N,  mean = g + d,  m2 = sum(m2 + n (mean - g)^2) - N d^2. Without d the mean of equal
    constants would not be that constant: mean - g has few bits, so its products and sums are exact.
    """
    n, mean, m2 = part
    total = allreduce(np.concatenate(([float(n)], n * mean)))
    count = float(total[0])
    if count == 0:
        return 0, np.zeros_like(mean), np.zeros_like(m2)
    g = total[1:] / count
    delta = mean - g if n else np.zeros_like(mean)
    sums = allreduce(np.concatenate((n * delta, m2 + n * delta * delta)))
    channels = mean.shape[0]
    d = sums[:channels] / count
    return int(count), g + d, np.maximum(sums[channels:] - count * d * d, 0.0)


def unpacked(message: Float64Array) -> Moments:
    """The moments of a message [n, mean, m2]."""
    channels = len(message) // 2
    return int(message[0]), message[1 : 1 + channels], message[1 + channels :]
