"""Quantized batch norm layers: 8-bit integers in and out, for inference."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, ClassVar, Self

from arraynorm import _array, _check
from arraynorm.functional.quantized_batch_norm import quantized_batch_norm, quantized_batch_norm_relu
from arraynorm.layers._documented import documented_as
from arraynorm.layers._running_stats import RunningStatsModule
from arraynorm.layers.batch_norm import BatchNorm
from arraynorm.typing import Array


class _QuantizedBatchNorm(RunningStatsModule):
    """Batch norm with running statistics from quantized to quantized values, always affine.

    The output stands for (yq - zero_point) * scale; `scale` (1.0) and `zero_point` (0) are buffers, in the state.

    Parameters
    ----------
    num_features : int
        C, the size of the channel axis.
    eps : float
        Added to the variance; >= 0.
    momentum : float or None
        Kept, not used: nothing is ever updated.
    axis : int
        The channel axis.
    xp, device, dtype : optional
        Of parameters and buffers, as for `BatchNorm`.

    Raises
    ------
    ValueError
        From a call: a wrong rank or number of channels; a scale that is not > 0.
    TypeError
        From a call: an input that is not uint8 or int8.
    """

    _function: ClassVar[Callable[..., Array]]
    _layout: ClassVar[str]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        axis: int = 1,
        xp: ModuleType | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, True, True, bias=True, axis=axis, xp=xp, device=device, dtype=dtype
        )
        namespace = _array.resolve_namespace(xp)
        self.register_buffer("scale", namespace.full((), 1.0, dtype=namespace.float32, device=device))
        self.register_buffer("zero_point", namespace.full((), 0, dtype=namespace.int64, device=device))

    @classmethod
    def from_float(cls, layer: BatchNorm, scale: float, zero_point: int) -> Self:
        """The quantized layer of a BatchNorm or FusedBatchNorm, for outputs of the given scale and zero point.

        Keeps eps, momentum and axis (torch drops the momentum) and copies parameters and running statistics. A layer
        without affine has weight 1 and bias 0.

        Raises
        ------
        TypeError
            `layer` is not a BatchNorm.
        ValueError
            It has no running statistics; `scale` is not finite and > 0.
        """
        name = f"{cls.__name__}.from_float"
        if not isinstance(layer, BatchNorm):
            raise TypeError(f"{name}: layer must be a BatchNorm or FusedBatchNorm, got {type(layer).__qualname__}")
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError(f"{name}: layer must have running statistics, got None")
        scale = _check.scale(name, "scale", _check.as_float32(name, "scale", scale))  # as the buffer holds it
        zero_point = _check.zero_point_of_any(name, "zero_point", zero_point)
        xp = _array.array_namespace(layer.running_mean)
        new = cls(layer.num_features, layer.eps, layer.momentum, axis=layer.axis)
        new._convert(lambda array, _: _array.move(array, xp, _array.device(layer.running_mean)))
        for key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            array = getattr(layer, key)
            if array is not None:
                setattr(new, key, xp.asarray(array, copy=True))
        new._fill("scale", scale)
        new._fill("zero_point", zero_point)
        new.training = layer.training
        return new

    def forward(self, xq: Array, x_scale: float, x_zero_point: int) -> Array:
        """yq, in xq's shape and dtype; xq stands for (xq - x_zero_point) * x_scale."""
        name = type(self).__name__
        _check.quantized(name, "xq", xq)
        if xq.ndim not in self._ndims:
            raise ValueError(f"Input shape must be `{self._layout}`!")
        self._check_channels(xq, _check.channel_axis(name, xq, self.axis), "xq")
        return type(self)._function(
            xq,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            x_scale=x_scale,
            x_zero_point=x_zero_point,
            y_scale=self.scale,
            y_zero_point=self.zero_point,
            axis=self.axis,
            eps=self.eps,
        )

    def backward(self, dy: Array) -> Array:
        """There is none: rounding to 8 bits has no gradient."""
        raise RuntimeError(f"{type(self).__name__}: a quantized layer has no backward")

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


@documented_as(_QuantizedBatchNorm)
class QuantizedBatchNorm2d(_QuantizedBatchNorm):
    """Quantized batch norm for inputs (N, C, H, W)."""

    _function = staticmethod(quantized_batch_norm)
    _ndims, _layout = (4,), "(N, C, H, W)"


@documented_as(_QuantizedBatchNorm)
class QuantizedBatchNorm3d(_QuantizedBatchNorm):
    """Quantized batch norm for inputs (N, C, D, H, W)."""

    _function = staticmethod(quantized_batch_norm)
    _ndims, _layout = (5,), "(N, C, D, H, W)"


@documented_as(_QuantizedBatchNorm)
class QuantizedBNReLU2d(_QuantizedBatchNorm):
    """Quantized batch norm, then ReLU, for inputs (N, C, H, W)."""

    _function = staticmethod(quantized_batch_norm_relu)
    _ndims, _layout = (4,), "(N, C, H, W)"


@documented_as(_QuantizedBatchNorm)
class QuantizedBNReLU3d(_QuantizedBatchNorm):
    """Quantized batch norm, then ReLU, for inputs (N, C, D, H, W)."""

    _function = staticmethod(quantized_batch_norm_relu)
    _ndims, _layout = (5,), "(N, C, D, H, W)"
