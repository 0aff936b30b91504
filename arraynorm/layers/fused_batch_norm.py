"""Batch norm + add + ReLU layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, ClassVar

from arraynorm import distributed
from arraynorm.functional.batch_norm_add_relu import (
    BatchNormAddReluCache,
    FrozenBatchNormAddReluCache,
    batch_norm_add_relu_backward,
    batch_norm_add_relu_forward,
    batch_norm_add_relu_frozen_backward,
    batch_norm_add_relu_frozen_forward,
)
from arraynorm.layers._documented import documented_as
from arraynorm.layers._synchronized import SynchronizedBatchNorm
from arraynorm.typing import Array, InputGradients


class FusedBatchNorm(SynchronizedBatchNorm):
    """Batch norm, plus an addend, then ReLU, over inputs of any rank from 2: y = relu(batch_norm(x) + addend).

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, bias, axis, xp, device, dtype
        As for `BatchNorm`.
    comm : Communicator or mpi4py communicator, optional
        The ranks that share their statistics: this one alone by default; None is the whole world.
    name : str, optional
        As for `SyncBatchNorm`.

    Raises
    ------
    ValueError, TypeError, RuntimeError, SyncMismatchError
        As for `BatchNorm` and `SyncBatchNorm`.

    Notes
    -----
    Backward needs one bit per element, where y > 0, and neither y nor the addend. The gradient at y = 0 is 0.
    """

    _batch_forward = staticmethod(batch_norm_add_relu_forward)
    _frozen_forward = staticmethod(batch_norm_add_relu_frozen_forward)
    _backwards: ClassVar[Mapping[type, Callable[..., Any]]] = {
        BatchNormAddReluCache: batch_norm_add_relu_backward,
        FrozenBatchNormAddReluCache: batch_norm_add_relu_frozen_backward,
    }

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        comm: Any = distributed.SELF,
        bias: bool = True,
        axis: int = 1,
        xp: ModuleType | None = None,
        device: Any = None,
        dtype: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            bias=bias,
            axis=axis,
            xp=xp,
            device=device,
            dtype=dtype,
        )
        self.name = name
        self.comm = comm

    def forward(self, x: Array, addend: Array | None = None) -> Array:
        """y, in x's shape and dtype; `addend` has x's shape, and None is 0."""
        return self._normalize(x, addend)

    def backward(self, dy: Array) -> InputGradients:
        """(dx, daddend), the latter None without an addend; adds to `grads["weight"]` and `grads["bias"]`."""
        gradients = self._gradients(dy)
        return InputGradients(gradients.dx, gradients.daddend)


@documented_as(FusedBatchNorm)
class FusedBatchNorm1d(FusedBatchNorm):
    """`FusedBatchNorm` for inputs (N, C) and (N, C, L)."""

    _ndims = (2, 3)


@documented_as(FusedBatchNorm)
class FusedBatchNorm2d(FusedBatchNorm):
    """`FusedBatchNorm` for inputs (N, C, H, W)."""

    _ndims = (4,)


@documented_as(FusedBatchNorm)
class FusedBatchNorm3d(FusedBatchNorm):
    """`FusedBatchNorm` for inputs (N, C, D, H, W)."""

    _ndims = (5,)
