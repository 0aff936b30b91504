"""Batch norm layers of one process: BatchNorm for any rank, and torch's three that check it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from arraynorm.functional._agreement import refusal
from arraynorm.functional.batch_norm import (
    BatchNormCache,
    FrozenBatchNormCache,
    batch_norm_backward,
    batch_norm_forward,
    batch_norm_frozen_backward,
    batch_norm_frozen_forward,
)
from arraynorm.layers._documented import documented_as
from arraynorm.layers._running_stats import RunningStatsModule
from arraynorm.typing import Array, Communicator


class BatchNorm(RunningStatsModule):
    """Batch norm over inputs of any rank from 2.

    In training x is normalized with its own mean and **biased** variance, and the running statistics move:
    `new = (1 - momentum) * old + momentum * batch`, with the **unbiased** variance (torch's conventions; Keras, Flax,
    Chainer and ONNX mean otherwise by `momentum`). In eval the running statistics normalize.

    Parameters
    ----------
    num_features : int
        C, the size of the channel axis.
    eps : float
        Added to the variance; >= 0.
    momentum : float or None
        Weight of the newest batch; None is the exact cumulative mean, 1 / num_batches_tracked.
    affine : bool
        Whether there is a weight (ones) and, with `bias`, a bias (zeros).
    track_running_stats : bool
        Whether there are running_mean, running_var and num_batches_tracked; without them batch statistics normalize
        in eval, too.
    bias : bool
    axis : int
        The channel axis.
    xp : module, optional
        Array library of parameters and buffers; NumPy by default.
    device, dtype : optional
        Of parameters and buffers; float32 by default. Running statistics are at least float32.

    Raises
    ------
    ValueError
        From a call: a wrong rank or number of channels; one value per channel in training.
    TypeError
        From a call: x, a parameter or a buffer of an unsupported dtype, or of different libraries.
    RuntimeError
        From `backward`: there was no forward, or its cache is used up.

    Notes
    -----
    A failed call changes nothing. An empty batch moves nothing, the counter included (torch counts it, and its
    cumulative mean is then wrong).
    """

    _batch_forward: ClassVar[Callable[..., tuple[Array, Any]]] = staticmethod(batch_norm_forward)
    _frozen_forward: ClassVar[Callable[..., tuple[Array, Any]]] = staticmethod(batch_norm_frozen_forward)
    _backwards: ClassVar[Mapping[type, Callable[..., Any]]] = {
        BatchNormCache: batch_norm_backward,
        FrozenBatchNormCache: batch_norm_frozen_backward,
    }

    def forward(self, x: Array) -> Array:
        """y, in x's shape and dtype."""
        return self._normalize(x)

    def backward(self, dy: Array) -> Array:
        """dx; adds to `grads["weight"]` and `grads["bias"]`."""
        return self._gradients(dy).dx

    def _normalize(self, x: Array, *addend: Array | None) -> Array:
        comm = self._collective()
        with refusal(comm):
            frozen = self._check_call(x)
        parameters = self.weight, self.bias
        if frozen:
            given = self.running_mean, self.running_var, *parameters
            y, cache = self._frozen_forward(x, *addend, *given, axis=self.axis, eps=self.eps)
        else:
            y, cache = self._batch_forward(x, *addend, *parameters, axis=self.axis, eps=self.eps, comm=comm)
            if self._moves_running_stats():
                self._update_running_stats(cache)
        self.keep(cache)
        return y

    def _gradients(self, dy: Array) -> Any:
        with refusal(self._collective()):
            function = self._backwards[type(self.kept())]
            self._check_gradients()
        return self._backward(function, dy)

    def _check_call(self, x: Array) -> bool:
        """The checks of a forward; whether the running statistics normalize."""
        self._check_input(x)
        has_running_stats = self._has_running_stats()
        frozen = has_running_stats and not self.training
        moves = self._moves_running_stats()
        if frozen or moves:
            self._check_running_stats(x, moves=moves)
        return frozen

    def _moves_running_stats(self) -> bool:
        return bool(self.training and self.track_running_stats and self.running_mean is not None)

    def _collective(self) -> Communicator | None:
        """The communicator of a forward in the present mode; None is no synchronization."""
        return None


@documented_as(BatchNorm)
class BatchNorm1d(BatchNorm):
    """`BatchNorm` for inputs (N, C) and (N, C, L)."""

    _ndims = (2, 3)


@documented_as(BatchNorm)
class BatchNorm2d(BatchNorm):
    """`BatchNorm` for inputs (N, C, H, W)."""

    _ndims = (4,)


@documented_as(BatchNorm)
class BatchNorm3d(BatchNorm):
    """`BatchNorm` for inputs (N, C, D, H, W)."""

    _ndims = (5,)
