"""Section I of the contract: relu(bn(x) + addend), against a BatchNorm with the addition and ReLU written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import arraynorm as an
from layer_cases import FUSED_BATCH_NORMS, Case, assert_close, filled
from namespaces import NUMPY, Namespace, to_numpy

CASES = pytest.mark.parametrize("case", FUSED_BATCH_NORMS, ids=str)
ADDEND = pytest.mark.parametrize("with_addend", [True, False], ids=["addend", "no addend"])
MODES = pytest.mark.parametrize(
    ("training", "tracking", "momentum"),
    [(True, True, 0.1), (True, True, None), (True, False, 0.1), (False, True, 0.1), (False, False, 0.1)],
)


def batch_norm_like(layer: Any, **options: Any) -> Any:
    """The same layer without the tail."""
    return filled(an.BatchNorm(3, momentum=layer.momentum, **options)).train(layer.training)


def compare_with_batch_norm(
    case: Case, with_addend: bool, training: bool, tracking: bool, momentum: float | None, xp: Namespace
) -> None:
    options = {"track_running_stats": tracking, "xp": xp.module, "dtype": xp.dtype("float64")}
    layer = case.layer(momentum=momentum, **options).train(training)
    batch_norm = batch_norm_like(layer, **options)
    x, dy = case.x(0, "float64", xp), case.x(1, "float64")
    addend = case.x(2, "float64", xp) if with_addend else None

    out = to_numpy(layer(x, addend))
    before_relu = to_numpy(batch_norm(x)) + (to_numpy(addend) if with_addend else 0)
    assert_close(out, np.maximum(before_relu, 0))

    dx, daddend = layer.backward(xp.asarray(dy))
    g = dy * (out > 0)
    assert_close(dx, batch_norm.backward(xp.asarray(g)))
    if with_addend:
        np.testing.assert_array_equal(to_numpy(daddend), g)
    else:
        assert daddend is None
    for mine, theirs in zip(layer.buffers(), batch_norm.buffers(), strict=True):
        np.testing.assert_array_equal(to_numpy(mine), to_numpy(theirs))
    for name in ("weight", "bias"):
        assert_close(layer.grads[name], batch_norm.grads[name])


@pytest.mark.behaviour(42)
@ADDEND
@MODES
@CASES
def test_it_is_batch_norm_then_add_then_relu(
    case: Case, with_addend: bool, training: bool, tracking: bool, momentum: float | None
) -> None:
    compare_with_batch_norm(case, with_addend, training, tracking, momentum, NUMPY)


@pytest.mark.behaviour(42)
@ADDEND
@MODES
def test_it_is_so_in_every_array_library(
    with_addend: bool, training: bool, tracking: bool, momentum: float | None, xp: Namespace
) -> None:
    compare_with_batch_norm(FUSED_BATCH_NORMS[2], with_addend, training, tracking, momentum, xp)


@pytest.mark.behaviour(42)
@CASES
def test_an_addend_left_out_is_none(case: Case) -> None:
    np.testing.assert_array_equal(case.layer()(case.x()), case.layer()(case.x(), None))


@pytest.mark.behaviour(42)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@CASES
def test_the_addend_must_have_the_shape_of_x(case: Case, training: bool) -> None:
    layer = case.layer().train(training)
    for addend in (case.x()[:1], case.x()[..., :1], case.x()[None], case.x().ravel()):  # most of which would broadcast
        with pytest.raises(ValueError, match="addend"):
            layer(case.x(), addend)


@pytest.mark.behaviour(42)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@CASES
def test_the_gradient_at_the_kink_is_zero(case: Case, training: bool) -> None:
    layer = case.layer().train(training)
    x = case.x(dtype="float64")
    addend = -batch_norm_like(layer)(x)  # in float64, in which the sum is exactly zero
    np.testing.assert_array_equal(layer(x, addend), np.zeros(x.shape))
    dx, daddend = layer.backward(np.ones(x.shape))
    np.testing.assert_array_equal(dx, np.zeros(x.shape))
    np.testing.assert_array_equal(daddend, np.zeros(x.shape))
    np.testing.assert_array_equal([layer.grads["weight"], layer.grads["bias"]], np.zeros((2, 3)))


@pytest.mark.behaviour(42)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@CASES
def test_the_saved_mask_is_one_bit_per_element(case: Case, training: bool) -> None:
    layer = case.layer().train(training)
    y = layer(case.x(), case.x(1))
    mask = layer.kept().mask
    assert (mask.dtype, mask.shape) == (np.uint8, (-(-y.size // 8),))
    bits = np.unpackbits(mask, bitorder="little")
    np.testing.assert_array_equal(bits[: y.size].reshape(y.shape), y > 0)
    assert not bits[y.size :].any()


@pytest.mark.behaviour(42)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@CASES
def test_half_precision_is_rounded_once(case: Case, dtype: str) -> None:
    layer, wide = case.layer(), case.layer()
    x, addend = case.x(dtype=dtype), case.x(1, dtype=dtype)
    expected = wide(x.astype(np.float64), addend.astype(np.float64)).astype(x.dtype)
    np.testing.assert_array_equal(layer(x, addend), expected)
