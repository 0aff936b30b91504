"""Batch norm over 1 to 64 simulated ranks is batch norm on the concatenated batch, however it is cut."""

from __future__ import annotations

import pytest

import sweep
from arraynorm.distributed import ThreadCommunicator
from sync_cases import on_ranks

RANKS = (1, 2, 3, 4, 8, 16, 64)


def held(case, data):
    """What each rank holds that merges the way of `case`."""

    def rank(comm):
        limited = ThreadCommunicator(comm._group, comm.rank, max_gathered_ranks=sweep.THRESHOLDS[case.path])
        return sweep.on_rank(case, data, limited)

    return on_ranks(len(data.counts), rank)


@pytest.mark.parametrize("case", sweep.CASES, ids=str)
@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_are_one_batch(ranks, case):
    data = sweep.batch(ranks, case)
    sweep.assert_one_batch(case, held(case, data), sweep.in_one_process(case, data))


@pytest.mark.parametrize("apart", [0.0, 3.0], ids=["one mean", "a mean per rank"])
@pytest.mark.parametrize(
    "case", [case for case in sweep.CASES if case.dtype == "float64" and case.layout == "2d"], ids=str
)
@pytest.mark.parametrize("ranks", RANKS)
def test_a_mean_of_a_million_deviations_costs_as_many_roundings_as_in_one_process(ranks, case, apart):
    data = sweep.batch(ranks, case, mean=1e4, std=1e-2, apart=apart)
    sweep.assert_one_batch(case, held(case, data), sweep.in_one_process(case, data), condition=data.condition())


def test_the_cuts_have_empty_ranks_and_single_samples():
    for ranks in RANKS:
        counts = sweep.cut(ranks, seed=ranks)
        assert len(counts) == ranks
        assert (0 in counts) == (ranks > 1)
        assert (1 in counts) == (ranks > 2)
