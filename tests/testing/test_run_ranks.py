"""run_ranks: ranks as threads, with results in rank order and no hang, whatever a rank does."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed import SyncMismatchError
from arraynorm.testing import gradcheck, run_ranks
from arraynorm.typing import Communicator

Array = Any
ROWS = np.random.default_rng(0).standard_normal((11, 3, 2)) + 5
DY = np.random.default_rng(1).standard_normal(ROWS.shape)
WEIGHT, BIAS = np.array([0.5, -1.0, 2.0]), np.array([0.0, 1.0, -1.0])
CUTS = {1: [], 2: [4], 3: [1, 9], 4: [2, 2, 7]}  # uneven; one row; none on rank 1 of 4
# Bounds a hang in a test that fails: no test that passes waits for it.
PATIENCE = 60.0


def shards(array: Array, ranks: int) -> list[Array]:
    return np.split(array, CUTS[ranks])


def together(comm: Communicator) -> None:
    """A collective of all ranks."""
    comm.allreduce_sum(np.ones(1))


# -- results ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_results_come_in_rank_order_whoever_is_first(ranks: int) -> None:
    done = [threading.Event() for _ in range(ranks + 1)]
    done[ranks].set()

    def last_first(comm: Communicator) -> tuple[int, int]:
        assert done[comm.rank + 1].wait(PATIENCE)
        done[comm.rank].set()
        return comm.rank, comm.size

    assert run_ranks(ranks, last_first) == [(rank, ranks) for rank in range(ranks)]


def test_a_communicator_is_what_the_package_takes_for_one() -> None:
    assert run_ranks(2, lambda comm: isinstance(comm, Communicator)) == [True, True]


def test_ranks_see_the_context_of_the_caller() -> None:
    def keeps_a_cache(comm: Communicator) -> bool:
        layer = an.LayerNorm((3, 2))
        layer(ROWS)
        try:
            layer.backward(DY)
        except RuntimeError:
            return False
        return True

    assert run_ranks(2, keeps_a_cache) == [True, True]
    with an.no_grad():
        assert run_ranks(2, keeps_a_cache) == [False, False]


@pytest.mark.parametrize("n", [0, -1])
def test_no_ranks_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"run_ranks: n must be >= 1, got {n}"):
        run_ranks(n, together)


# -- synchronized statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", CUTS)
def test_uneven_ranks_give_batch_norm_of_the_whole_batch(ranks: int) -> None:
    xs, dys = shards(ROWS, ranks), shards(DY, ranks)

    def step(comm: Communicator) -> Any:
        y, cache = an.batch_norm_forward(xs[comm.rank], WEIGHT, BIAS, comm=comm)
        return y, cache, an.batch_norm_backward(dys[comm.rank], cache)

    outcomes = run_ranks(ranks, step)
    whole_y, whole = an.batch_norm_forward(ROWS, WEIGHT, BIAS)
    expected = an.batch_norm_backward(DY, whole)
    # Sums of 22 numbers in another order; the factor |mean| / std is 5.
    tolerance: dict[str, Any] = {"rtol": 0, "atol": 22 * 5 * float(np.max(abs(DY))) * np.finfo(float).eps}
    np.testing.assert_allclose(np.concatenate([y for y, _, _ in outcomes]), whole_y, **tolerance)
    np.testing.assert_allclose(np.concatenate([g.dx for _, _, g in outcomes]), expected.dx, **tolerance)
    # each rank has its own share of the parameters' gradients
    np.testing.assert_allclose(sum(g.dweight for _, _, g in outcomes), expected.dweight, **tolerance)
    np.testing.assert_allclose(sum(g.dbias for _, _, g in outcomes), expected.dbias, **tolerance)
    assert {cache.n for _, cache, _ in outcomes} == {22}
    for statistic in ("mean", "var", "rstd"):
        assert len({getattr(cache, statistic).tobytes() for _, cache, _ in outcomes}) == 1


def test_local_batch_norm_on_the_same_ranks_differs() -> None:
    """Or the test above would show nothing."""
    xs = shards(ROWS, 3)
    local = np.concatenate(run_ranks(3, lambda comm: an.batch_norm(xs[comm.rank])))
    assert np.max(abs(local - an.batch_norm(ROWS))) > 0.1


def test_layers_with_a_communicator_keep_equal_running_statistics() -> None:
    xs = shards(ROWS, 4)

    def train(comm: Communicator) -> Any:
        layer = an.SyncBatchNorm(3, comm=comm, dtype=np.float64)
        for _ in range(3):
            layer(xs[comm.rank])
        return layer.running_mean.tobytes(), layer.running_var.tobytes(), int(layer.num_batches_tracked)

    alone = an.BatchNorm(3, dtype=np.float64)
    for _ in range(3):
        alone(ROWS)
    outcomes = run_ranks(4, train)
    assert len(set(outcomes)) == 1
    np.testing.assert_allclose(np.frombuffer(outcomes[0][0]), alone.running_mean, rtol=22 * np.finfo(float).eps)
    np.testing.assert_allclose(np.frombuffer(outcomes[0][1]), alone.running_var, rtol=22 * 5 * np.finfo(float).eps)
    assert outcomes[0][2] == 3


def test_gradcheck_takes_a_synchronized_norm_as_one_function() -> None:
    """The gradients of <dy, y> summed over ranks; a backward that forgets its collective is found."""
    ranks = 3

    def forward(x: Array, weight: Array, bias: Array) -> Any:
        xs = shards(x, ranks)
        pairs = run_ranks(ranks, lambda comm: an.batch_norm_forward(xs[comm.rank], weight, bias, comm=comm))
        return np.concatenate([y for y, _ in pairs]), [cache for _, cache in pairs]

    def backward(dy: Array, caches: Any, *, forgetful: bool = False) -> Any:
        dys = shards(dy, ranks)

        def of_rank(comm: Communicator) -> Any:
            cache = caches[comm.rank]._replace(comm=None if forgetful else comm)
            return an.batch_norm_backward(dys[comm.rank], cache)

        gradients = run_ranks(ranks, of_rank)
        return (
            np.concatenate([g.dx for g in gradients]),
            sum(g.dweight for g in gradients),
            sum(g.dbias for g in gradients),
        )

    inputs = ROWS, WEIGHT, BIAS
    gradcheck(forward, backward, inputs, mode="directional")
    with pytest.raises(AssertionError, match=r"argument 0 \(x\) is wrong"):
        gradcheck(forward, lambda dy, caches: backward(dy, caches, forgetful=True), inputs, mode="directional")


# -- faults ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("error", [KeyError("planted"), SystemExit(3)])
def test_an_exception_reaches_the_caller_while_its_peers_wait(failing: int, error: BaseException) -> None:
    def one_fails(comm: Communicator) -> None:
        if comm.rank == failing:
            raise error
        together(comm)

    with pytest.raises(type(error)) as caught:
        run_ranks(3, one_fails, timeout=PATIENCE)
    assert caught.value is error


def test_the_first_rank_s_own_exception_goes_before_the_others() -> None:
    errors = [ValueError("rank 0"), KeyError("rank 1")]

    def both_fail(comm: Communicator) -> None:
        together(comm)
        raise errors[comm.rank]

    with pytest.raises(ValueError, match="rank 0"):
        run_ranks(2, both_fail)


def test_exceptions_may_be_returned_in_their_places() -> None:
    planted = ValueError("planted")

    def one_fails(comm: Communicator) -> int:
        if comm.rank == 1:
            raise planted
        return comm.rank

    assert run_ranks(3, one_fails, return_exceptions=True) == [0, planted, 2]


def test_ranks_in_a_collective_are_told_which_peer_failed_and_how() -> None:
    def one_fails(comm: Communicator) -> None:
        together(comm)
        if comm.rank == 1:
            raise ValueError("planted")
        together(comm)

    outcomes = run_ranks(3, one_fails, timeout=PATIENCE, return_exceptions=True)
    for rank in (0, 2):
        assert isinstance(outcomes[rank], RuntimeError)
        assert f"rank {rank} waits in a collective that can't complete" in str(outcomes[rank])
        assert "rank 1 raised ValueError: planted" in str(outcomes[rank])


def test_a_skipped_collective_is_an_error_that_names_the_rank() -> None:
    def one_skips(comm: Communicator) -> None:
        together(comm)
        if comm.rank != 1:
            together(comm)

    with pytest.raises(RuntimeError, match="rank 1 has returned"):
        run_ranks(3, one_skips, timeout=PATIENCE)


def test_ranks_that_disagree_all_get_the_error() -> None:
    def with_own_eps(comm: Communicator) -> Array:
        return an.batch_norm(ROWS, eps=0.1 * (1 + comm.rank), comm=comm)

    outcomes = run_ranks(3, with_own_eps, timeout=PATIENCE, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == 3 * [SyncMismatchError]
    assert all("eps: 0.1 on rank 0, 0.2 on rank 1" in str(outcome) for outcome in outcomes)


def test_a_rank_whose_call_is_refused_takes_its_peers_along() -> None:
    def one_passes_a_wrong_weight(comm: Communicator) -> Array:
        return an.batch_norm(ROWS, WEIGHT[: 2 + (comm.rank != 1)], comm=comm)

    outcomes = run_ranks(3, one_passes_a_wrong_weight, timeout=PATIENCE, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == 3 * [SyncMismatchError]
    assert all("rank 1: ValueError" in str(outcome) for outcome in outcomes)


def late(comm: Communicator, given_up: threading.Event) -> None:
    """Rank 1 comes to the collective when rank 0 has given up waiting for it."""
    if comm.rank == 1:
        assert given_up.wait(PATIENCE)
    try:
        together(comm)
    finally:
        given_up.set()


def test_a_rank_that_does_not_come_in_time_is_an_error() -> None:
    given_up = threading.Event()
    with pytest.raises(RuntimeError, match=r"rank 0 waits .* not all ranks came within 0\.05 s"):
        run_ranks(2, lambda comm: late(comm, given_up), timeout=0.05)


def test_a_rank_that_comes_too_late_gets_an_error_as_well() -> None:
    given_up = threading.Event()
    outcomes = run_ranks(2, lambda comm: late(comm, given_up), timeout=0.05, return_exceptions=True)
    assert [isinstance(outcome, RuntimeError) for outcome in outcomes] == [True, True]


def test_groups_are_independent() -> None:
    """Ranks of one group may run groups of their own."""

    def nested(comm: Communicator) -> float:
        inner = run_ranks(2, lambda other: float(other.allreduce_sum(np.array([1.0 + comm.rank]))[0]))
        return float(comm.allreduce_sum(np.array(inner[:1]))[0])

    assert run_ranks(3, nested) == [12.0, 12.0, 12.0]
