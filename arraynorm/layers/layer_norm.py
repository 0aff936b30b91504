"""Layer norm layer."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

from arraynorm import _check
from arraynorm.functional.layer_norm import layer_norm_backward, layer_norm_forward
from arraynorm.layers._affine import AffineModule
from arraynorm.typing import Array


class LayerNorm(AffineModule):
    """Layer norm: statistics over the last dimensions.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The last dimensions of the input, at least one.
    eps : float
        Added to the **biased** variance; >= 0.
    elementwise_affine : bool
        Whether there is a weight (ones) and, with `bias`, a bias (zeros), of normalized_shape.
    bias : bool
    xp, device, dtype : optional
        Of the parameters, as for `BatchNorm`.

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
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        xp: ModuleType | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.normalized_shape = _check.normalized_shape(name, normalized_shape)
        self.eps = _check.epsilon(name, eps)
        self.elementwise_affine = elementwise_affine
        _check.placement(name, xp, device, dtype)
        affine = elementwise_affine
        self._init_affine(self.normalized_shape, weight=affine, bias=affine and bias, xp=xp, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """weight 1, bias 0."""
        self._reset_affine(self.elementwise_affine)

    def forward(self, x: Array) -> Array:
        """y, in x's shape and dtype."""
        y, cache = layer_norm_forward(x, self.normalized_shape, self.weight, self.bias, eps=self.eps)
        self.keep(cache)
        return y

    def backward(self, dy: Array) -> Array:
        """dx; adds to `grads["weight"]` and `grads["bias"]`."""
        return self._backward(layer_norm_backward, dy).dx

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
