"""Ours against what torch gave when it was recorded; needs no torch."""

from __future__ import annotations

import inspect

import pytest

import arraynorm as an
from arraynorm import functional
from parity import cases, grid, ours, recorded
from parity.judge import Tally
from parity.ties import Ties, ties

_, TORCH = recorded.read()
CASES = grid.by_target(grid.RECORDED)

OPS = {name.removesuffix("_forward") for name in functional.__all__ if name.endswith("_forward")}
QUANTIZED_OPS = {name for name in functional.__all__ if name.startswith("quantized_")}
LAYERS = {
    name
    for name, layer in inspect.getmembers(an.layers, inspect.isclass)
    if issubclass(layer, an.Module) and layer not in (an.Module, an.Sequential)
}


@pytest.mark.parametrize("target", [target for target in CASES if target in OPS | LAYERS and "uantized" not in target])
def test_ours_agrees_with_the_record(target):
    tally = Tally()
    for case in CASES[target]:
        tally.add(case, ours.results(case), TORCH[cases.name(case)])
    assert not tally.faults, "\n".join(tally.faults)


@pytest.mark.behaviour(43, 44)
@pytest.mark.parametrize("target", [target for target in CASES if "uantized" in target])
def test_quantized_ours_agrees_with_the_record(target):
    total = Ties()
    for case in CASES[target]:
        total = total.plus(ties(case, ours.results(case)["yq"], TORCH[cases.name(case)]["yq"]))
    assert not total.faults, "\n".join(total.faults)


def test_the_record_has_the_cases_of_the_grid_and_no_others():
    assert TORCH.keys() == {cases.name(case) for case in grid.RECORDED}


NOT_IN_TORCH: frozenset[str] = frozenset()
"""Ops that torch has nothing to compare with; so far it has all of them."""


def test_the_record_leaves_out_no_op_layer_or_dtype():
    floating = {"float64", "float32"}
    expected = {(op, dtype) for op in OPS - NOT_IN_TORCH for dtype in floating | {"float16", "bfloat16"}}
    expected |= {(layer, dtype) for layer in LAYERS if "Quantized" not in layer for dtype in floating}
    quantized = QUANTIZED_OPS | {layer for layer in LAYERS if "Quantized" in layer}
    expected |= {(target, dtype) for target in quantized for dtype in ("uint8", "int8")}
    assert {(case.target, case.dtype) for case in grid.RECORDED} == expected


def test_the_record_leaves_out_no_trait_of_the_grid():
    whole = (*grid.OPS, *grid.LAYERS, *grid.quantized(channels=4))
    everything = {(case.target, trait) for case in whole for trait in grid.traits(case)}
    assert {(case.target, trait) for case in grid.RECORDED for trait in grid.traits(case)} == everything


def test_the_record_is_below_a_megabyte():
    assert recorded.PATH.stat().st_size < 1e6
