"""The judge finds what is wrong: results of ours, with an error planted in one array, are refused for that array."""

from __future__ import annotations

import numpy as np
import pytest

from parity import ours
from parity.cases import LayerCase, OpCase, QuantizedCase
from parity.exact import Truth
from parity.judge import EPS, Tally
from parity.ties import ties

BOTH = ("weight", "bias")
CASES = [
    OpCase("batch_norm", (5, 3, 2), (("axis", 1),), BOTH, "float64"),
    OpCase("batch_norm_add_relu", (5, 3, 2), (("axis", -1),), (*BOTH, "addend"), "float32", mean_over_std=1e4),
    OpCase("instance_norm", (5, 3, 4), (), BOTH, "bfloat16"),
    LayerCase("BatchNorm1d", (5, 3), (("num_features", 3),), "float64", "tte"),
    LayerCase("FusedBatchNorm1d", (5, 3), (("num_features", 3),), "float32", addend=True),
]


def faults(case, found, torch) -> list[str]:
    tally = Tally()
    tally.add(case, found, torch)
    return tally.faults


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.target)
def test_an_error_in_any_array_is_found_on_either_side(case):
    right = ours.results(case)
    exact = Truth(case).arrays(right.get("open"))
    assert faults(case, right, right) == []
    for key, (_, _, terms, k) in exact.items():
        # beyond every bound: OURS * 2 EPS of the array, TORCH * EPS of the case, times 1 + k
        for side, eps in (("ours", EPS[str(right[key].dtype)]), ("torch", EPS[case.dtype])):
            wrong = right[key].copy()
            wrong.flat[-1] += np.asarray(10 * eps * (1 + k) * terms, dtype=wrong.dtype)
            planted = right | {key: wrong}
            reported = faults(case, planted, right) if side == "ours" else faults(case, right, planted)
            assert reported, (side, key)
            assert all(f"{side}: {key} " in fault or f" {key}: " in fault for fault in reported)


def test_a_relu_that_lets_through_what_it_should_not_is_found():
    case = CASES[1]
    right = ours.results(case)
    for element in np.ndindex(right["open"].shape):
        is_open = right["open"].copy()
        is_open[element] ^= True
        assert any("ReLU" in fault for fault in faults(case, right | {"open": is_open}, right))


def test_a_missing_array_a_wrong_dtype_and_a_wrong_count_are_found():
    case = CASES[3]
    right = ours.results(case)
    without = {key: array for key, array in right.items() if key != "running_var"}
    recounted = right | {"num_batches_tracked": right["num_batches_tracked"] + 1}
    for wrong in (without, right | {"y": right["y"].astype(np.float32)}, recounted):
        assert faults(case, wrong, right)
        assert faults(case, right, wrong)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_a_level_that_is_off_by_one_is_found_unless_it_is_a_tie(dtype):
    case = QuantizedCase("quantized_batch_norm", 3, dtype, (0.05, 0.11))
    right = ours.results(case)["yq"]
    limits = np.iinfo(dtype)
    for element in np.argwhere((right > limits.min) & (right < limits.max))[::7]:
        wrong = right.copy()
        wrong[tuple(element)] += 1
        assert ties(case, right, wrong).faults
        assert ties(case, wrong, right).faults
    assert ties(case, right, right) == (right.size, 0, 0.0, 0, ())
