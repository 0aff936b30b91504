"""The record is what torch gives now."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed here: parity is replayed from the record alone")

from parity import cases, grid, ours, recorded, torch_side
from parity.cases import QuantizedCase
from parity.judge import Tally

pytestmark = pytest.mark.parity

VERSION, RECORD = recorded.read()


def test_the_record_was_made_by_this_version_of_torch():
    assert torch_side.version().split()[0] == VERSION.split()[0]


def test_the_record_is_what_torch_gives_now(record_property):
    changed = [case for case in grid.RECORDED if not same(torch_side.results(case), RECORD[cases.name(case)])]
    record_property("parity", f"record: {len(changed)} of {len(grid.RECORDED)} cases differ from torch's results now")
    if torch_side.version() == VERSION:
        assert not changed, "\n".join(map(cases.name, changed))
    # Compiled for other instructions torch adds in another order: what it gives now is held to the bounds that the
    # record is held to by test_recorded. 8-bit results can't differ: no sum is in them.
    tally = Tally()
    for case in changed:
        assert not isinstance(case, QuantizedCase), cases.name(case)
        tally.add(case, ours.results(case), torch_side.results(case))
    assert not tally.faults, "\n".join(tally.faults)


def same(now: cases.Results, then: cases.Results) -> bool:
    """To the bit."""
    return now.keys() == then.keys() and all(
        (now[key].dtype, now[key].shape) == (then[key].dtype, then[key].shape) and np.array_equal(now[key], then[key])
        for key in now
    )
