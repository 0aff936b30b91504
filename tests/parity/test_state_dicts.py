"""State dicts of torch load here, and ours load in torch: the same keys, and the same numbers come out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed here: parity is replayed from the record alone")

import torch

import arraynorm as an
from parity import cases, grid, ours, torch_side

pytestmark = [pytest.mark.parity, pytest.mark.behaviour(28, 31)]

CASES = grid.by_target(case for case in grid.LAYERS if case.mean_over_std == 0.5 and not case.changed)


def trained(case: cases.LayerCase, side: Any) -> Any:
    """A layer whose state is not what it was built with: one step in training."""
    layer = side.build(case).train()
    x = cases.inputs(case).x[0]
    layer(x if side is ours else torch_side.tensor(x))
    return layer


def in_numpy(layer: Any) -> dict[str, Any]:
    return {key: torch_side.array(value) for key, value in layer.state_dict().items()}


def agree(case: cases.LayerCase, our_layer: Any, torch_layer: Any) -> None:
    """Equal keys in equal order, equal numbers; and the same output in eval."""
    ours_now, torchs_now = our_layer.state_dict(), in_numpy(torch_layer)
    assert list(ours_now) == list(torchs_now)
    for key, value in torchs_now.items():
        assert ours_now[key].dtype == value.dtype, key
        np.testing.assert_array_equal(ours_now[key], value, err_msg=key)
    x = cases.inputs(case).x[1]
    y = our_layer.eval()(x)
    expected = torch_side.array(torch_layer.eval()(torch_side.tensor(x)))
    if case.target.startswith("Fused"):
        expected = np.maximum(expected, 0)
    # values are below 10, and rounded a few times
    np.testing.assert_allclose(y, expected, rtol=0, atol=10 * 4 * np.finfo(case.dtype).eps)


@pytest.mark.parametrize("target", CASES)
def test_a_state_saved_by_torch_loads_by_key(target):
    for case in CASES[target]:
        torch_layer, our_layer = trained(case, torch_side), ours.build(case)
        saved = torch_layer.state_dict()
        state = type(saved)((key, torch_side.array(value)) for key, value in saved.items())
        state._metadata = saved._metadata
        assert our_layer.load_state_dict(state) == ([], [])
        agree(case, our_layer, torch_layer)


@pytest.mark.parametrize("target", CASES)
def test_a_state_saved_here_loads_in_torch(target):
    for case in CASES[target]:
        our_layer, torch_layer = trained(case, ours), torch_side.build(case)
        saved = our_layer.state_dict()
        state = type(torch_layer.state_dict())((key, torch_side.tensor(value)) for key, value in saved.items())
        state._metadata = saved._metadata
        assert tuple(torch_layer.load_state_dict(state)) == ([], [])
        agree(case, our_layer, torch_layer)


def test_the_metadata_carries_torchs_versions():
    for target, (case, *_) in CASES.items():
        versions = ours.build(case).state_dict()._metadata[""]
        assert versions == torch_side.build(case).state_dict()._metadata[""], target


def test_a_state_of_a_nested_model_has_torchs_keys():
    def names(library: Any) -> list[str]:
        inner = library.Sequential(library.BatchNorm1d(6), library.GroupNorm(2, 6))
        return list(library.Sequential(library.LayerNorm(6), inner, library.InstanceNorm1d(6)).state_dict())

    assert names(an) == names(torch.nn)
