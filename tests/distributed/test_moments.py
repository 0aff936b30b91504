"""Merging the moments of several ranks, against exact rational arithmetic: in Python and in C++, to the same bits."""

from __future__ import annotations

import functools
import itertools
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from arraynorm.distributed import _moments
from arraynorm.kernels import cpu
from compiled import needs_native

IMPLEMENTATIONS = [
    pytest.param(_moments, id="Python"),
    pytest.param(cpu.native, id="C++", marks=needs_native),
]
EPS = float(np.finfo(np.float64).eps)

COUNTS = {
    "uneven": (37, 200, 5, 0),
    "single samples": (1, 1, 1, 1),
    "empty ranks between": (0, 3, 0, 0, 2),
    "one rank has all": (0, 0, 9),
    "one against many": (500, 1),
    "one rank": (7,),
}


def exact_moments(x):
    """x (n, C) -> n, mean (C,), m2 (C,): Fractions, and no rounding."""
    columns = [[Fraction(float(value)) for value in column] for column in x.T]
    mean = [sum(column) / max(len(column), 1) for column in columns]
    m2 = [sum((value - m) ** 2 for value in column) for column, m in zip(columns, mean, strict=True)]
    return len(x), mean, m2


def part(x):
    """What a rank with the samples x brings: its exact moments, rounded once."""
    n, mean, m2 = exact_moments(x)
    return n, np.array([float(m) for m in mean]), np.array([float(m) for m in m2])


def assert_moments_of_union(merged, shards):
    """`merged` is as close to the moments of the union as float64 updates can be.

    Every update rounds the mean a few times, by eps of the largest mean A. A difference d of two means is thus off by
    e = (P + 2) eps A, and its square by 2 d e + e^2, which enters with the weight n n_part / (n + n_part): less than
    the smaller count. Over all updates that is less than twice the samples outside the largest shard. All other terms
    of m2 are positive and rounded to within eps of themselves.
    """
    n, mean, m2 = exact_moments(np.concatenate(shards))
    ranks, parts = len(shards), [part(shard) for shard in shards if len(shard)]
    assert merged[0] == n
    for channel in range(len(mean)):
        means = [p[1][channel] for p in parts]
        largest, spread = max(map(abs, means)), max(means) - min(means)
        e = (ranks + 2) * EPS * largest
        assert abs(Fraction(merged[1][channel]) - mean[channel]) <= 4 * ranks * EPS * largest
        weight = 2 * (n - max(p[0] for p in parts))
        allowed = 8 * ranks * EPS * m2[channel] + weight * (2 * spread * e + e * e)
        assert abs(Fraction(merged[2][channel]) - m2[channel]) <= allowed


def shards_of(counts, *, mean=0.0, std=1.0, channels=3, dtype=np.float64):
    rng = np.random.default_rng(sum(counts))
    return [rng.normal(mean, std, (n, channels)).astype(dtype) for n in counts]


@pytest.fixture(params=IMPLEMENTATIONS)
def payloads(request):
    """pack_payload, add_payloads and merge_moments."""
    return request.param


@pytest.fixture
def merge(payloads):
    """The moments of the union of parts (n, mean, m2)."""
    return functools.partial(merge_by, payloads)


def merge_by(payloads, parts):
    return payloads.merge_moments([packed(payloads, *moments) for moments in parts])


def packed(payloads, *parts):
    payload = np.full(sum(np.size(part) for part in parts), np.nan)
    payloads.pack_payload(payload, *parts)
    return payload


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1e4, 1e-2), (-1e8, 1.0), (1e-140, 1e-141)])
def test_the_merge_is_the_moments_of_the_union(merge, counts, mean, std):
    shards = shards_of(counts, mean=mean, std=std)
    assert_moments_of_union(merge(map(part, shards)), shards)


