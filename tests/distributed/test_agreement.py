"""Ranks whose calls differ, or one of whose calls is wrong: the same error on every rank, and nothing has moved."""

from __future__ import annotations

import numpy as np
import pytest

import arraynorm as an
from arraynorm import _fields
from arraynorm.distributed import SELF, SyncMismatchError, ThreadCommunicator
from arraynorm.distributed.threads import run_ranks

RANKS, ODD = 3, 1  # one rank of three does something else

x = np.random.default_rng(0).normal(size=(4, 3, 2))
ones = np.ones(3)


def outcomes(function):
    return run_ranks(RANKS, function, timeout=30, return_exceptions=True)


def same_mismatch(results):
    """The text of the SyncMismatchError that every rank has raised."""
    assert [type(result) for result in results] == [SyncMismatchError] * RANKS
    texts = {str(result) for result in results}
    assert len(texts) == 1
    return texts.pop()


# -- differing calls -------------------------------------------------------------------------------------------


def plain(comm):
    return an.batch_norm(x, comm=comm)


DIFFERENCES = {
    "eps": (
        lambda comm: an.batch_norm(x, eps=1e-3, comm=comm),
        "eps: 1e-05 on rank 0, 0.001 on rank 1, 1e-05 on rank 2",
    ),
    "dtype": (
        lambda comm: an.batch_norm(x.astype(np.float16), comm=comm),
        "dtype: float64 on rank 0, float16 on rank 1, float64 on rank 2",
    ),
    "dimensions": (
        lambda comm: an.batch_norm(x[:, :, 0], comm=comm),
        "ndim: 3 on rank 0, 2 on rank 1, 3 on rank 2",
    ),
    "weight": (
        lambda comm: an.batch_norm(x, ones, comm=comm),
        "weight: 0 on rank 0, 1 on rank 1, 0 on rank 2",
    ),
    "bias": (
        lambda comm: an.batch_norm(x, bias=ones, comm=comm),
        "bias: 0 on rank 0, 1 on rank 1, 0 on rank 2",
    ),
    "cache": (
        lambda comm: an.batch_norm_forward(x, comm=comm),
        "cache: 0 on rank 0, 1 on rank 1, 0 on rank 2",
    ),
    "operation": (
        lambda comm: an.batch_norm_add_relu(x, comm=comm),
        "operation: batch_norm on rank 0, batch_norm_add_relu on rank 1, batch_norm on rank 2",
    ),
    "channels and eps": (
        lambda comm: an.batch_norm(x[:, :2], eps=0.5, comm=comm),
        "channels: 3 on rank 0, 2 on rank 1, 3 on rank 2; eps: 1e-05 on rank 0, 0.5 on rank 1, 1e-05 on rank 2",
    ),
}


