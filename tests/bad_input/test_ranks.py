"""What one rank of a synchronized call refuses, every rank refuses: none is left waiting, and nothing has changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed import SyncMismatchError
from arraynorm.testing import run_ranks
from bad_input.calls import CALLS, SHAPE, Call
from bad_input.faults import Fault
from bad_input.witness import assert_documented, noted, picture

SYNCHRONIZED = [call for call in CALLS if call.op.removesuffix("_backward") in ("batch_norm", "batch_norm_add_relu")]
TIMEOUT = 5.0
"""Seconds that a rank waits for the others, where a bug leaves it waiting."""


def two_ranks(call: Call, argument: str, fault: Fault) -> list[dict[str, Any]]:
    """Good arguments for rank 0, spoiled ones for rank 1; without the communicator."""
    return [call.make(SHAPE), call.spoiled((argument, fault))]


def on_comm(call: Call, arguments: dict[str, Any], comm: Any) -> Any:
    if "cache" in arguments:
        return call.function(**arguments | {"cache": arguments["cache"]._replace(comm=comm)})
    return call.function(**arguments | {"comm": comm})


# `comm` and the cache say whom to tell: where they are wrong, nobody can be told.
@pytest.mark.parametrize(
    ("call", "argument"),
    [
        pytest.param(call, argument, id=f"{argument} of {call.name}")
        for call in SYNCHRONIZED
        for argument in call.make(SHAPE)
        if argument not in ("comm", "cache")
    ],
)
def test_a_bad_argument_on_one_rank_is_refused_on_all(call: Call, argument: str) -> None:
    complaints: list[str] = []
    for fault in call.faults(argument):
        if fault.plain is None:
            with noted(complaints, fault.name):
                arguments = two_ranks(call, argument, fault)
                before = picture(arguments)
                outcomes = run_ranks(
                    2,
                    lambda comm, given=arguments: on_comm(call, given[comm.rank], comm),
                    timeout=TIMEOUT,
                    return_exceptions=True,
                )
                for rank, error in enumerate(outcomes):
                    assert type(error) is SyncMismatchError, f"rank {rank}: {error!r}"
                    assert "rank 1: " in str(error), f"rank {rank} does not say where: {error}"
                assert_documented(outcomes[1].__cause__, fault.refused, call.op, call.blamed((argument, fault)))
                assert picture(arguments) == before, "an argument has changed"
    assert not complaints, "\n".join(complaints)


def layers_of(comm: Any) -> list[Any]:
    return [an.SyncBatchNorm(3, comm=comm), an.FusedBatchNorm2d(3, comm=comm)]


BAD_INPUTS = {
    "no array": (None, TypeError),
    "no floats": (np.ones(SHAPE, np.int64), TypeError),
    "one dimension": (np.ones(3), ValueError),
    "another number of channels": (np.ones((4, 5, 2, 5)), ValueError),
}


@pytest.mark.parametrize("which", [0, 1], ids=["SyncBatchNorm", "FusedBatchNorm"])
@pytest.mark.parametrize(("bad", "refused"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_a_bad_input_of_one_ranks_layer_changes_no_ranks_layer(bad: Any, refused: type[Exception], which: int) -> None:
    inputs = [np.random.default_rng(0).normal(size=SHAPE), bad]
    good = np.random.default_rng(1).normal(size=SHAPE)

    def rank(comm: Any) -> tuple[Any, bool, bool]:
        layer = layers_of(comm)[which]
        layer(good)
        before = picture(layer)
        try:
            layer(inputs[comm.rank])
        except SyncMismatchError as error:
            forward = error
        same_after_forward = picture(layer) == before
        try:
            layer.backward(bad if comm.rank else np.ones(SHAPE))
        except SyncMismatchError:
            return forward, same_after_forward, picture(layer) == before
        return forward, same_after_forward, False

    for error, *unchanged in run_ranks(2, rank, timeout=TIMEOUT):
        assert f"rank 1: {refused.__name__}: " in str(error)
        assert unchanged == [True, True]


def test_one_value_over_all_ranks_is_refused_on_all() -> None:
    shards = [np.ones((1, 3)), np.ones((0, 3))]

    def rank(comm: Any) -> bool:
        layer = an.SyncBatchNorm(3, comm=comm)
        before = picture(layer)
        with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got 1 value over"):
            layer(shards[comm.rank])
        return picture(layer) == before

    assert run_ranks(2, rank, timeout=TIMEOUT) == [True, True]
