"""The types of the public API: arrays, the communicator protocol, and the gradients that backwards return."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

__all__ = [
    "AddReluGradients",
    "AffineGradients",
    "Array",
    "Communicator",
    "InputGradients",
    "NamedGradient",
    "RMSNormGradients",
]

Array: TypeAlias = Any
"""An array of any library that implements the Python array API standard."""


@runtime_checkable
class Communicator(Protocol):
    """What synchronized statistics need of a group of ranks.

    Arrays go in and come back in the caller's library; the payload is float64 on the host. Every method is
    collective: all ranks call the same ones in the same order.
    """

    @property
    def rank(self) -> int:
        """This rank's number, 0 <= rank < size."""

    @property
    def size(self) -> int:
        """The number of ranks."""

    def agree(self, fields: bytes, error: Exception | None = None) -> None:
        """Compare `fields` over all ranks; raise on every rank if they differ, or if any rank brings an `error`.

        Without an `error` it may leave that to the payload that follows, which then raises instead.
        """

    def merge_moments(self, n: int, mean: Array, m2: Array) -> tuple[int, Array, Array]:
        """Count, mean (C,) and sum of squared deviations (C,) of the union of all ranks' samples."""

    def allreduce_sum(self, a: Array) -> Array:
        """The sum over ranks in float64, added in an order that does not depend on timing."""


class AffineGradients(NamedTuple):
    """Gradients of a norm with weight and bias."""

    dx: Array
    """x's shape and dtype."""
    dweight: Array | None
    """weight's shape, in the computation dtype; None where weight is None."""
    dbias: Array | None
    """bias's shape, in the computation dtype; None where bias is None."""


class AddReluGradients(NamedTuple):
    """Gradients of batch norm + add + ReLU."""

    dx: Array
    daddend: Array | None
    """addend's shape and x's dtype; None where addend is None."""
    dweight: Array | None
    dbias: Array | None


class RMSNormGradients(NamedTuple):
    """Gradients of RMS norm."""

    dx: Array
    dweight: Array | None


class NamedGradient(NamedTuple):
    """One item of `Module.named_gradients`."""

    name: str
    parameter: Array
    gradient: Array


class InputGradients(NamedTuple):
    """What the backward of a fused layer returns: the gradients of its two inputs."""

    dx: Array
    daddend: Array | None
