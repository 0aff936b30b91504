"""What communicators have in common: agreement rounds, and merging in an order that does not depend on timing."""

from __future__ import annotations

import abc
import contextvars
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import numpy as np

from arraynorm import _fields
from arraynorm.distributed import _agreement, _moments
from arraynorm.distributed._agreement import HEAD
from arraynorm.distributed._errors import SyncError, SyncMismatchError
from arraynorm.distributed._moments import Float64Array, Moments, merge_by_sums, unpacked
from arraynorm.distributed._rows import Row, Rows, row_capacity
from arraynorm.distributed._staging import Staging
from arraynorm.kernels.cpu import native
from arraynorm.typing import Array

MAX_GATHERED_RANKS = 16
"""Up to so many ranks a payload is gathered and worked on in rank order: one message. Beyond, it is summed.

Measured with 2 to 16 ranks and 64 to 4096 channels, and by the cost model for a network of 5 us: docs/cost_model.md.
"""

# pack_payload, add_payloads and merge_moments: of the extension where it is built, else of Python, to the same bits.
_payloads: Any = _moments if native is None else native

_UNANNOUNCED = _fields.pack({"operation": "a payload that no agree announced"})


class LayerNumbers:
    """The numbers of the layers on a communicator, in the order of construction."""

    def __init__(self) -> None:
        self._next = 0

    def take(self) -> int:
        """The number of one more layer."""
        self._next += 1
        return self._next - 1

    def skip(self, number: int) -> None:
        """A layer comes with its number, from another process perhaps: later ones get greater numbers."""
        self._next = max(self._next, number + 1)


