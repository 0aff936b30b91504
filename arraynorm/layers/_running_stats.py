"""What batch norm and instance norm layers share: running statistics, and when they move."""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

from arraynorm import _array, _check
from arraynorm.functional.batch_norm import BatchNormCache
from arraynorm.functional.batch_norm_add_relu import BatchNormAddReluCache
from arraynorm.functional.instance_norm import InstanceNormCache
from arraynorm.functional.running_stats import is_empty, update_running_stats
from arraynorm.layers._affine import AffineModule
from arraynorm.typing import Array

RUNNING_STATS = ("running_mean", "running_var")


class RunningStatsModule(AffineModule):
    """A norm over channels with running statistics: constructor, buffers, state, input checks."""

    _version = 2  # torch's number: version 2 added num_batches_tracked
    _ndims: ClassVar[tuple[int, ...]] = ()
    """The numbers of dimensions that the class takes; () is any from 2."""
    _first_channel_axis: ClassVar[int] = 0

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        bias: bool = True,
        axis: int = 1,
        xp: ModuleType | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.num_features = _check.count(name, "num_features", num_features, minimum=0)
        self.eps = _check.epsilon(name, eps)
        self.momentum = None if momentum is None else _check.momentum(name, momentum)
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.axis = _check.axis_of_inputs(name, axis, self._ndims, first=self._first_channel_axis)
        _check.placement(name, xp, device, dtype)
        shape = (self.num_features,)
        self._init_affine(shape, weight=affine, bias=affine and bias, xp=xp, device=device, dtype=dtype)
        xp = _array.resolve_namespace(xp)
        dtype = _array.running_dtype(xp, xp.float32 if dtype is None else dtype)
        tracked = track_running_stats
        self.register_buffer("running_mean", xp.zeros(shape, dtype=dtype, device=device) if tracked else None)
        self.register_buffer("running_var", xp.ones(shape, dtype=dtype, device=device) if tracked else None)
        counter = xp.zeros((), dtype=xp.int64, device=device) if tracked else None
        self.register_buffer("num_batches_tracked", counter)

    def reset_running_stats(self) -> None:
        """Running mean 0, running variance 1, counter 0, where `track_running_stats` is set."""
        self._require_buffers()
        if self.track_running_stats:
            for name, value in (("running_mean", 0), ("running_var", 1), ("num_batches_tracked", 0)):
                self._fill(name, value)

    def reset_parameters(self) -> None:
        """Running statistics and parameters as a new layer has them, by the live attributes."""
        self._require_buffers()
        self._require_weight(self.affine)  # both before anything is reset
        self.reset_running_stats()
        self._reset_affine(self.affine)

    def _require_buffers(self) -> None:
        if self.track_running_stats and any(
            getattr(self, name) is None for name in (*RUNNING_STATS, "num_batches_tracked")
        ):
            raise RuntimeError(
                f"{type(self).__name__}.reset_running_stats: track_running_stats is set, but the layer was built "
                "without buffers"
            )

    # -- checks of a forward ---------------------------------------------------------------------------------

    def _check_input(self, x: Array) -> None:
        """x is an array of the right rank with `num_features` channels."""
        name = type(self).__name__
        _check.input_array(name, "x", x)
        _check.ndim_in(x, self._ndims)
        self._check_channels(x, _check.channel_axis(name, x, self.axis))

    def _check_channels(self, x: Array, axis: int, argument: str = "x") -> None:
        _check.channels(type(self).__name__, argument, x, axis, "num_features", self.num_features)

    def _has_running_stats(self) -> bool:
        """Whether both buffers are there; one alone is an error."""
        missing = [getattr(self, name) is None for name in RUNNING_STATS]
        if any(missing) and not all(missing):
            raise ValueError("running_mean and running_var must either both be None or neither be None")
        return not any(missing)

    def _check_running_stats(self, x: Array, *, moves: bool) -> None:
        """The buffers, which the user may have replaced, can be used with x, and moved if this call `moves` them."""
        name = type(self).__name__
        for buffer in RUNNING_STATS:
            _check.companion(name, x, buffer, getattr(self, buffer), (self.num_features,))
        if not moves:
            return
        if self.momentum is not None:
            _check.momentum(name, self.momentum)
        counter = self.num_batches_tracked
        if counter is not None:
            _check.counter(name, x, "num_batches_tracked", counter)
        elif self.momentum is None:
            raise RuntimeError(
                f"{name}: momentum=None averages over num_batches_tracked, which is None; set it to a 0-d int64 array"
            )

    # -- moving the running statistics -----------------------------------------------------------------------

    def _update_running_stats(self, cache: BatchNormCache | BatchNormAddReluCache | InstanceNormCache) -> None:
        """One step of the running statistics and of the counter; nothing for an empty batch. Checked before."""
        if is_empty(cache):
            return
        buffers = self._buffers
        mean, var, counter = (buffers[name] for name in (*RUNNING_STATS, "num_batches_tracked"))
        momentum = 1 / (int(counter) + 1) if self.momentum is None else self.momentum
        new_mean, new_var = update_running_stats(mean, var, cache, momentum=momentum)
        buffers["running_mean"] = _array.assign(mean, new_mean, cache.x, var)
        buffers["running_var"] = _array.assign(var, new_var, cache.x, mean)
        if counter is not None:
            buffers["num_batches_tracked"] = _array.assign(counter, counter + 1)

    # -- state -----------------------------------------------------------------------------------------------

    def _migrate_state(self, state: dict[str, Array], prefix: str, version: int | None, errors: list[str]) -> None:
        key = f"{prefix}num_batches_tracked"
        if (version is None or version < 2) and self.num_batches_tracked is not None and key not in state:
            counter = self.num_batches_tracked
            state[key] = _array.array_namespace(counter).zeros_like(counter)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        )
