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


def sizes_before_cancellation(layer, x, dy):
    """Per channel, the largest of the terms that make y (x * scale, mean * scale, bias), and of those that make dx."""
    columns = np.moveaxis(np.asarray(x, np.float64), 1, -1).reshape(-1, x.shape[1])
    weight, bias = (np.abs(np.asarray(p, np.float64)) for p in (layer.weight, layer.bias))
    scale = weight / np.sqrt(columns.var(axis=0) + layer.eps)
    of_dy = np.abs(np.moveaxis(np.asarray(dy, np.float64), 1, -1).reshape(columns.shape))
    return np.abs(columns).max(axis=0) * scale + bias, of_dy.max(axis=0) * scale


def assert_within_an_ulp(value, reference, size):
    """Every element is its reference to one ulp of its channel's `size`, that of its terms before they cancel.

    Or its own, where the terms add up to more than the largest of them: its neighbours are no nearer.
    """
    assert value.shape == reference.shape, f"{value.shape} is not {reference.shape}"
    assert value.dtype == reference.dtype, f"{value.dtype} is not {reference.dtype}"
    of = limits(reference.dtype.name)
    expected = np.asarray(reference, np.float64)
    size = np.maximum(np.reshape(size, (1, -1, *[1] * (value.ndim - 2))), np.abs(expected))
    ulp = 2.0 ** np.floor(np.log2(np.maximum(size, float(of.tiny)))) * float(of.eps)
    ulps = np.abs(np.asarray(value, np.float64) - expected) / ulp
    assert np.all(ulps <= 1), f"off by {np.max(ulps)} ulp"


def _ordinals(array):
    """Each element's place among the numbers of its dtype; 0 for both zeros."""
    assert array.dtype in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
    bits = np.ascontiguousarray(array).view(f"i{array.itemsize}")
    least = np.iinfo(bits.dtype).min
    return [i if i >= 0 else least - i for i in bits.ravel().tolist()]
