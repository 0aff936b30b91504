"""Modules one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import overload

from arraynorm.layers.module import Module
from arraynorm.typing import Array


class Sequential(Module):
    """Modules one after the other; the backward runs them in reverse.

    Parameters
    ----------
    *modules : Module
        Or one mapping of names to modules.
    """

    def __init__(self, *modules: Module | Mapping[str, Module]) -> None:
        super().__init__()
        if len(modules) == 1 and isinstance(modules[0], Mapping):
            named = tuple(modules[0].items())
        else:
            named = tuple((str(number), module) for number, module in enumerate(modules))  # type: ignore[misc]
        for name, module in named:
            if not isinstance(module, Module):
                raise TypeError(f"Sequential: {name} must be a Module, got {type(module).__qualname__}")
            self.add_module(name, module)

    def forward(self, x: Array) -> Array:
        """The last module's y."""
        for module in self.children():
            x = module(x)
        return x

    def backward(self, dy: Array) -> Array:
        """The first module's dx."""
        for module in reversed(tuple(self.children())):
            dx = module.backward(dy)
            dy = dx[0] if isinstance(dx, tuple) else dx  # a fused layer's daddend: it had no addend here
        return dy

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return self.children()

    @overload
    def __getitem__(self, index: int) -> Module: ...
    @overload
    def __getitem__(self, index: slice) -> Sequential: ...
    def __getitem__(self, index: int | slice) -> Module:
        """One module, or a Sequential of those of a slice, which keep their names."""
        if isinstance(index, slice):
            return Sequential(dict(tuple(self.named_children())[index]))
        return tuple(self.children())[index]
