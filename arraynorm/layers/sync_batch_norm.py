"""Batch norm whose statistics are shared over ranks, and the conversion of a model to it and back."""

from __future__ import annotations

from types import ModuleType
from typing import Any, TypeVar, overload

from arraynorm import distributed
from arraynorm.layers._synchronized import SynchronizedBatchNorm
from arraynorm.layers.batch_norm import BatchNorm
from arraynorm.layers.fused_batch_norm import FusedBatchNorm
from arraynorm.layers.module import Module
from arraynorm.typing import Array

F = TypeVar("F", bound=FusedBatchNorm)
M = TypeVar("M", bound=Module)


class SyncBatchNorm(SynchronizedBatchNorm):
    """Batch norm with the statistics of all ranks' samples: `BatchNorm` on the concatenated batch, to rounding.

    Ranks may have different numbers of samples, or none. Works on CPU arrays (torch's refuses them). Eval never
    communicates. With one rank it is `BatchNorm`, bit for bit.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, bias, axis, xp, device, dtype
        As for `BatchNorm`; equal on all ranks.
    comm : Communicator or mpi4py communicator, optional
        The ranks that share. None is the whole world, resolved at the first training forward;
        `arraynorm.distributed.SELF` means no synchronization.
    name : str, optional
        What the ranks call the layer in errors. They compare it, as they do the layer's number on its communicator.

    Raises
    ------
    ValueError
        From a call: no channels; one value per channel over all ranks.
    SyncMismatchError
        From a call, on every rank: the ranks' calls differ, or one of them is wrong.
    RuntimeError
        From a call in training: under a launcher with several ranks, but without mpi4py.

    Notes
    -----
    dweight and dbias are this rank's sums; add them over the ranks with all other gradients, once.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        comm: Any = None,
        bias: bool = True,
        axis: int = 1,
        xp: ModuleType | None = None,
        device: Any = None,
        dtype: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            bias=bias,
            axis=axis,
            xp=xp,
            device=device,
            dtype=dtype,
        )
        self.name = name
        self.comm = comm
        self._source: type[BatchNorm] = BatchNorm

    @overload
    @classmethod
    def convert_sync_batchnorm(cls, module: F, comm: Any = None) -> F: ...  # type: ignore[overload-overlap]
    @overload
    @classmethod
    def convert_sync_batchnorm(cls, module: BatchNorm, comm: Any = None) -> SyncBatchNorm: ...
    @overload
    @classmethod
    def convert_sync_batchnorm(cls, module: M, comm: Any = None) -> M: ...
    @classmethod
    def convert_sync_batchnorm(cls, module: Module, comm: Any = None) -> Module:
        """Replace every BatchNorm in `module` by a SyncBatchNorm over `comm`; give FusedBatchNorms that communicator.

        Parameters
        ----------
        module : Module
            A container is changed in place and returned; for a BatchNorm itself a new layer is returned.
        comm : Communicator or mpi4py communicator, optional
            None is the whole world.

        Returns
        -------
        Module
            New layers share parameters, buffers, gradients and hooks with those they replace, and keep `training`
            and every other attribute.
        """
        comm = distributed.as_communicator(comm)

        def convert(layer: Module) -> Module:
            if isinstance(layer, FusedBatchNorm):
                layer.comm = comm
            elif isinstance(layer, BatchNorm):
                source = layer._source if isinstance(layer, SyncBatchNorm) else type(layer)
                layer = layer._recreated_as(cls)
                layer.__dict__.update(_source=source, name=getattr(layer, "name", None))
                layer.comm = comm
            return layer

        return _replaced(module, convert)

    def _check_input(self, x: Array) -> None:
        super()._check_input(x)
        if self.num_features == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")


@overload
def revert_sync_batchnorm(module: SyncBatchNorm) -> BatchNorm: ...
@overload
def revert_sync_batchnorm(module: M) -> M: ...
def revert_sync_batchnorm(module: Module) -> Module:
    """Undo `SyncBatchNorm.convert_sync_batchnorm`: every SyncBatchNorm becomes the class that it came from.

    One that was built directly becomes the `BatchNorm` of any rank; FusedBatchNorms stop sharing.

    Parameters
    ----------
    module : Module
        As for convert_sync_batchnorm.

    Returns
    -------
    Module
    """

    def revert(layer: Module) -> Module:
        if isinstance(layer, FusedBatchNorm):
            layer.comm = distributed.SELF
        elif isinstance(layer, SyncBatchNorm):
            source = layer._source
            layer = layer._recreated_as(source)
            for name in ("_comm", "_index", "_source"):
                layer.__dict__.pop(name, None)
        return layer

    return _replaced(module, revert)


def _replaced(module: Module, function: Any) -> Module:
    """`function` of the module, its children replaced in place first; one that stands in two places stays one."""
    done: dict[int, Module] = {}

    def visit(layer: Module) -> Module:
        if id(layer) not in done:
            done[id(layer)] = layer
            for name, child in layer.named_children():
                layer._modules[name] = visit(child)
            done[id(layer)] = function(layer)
        return done[id(layer)]

    return visit(module)
