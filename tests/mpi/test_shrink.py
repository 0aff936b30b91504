"""Shrinking a communicator of which nobody has died; test_lost_ranks.py has those of which somebody has."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from arraynorm.distributed import MPICommunicator, SyncError

# What Open MPI's mpiexec tells the ranks when it is given `--with-ft ulfm`; MPICH's has no such thing to tell.
TOLD_BY = "OMPI_MCA_mpi_ft_enable"
WITH_ULFM = os.environ.get(TOLD_BY) == "1"


def test_all_who_live_are_left_or_the_error_names_an_mpi_that_can_shrink(world):
    comm = MPICommunicator(world.Dup(), timeout=50, max_gathered_ranks=1)
    if not WITH_ULFM:
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=r"can't go on without a rank.*mpiexec --with-ft ulfm"):
            comm.shrink()
        assert time.monotonic() - start < 10  # at once, not at the deadline
        assert comm.allreduce_sum(np.ones(1)) == world.size
        return
    left = comm.shrink()
    assert (left.rank, left.size, left.timeout, left.max_gathered_ranks) == (world.rank, world.size, 50, 1)
    assert left.allreduce_sum(np.ones(1)) == world.size
    with pytest.raises(SyncError, match="broken since an earlier call: it was shrunk"):
        comm.allreduce_sum(np.ones(1))