class HostCommunicator(abc.ABC):
    """A communicator whose payloads are float64 on the host.

    Every rank does the same arithmetic on the same numbers, so results are bit-identical on all ranks. A subclass
    brings the transport: `_swap`, `_maximum`, `_gather`, `_sum`, `_broadcast`, which raise rather than wait for ever.

    Where payloads are gathered, `agree` of a call that this rank can make only announces it: the ranks compare their
    calls in the message of the payload that follows, which raises the SyncMismatchError. Where they are summed, and for
    an error, `agree` makes a round of its own.

    Parameters
    ----------
    validate : bool
        Whether `agree` compares the ranks' calls. Without it a difference between ranks is a hang or garbage.
    max_gathered_ranks : int
        See MAX_GATHERED_RANKS.
    """

    def __init__(self, *, validate: bool = True, max_gathered_ranks: int = MAX_GATHERED_RANKS) -> None:
        self.validate = validate
        self.max_gathered_ranks = max_gathered_ranks
        self._rounds = 0
        self._steps = 0
        self.layer_numbers = LayerNumbers()
        self._said: bytes | None = b""  # None for an error
        self._is_announced = False  # what was said was not compared yet
        self._broken = ""
        self._turn = _Turn(type(self).__name__, self._break)
        self._staging = Staging()
        # A rank may bring NaN or infinity: a value, not an event. np.errstate takes 2 us, this 0.1.
        self._silently: Callable[..., Any] = contextvars.Context().run
        self._silently(np.seterr, all="ignore")

    @property
    @abc.abstractmethod
    def rank(self) -> int:
        """This rank's number."""

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """The number of ranks."""

    def _row(self, length: int) -> Row:
        """A row to be written and swapped."""
        return Row(np.empty(length))

    @abc.abstractmethod
    def _swap(self, row: Row) -> Rows:
        """The rows of all ranks; good until the next swap."""

    @abc.abstractmethod
    def _maximum(self, a: Any) -> Any:
        """Elementwise maximum of an int64 vector over all ranks."""

    @abc.abstractmethod
    def _gather(self, a: Any) -> Any:
        """A vector (K,) of any dtype, the same K on every rank -> (size, K)."""

    @abc.abstractmethod
    def _sum(self, a: Any) -> Any:
        """The sum of a vector over all ranks, the same bits on each of them."""

    @abc.abstractmethod
    def _broadcast(self, a: Any, root: int) -> Any:
        """Rank root's vector."""

    # -- the protocol of arraynorm.typing.Communicator ---------------------------------------------------------

    def agree(self, fields: bytes, error: BaseException | None = None) -> None:
        """See `arraynorm.typing.Communicator.agree`."""
        turn = self._turn
        turn.take()
        try:
            if turn.payload_is_due:
                turn.skip_payload()
                if not (self._is_announced and self.validate):
                    # An exception kept this rank from it: the peers wait there, not in a round.
                    self._broken = self._broken or f"{self} did not come to the payload of {self._call()}"
            self._said = fields if error is None else None
            self._is_announced = True
            if error is not None or not self._gathers:
                self._meet(error)
        except BaseException as reason:
            self._break(reason)
            turn.release()
            raise
        turn.payload_is_due = True

    def merge_moments(self, n: int, mean: Array, m2: Array) -> tuple[int, Array, Array]:
        """See `arraynorm.typing.Communicator.merge_moments`."""
        with self._turn:
            if self._gathers:
                merged: Moments = self._silently(_payloads.merge_moments, self._gathered([n], mean, m2))
            else:
                message = self._staging.host_message([n], mean, m2)
                merged = self._silently(merge_by_sums, unpacked(message), self._sum)
            if type(mean) is np.ndarray:
                return merged
            n, merged_mean, merged_m2 = merged
            return n, self._staging.like(mean, merged_mean), self._staging.like(m2, merged_m2)

    def allreduce_sum(self, a: Array) -> Array:
        """See `arraynorm.typing.Communicator.allreduce_sum`."""
        with self._turn:
            if self._gathers:
                total = self._silently(_payloads.add_payloads, self._gathered([], a))
            else:
                total = self._silently(self._sum, self._staging.host_message([], a))
            return self._staging.like(a, total.reshape(a.shape))

    # -- what the ranks say of a call, alone or at the head of its payload ---------------------------------------

    @functools.cached_property
    def _gathers(self) -> bool:
        return self.size <= self.max_gathered_ranks

    @functools.cached_property
    def _row_capacity(self) -> int:
        return row_capacity(self.size)

    def _gathered(self, head: Sequence[float], *arrays: Array) -> list[Float64Array]:
        """The payloads [*head, *arrays] of all ranks, on the host: views that are good until the next call."""
        length = HEAD + len(head)
        for array in arrays:
            length += array.size
        staging = self._staging
        if length > self._row_capacity or (staging.cuda_aware and staging.sends_device_memory(arrays[0])):
            if self._is_announced:
                self._meet()
            return list(staging.gathered(self._gather(staging.message(head, *arrays))))
        return self._compared(length, None, *head, *staging.on_host(arrays))

    def _meet(self, error: BaseException | None = None) -> None:
        """Make the round that was announced, without a payload."""
        if not self.validate:
            self._is_announced = False
        elif self._gathers:
            self._compared(HEAD, error)
        else:
            fields = self._take_announced()
            if not _agreement.agree_by_maximum(fields, error, self._rounds, self._steps, self._maximum):
                raise self._disagreement(fields, error) from error

    def _compared(self, length: int, error: BaseException | None, *parts: Any) -> list[Float64Array]:
        """The payloads of all ranks, once the heads of their rows were found to be equal.

        This one's consists of `parts`, and its row has `length` elements.
        """
        fields, row = self._take_announced(), self._row(length)
        head = _agreement.head(fields, error, self._rounds, self._steps, length - HEAD)
        _payloads.pack_payload(row.whole, *head, *parts)
        rows = self._swap(row)
        if self.validate and not _agreement.agree_by_heads(rows.heads, error):
            raise self._disagreement(fields, error, elements=length - HEAD) from error
        return rows.payloads

    def _disagreement(self, fields: bytes, error: BaseException | None, **numbers: int) -> SyncMismatchError:
        numbers = {"round": self._rounds, "step": self._steps, **numbers}
        return _agreement.disagreement(fields, numbers, error, self._gather)

    def _take_announced(self) -> bytes:
        """What this rank says in the round that it now makes."""
        if not self._is_announced:
            return _UNANNOUNCED
        self._is_announced = False
        # The number of the round finds a skipped or an extra call even where the calls look alike.
        self._rounds += 1
        return self._said or b""

    # -- payloads of any dtype, for data-parallel training -------------------------------------------------------

    def allreduce(self, vectors: Sequence[Any]) -> list[Any]:
        """The sums over all ranks of vectors of host numbers, in their dtypes: the same bits on each rank."""
        with self._turn:
            if self._is_announced:
                self._meet()
            return [self._silently(self._sum, vector) for vector in vectors]

    def broadcast(self, vectors: Sequence[Any], root: int) -> list[Any]:
        """Rank root's vectors of host numbers; `vectors` give sizes and dtypes and may be overwritten."""
        with self._turn:
            if self._is_announced:
                self._meet()
            return [self._broadcast(vector, root) for vector in vectors]

    def _break(self, reason: BaseException) -> None:
        """After an exception within a collective later ones would meet other collectives of the peers."""
        if not isinstance(reason, SyncMismatchError) and not self._broken:
            self._broken = f"{self} left {self._call()} by {type(reason).__name__}: {reason}"

    def _agree_alone(self, fields: bytes, error: BaseException | None = None) -> None:
        """A round that no payload follows."""
        self.agree(fields, error)
        with self._turn:
            if self._is_announced:
                self._meet()

    def _call(self) -> str:
        """ "SyncBatchNorm 3, batch_norm, step 12": what a rank that waits in vain says that it waits for."""
        if self._said is None:
            return "reporting an error"
        said = _fields.unpack(self._said)
        layer = " ".join(str(said[name]) for name in ("layer", "name", "index") if said.get(name, "") != "")
        words = [layer, str(said.get("operation", "a call")), f"step {self._steps}" if self._steps else ""]
        return ", ".join(word for word in words if word)

    # -- training steps ----------------------------------------------------------------------------------------

    @contextmanager
    def step(self) -> Iterator[None]:
        """Close a training step with one more agreement round.

        A rank whose body raised brings its error to the round that its peers come to next, so that all raise within
        one round; a rank that skipped the last call, or made one too many, is found at the end of the step.
        """
        self._steps += 1
        before = self._rounds
        try:
            yield
        except SyncError:  # every rank has it already, or can't be reached
            raise
        except BaseException as error:
            # the peers wait in another collective than a round
            if self._broken or (self._turn.payload_is_due and not self._is_announced):
                raise
            self._agree_alone(b"", error)
            raise
        self._agree_alone(_fields.pack({"operation": "the end of the step", "calls": self._rounds - before}))

    # -- copies ------------------------------------------------------------------------------------------------

    def __copy__(self) -> Self:
        return self  # it stands for processes, not for data

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(f"{type(self).__name__}: a communicator cannot be pickled")


