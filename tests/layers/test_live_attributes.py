"""Section D of the contract: what the attributes do when they are changed after construction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import arraynorm as an
from layer_cases import (
    BATCH_STATISTICS,
    BUFFERS,
    FAMILIES,
    INSTANCE_NORMS,
    Case,
    backward,
    held,
)

# Table D row by row. Rows in training show behaviour 17, rows in eval behaviour 20; the counter that counts shows 19.
ROWS = [  # mode, built tracking, set to, normalizes with, buffers
    ("train", True, True, "batch", "updated"),
    ("train", True, False, "batch", "untouched"),
    ("train", False, True, "batch", "none"),
    ("train", False, False, "batch", "none"),
    ("eval", True, True, "buffers", "untouched"),
    ("eval", True, False, "buffers", "untouched"),
    ("eval", False, True, "batch", "none"),
    ("eval", False, False, "batch", "none"),
]
TRAIN, EVAL = pytest.mark.behaviour(17), pytest.mark.behaviour(20)
TABLE = [pytest.param(*row, marks=TRAIN if row[0] == "train" else EVAL) for row in ROWS]
COUNTS = [pytest.param(*ROWS[0][:3], marks=pytest.mark.behaviour(19))]
COUNTS += [pytest.param(*row[:3], marks=TRAIN if row[0] == "train" else EVAL) for row in ROWS[1:]]
CASES = pytest.mark.parametrize("case", [case for case in FAMILIES if case in BATCH_STATISTICS], ids=str)


def switched(case: Case, mode: str, built: bool, set_to: bool) -> Any:
    layer = case.layer(track_running_stats=built).train(mode == "train")
    layer.track_running_stats = set_to
    return layer


def with_batch(case: Case) -> Any:
    """A layer that can use nothing but the batch."""
    return case.layer(track_running_stats=False)


def with_buffers(case: Case) -> Any:
    return case.layer().eval()


@CASES
@pytest.mark.parametrize(("mode", "built", "set_to", "source", "buffers"), TABLE)
def test_tracking_switched_later_what_normalizes(
    case: Case, mode: str, built: bool, set_to: bool, source: str, buffers: str
) -> None:
    expected = {"batch": with_batch, "buffers": with_buffers}[source](case)
    layer = switched(case, mode, built, set_to)
    np.testing.assert_array_equal(layer(case.x()), expected(case.x()))
    np.testing.assert_array_equal(backward(layer, case.x(1)), backward(expected, case.x(1)))


@CASES
@pytest.mark.parametrize(("mode", "built", "set_to", "source", "buffers"), TABLE)
def test_tracking_switched_later_whether_the_buffers_move(
    case: Case, mode: str, built: bool, set_to: bool, source: str, buffers: str
) -> None:
    layer = switched(case, mode, built, set_to)
    before = _running_stats(layer)
    layer(case.x())
    after = _running_stats(layer)
    if buffers == "none":
        assert after == [None, None]
    else:
        moved = [a != b for a, b in zip(after, before, strict=True)]
        assert moved == [buffers == "updated"] * 2


def _running_stats(layer: Any) -> list[list[float] | None]:
    arrays = (getattr(layer, name) for name in BUFFERS[:2])
    return [None if array is None else array.tolist() for array in arrays]


@CASES
@pytest.mark.parametrize(("mode", "built", "set_to"), COUNTS)
def test_tracking_switched_later_whether_the_counter_counts(case: Case, mode: str, built: bool, set_to: bool) -> None:
    layer = switched(case, mode, built, set_to)
    before = None if layer.num_batches_tracked is None else int(layer.num_batches_tracked)
    layer(case.x())
    if before is None:
        assert layer.num_batches_tracked is None
    else:
        assert layer.num_batches_tracked == before + (mode == "train" and built and set_to)


AFFINE = [case for case in FAMILIES if case.cls not in (an.LayerNorm, an.RMSNorm)]


@pytest.mark.behaviour(26)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("case", AFFINE, ids=str)
def test_affine_switched_later_changes_only_the_repr(case: Case, built: bool, training: bool) -> None:
    layer, unchanged = (case.layer(affine=built).train(training) for _ in range(2))
    layer.affine = not built
    np.testing.assert_array_equal(layer(case.x()), unchanged(case.x()))
    np.testing.assert_array_equal(backward(layer, case.x(1)), backward(unchanged, case.x(1)))
    assert held(layer) == held(unchanged)
    assert f"affine={not built}" in repr(layer)


@pytest.mark.behaviour(26)
@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("case", BATCH_STATISTICS, ids=str)
def test_conversion_keeps_weight_and_bias_whatever_affine_says(case: Case, built: bool) -> None:
    layer = case.layer(affine=built)
    weight, bias = layer.weight, layer.bias
    layer.affine = not built
    converted = an.SyncBatchNorm.convert_sync_batchnorm(layer, comm=an.distributed.SELF)
    assert converted.weight is weight
    assert converted.bias is bias
    assert converted.affine is not built


@pytest.mark.behaviour(27)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", INSTANCE_NORMS, ids=str)
def test_an_instance_norm_with_tracking_switched_off_uses_the_input_and_leaves_the_buffers(
    case: Case, training: bool
) -> None:
    layer, never_tracked = case.layer().train(training), case.layer(track_running_stats=False).train(training)
    layer.track_running_stats = False
    before = held(layer)
    np.testing.assert_array_equal(layer(case.x()), never_tracked(case.x()))
    assert held(layer) == before
    np.testing.assert_array_equal(layer.backward(case.x(1)), never_tracked.backward(case.x(1)))


@pytest.mark.behaviour(27)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", INSTANCE_NORMS, ids=str)
def test_an_instance_norm_with_tracking_switched_on_has_still_no_buffers(case: Case, training: bool) -> None:
    layer, unchanged = (case.layer(track_running_stats=False).train(training) for _ in range(2))
    layer.track_running_stats = True
    np.testing.assert_array_equal(layer(case.x()), unchanged(case.x()))
    assert [getattr(layer, name) for name in BUFFERS] == [None] * 3
