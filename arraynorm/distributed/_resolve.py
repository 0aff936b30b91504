"""Which communicator a user means: a raw mpi4py one, ours, or the whole world."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from arraynorm.distributed._communicator import SELF, HostCommunicator, LayerNumbers
from arraynorm.distributed.mpi import is_mpi4py, wrapped
from arraynorm.typing import Communicator

# What launchers say of the number of ranks: Open MPI, MPICH and Intel MPI (PMI), MVAPICH, Slurm's srun.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def as_communicator(comm: Any, function: str = "as_communicator") -> Communicator | None:
    """`comm` as an `arraynorm.typing.Communicator`: a raw mpi4py communicator is wrapped, None stays None."""
    if is_mpi4py(comm):  # asked first: the protocol's check looks at comm.size, which raises for COMM_NULL
        return wrapped(comm)
    # a class has the protocol's methods, too
    if comm is None or (isinstance(comm, Communicator) and not isinstance(comm, type)):
        return comm
    raise TypeError(
        f"{function}: comm must be None, a communicator of arraynorm.distributed or an mpi4py one, "
        f"got {type(comm).__qualname__}"
    )


def layer_numbers(comm: Communicator | None) -> LayerNumbers:
    """The numbers of the layers on `comm`; of one that does not keep any, new ones."""
    if comm is None:  # the world, which is not resolved before it is needed
        return _layers_of_the_world
    return comm.layer_numbers if isinstance(comm, HostCommunicator) else LayerNumbers()


_layers_of_the_world = LayerNumbers()


@functools.cache
def world() -> Communicator:
    """All ranks: MPI's world where mpi4py and an MPI are installed, else this rank, if no launcher says there are more.

    Raises
    ------
    RuntimeError
        A launcher started several ranks, and mpi4py or its MPI library is missing, or is not the launcher's: each rank
        is then alone in its world.
    """
    size = launched_ranks(os.environ)
    trouble = "mpi4py is not installed; pip install arraynorm[mpi]"
    if importlib.util.find_spec("mpi4py") is not None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            trouble = f"mpi4py finds no MPI library ({error}); install one, for example: pip install mpich"
        else:
            if size == 1 or MPI.COMM_WORLD.Get_size() > 1:
                return wrapped(MPI.COMM_WORLD)
            trouble = (
                f"each is alone in its MPI world: mpi4py runs on {MPI.get_vendor()[0]}, the launcher belongs to "
                "another MPI; use the mpiexec of that library"
            )
    if size > 1:
        raise RuntimeError(f"the launcher started {size} ranks, which can't share statistics, for {trouble}")
    return SELF


def launched_ranks(environment: Mapping[str, str]) -> int:
    """The number of ranks that a launcher announced in the environment; 1 without a launcher."""
    return max((int(environment[name]) for name in _SIZE_VARIABLES if environment.get(name, "").isdigit()), default=1)