@pytest.mark.parametrize(("odd", "said"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_calls_that_differ_raise_on_every_rank_and_name_ranks_and_values(odd, said):
    text = same_mismatch(outcomes(lambda comm: (odd if comm.rank == ODD else plain)(comm)))
    assert text == f"the ranks' calls differ: {said}"


@pytest.mark.parametrize("name", ["batch_norm", "batch_norm_add_relu"])
def test_a_backward_does_not_meet_a_forward(name):
    forward, backward = getattr(an, f"{name}_forward"), getattr(an, f"{name}_backward")

    def call(comm):
        y, cache = forward(x, comm=comm)
        return backward(y, cache) if comm.rank == ODD else forward(x, comm=comm)

    said = f"operation: {name} on rank 0, {name}_backward on rank 1, {name} on rank 2"
    assert said in same_mismatch(outcomes(call))


LAYERS = {
    "eps": ({"eps": 1e-3}, "eps: 1e-05 on rank 0, 0.001 on rank 1, 1e-05 on rank 2"),
    "momentum": ({"momentum": 0.25}, "momentum: 0.1 on rank 0, 0.25 on rank 1, 0.1 on rank 2"),
    "no momentum": ({"momentum": None}, "momentum: 0.1 on rank 0, cumulative on rank 1, 0.1 on rank 2"),
    "affine": ({"affine": False}, "weight: 1 on rank 0, 0 on rank 1, 1 on rank 2"),
}


@pytest.mark.parametrize(("settings", "said"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("cls", [an.SyncBatchNorm, an.FusedBatchNorm])
def test_layers_of_different_settings_do_not_meet(cls, settings, said):
    assert said in same_mismatch(outcomes(lambda comm: cls(3, comm=comm, **(settings if comm.rank == ODD else {}))(x)))


def test_layers_of_different_classes_do_not_meet():
    def call(comm):
        return (an.FusedBatchNorm if comm.rank == ODD else an.SyncBatchNorm)(3, comm=comm)(x)

    assert "layer: SyncBatchNorm on rank 0, FusedBatchNorm on rank 1" in same_mismatch(outcomes(call))


def test_a_layer_does_not_meet_a_function():
    def call(comm):
        layer = an.SyncBatchNorm(3, comm=comm)
        return an.batch_norm_forward(x, ones, ones, comm=comm) if comm.rank == ODD else layer(x)

    assert "layer: SyncBatchNorm on rank 0, absent on rank 1" in same_mismatch(outcomes(call))


def test_batch_and_spatial_sizes_library_and_memory_order_may_differ(xp):
    shapes = ((4, 3, 2), (0, 3, 7), (1, 3, 1))

    def call(comm):
        shard = np.ones(shapes[comm.rank], order="CF"[comm.rank % 2])
        return an.batch_norm(xp.asarray(shard) if comm.rank == ODD else shard, comm=comm)

    assert [tuple(y.shape) for y in run_ranks(RANKS, call)] == list(shapes)


# -- one rank's fault ------------------------------------------------------------------------------------------

read_only = x.copy()
read_only.flags.writeable = False

FAULTS = {
    "an integer x": (lambda comm: an.batch_norm(x.astype(int), comm=comm), TypeError, "x must have dtype"),
    "a list": (lambda comm: an.batch_norm(x.tolist(), comm=comm), TypeError, "x must be an array"),
    "a vector": (lambda comm: an.batch_norm(x[0, 0], comm=comm), ValueError, "expected at least 2D input (got 1D"),
    "a wrong axis": (lambda comm: an.batch_norm(x, axis=5, comm=comm), ValueError, "axis"),
    "a negative eps": (lambda comm: an.batch_norm(x, eps=-1.0, comm=comm), ValueError, "eps must be finite and >= 0"),
    "a short weight": (lambda comm: an.batch_norm(x, ones[:2], comm=comm), ValueError, "weight must have shape (3,)"),
    "a read-only out": (lambda comm: an.batch_norm(x, out=read_only, comm=comm), ValueError, "out must be writeable"),
    "a short addend": (lambda comm: an.batch_norm_add_relu(x, x[1:], comm=comm), ValueError, "addend must have shape"),
}


@pytest.mark.parametrize(("call", "kind", "said"), FAULTS.values(), ids=FAULTS)
def test_what_one_rank_refuses_every_rank_refuses_and_the_communicator_stays_usable(call, kind, said):
    def run(comm):
        with pytest.raises(SyncMismatchError) as caught:
            (call if comm.rank == ODD else plain)(comm)
        plain(comm)
        return caught

    errors = [caught.value for caught in run_ranks(RANKS, run, timeout=30)]
    assert same_mismatch(errors).startswith(f"a rank refused its call; rank 1: {kind.__name__}: ")
    assert said in str(errors[0])
    # Whoever is at fault sees where; for the others there is nothing to see.
    assert [type(error.__cause__) for error in errors] == [kind if rank == ODD else type(None) for rank in range(RANKS)]


def test_every_rank_at_fault_is_named():
    def call(comm):
        return an.batch_norm(x, eps=(-1.0, 1e-5, np.nan)[comm.rank], comm=comm)

    text = same_mismatch(outcomes(call))
    assert "rank 0: ValueError: batch_norm: eps must be finite and >= 0, got -1.0" in text
    assert "rank 2: ValueError: batch_norm: eps must be finite and >= 0, got nan" in text
    assert "rank 1" not in text


def test_a_fault_in_backward_is_everyones_fault_and_can_be_made_good():
    def call(comm):
        y, cache = an.batch_norm_forward(x, ones, comm=comm)
        with pytest.raises(SyncMismatchError, match=r"rank 1: ValueError: batch_norm_backward: dy must have shape"):
            an.batch_norm_backward(y[1:] if comm.rank == ODD else y, cache)
        return an.batch_norm_backward(y, cache).dx

    expected = an.batch_norm_backward(*an.batch_norm_forward(x, ones)).dx  # three ranks of the same data
    for dx in run_ranks(RANKS, call):
        np.testing.assert_allclose(dx, expected, rtol=0, atol=1e-15)


def spoil_buffer(layer):
    layer.running_var = np.ones(2, np.float32)


def spoil_momentum(layer):
    layer.momentum = "high"


def spoil_weight(layer):
    layer.weight = np.ones(3, int)


def spoil_counter(layer):
    layer.num_batches_tracked = np.zeros(2, int)


def spoil_width(layer):
    layer.num_features = 2


@pytest.mark.parametrize("spoil", [spoil_buffer, spoil_momentum, spoil_weight, spoil_counter, spoil_width])
@pytest.mark.parametrize("cls", [an.SyncBatchNorm, an.FusedBatchNorm])
def test_a_spoiled_layer_raises_on_every_rank_and_moves_no_buffer(cls, spoil):
    def call(comm):
        layer = cls(3, comm=comm)
        if comm.rank == ODD:
            spoil(layer)
        before = {name: array.tobytes() for name, array in layer.state_dict().items()}
        with pytest.raises(SyncMismatchError) as caught:
            layer(x)
        assert {name: array.tobytes() for name, array in layer.state_dict().items()} == before
        return caught

    text = same_mismatch([caught.value for caught in run_ranks(RANKS, call, timeout=30)])
    assert text.startswith("a rank refused its call; rank 1: ")


def test_a_backward_without_a_forward_raises_on_every_rank_and_the_others_keep_their_caches():
    def call(comm):
        layer = an.SyncBatchNorm(3, comm=comm)
        y = layer(x)
        if comm.rank == ODD:
            layer.clear_cache()
        with pytest.raises(SyncMismatchError, match=r"rank 1: RuntimeError: SyncBatchNorm: backward needs a forward"):
            layer.backward(y)
        layer(x)
        return layer.backward(y).shape

    assert run_ranks(RANKS, call) == [x.shape] * RANKS


def test_one_value_per_channel_over_all_ranks_is_refused_by_all():
    def call(comm):
        return an.batch_norm(x[: comm.rank == ODD, :, :1], comm=comm)

    results = outcomes(call)
    assert [type(result) for result in results] == [ValueError] * RANKS
    assert {str(result) for result in results} == {
        "Expected more than 1 value per channel when training, got 1 value over 3 ranks"
    }


# -- the round itself ------------------------------------------------------------------------------------------


def test_self_raises_the_error_itself():
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        SELF.agree(b"", error)
    assert caught.value is error


def test_a_field_that_only_some_ranks_have_is_shown_as_absent():
    def call(comm):
        comm.agree(_fields.pack({"a": 1, "b": 2.5} if comm.rank == ODD else {"a": 1}))
        comm.allreduce_sum(ones)  # which carries what was announced

    assert "differ: b: absent on rank 0, 2.5 on rank 1, absent on rank 2" in same_mismatch(outcomes(call))


def test_payloads_of_other_lengths_do_not_meet_even_where_all_say_the_same():
    def call(comm):
        comm.agree(b"")
        comm.allreduce_sum(np.ones(3 + (comm.rank == ODD)))

    said = "elements: 3 on rank 0, 4 on rank 1, 3 on rank 2"
    assert same_mismatch(outcomes(call)) == f"the ranks' calls differ: {said}"


def test_a_payload_does_not_meet_one_that_was_not_announced():
    def call(comm):
        if comm.rank != ODD:
            comm.agree(_fields.pack({"operation": "mine"}))
        comm.allreduce_sum(ones)

    assert "operation: mine on rank 0, a payload that no agree announced on rank 1" in same_mismatch(outcomes(call))


@pytest.mark.parametrize("threshold", [1, RANKS])
@pytest.mark.parametrize("channels", [3, 2**14])  # the longer ones do not come with what is said of them
def test_differences_are_found_and_the_communicator_stays_usable_however_long_the_payload(threshold, channels):
    wide = np.random.default_rng(0).normal(size=(4, channels))

    def call(comm):
        comm = ThreadCommunicator(comm._group, comm.rank, max_gathered_ranks=threshold)
        with pytest.raises(SyncMismatchError) as caught:
            an.batch_norm(wide, eps=1e-3 if comm.rank == ODD else 1e-5, comm=comm)
        assert "eps: 1e-05 on rank 0, 0.001 on rank 1" in str(caught.value)
        with pytest.raises(SyncMismatchError, match="channels: "):
            an.batch_norm(wide[:, : channels - (comm.rank == ODD)], comm=comm)
        return an.batch_norm(wide, comm=comm)

    for y in run_ranks(RANKS, call):
        np.testing.assert_allclose(y, an.batch_norm(wide), rtol=0, atol=1e-12)


def test_fields_come_back_as_they_were_packed():
    fields = {"text": "é, naïve", "": "", "whole": -(2**62), "truth": True, "real": 0.1, "least": 5e-324}
    assert _fields.unpack(_fields.pack(fields)) == fields


def test_packed_fields_differ_where_the_settings_do():
    pairs = [{"a": 1}, {"a": 1.5}, {"a": "1"}, {"b": 1}, {"a": 2}, {"a": 1, "b": 1}, {"ab": 1}, {"a": "b"}, {}]
    assert len({_fields.pack(pair) for pair in pairs}) == len(pairs)


@pytest.mark.parametrize(
    "equal", [(1, 1.0, True, np.float64(1)), (0, -0.0, False), (2**60, 2.0**60), (2.0**70, np.float64(2.0**70))]
)
def test_packed_fields_are_equal_where_the_settings_are(equal):
    _fields._packed_all.cache_clear()
    assert len({_fields.pack({"a": value}) for value in equal}) == 1
    for value in equal:
        _fields._packed_all.cache_clear()
        assert _fields.unpack(_fields.pack({"a": value})) == {"a": equal[0]}


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinite_fields_come_back(value):
    assert _fields.unpack(_fields.pack({"a": value})) == {"a": value}
