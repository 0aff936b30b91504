"""How many threads a call may use unless somebody says otherwise."""

from __future__ import annotations

import os
from collections.abc import Mapping

_LOCAL_RANKS = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "PMI_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
"""Where launchers say how many ranks they have started on this machine: MPICH, Open MPI, and MVAPICH's two."""


def default_threads(environment: Mapping[str, str]) -> int:
    """ARRAYNORM_NUM_THREADS, or the processors that this process may run on.

    Under an MPI launcher that has bound no rank, so that each may run anywhere, that is this rank's share of them.
    """
    if given := environment.get("ARRAYNORM_NUM_THREADS"):
        if not given.isdecimal() or int(given) < 1:
            raise ValueError(f"ARRAYNORM_NUM_THREADS must be an integer >= 1, got {given!r}")
        return int(given)
    everything = os.cpu_count() or 1
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else everything
    ranks = next((int(n) for name in _LOCAL_RANKS if (n := environment.get(name, "")).isdecimal()), 1)
    return max(1, mine // max(1, ranks)) if mine == everything else mine
