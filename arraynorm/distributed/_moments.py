"""Payloads of several ranks: packing, adding and merging them in rank order; and merging by sums, for many ranks.

The first three are called in every step, and take some 10 us from NumPy, as long as the message itself does: where the
C++ extension is there, the functions of these names in moments.cpp run instead, and give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Float64Array = np.ndarray[Any, np.dtype[np.float64]]
Moments = tuple[int, Float64Array, Float64Array]
"""n, mean (C,), sum of squared deviations m2 (C,)."""


def pack_payload(payload: Float64Array, *parts: float | Float64Array) -> None:
    """Write numbers and arrays, one after the other, to the vector `payload` of as many elements."""
    np.concatenate([np.reshape(part, -1) for part in parts], out=payload)


def unpacked(payload: Float64Array) -> Moments:
    """The moments of a payload [n, mean, m2]; n is below 2^53."""
    channels, n = len(payload) // 2, float(payload[0])
    if not (0 <= n < 2**53 and n.is_integer()):
        raise ValueError(f"merge_moments: n must be a number of samples, got {n}")
    return int(n), payload[1 : 1 + channels], payload[1 + channels :]


def add_payloads(payloads: Sequence[Float64Array]) -> Float64Array:
    """The sum of vectors, in their order."""
    first, *rest = payloads
    total = first.copy()
    for vector in rest:
        total += vector
    return total


def merge_moments(payloads: Sequence[Float64Array]) -> Moments:
    """The moments of the union of all ranks' samples, from payloads [n, mean, m2], added in their order.

    Pairwise update of Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", 1979, equation 1.5: no square of a mean is ever subtracted, and equal constants merge to themselves.
    A rank may bring NaN or infinity, a value, not an event: the caller silences NumPy, here and below.
    """
    n, mean, m2 = unpacked(payloads[0])
    mean, m2 = mean.copy(), m2.copy()
    for n_part, mean_part, m2_part in map(unpacked, payloads[1:]):
        if n == 0:  # an empty rank has no mean
            n, mean, m2 = n_part, mean_part.copy(), m2_part.copy()
        elif n_part > 0:
            share = n_part / (n + n_part)
            delta = mean_part - mean
            mean += delta * share
            m2 += m2_part
            m2 += delta * delta * (n * share)
            n += n_part
    if n == 0:
        return 0, np.zeros_like(mean), np.zeros_like(m2)
    return n, mean, m2


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
