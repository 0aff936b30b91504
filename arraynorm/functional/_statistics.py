"""What batch norm and batch norm + add + ReLU share: given statistics, and those over ranks."""

from __future__ import annotations

from arraynorm import _array, _check
from arraynorm.kernels.reference.batch_norm import batch_norm_stats
from arraynorm.kernels.reference.moments import reciprocal_std
from arraynorm.typing import Array, Communicator


def check_statistics(function: str, x: Array, mean: Array, var: Array, axis: int) -> None:
    for name, value in (("mean", mean), ("var", var)):
        _check.companion(function, x, name, value, (x.shape[axis],))


def forward_fields(
    function: str, x: Array, weight: Array | None, bias: Array | None, axis: int, eps: float, keep: bool
) -> dict[str, str | int | float]:
    """What must be equal on all ranks. Batch and spatial sizes are not in it."""
    return {
        "operation": function,
        "channels": x.shape[axis],
        "axis": axis,
        "dtype": _array.dtype_name(x.dtype),
        "ndim": x.ndim,
        "eps": eps,
        "weight": weight is not None,
        "bias": bias is not None,
        "cache": keep,
    }


def merged_statistics(x3: Array, comm: Communicator) -> tuple[Array, Array, int]:
    """Mean, biased variance and count per channel of x3 (N, C, S), over all ranks."""
    mean, m2 = batch_norm_stats(x3)
    count, mean, m2 = comm.merge_moments(x3.shape[0] * x3.shape[2], mean, m2)
    _check.more_than_one_value(count, (), comm.size)
    with _array.silent():
        return mean, m2 / max(count, 1), count


def local_count(x3: Array, shape: tuple[int, ...]) -> int:
    """Values per channel of x3 (N, C, S), where they are all there are."""
    count: int = x3.shape[0] * x3.shape[2]
    _check.more_than_one_value(count, shape)
    return count


def frozen_statistics(mean: Array, var: Array, eps: float) -> tuple[Array, Array]:
    """Mean and rstd in float64, in arrays of their own: the caller may update running statistics in place."""
    xp = _array.array_namespace(mean)
    return xp.astype(mean, xp.float64, copy=True), reciprocal_std(_array.widen(var), eps)


def global_means(sums: tuple[Array, Array], count: int, comm: Communicator) -> tuple[Array, Array]:
    """The two means of batch norm's backward, over all ranks: one message."""
    total = comm.allreduce_sum(_array.array_namespace(sums[0]).stack(sums))
    with _array.silent():
        return total[0, :] / max(count, 1), total[1, :] / max(count, 1)
