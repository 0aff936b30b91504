"""RMS norm layer."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from arraynorm import _check
from arraynorm.functional.rms_norm import rms_norm_backward, rms_norm_forward
from arraynorm.layers._affine import AffineModule
from arraynorm.typing import Array


class RMSNorm(AffineModule):
    """RMS norm: the input over its root mean square, taken over the last dimensions.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The last dimensions of the input, at least one.
    eps : float, optional
        Added to the mean square; >= 0. None is the machine epsilon of the computation dtype (float32's for float16
        and bfloat16), as in torch 2.13.
    elementwise_affine : bool
        Whether there is a weight (ones), of normalized_shape.
    xp, device, dtype : optional
        Of the parameter, as for `BatchNorm`.

    Raises
    ------
    ValueError
        normalized_shape is (); from a call: the input does not end with normalized_shape.
    TypeError, RuntimeError
        As for `BatchNorm`.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        xp: ModuleType | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.normalized_shape = _check.normalized_shape(name, normalized_shape)
        self.eps = None if eps is None else _check.epsilon(name, eps)
        self.elementwise_affine = elementwise_affine
        _check.placement(name, xp, device, dtype)
        self._init_parameter("weight", self.normalized_shape, elementwise_affine, 1, xp=xp, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """weight 1."""
        self._reset_affine(self.elementwise_affine)

    def forward(self, x: Array) -> Array:
        """y, in x's shape and dtype."""
        y, cache = rms_norm_forward(x, self.normalized_shape, self.weight, eps=self.eps)
        self.keep(cache)
        return y

    def backward(self, dy: Array) -> Array:
        """dx; adds to `grads["weight"]`."""
        return self._backward(rms_norm_backward, dy).dx

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
