"""Batch norm over ranks is batch norm on the concatenated batch, however it lies on them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed import MPICommunicator
from mpi.shards import (
    LAYOUTS,
    assert_close,
    assert_neighbours,
    assert_within_an_ulp,
    held_alike,
    shard,
    sizes_before_cancellation,
)
from tolerances import EPS32
from tolerances import C as ROUNDINGS

C = 5
EXACT = 1e-12  # float64 on well-conditioned data, where the two differ in the order of some sums

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

SETTINGS = {
    "default": {},
    "cumulative mean": {"momentum": None},
    "no parameters": {"affine": False},
    "no bias": {"bias": False},
    "no running statistics": {"track_running_stats": False},
    "eps": {"eps": 0.5},
    "channels last": {"axis": -1},
}
CASES = dict.fromkeys([(layout, "default") for layout in LAYOUTS] + [("last rank empty", name) for name in SETTINGS])


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def counts(request, world):
    return request.param(world.size)


def batch(counts, *, axis=1, seed=0, dtype=np.float64):
    """x and dy of all ranks: two spatial axes of 3 and 2, C channels on `axis`."""
    rng = np.random.default_rng(seed)
    shape = (sum(counts), 3, 2, C) if axis == -1 else (sum(counts), C, 3, 2)
    return tuple(rng.normal(mean, 2.0, shape).astype(dtype) for mean in (3.0, 0.0))


def with_parameters(layer):
    """The layer with a weight and a bias that are not 1 and 0."""
    rng = np.random.default_rng(99)
    for parameter in layer.parameters():
        parameter[...] = rng.uniform(0.5, 2.0, C)
    return layer


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_a_layer_is_batch_norm_on_the_concatenated_batch_to_1e_12(world, layout, name):
    counts, settings = LAYOUTS[layout](world.size), SETTINGS[name]
    sync = with_parameters(an.SyncBatchNorm(C, dtype=np.float64, **settings))
    whole = with_parameters(an.BatchNorm(C, dtype=np.float64, **settings))
    for seed in range(3):
        x, dy = batch(counts, axis=settings.get("axis", 1), seed=seed)
        y, dx = whole(x), whole.backward(dy)
        mine = sync(shard(x, counts, world.rank))
        assert_close(mine, shard(y, counts, world.rank), EXACT)
        assert_close(sync.backward(shard(dy, counts, world.rank)), shard(dx, counts, world.rank), EXACT)
    for name, gradient in whole.grads.items():
        if gradient is None:
            assert sync.grads[name] is None
        else:
            assert_close(world.allreduce(sync.grads[name]), gradient, EXACT)
    for name, buffer in whole.named_buffers():
        assert_close(getattr(sync, name), buffer, EXACT)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda dtype: dtype.__name__)
def test_in_narrow_dtypes_it_is_the_same_to_an_ulp(world, counts, dtype):
    sync, whole = with_parameters(an.SyncBatchNorm(C)), with_parameters(an.BatchNorm(C))
    x, dy = batch(counts, dtype=dtype)
    y, dx = whole(x), whole.backward(dy)
    of_y, of_dx = sizes_before_cancellation(whole, x, dy)
    assert_within_an_ulp(sync(shard(x, counts, world.rank)), shard(y, counts, world.rank), of_y)
    assert_within_an_ulp(sync.backward(shard(dy, counts, world.rank)), shard(dx, counts, world.rank), of_dx)
    for name in BUFFERS[:2]:
        assert getattr(sync, name).dtype == np.float32
        assert_neighbours(getattr(sync, name), getattr(whole, name))
    wide = x.astype(np.float64)
    x_hat = (wide - wide.mean(axis=(0, 2, 3), keepdims=True)) / np.sqrt(wide.var(axis=(0, 2, 3), keepdims=True) + 1e-5)
    terms = np.sum(np.abs(dy.astype(np.float64)) * np.maximum(1, np.abs(x_hat)), axis=(0, 2, 3))
    for name, gradient in whole.grads.items():
        mine = sync.grads[name].astype(np.float64)
        # every rank's sum is rounded to float32, and so is the sum for the whole batch; and groups of terms before that
        allowed = EPS32 * (world.allreduce(np.abs(mine)) + ROUNDINGS * terms)
        assert np.all(np.abs(world.allreduce(mine) - gradient) <= allowed)


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_buffers_have_the_same_bits_on_all_ranks_though_shards_change_from_step_to_step(world, momentum):
    layer = an.SyncBatchNorm(C, momentum=momentum)
    for seed, layout in enumerate(LAYOUTS.values()):
        counts = layout(world.size)
        x, dy = batch(counts, seed=seed, dtype=np.float32)
        layer(1e3 + shard(x, counts, world.rank))
        layer.backward(shard(dy, counts, world.rank))
    assert held_alike(world, *(getattr(layer, name) for name in BUFFERS))
    assert int(layer.num_batches_tracked) == len(LAYOUTS)


@pytest.mark.parametrize("kind", ["None", "raw", "wrapped"])
def test_the_world_may_be_meant_or_given(world, kind):
    comm = {"None": None, "raw": world, "wrapped": MPICommunicator(world)}[kind]
    counts = LAYOUTS["uneven"](world.size)
    x, _ = batch(counts)
    y = an.SyncBatchNorm(C, comm=comm)(shard(x, counts, world.rank))
    assert_close(y, shard(an.batch_norm(x), counts, world.rank), EXACT)


@pytest.mark.parametrize("with_addend", [True, False])
def test_a_fused_layer_is_the_fused_layer_on_the_concatenated_batch(world, counts, with_addend):
    sync = with_parameters(an.FusedBatchNorm2d(C, dtype=np.float64, comm=world))
    whole = with_parameters(an.FusedBatchNorm2d(C, dtype=np.float64))
    x, dy = batch(counts)
    addend = batch(counts, seed=1)[0] - 3.0 if with_addend else None
    mine = None if addend is None else shard(addend, counts, world.rank)
    assert_close(sync(shard(x, counts, world.rank), mine), shard(whole(x, addend), counts, world.rank), EXACT)
    dx, daddend = sync.backward(shard(dy, counts, world.rank))
    expected = whole.backward(dy)
    assert_close(dx, shard(expected.dx, counts, world.rank), EXACT)
    assert (daddend is None) == (not with_addend)
    if with_addend:
        np.testing.assert_array_equal(daddend, shard(expected.daddend, counts, world.rank))
    for name, gradient in whole.grads.items():
        assert_close(world.allreduce(sync.grads[name]), gradient, EXACT)
    assert held_alike(world, *(getattr(sync, name) for name in BUFFERS))


@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_add_relu"])
def test_functions_share_their_statistics_too(world, counts, name):
    forward, backward = getattr(an, f"{name}_forward"), getattr(an, f"{name}_backward")
    x, dy = batch(counts)
    y, cache = forward(x)
    mine, my_cache = forward(shard(x, counts, world.rank), comm=MPICommunicator(world))
    assert_close(mine, shard(y, counts, world.rank), EXACT)
    dx = backward(shard(dy, counts, world.rank), my_cache).dx
    assert_close(dx, shard(backward(dy, cache).dx, counts, world.rank), EXACT)
    assert my_cache.n == cache.n == x.size // C
    assert held_alike(world, my_cache.mean, my_cache.var, my_cache.rstd)


def test_a_mean_of_a_million_deviations_costs_no_more_than_1e_10(world):
    # Shards of 37, 200, 5 and 0 samples, dealt out to the ranks.
    x = np.random.default_rng(1).normal(1e4, 1e-2, (242, C)).astype(np.float32)
    shards = np.split(x, [37, 237, 242])
    mine = np.concatenate([x[:0], *shards[world.rank :: world.size]])
    _, cache = an.batch_norm_forward(mine, comm=MPICommunicator(world))
    np.testing.assert_allclose(cache.var, np.var(x.astype(np.longdouble), axis=0), rtol=1e-10)


def test_constant_channels_give_exactly_the_bias(world, counts):
    layer = with_parameters(an.SyncBatchNorm(C))
    constants = np.array([0.1, 1e4 + 0.3, 1e7, 1e10, -3e38], np.float32)
    y = layer(np.broadcast_to(constants[:, None, None], (counts[world.rank], C, 3, 2)))
    np.testing.assert_array_equal(y, np.broadcast_to(layer.bias[:, None, None], y.shape))
    np.testing.assert_array_equal(layer.running_var, np.full(C, np.float32(0.9)))
