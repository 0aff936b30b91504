"""Shrinking a communicator of which nobody has died; test_lost_ranks.py has those of which somebody has."""

from __future__ import annotations

import numpy as np
import pytest
from mpi4py import MPI

from arraynorm.distributed import MPICommunicator, SyncError


def test_all_who_live_are_left_or_the_error_names_an_mpi_that_can_shrink(world):
    comm = MPICommunicator(world.Dup(), timeout=50, max_gathered_ranks=1)
    if MPI.get_vendor()[0] != "Open MPI":
        with pytest.raises(RuntimeError, match=r"can't go on without a rank.*mpiexec --with-ft ulfm"):
            comm.shrink()
        assert comm.allreduce_sum(np.ones(1)) == world.size
        return
    left = comm.shrink()
    assert (left.rank, left.size, left.timeout, left.max_gathered_ranks) == (world.rank, world.size, 50, 1)
    assert left.allreduce_sum(np.ones(1)) == world.size
    with pytest.raises(SyncError, match="broken since an earlier call: it was shrunk"):
        comm.allreduce_sum(np.ones(1))
