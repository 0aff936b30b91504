"""What the layers with one weight and one bias per channel or element share."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

from arraynorm import _array, _check
from arraynorm.layers.module import Module
from arraynorm.typing import AddReluGradients, AffineGradients, Array, RMSNormGradients

G = TypeVar("G", AddReluGradients, AffineGradients, RMSNormGradients)


class AffineModule(Module):
    """A module with parameters `weight` (ones) and, but for RMS norm, `bias` (zeros), either of which may be None."""

    def _init_affine(
        self,
        shape: tuple[int, ...],
        *,
        weight: bool,
        bias: bool,
        xp: ModuleType | None,
        device: Any,
        dtype: Any,
    ) -> None:
        self._init_parameter("weight", shape, weight, 1, xp=xp, device=device, dtype=dtype)
        self._init_parameter("bias", shape, bias, 0, xp=xp, device=device, dtype=dtype)

    def _init_parameter(
        self,
        name: str,
        shape: tuple[int, ...],
        present: bool,
        value: float,
        *,
        xp: ModuleType | None,
        device: Any,
        dtype: Any,
    ) -> None:
        """Register a parameter filled with `value`, or None."""
        xp = _array.resolve_namespace(xp)
        dtype = xp.float32 if dtype is None else dtype
        self.register_parameter(name, xp.full(shape, value, dtype=dtype, device=device) if present else None)

    def _fill(self, name: str, value: float) -> None:
        """Set every element of a parameter or buffer."""
        array: Array = getattr(self, name)
        filled = _array.array_namespace(array).full_like(array, value)
        setattr(self, name, _array.assign(array, filled))

    def _require_weight(self, affine: bool) -> None:
        if affine and self.weight is None:
            raise RuntimeError(
                f"{type(self).__name__}.reset_parameters: affine is set, but the layer was built without a weight"
            )

    def _reset_affine(self, affine: bool) -> None:
        """weight = 1, bias = 0, for a layer whose live attribute says that it has them."""
        self._require_weight(affine)
        if affine:
            self._fill("weight", 1)
            if self._parameters.get("bias") is not None:
                self._fill("bias", 0)

    def _check_gradients(self) -> None:
        """What `grads` holds, perhaps from the user, can be added to."""
        for name, held in self.grads.items():
            parameter = self._parameters.get(name)
            if held is not None and parameter is not None:
                _check.companion(type(self).__name__, parameter, f"grads[{name!r}]", held, tuple(parameter.shape))

    def _backward(self, function: Callable[[Array, Any], G], dy: Array) -> G:
        """Run a functional backward on the kept cache; once it has succeeded, use up the cache and keep gradients."""
        cache = self.kept()
        self._check_gradients()
        gradients = function(dy, cache)
        self._cache = None
        for name in ("weight", "bias"):
            if name in self._parameters:
                self.accumulate_gradient(name, getattr(gradients, f"d{name}"))
        return gradients