class _Turn:
    """The one thread that may send: from an agreement to the end of its payload no other comes between."""

    def __init__(self, whose: str, on_error: Callable[[BaseException], None]) -> None:
        self._whose = whose
        self._on_error = on_error
        lock = threading.RLock()
        self._acquire, self.release = lock.acquire, lock.release
        self.payload_is_due = False
        """The turn is kept for the payload of a call that was agreed on or announced."""

    def take(self) -> None:
        if not self._acquire(False):
            raise RuntimeError(
                f"{self._whose}: entered from two threads at once, whose messages would mix; make one "
                "communicator per thread, in the same order on every rank"
            )

    def skip_payload(self) -> None:
        """Give up the turn that was kept."""
        self.payload_is_due = False
        self.release()

    __enter__ = take  # for a payload

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._on_error(error)
        self.release()
        if self.payload_is_due:
            self.skip_payload()


class SelfCommunicator(HostCommunicator):
    """The group of this rank alone: nothing is sent."""

    rank = 0
    size = 1

    def agree(self, fields: bytes, error: BaseException | None = None) -> None:
        """Raises `error` itself, if there is one."""
        if error is not None:
            raise error

    def _swap(self, row: Row) -> Rows:
        return Rows.of([row])

    def _maximum(self, a: Any) -> Any:
        return a

    def _gather(self, a: Any) -> Any:
        return a[None, :]

    def _sum(self, a: Any) -> Any:
        return a

    def _broadcast(self, a: Any, root: int) -> Any:
        return a

    def __reduce__(self) -> str:
        return "SELF"

    def __repr__(self) -> str:
        return "arraynorm.distributed.SELF"


SELF = SelfCommunicator()
"""No synchronization."""
