"""Quantized batch norm against torch: every level in 4,096 channels; where they differ there is a rounding tie."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed here: parity is replayed from the record alone")

from parity import grid, ours, torch_side
from parity.ties import Ties, ties

pytestmark = [pytest.mark.parity, pytest.mark.behaviour(43, 44)]

CASES = grid.by_target(grid.quantized(channels=4096))


@pytest.mark.parametrize("target", CASES)
def test_ours_and_torch_differ_at_rounding_ties_alone(target, record_property):
    total = Ties()
    for case in CASES[target]:
        total = total.plus(ties(case, ours.results(case)["yq"], torch_side.results(case)["yq"]))
    record_property("parity", f"{target}: {total.summary()}")
    assert not total.faults, "\n".join(total.faults)
