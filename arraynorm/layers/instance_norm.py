"""Instance norm layers."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from arraynorm import _check
from arraynorm.functional.batch_norm import (
    FrozenBatchNormCache,
    batch_norm_frozen_backward,
    batch_norm_frozen_forward,
)
from arraynorm.functional.instance_norm import instance_norm_backward, instance_norm_forward
from arraynorm.layers import _state
from arraynorm.layers._documented import documented_as
from arraynorm.layers._running_stats import RUNNING_STATS, RunningStatsModule
from arraynorm.typing import Array


class _InstanceNorm(RunningStatsModule):
    """Instance norm: statistics per sample and channel, from the input or, in eval with tracking, running ones.

    Parameters
    ----------
    num_features : int
        C, the size of the channel axis.
    eps : float
        Added to the **biased** variance; >= 0.
    momentum : float or None
        Weight of the newest batch; None is the exact cumulative mean.
    affine : bool
        Whether there is a weight (ones) and, with `bias`, a bias (zeros). False by default, as in torch.
    track_running_stats : bool
        Whether running statistics are kept and used in eval. False by default. The running mean averages the
        instances' means, the running variance their **unbiased** variances.
    bias : bool
    axis : int
        The channel axis of a batch, not 0.
    xp, device, dtype : optional
        Of parameters and buffers, as for `BatchNorm`.

    Raises
    ------
    ValueError
        From a call: a wrong rank or number of channels (torch only warns without affine); one spatial element.
    TypeError, RuntimeError
        As for `BatchNorm`.

    Notes
    -----
    An input without the batch axis is a batch of one. `num_batches_tracked` counts, and `momentum=None` works (torch
    never counts here). With tracking switched off after construction, eval uses the input's statistics and leaves the
    buffers alone (torch moves them).
    """

    _first_channel_axis = 1

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        bias: bool = True,
        axis: int = 1,
        xp: ModuleType | None = None,
        device: Any = None,
        dtype: Any = None,
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

    def forward(self, x: Array) -> Array:
        """y, in x's shape and dtype."""
        self._check_input(x)
        unbatched = self._is_unbatched(x)
        batch = x[None, ...] if unbatched else x
        has_running_stats = self._has_running_stats() and self.track_running_stats
        if has_running_stats:
            self._check_running_stats(x, moves=self.training)
        if has_running_stats and not self.training:
            y, frozen_cache = batch_norm_frozen_forward(
                batch, self.running_mean, self.running_var, self.weight, self.bias, axis=self.axis, eps=self.eps
            )
            self.keep((frozen_cache, unbatched))
        else:
            y, cache = instance_norm_forward(batch, self.weight, self.bias, axis=self.axis, eps=self.eps)
            if has_running_stats:
                self._update_running_stats(cache)
            self.keep((cache, unbatched))
        return y[0, ...] if unbatched else y

    def backward(self, dy: Array) -> Array:
        """dx; adds to `grads["weight"]` and `grads["bias"]`."""
        cache, unbatched = self.kept()
        name, shape = type(self).__name__, tuple(cache.x.shape)
        _check.floating(name, "dy", dy)
        _check.has_shape(name, "dy", dy, shape[1:] if unbatched else shape)
        frozen = isinstance(cache, FrozenBatchNormCache)
        backward = batch_norm_frozen_backward if frozen else instance_norm_backward
        dx = self._backward(lambda dy, kept: backward(dy, kept[0]), dy[None, ...] if unbatched else dy).dx
        return dx[0, ...] if unbatched else dx

    def _is_unbatched(self, x: Array) -> bool:
        return bool(x.ndim == self._ndims[0])

    def _migrate_state(self, state: dict[str, Array], prefix: str, version: int | None, errors: list[str]) -> None:
        super()._migrate_state(state, prefix, version, errors)
        keys = [prefix + name for name in RUNNING_STATS if prefix + name in state]
        if version is None and not self.track_running_stats and keys:
            name = type(self).__name__
            errors.append(
                f"Unexpected running stats buffer(s) {_state.quoted(keys, ' and ')} for {name} with "
                "track_running_stats=False. If state_dict is a checkpoint saved before 0.4.0, this may be expected "
                f"because {name} does not track running stats by default since 0.4.0. Please remove these keys from "
                "state_dict. If the running stats are actually needed, instead set track_running_stats=True in "
                f"{name} to enable them. See the documentation of {name} for details."
            )
            for key in keys:
                del state[key]

    def _check_input(self, x: Array) -> None:
        name = type(self).__name__
        _check.input_array(name, "x", x)
        _check.ndim_in(x, self._ndims)
        if not self._is_unbatched(x):
            self._check_channels(x, _check.channel_axis(name, x, self.axis, first=self._first_channel_axis))
        else:  # `axis` speaks of a batch
            self._check_channels(
                x, _check.channel_axis(name, x[None, ...], self.axis, first=self._first_channel_axis) - 1
            )


@documented_as(_InstanceNorm)
class InstanceNorm1d(_InstanceNorm):
    """Instance norm for inputs (N, C, L) and, unbatched, (C, L)."""

    _ndims = (2, 3)


@documented_as(_InstanceNorm)
class InstanceNorm2d(_InstanceNorm):
    """Instance norm for inputs (N, C, H, W) and, unbatched, (C, H, W)."""

    _ndims = (3, 4)


@documented_as(_InstanceNorm)
class InstanceNorm3d(_InstanceNorm):
    """Instance norm for inputs (N, C, D, H, W) and, unbatched, (C, D, H, W)."""

    _ndims = (4, 5)