def test_a_large_mean_costs_the_variance_less_than_1e_10(merge):
    # float64 sums of x and x^2 are off by 3e-3 on this data, float32 sums by 1e6.
    shards = shards_of((37, 200, 5, 0), mean=1e4, std=1e-2, channels=20, dtype=np.float32)
    _, _, exact = exact_moments(np.concatenate(shards))
    _, _, m2 = merge(map(part, shards))
    assert max(abs(Fraction(a) / b - 1) for a, b in zip(m2, exact, strict=True)) < 1e-10


def test_ranks_of_different_means_are_merged_as_exactly_as_ranks_of_one(merge):
    shards = [shard + 10.0**rank for rank, shard in enumerate(shards_of((3, 40, 1, 0, 17)))]
    assert_moments_of_union(merge(map(part, shards)), shards)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("constant", [0.1, 1e4 + 0.3, 1e10, -1e300, 5e-324])
def test_equal_constants_merge_to_themselves_exactly(merge, counts, constant):
    n, mean, m2 = merge(part(np.full((n, 2), constant)) for n in counts)
    assert n == sum(counts)
    np.testing.assert_array_equal(mean, constant)
    np.testing.assert_array_equal(m2, 0.0)


def test_empty_ranks_change_no_bit_wherever_they_stand(merge):
    a, b, empty = (part(shard) for shard in shards_of((5, 3, 0)))
    expected = merge([a, b])
    for parts in set(itertools.permutations([0, 0, 1, 2])):
        if parts.index(1) < parts.index(2):
            n, mean, m2 = merge((empty, a, b)[which] for which in parts)
            assert (n, mean.tobytes(), m2.tobytes()) == (expected[0], expected[1].tobytes(), expected[2].tobytes())


def test_only_empty_ranks_merge_to_no_samples_and_zeros_per_channel(merge):
    n, mean, m2 = merge([part(np.empty((0, 4)))] * 3)
    assert n == 0
    np.testing.assert_array_equal(mean, np.zeros(4), strict=True)
    np.testing.assert_array_equal(m2, np.zeros(4), strict=True)


def test_the_moments_of_a_single_rank_keep_every_bit(merge):
    n, mean, m2 = part(shards_of((11,))[0])
    merged = merge([(n, mean, m2)])
    assert (merged[0], merged[1].tobytes(), merged[2].tobytes()) == (n, mean.tobytes(), m2.tobytes())


def test_every_order_of_the_ranks_is_as_good(merge):
    shards = shards_of((37, 20, 5, 1), mean=1e4)
    for order in itertools.permutations(shards):
        assert_moments_of_union(merge(map(part, order)), order)


def test_counts_beyond_32_and_64_bits_do_not_overflow(merge):
    # n * n_part is 2^80; two halves at 0 and 1 have m2 = n / 4.
    n, mean, m2 = merge([(2**40, np.zeros(1), np.zeros(1)), (2**40, np.ones(1), np.zeros(1))])
    assert (n, mean[0], m2[0]) == (2**41, 0.5, 2.0**39)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_channel(merge, value):
    parts = [part(shard) for shard in shards_of((4, 6, 2))]
    _, clean_mean, clean_m2 = merge(parts)
    parts[1][1][0], parts[1][2][0] = value, np.nan
    with np.errstate(all="ignore"):
        _, mean, m2 = merge(parts)
    assert not np.isfinite(mean[0])
    assert np.isnan(m2[0])
    np.testing.assert_array_equal(mean[1:], clean_mean[1:])
    np.testing.assert_array_equal(m2[1:], clean_m2[1:])


values = st.floats(-1e6, 1e6, width=32)


@pytest.mark.parametrize("payloads", IMPLEMENTATIONS)
@given(shards=st.lists(st.lists(values, max_size=6), min_size=1, max_size=5).filter(any))
def test_any_shards_merge_to_the_moments_of_their_union(payloads, shards):
    arrays = [np.array(shard, dtype=np.float64).reshape(-1, 1) for shard in shards]
    assert_moments_of_union(merge_by(payloads, map(part, arrays)), arrays)


