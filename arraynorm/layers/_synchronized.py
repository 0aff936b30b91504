"""What the layers with a communicator share: which one it is, and what it knows of the layer."""

from __future__ import annotations

import numbers
from typing import Any, Self

from arraynorm import _fields, distributed
from arraynorm.layers.batch_norm import BatchNorm
from arraynorm.typing import Array, Communicator


class _Lost:
    """Stands where a layer had a communicator before it was pickled."""


class SynchronizedBatchNorm(BatchNorm):
    """Batch norm with a `comm`: a communicator, a raw mpi4py one (wrapped once), or None for the whole world."""

    _comm: Communicator | _Lost | None
    _index: int
    """The layer's number on its communicator. The ranks compare it, so that no layer meets another of equal size."""

    name: str | None
    """Compared by the ranks as well, and named in errors."""

    @property
    def comm(self) -> Any:
        """The ranks that share their statistics; None is the whole world, found at the first training forward."""
        return None if isinstance(self._comm, _Lost) else self._comm

    @comm.setter
    def comm(self, comm: Any) -> None:
        comm = distributed.as_communicator(comm, type(self).__name__)
        self.__dict__.update(_comm=comm, _index=distributed.layer_numbers(comm).take())

    def _collective(self) -> Communicator | None:
        """The communicator of a training forward; None in eval, which never communicates, and for one rank."""
        if not self.training:
            return None
        if isinstance(self._comm, _Lost):
            raise RuntimeError(
                f"{type(self).__name__}: the communicator was lost when the layer was pickled; set layer.comm"
            )
        comm = distributed.world() if self._comm is None else self._comm
        return _LayerCommunicator(comm, self) if comm.size > 1 else None

    def __getstate__(self) -> dict[str, Any]:
        keeps = self._comm is None or self._comm is distributed.SELF
        return {**super().__getstate__(), "_comm": self._comm if keeps else _Lost()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._comm is None:  # it has the number that it had on the rank which made it
            distributed.layer_numbers(None).skip(self._index)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self._comm)] = self._comm  # by reference: it stands for processes, not for data
        return super().__deepcopy__(memo)


class _LayerCommunicator:
    """A communicator whose agreement rounds also compare the layers that meet in them."""

    def __init__(self, comm: Communicator, layer: BatchNorm) -> None:
        self._comm = comm
        fields: dict[str, _fields.Field] = {
            "layer": type(layer).__name__,
            "name": layer.name or "",
            "index": layer._index,
        }
        if layer._moves_running_stats():
            momentum = layer.momentum
            fields["momentum"] = float(momentum) if isinstance(momentum, numbers.Real) else "cumulative"
        self._identity = _fields.pack(fields)

    @property
    def rank(self) -> int:
        return self._comm.rank

    @property
    def size(self) -> int:
        return self._comm.size

    def agree(self, fields: bytes, error: Exception | None = None) -> None:
        self._comm.agree(self._identity + fields, error)

    def merge_moments(self, n: int, mean: Array, m2: Array) -> tuple[int, Array, Array]:
        return self._comm.merge_moments(n, mean, m2)

    def allreduce_sum(self, a: Array) -> Array:
        return self._comm.allreduce_sum(a)
