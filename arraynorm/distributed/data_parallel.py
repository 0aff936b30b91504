"""What data-parallel training needs besides synchronized norms: equal starts, and gradients added over the ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from arraynorm import _array, _fields
from arraynorm.distributed._communicator import HostCommunicator
from arraynorm.distributed._resolve import as_communicator, world
from arraynorm.typing import Array

Named = Sequence[tuple[str, Array]]


def broadcast_state(module: Any, comm: Any = None, *, root: int = 0) -> None:
    """Give every rank the parameters and buffers that rank `root` has, in place.

    Parameters
    ----------
    module : Module
        The same tree of layers on every rank.
    comm : communicator, optional
        Of `arraynorm.distributed`, or an mpi4py one; None is the whole world.
    root : int
        The rank to copy from.

    Raises
    ------
    ValueError
        There is no such rank.
    SyncMismatchError
        On every rank: names, shapes or dtypes differ between ranks.
    """
    group = _group("broadcast_state", comm)
    if not (isinstance(root, int) and 0 <= root < group.size):
        raise ValueError(f"broadcast_state: root must be a rank from 0 to {group.size - 1}, got {root!r}")
    state = list(module.state_dict().items())
    _agree(group, "broadcast_state", state, root=root)
    groups = _by_dtype(state)
    received = group.broadcast([_flattened(named) for named in groups], root)
    module.load_state_dict(
        dict(pair for a, named in zip(received, groups, strict=True) for pair in _unflattened(a, named))
    )


def allreduce_gradients(module: Any, comm: Any = None, *, average: bool = False) -> None:
    """Add the parameters' gradients over all ranks, in place: one message per dtype, the same bits on every rank.

    The losses of all ranks' samples add up if each rank differentiates the **sum** of its own; to average, divide
    `dy` by the global number of samples, which is right for uneven shards as well.

    Parameters
    ----------
    module : Module
        The same tree of layers on every rank.
    comm : communicator, optional
        Of `arraynorm.distributed`, or an mpi4py one; None is the whole world.
    average : bool
        Divide by the number of ranks: for losses that are averaged over equal shards.

    Raises
    ------
    SyncMismatchError
        On every rank: names, shapes or dtypes of the gradients differ, or one rank lacks a gradient.
    """
    group = _group("allreduce_gradients", comm)
    gradients = [(name, gradient) for name, _, gradient in module.named_gradients()]
    _agree(group, "allreduce_gradients", gradients, average=int(average))
    groups = _by_dtype(gradients)
    totals = group.allreduce([_flattened(named) for named in groups])
    for total, named in zip(totals, groups, strict=True):
        mean = total / total.dtype.type(group.size) if average else total
        for (_, gradient), (_, value) in zip(named, _unflattened(mean, named), strict=True):
            gradient[...] = _array.from_numpy(value, _array.array_namespace(gradient), _array.device(gradient))


def _group(function: str, comm: Any) -> HostCommunicator:
    group = world() if comm is None else as_communicator(comm, function)
    if not isinstance(group, HostCommunicator):
        raise TypeError(
            f"{function}: comm must be a communicator of arraynorm.distributed, got {type(comm).__qualname__}"
        )
    return group


def _agree(group: HostCommunicator, operation: str, named: Named, **settings: int) -> None:
    """All ranks bring arrays of the same names, shapes and dtypes."""
    listed = "\n".join(f"{name} {tuple(a.shape)} {_array.dtype_name(a.dtype)}" for name, a in named)
    elements = sum(int(np.prod(a.shape)) for _, a in named)
    what = f"{len(named)} of {elements} elements in all, {hashlib.blake2b(listed.encode(), digest_size=4).hexdigest()}"
    group.agree(_fields.pack({"operation": operation, "arrays": what, **settings}))


def _by_dtype(named: Named) -> list[Named]:
    groups: dict[str, list[tuple[str, Array]]] = {}
    for name, array in named:
        groups.setdefault(_array.dtype_name(array.dtype), []).append((name, array))
    return list(groups.values())


def _flattened(named: Named) -> np.ndarray[Any, Any]:
    """One vector of all elements, in a dtype that MPI can add."""
    flat = np.concatenate([_array.to_numpy(array).reshape(-1) for _, array in named])
    return flat.astype(np.float32) if _array.dtype_name(flat.dtype) in ("float16", "bfloat16") else flat


def _unflattened(flat: np.ndarray[Any, Any], named: Named) -> Iterable[tuple[str, np.ndarray[Any, Any]]]:
    start = 0
    for name, array in named:
        shape = tuple(array.shape)
        stop = start + int(np.prod(shape))
        yield name, flat[start:stop].reshape(shape)
        start = stop