# -- payloads --------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("counts", [*COUNTS.values(), (2**40, 3, 2**52)], ids=str)
@pytest.mark.parametrize("channels", [0, 1, 7, 64, 20_000])
def test_both_implementations_give_the_same_bits(counts, channels):
    rng = np.random.default_rng(channels)
    parts = [np.concatenate(([n], rng.normal(3, 1, channels), rng.random(channels))) for n in counts]
    python, compiled = (implementation.merge_moments(parts) for implementation in (_moments, cpu.native))
    assert type(compiled[0]) is int
    assert python[0] == compiled[0]
    for ours, theirs in zip(python[1:], compiled[1:], strict=True):
        np.testing.assert_array_equal(ours.view(np.int64), theirs.view(np.int64), strict=True)
    total = [implementation.add_payloads(parts).view(np.int64) for implementation in (_moments, cpu.native)]
    np.testing.assert_array_equal(*total, strict=True)


def test_payloads_are_added_in_their_order(payloads):
    # 1 is lost to the big number before it
    total = payloads.add_payloads([np.full(3, value) for value in (2.0**53, 1.0, -(2.0**53), 1.0)])
    np.testing.assert_array_equal(total, np.ones(3), strict=True)


def test_results_are_memory_of_their_own(payloads):
    payload = packed(payloads, 2, np.ones(3), np.ones(3))
    _, mean, m2 = payloads.merge_moments([payload])
    total = payloads.add_payloads([payload])
    payload[:] = 7
    assert mean.tolist() == m2.tolist() == [1.0] * 3
    assert total.tolist() == [2.0, *[1.0] * 6]


@pytest.mark.parametrize("array", [np.arange(6.0).reshape(2, 3).T, np.arange(12.0)[::2], np.arange(6, dtype=">f8")])
def test_parts_of_any_strides_and_byte_order_are_packed_in_their_order(payloads, array):
    np.testing.assert_array_equal(packed(payloads, 5, array), [5, *array.ravel().tolist()])


def test_longer_floats_are_rounded_and_other_numbers_refused(payloads):
    wide = np.full(2, 1, np.longdouble) / 3
    np.testing.assert_array_equal(packed(payloads, 1, wide), [1, 1 / 3, 1 / 3])
    with pytest.raises(TypeError):
        packed(payloads, 1, np.ones(2, complex))


def test_a_read_only_payload_is_refused(payloads):
    memory = bytes(24)
    with pytest.raises(ValueError, match="read-only"):
        payloads.pack_payload(np.frombuffer(memory), 7, np.ones(2))
    assert memory == bytes(24)


@pytest.mark.parametrize("n", [np.nan, -1.0, 2.5, np.inf])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_no_number_of_samples_is_refused(payloads, n, rank):
    parts = [np.array([3.0, 1.0, 1.0]) for _ in range(2)]
    parts[rank][0] = n
    with pytest.raises(ValueError, match="n must be a number of samples"):
        payloads.merge_moments(parts)


def test_parts_that_do_not_fill_the_payload_are_refused_and_change_nothing(payloads):
    payload = np.zeros(4)
    for parts in ([np.ones(3)], [1.0, np.ones(4)]):
        with pytest.raises(ValueError, match=r"fill the payload|output array|shape"):
            payloads.pack_payload(payload, *parts)
    assert not payload.any()


@needs_native
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ([], ValueError),
        ([np.ones(3), np.ones(5)], ValueError),
        ([np.ones(3, np.float32)], TypeError),
        ([np.ones(6)[::2]], TypeError),
        ([np.ones((3, 1))], TypeError),
        ([[1.0, 2.0, 3.0]], TypeError),
        (None, TypeError),
    ],
)
def test_the_compiled_functions_refuse_what_is_not_vectors_of_one_size(wrong, error):
    for function in (cpu.native.merge_moments, cpu.native.add_payloads):
        with pytest.raises(error):
            function(wrong)
