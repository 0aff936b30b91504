"""How a batch lies on the ranks, and how results are compared with those for the whole batch."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from data import limits

# Samples on each of P ranks.
LAYOUTS = {
    "even": lambda ranks: [4] * ranks,
    "uneven": lambda ranks: [1 + 5 * rank for rank in range(ranks)],
    "one sample each": lambda ranks: [1] * ranks,
    "first rank empty": lambda ranks: [0] + [3] * (ranks - 1),
    "last rank empty": lambda ranks: [7, *range(2, ranks), 0],
    "one sample, the others empty": lambda ranks: [1] + [0] * (ranks - 1),
}


def shard(x, counts, rank):
    """The samples of one rank."""
    return np.split(x, np.cumsum(counts)[:-1])[rank]


def held_alike(comm, *arrays):
    """Whether the arrays have the same bits on all ranks."""
    return held_alike_bits(comm.allgather(arrays))


def held_alike_bits(ranks):
    """Whether the arrays of every rank have the same bits."""
    return len({tuple(array.tobytes() for array in arrays) for arrays in ranks}) == 1


def assert_close(value, reference, bound):
    """Every element is within `bound` of its reference, relative to the largest reference value."""
    assert value.shape == reference.shape, f"{value.shape} is not {reference.shape}"
    assert value.dtype == reference.dtype, f"{value.dtype} is not {reference.dtype}"
    if value.size:
        error = np.max(np.abs(value - reference)) / (np.max(np.abs(reference)) or 1.0)
        assert error <= bound, f"the error is {error:.3g}, allowed are {bound:.3g}"


def assert_neighbours(value, reference):
    """Every element is its reference, or the next number of the dtype."""
    assert value.shape == reference.shape, f"{value.shape} is not {reference.shape}"
    assert value.dtype == reference.dtype, f"{value.dtype} is not {reference.dtype}"
    steps = max((abs(i - j) for i, j in zip(_ordinals(value), _ordinals(reference), strict=True)), default=0)
    assert steps <= 1, f"an element is {steps} numbers away"


def assert_within_an_ulp(value, reference, whole):
    """Every element is its reference to one ulp of its channel's largest in `whole`: that is its size before its terms cancel,
    and statistics summed in another order move the terms, not their difference, by an ulp."""
    assert value.shape == reference.shape, f"{value.shape} is not {reference.shape}"
    assert value.dtype == reference.dtype == whole.dtype, f"{value.dtype} is not {reference.dtype}"
    value, reference, largest = (np.asarray(a, np.float64) for a in (value, reference, np.abs(whole)))
    axes = tuple(axis for axis in range(whole.ndim) if axis != 1)
    of = limits(whole.dtype.name)
    largest = np.maximum(largest.max(axis=axes, keepdims=True), float(of.tiny))
    ulp = 2.0 ** np.floor(np.log2(largest)) * float(of.eps)
    assert np.all(np.abs(value - reference) <= ulp), f"off by {np.max(np.abs(value - reference) / ulp, initial=0)} ulp"


def _ordinals(array):
    """Each element's place among the numbers of its dtype; 0 for both zeros."""
    assert array.dtype in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
    bits = np.ascontiguousarray(array).view(f"i{array.itemsize}")
    least = np.iinfo(bits.dtype).min
    return [i if i >= 0 else least - i for i in bits.ravel().tolist()]
