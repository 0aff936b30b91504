"""Every functional op and every layer against torch on the CPU: forward, buffers after three steps, all gradients."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="torch is not installed here: parity is replayed from the record alone")

from hypothesis import given
from hypothesis import strategies as st

from parity import draws, grid, ours, torch_side
from parity.judge import Tally

pytestmark = pytest.mark.parity

OPS, LAYERS = grid.by_target(grid.OPS), grid.by_target(grid.LAYERS)


def compare(tally: Tally, cases) -> None:
    for case in cases:
        tally.add(case, ours.results(case), torch_side.results(case))
    assert not tally.faults, "\n".join(tally.faults)


@pytest.mark.parametrize("target", [*OPS, *LAYERS])
def test_ours_and_torch_agree_on_the_grid(target, record_property):
    tally = Tally()
    compare(tally, (OPS | LAYERS)[target])
    record_property("parity", f"{target}: {tally.summary()}")


@pytest.mark.parametrize("target", OPS)
@given(data=st.data())
def test_ops_agree_on_drawn_shapes_axes_and_options(target, data):
    compare(Tally(), [data.draw(draws.ops(target))])


@pytest.mark.parametrize("target", LAYERS)
@given(data=st.data())
def test_layers_agree_on_drawn_shapes_axes_and_options(target, data):
    compare(Tally(), [data.draw(draws.layers(target))])
