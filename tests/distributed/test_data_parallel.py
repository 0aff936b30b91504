"""Equal starts and summed gradients: a data-parallel run is the single-process one."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed import SyncMismatchError, allreduce_gradients, broadcast_state
from arraynorm.testing import run_ranks

CUTS = (0, 5, 5, 12)
x = np.random.default_rng(0).standard_normal((12, 3))


def network(seed=0, comm=None):
    net = an.Sequential(an.BatchNorm(3, dtype=np.float64), an.LayerNorm(3, dtype=np.float64))
    for parameter in net.parameters():
        parameter[...] = np.random.default_rng(seed).uniform(0.5, 1.5, 3)
    return net if comm is None else an.SyncBatchNorm.convert_sync_batchnorm(net, comm)


def steps(net, part, comm=None):
    for _ in range(3):
        net.zero_grad()
        net.backward(net(part) - 1)
        if comm is not None:
            allreduce_gradients(net, comm)
        for _, parameter, gradient in net.named_gradients():
            parameter -= 0.01 * gradient
    return net.state_dict()


def test_three_steps_on_uneven_shards_are_those_of_one_process():
    def call(comm):
        net = network(seed=comm.rank, comm=comm)
        broadcast_state(net, comm)
        return steps(net, x[CUTS[comm.rank] : CUTS[comm.rank + 1]], comm)

    whole = steps(network(), x)
    states = run_ranks(3, call)
    for name, wanted in whole.items():
        np.testing.assert_allclose(states[0][name], wanted, rtol=0, atol=1e-12, err_msg=name)
        assert len({state[name].tobytes() for state in states}) == 1, name


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_broadcast_gives_every_rank_the_bits_of_the_root(dtype):
    def call(comm):
        layer = an.BatchNorm(3, dtype=dtype)
        layer.weight[...] = np.random.default_rng(comm.rank).standard_normal(3)
        layer.num_batches_tracked[...] = 10 + comm.rank
        kept = layer.weight
        broadcast_state(layer, comm, root=1)
        assert layer.weight is kept
        return [array.tobytes() for array in layer.state_dict().values()]

    first, second, third = run_ranks(3, call)
    assert first == second == third
    assert np.int64(11).tobytes() in first


def test_the_average_divides_by_the_number_of_ranks():
    def call(comm):
        layer = an.LayerNorm(2)
        layer.grads["weight"] = np.full(2, comm.rank + 1.0, np.float32)
        allreduce_gradients(layer, comm, average=True)
        return layer.grads["weight"].tolist(), layer.grads["bias"]

    assert run_ranks(4, call) == [([2.5, 2.5], None)] * 4


def test_a_rank_without_a_gradient_is_an_error_on_all():
    def call(comm):
        layer = an.LayerNorm(2)
        if comm.rank:
            layer.grads["weight"] = np.ones(2)
        allreduce_gradients(layer, comm)

    errors = run_ranks(2, call, return_exceptions=True)
    assert {type(error) for error in errors} == {SyncMismatchError}
    assert "arrays: 0 of 0 elements in all" in str(errors[0])


@pytest.mark.parametrize("root", [-1, 1, 0.0])
def test_a_root_that_is_no_rank_is_refused(root):
    with pytest.raises(ValueError, match="broadcast_state: root must be a rank from 0 to 0"):
        broadcast_state(an.LayerNorm(2), an.distributed.SELF, root=root)


def test_what_is_no_communicator_is_refused():
    with pytest.raises(TypeError, match="allreduce_gradients: comm must be"):
        allreduce_gradients(an.LayerNorm(2), "everyone")
