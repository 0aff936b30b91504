"""What communicators have in common: packing, merging in rank order, and finding out who disagrees."""

from __future__ import annotations

import abc
from typing import Any, Self

import numpy as np

from arraynorm import _array, _fields
from arraynorm.distributed._moments import Float64Array, merge
from arraynorm.typing import Array


class SyncMismatchError(RuntimeError):
    """The ranks' calls differ, or one of them was refused; raised on every rank."""


class HostCommunicator(abc.ABC):
    """A communicator that gathers host float64 payloads and works on them in rank order.

    Every rank does the same arithmetic on the same numbers, so results are bit-identical by construction.
    """

    @property
    @abc.abstractmethod
    def rank(self) -> int:
        """This rank's number."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """The number of ranks."""

    @abc.abstractmethod
    def _allgather(self, payload: Float64Array) -> Float64Array:
        """payload (K,), the same K on every rank -> (size, K)."""

    @abc.abstractmethod
    def _allgather_bytes(self, message: bytes) -> list[bytes]:
        """Every rank's message, which may differ in length."""

    def agree(self, fields: bytes, error: Exception | None = None) -> None:
        """See `arraynorm.typing.Communicator.agree`."""
        said = b"" if error is None else f"{type(error).__name__}: {error}".encode()
        calls = self._allgather_bytes(b"e" + said if error is not None else b"f" + fields)
        errors = [f"rank {rank}: {call[1:].decode()}" for rank, call in enumerate(calls) if call[:1] == b"e"]
        if errors:
            raise SyncMismatchError("a rank refused its call; " + "; ".join(errors)) from error
        if any(call != calls[0] for call in calls):
            raise SyncMismatchError("the ranks' calls differ: " + _differences([call[1:] for call in calls]))

    def merge_moments(self, n: int, mean: Array, m2: Array) -> tuple[int, Array, Array]:
        """See `arraynorm.typing.Communicator.merge_moments`: one message of [n, mean, m2]."""
        host_mean, host_m2 = _array.to_numpy(mean), _array.to_numpy(m2)
        gathered = self._allgather(np.concatenate(([float(n)], host_mean, host_m2)))
        channels = host_mean.shape[0]
        n, merged_mean, merged_m2 = merge((int(row[0]), row[1 : 1 + channels], row[1 + channels :]) for row in gathered)
        return n, _like(mean, merged_mean), _like(m2, merged_m2)

    def allreduce_sum(self, a: Array) -> Array:
        """See `arraynorm.typing.Communicator.allreduce_sum`: one message, added in rank order."""
        host = _array.to_numpy(a)
        # a copy: a peer that has the sum may go on to write to its own `a` while another still adds
        gathered = self._allgather(np.array(host, dtype=np.float64, order="C").reshape(-1))
        total = gathered[0].copy()
        with np.errstate(all="ignore"):
            for row in gathered[1:]:
                total += row
        return _like(a, total.reshape(host.shape))

    def __copy__(self) -> Self:
        return self  # it stands for processes, not for data

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(f"{type(self).__name__}: a communicator cannot be pickled")


class SelfCommunicator(HostCommunicator):
    """The group of this rank alone: nothing is sent."""

    rank = 0
    size = 1

    def agree(self, fields: bytes, error: Exception | None = None) -> None:
        """Raises `error` itself, if there is one."""
        if error is not None:
            raise error

    def _allgather(self, payload: Float64Array) -> Float64Array:
        return payload[None, :]

    def _allgather_bytes(self, message: bytes) -> list[bytes]:
        return [message]

    def __reduce__(self) -> str:
        return "SELF"

    def __repr__(self) -> str:
        return "arraynorm.distributed.SELF"


SELF = SelfCommunicator()
"""No synchronization."""


def _like(array: Array, host: Float64Array) -> Array:
    """`host` in the library and on the device of `array`."""
    return _array.from_numpy(host, _array.array_namespace(array), _array.device(array))


def _differences(calls: list[bytes]) -> str:
    """What the ranks hold, as far as it differs: "dtype: float32 on rank 0, float64 on rank 1"."""
    unpacked = [_fields.unpack(call) for call in calls]
    names = dict.fromkeys(name for fields in unpacked for name in fields)
    texts = []
    for name in names:
        values = [fields.get(name, "absent") for fields in unpacked]
        if any(value != values[0] for value in values):
            held = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            texts.append(f"{name}: {held}")
    return "; ".join(texts)
