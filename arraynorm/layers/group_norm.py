"""Group norm layer."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from arraynorm import _check
from arraynorm.functional.group_norm import group_norm_backward, group_norm_forward
from arraynorm.layers._affine import AffineModule
from arraynorm.typing import Array


class GroupNorm(AffineModule):
    """Group norm: statistics per sample and group of adjacent channels.

    Parameters
    ----------
    num_groups : int
        A divisor of num_channels.
    num_channels : int
        C, the size of the channel axis.
    eps : float
        Added to the **biased** variance; >= 0.
    affine : bool
        Whether there is a weight (ones) and, with `bias`, a bias (zeros), per channel.
    bias : bool
    axis : int
        The channel axis, not 0.
    xp, device, dtype : optional
        Of the parameters, as for `BatchNorm`.

    Raises
    ------
    ValueError
        num_channels is not divisible by num_groups; from a call: fewer than 2 dimensions, other channels.
    TypeError, RuntimeError
        As for `BatchNorm`.

    Notes
    -----
    One value per group gives the bias, for every N (torch raises for N = 1 only).
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bias: bool = True,
        axis: int = 1,
        xp: ModuleType | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.num_channels = _check.count(name, "num_channels", num_channels, minimum=0)
        self.num_groups = _check.groups(name, num_groups, self.num_channels)
        self.eps = _check.epsilon(name, eps)
        self.affine = affine
        _check.placement(name, xp, device, dtype)
        self.axis = _check.axis_of_inputs(name, axis, (), first=1)
        shape = (self.num_channels,)
        self._init_affine(shape, weight=affine, bias=affine and bias, xp=xp, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """weight 1, bias 0."""
        self._reset_affine(self.affine)

    def forward(self, x: Array) -> Array:
        """y, in x's shape and dtype."""
        name = type(self).__name__
        _check.input_array(name, "x", x)
        _check.min_ndim(x, 2)
        _check.channels(
            name, "x", x, _check.channel_axis(name, x, self.axis, first=1), "num_channels", self.num_channels
        )
        y, cache = group_norm_forward(x, self.num_groups, self.weight, self.bias, axis=self.axis, eps=self.eps)
        self.keep(cache)
        return y

    def backward(self, dy: Array) -> Array:
        """dx; adds to `grads["weight"]` and `grads["bias"]`."""
        return self._backward(group_norm_backward, dy).dx

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}"
