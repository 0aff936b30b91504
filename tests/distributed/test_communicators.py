"""What every communicator owes its callers, and when a group of threads gives up."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import threading
from typing import NamedTuple

import numpy as np
import pytest

from arraynorm.distributed import SELF, ThreadCommunicator
from arraynorm.distributed._moments import merge_moments
from arraynorm.distributed.threads import run_ranks
from arraynorm.typing import Communicator
from namespaces import to_numpy


class Group(NamedTuple):
    """Ranks that run a function each and return their results in rank order."""

    size: int
    kind: type

    def run(self, function):
        return [function(SELF)] if self.kind is type(SELF) else run_ranks(self.size, function, timeout=30)


GROUPS = [Group(1, type(SELF)), *(Group(size, ThreadCommunicator) for size in (1, 2, 5))]


@pytest.fixture(params=GROUPS, ids=lambda group: f"{group.kind.__name__}-{group.size}")
def group(request):
    return request.param


def parts_of(size, channels=3):
    """(n, mean, m2) of every rank, rank 1 being empty."""
    rng = np.random.default_rng(size)
    counts = [0 if rank == 1 else 3 * rank + 1 for rank in range(size)]
    return [(n, rng.normal(size=channels) * (n > 0), rng.uniform(size=channels) * (n > 1)) for n in counts]


def bits(*values):
    return [to_numpy(value).tobytes() for value in values]


# -- the protocol ----------------------------------------------------------------------------------------------


def test_every_communicator_is_one_by_the_runtime_check(group):
    assert all(group.run(lambda comm: isinstance(comm, Communicator)))


@pytest.mark.parametrize("missing", ["rank", "size", "agree", "merge_moments", "allreduce_sum"])
def test_an_object_without_one_of_the_five_members_is_no_communicator(missing):
    members = {name: getattr(SELF, name) for name in ("rank", "size", "agree", "merge_moments", "allreduce_sum")}
    assert isinstance(type("Whole", (), members)(), Communicator)
    del members[missing]
    assert not isinstance(type("Partial", (), members)(), Communicator)


def test_ranks_are_numbered_from_zero_in_order(group):
    assert group.run(lambda comm: (comm.rank, comm.size)) == [(rank, group.size) for rank in range(group.size)]


def test_all_ranks_get_the_moments_merged_in_rank_order(group):
    parts = parts_of(group.size)
    n, mean, m2 = merge_moments([np.concatenate(([n], mean, m2)) for n, mean, m2 in parts])
    for merged in group.run(lambda comm: comm.merge_moments(*parts[comm.rank])):
        assert merged[0] == n
        assert type(merged[0]) is int
        assert bits(*merged[1:]) == bits(mean, m2)


def test_sums_are_added_in_rank_order(group):
    # Big first, so that 1 is lost to it; any other order keeps a different part of the ones.
    column = np.array([2.0**53, 1.0, -(2.0**53), 1.0, 1.0])[: group.size]
    expected = column[0]
    for value in column[1:]:
        expected = expected + value
    sums = group.run(lambda comm: comm.allreduce_sum(np.full((2, 3), column[comm.rank])))
    for total in sums:
        np.testing.assert_array_equal(total, np.full((2, 3), expected), strict=True)


def test_arrays_come_back_in_the_library_they_came_from(group, xp):
    parts = parts_of(group.size)
    _, expected_mean, expected_m2 = merge_moments([np.concatenate(([n], mean, m2)) for n, mean, m2 in parts])

    def call(comm):
        n, mean, m2 = parts[comm.rank]
        mean, m2 = xp.asarray(mean, "float64"), xp.asarray(m2, "float64")
        return mean, comm.merge_moments(n, mean, m2), comm.allreduce_sum(mean)

    for given, (_, mean, m2), total in group.run(call):
        for array in (mean, m2, total):
            assert type(array) is type(given)
            assert array.dtype == given.dtype
        assert bits(mean, m2) == bits(expected_mean, expected_m2)


def test_no_input_is_written_to_and_no_result_is_shared_between_ranks(group):
    parts = parts_of(group.size)
    before = [bits(mean, m2) for _, mean, m2 in parts]
    results = group.run(lambda comm: (*comm.merge_moments(*parts[comm.rank])[1:], comm.allreduce_sum(parts[0][1])))
    for arrays in results:
        for array in arrays:
            array += 1.0  # a caller may work on in place
    assert [bits(mean, m2) for _, mean, m2 in parts] == before
    for first, second in itertools.combinations(results, 2):
        assert not any(np.may_share_memory(a, b) for a, b in zip(first, second, strict=True))


def test_equal_fields_agree_without_a_result(group):
    assert group.run(lambda comm: comm.agree(b"the same")) == [None] * group.size


def test_a_communicator_is_copied_by_reference(group):
    assert all(group.run(lambda comm: copy.deepcopy({"comm": comm})["comm"] is comm and copy.copy(comm) is comm))


def test_only_self_can_be_pickled():
    assert pickle.loads(pickle.dumps(SELF)) is SELF
    with pytest.raises(TypeError, match="ThreadCommunicator: a communicator cannot be pickled"):
        run_ranks(1, pickle.dumps)


def test_its_repr_says_which_rank_it_is():
    assert run_ranks(2, repr) == ["ThreadCommunicator(rank 0 of 2)", "ThreadCommunicator(rank 1 of 2)"]
    assert repr(SELF) == "arraynorm.distributed.SELF"


# -- threads ---------------------------------------------------------------------------------------------------


def test_the_bits_do_not_depend_on_who_comes_first():
    parts = parts_of(3, channels=40)

    def call(comm, order, has_come):
        place = order.index(comm.rank)
        if place:
            assert has_come[place - 1].wait(30)
        has_come[place].set()
        return bits(*comm.merge_moments(*parts[comm.rank])[1:], comm.allreduce_sum(parts[comm.rank][1]))

    seen = []
    for order in itertools.permutations(range(3)):
        has_come = [threading.Event() for _ in range(3)]
        seen += run_ranks(3, functools.partial(call, order=order, has_come=has_come))
    assert all(result == seen[0] for result in seen)


def test_a_rank_may_write_to_what_it_brought_as_soon_as_it_has_the_sum():
    def call(comm):
        right = 0
        for _ in range(20):
            a = np.full(200_000, comm.rank + 1.0)
            a[...] = comm.allreduce_sum(a)
            right += bool((a == 10).all())
        return right

    assert run_ranks(4, call) == [20] * 4


def test_rounds_that_follow_each_other_do_not_mix():
    def call(comm):
        return [comm.allreduce_sum(np.array([float(number * (comm.rank + 1))]))[0] for number in range(300)]

    assert run_ranks(4, call) == [[10.0 * number for number in range(300)]] * 4


def collective(comm):
    comm.allreduce_sum(np.ones(1))


def test_a_result_that_is_complete_is_delivered_though_a_peer_has_left_since():
    # Whoever comes last returns, and leaves, before the others have woken up.
    for _ in range(50):
        assert run_ranks(4, lambda comm: float(comm.allreduce_sum(np.ones(1))[0])) == [4.0] * 4
