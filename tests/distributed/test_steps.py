"""Training steps: what goes wrong between collectives is known to all ranks within one round."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed import SELF, SyncMismatchError, ThreadCommunicator
from arraynorm.testing import run_ranks

RANKS, ODD = 3, 1
x = np.random.default_rng(0).standard_normal((4, 3))


def outcomes(body):
    """What `body(layer, is_odd)`, run as one step, raises on every rank."""

    def call(comm):
        layer = an.SyncBatchNorm(3, comm=comm)
        with comm.step():
            body(layer, comm.rank == ODD)

    return run_ranks(RANKS, call, timeout=20, return_exceptions=True)


def raises_before(layer, is_odd):
    if is_odd:
        raise KeyError("planted")
    layer(x)


def raises_between(layer, is_odd):
    y = layer(x)
    if is_odd:
        raise KeyError("planted")
    layer.backward(y)


def raises_after(layer, is_odd):
    layer.backward(layer(x))
    if is_odd:
        raise KeyError("planted")


@pytest.mark.parametrize("body", [raises_before, raises_between, raises_after])
def test_an_exception_of_one_rank_is_raised_on_all_with_its_text(body):
    errors = outcomes(body)
    assert {type(error) for error in errors} == {SyncMismatchError}
    assert {str(error) for error in errors} == {f"a rank refused its call; rank {ODD}: KeyError: 'planted'"}
    assert isinstance(errors[ODD].__cause__, KeyError)


def skips_the_last(layer, is_odd):
    y = layer(x)
    if not is_odd:
        layer.backward(y)


def makes_one_more(layer, is_odd):
    layer(x)
    if is_odd:
        layer(x)


def is_in_eval(layer, is_odd):
    layer.train(not is_odd)(x)


@pytest.mark.parametrize("body", [skips_the_last, makes_one_more, is_in_eval])
def test_a_rank_that_makes_other_calls_is_found_at_the_end_of_the_step(body):
    errors = outcomes(body)
    assert {type(error) for error in errors} == {SyncMismatchError}
    assert len({str(error) for error in errors}) == 1
    assert "the end of the step on rank" in str(errors[0])


def test_two_layers_of_equal_size_do_not_meet_in_the_first_step():
    def call(comm):
        layers = [an.SyncBatchNorm(3, comm=comm, name=name) for name in ("first", "second")]
        for layer in layers[:: -1 if comm.rank == ODD else 1]:
            layer(x)

    errors = run_ranks(RANKS, call, timeout=20, return_exceptions=True)
    assert {str(error) for error in errors} == {
        "the ranks' calls differ: name: first on rank 0, second on rank 1, first on rank 2; "
        "index: 0 on rank 0, 1 on rank 1, 0 on rank 2"
    }


def test_a_step_in_which_all_goes_well_changes_nothing():
    def call(comm):
        layer = an.SyncBatchNorm(3, comm=comm)
        for _ in range(3):
            with comm.step():
                layer.backward(layer(x))
        return int(layer.num_batches_tracked)

    assert run_ranks(RANKS, call) == [3] * RANKS


def test_an_error_that_all_ranks_have_is_not_reported_again():
    def body(layer, is_odd):
        layer(x[:, :2] if is_odd else x)

    errors = outcomes(body)
    assert len({str(error) for error in errors}) == 1
    assert "must have num_features = 3 channels" in str(errors[0])


def test_a_step_of_one_process_passes_its_exception_on():
    with pytest.raises(KeyError, match="planted"), SELF.step():
        raise KeyError("planted")


def test_without_validation_calls_are_not_compared():
    def call(comm):
        rank = ThreadCommunicator(comm._group, comm.rank, validate=False)
        return an.batch_norm(x, eps=0.1 + comm.rank, comm=rank)

    ys = run_ranks(2, call)
    assert not np.array_equal(*ys)


def test_a_second_thread_between_a_round_and_its_payload_is_refused():
    def call(comm):
        comm.agree(b"")
        caught: list[BaseException] = []

        def enter():
            try:
                comm.allreduce_sum(np.ones(1))
            except RuntimeError as error:
                caught.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        assert "entered from two threads at once" in str(caught[0])
        return float(comm.allreduce_sum(np.ones(1))[0])

    assert run_ranks(2, call) == [2.0, 2.0]


class Failing(ThreadCommunicator):
    """One rank's first payload fails before anything of it is sent."""

    has_failed = False

    def merge_moments(self, n, mean, m2):
        if self.rank == ODD and not self.has_failed:
            self.has_failed = True
            raise MemoryError("planted")
        return super().merge_moments(n, mean, m2)


def failing(comm, **settings):
    return Failing(comm._group, comm.rank, **settings)


def test_a_call_that_failed_before_its_payload_can_be_made_again():
    def call(comm):
        layer = an.SyncBatchNorm(3, comm=failing(comm))
        try:
            return layer(x)
        except MemoryError:
            return layer(x)

    for y in run_ranks(RANKS, call, timeout=20):
        np.testing.assert_allclose(y, an.SyncBatchNorm(3, comm=SELF)(x), rtol=0, atol=1e-14)


def test_a_call_that_failed_before_its_payload_is_everyones_error_by_the_end_of_the_step():
    def call(comm):
        comm = failing(comm)
        layer = an.SyncBatchNorm(3, comm=comm)
        with comm.step():
            layer(x)

    errors = run_ranks(RANKS, call, timeout=20, return_exceptions=True)
    assert [str(error) for error in errors] == [f"a rank refused its call; rank {ODD}: MemoryError: planted"] * RANKS
    assert {type(error) for error in errors} == {SyncMismatchError}


def test_a_call_that_failed_before_its_payload_does_not_meet_the_next_one():
    def call(comm):
        first, second = (an.SyncBatchNorm(3, comm=comm) for comm in [failing(comm)] * 2)
        try:
            first(x)
        except MemoryError:
            second(x)

    errors = run_ranks(RANKS, call, timeout=20, return_exceptions=True)
    assert {type(error) for error in errors} == {SyncMismatchError}
    assert {str(error) for error in errors} == {"the ranks' calls differ: index: 0 on rank 0, 1 on rank 1, 0 on rank 2"}


@pytest.mark.parametrize("in_step", [True, False])
def test_an_exception_between_a_round_and_a_sum_leaves_no_rank_in_another_ranks_payload(in_step):
    def call(comm):
        comm = failing(comm, max_gathered_ranks=1)
        layer = an.SyncBatchNorm(3, comm=comm)
        try:
            with comm.step() if in_step else contextlib.nullcontext():
                layer(x)
        except MemoryError:
            layer(x)  # its round would meet the payload of the others

    errors = run_ranks(RANKS, call, timeout=20, return_exceptions=True)
    assert {type(error).__name__ for error in errors} == {"PeerLeftError"}
    assert "broken since an earlier call: ThreadCommunicator(rank 1 of 3) did not come to" in str(errors[ODD])
    assert all("rank 1 raised" in str(errors[rank]) for rank in (0, 2))
