"""Where the contract departs from torch on purpose ([ours] in its text): what torch does, and what we do.

Each departure is one function, run over both libraries. If torch comes to do as we do, its test fails and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed here: parity is replayed from the record alone")

import torch

import arraynorm as an
from parity.libraries import OURS, TORCH, Library

pytestmark = pytest.mark.parity


class Departure(NamedTuple):
    number: int | None
    """Of the behaviour; None for a row of table D and for what is a fault of torch's."""
    show: Callable[[Library], Any]
    torch: Any
    ours: Any


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the name of what it raises."""
    try:
        return call()
    except Exception as error:  # whatever it is, torch's included
        return type(error).__name__


def moved(library: Library, layer: Any, *batches: Any) -> Any:
    """The running mean's first element after these training batches, or the name of an error."""

    def train() -> float:
        for batch in batches:
            layer(batch)
        return round(float(layer.running_mean[0]), 6)

    return outcome(train)


def counted(layer: Any, batch: Any) -> int:
    """What the counter says after one batch, refused or not."""
    outcome(lambda: layer(batch))
    return int(layer.num_batches_tracked)


# -- one function for each -------------------------------------------------------------------------------------


def batch_norm_of_a_constant_with_eps_0(library: Library) -> Any:
    layer = library.layers.BatchNorm1d(3, eps=0.0)
    return outcome(lambda: library.to_numpy(layer(library.ones(2, 3))).tolist())


def layer_norm_of_a_constant_with_eps_0(library: Library) -> Any:
    return str(library.to_numpy(library.layers.LayerNorm(3, eps=0.0)(library.ones(1, 3))))


def reset_after_switching_tracking_on(library: Library) -> Any:
    layer = library.layers.BatchNorm1d(3, track_running_stats=False)
    layer.track_running_stats = True
    return outcome(layer.reset_running_stats)


def one_value_per_group_and_one_sample(library: Library) -> Any:
    layer = library.layers.GroupNorm(6, 6)
    return outcome(lambda: library.to_numpy(layer(library.ones(1, 6))).tolist())


def five_channels_without_parameters_for_three(library: Library) -> Any:
    layer = library.layers.BatchNorm1d(3, affine=False, track_running_stats=False)
    return outcome(lambda: tuple(layer(library.ones(4, 5)).shape))


def five_channels_in_instance_norm_for_three(library: Library) -> Any:
    return outcome(lambda: library.layers.InstanceNorm1d(3)(library.ones(2, 5, 4)))


def counter_after_a_refused_call(library: Library) -> Any:
    return counted(library.layers.BatchNorm1d(3), library.ones(4, 5))


def cumulative_mean_without_a_counter(library: Library) -> Any:
    layer = library.layers.BatchNorm1d(3, momentum=None)
    layer.num_batches_tracked = None
    return moved(library, layer, library.ones(4, 3))


def counter_after_an_empty_batch(library: Library) -> Any:
    return counted(library.layers.BatchNorm1d(3), library.ones(0, 3))


def cumulative_mean_of_1_and_0_with_an_empty_batch_between(library: Library) -> Any:
    ones = library.ones(4, 3)
    return moved(library, library.layers.BatchNorm1d(3, momentum=None), ones, library.ones(0, 3), 0 * ones)


def running_variance_of_a_half_layer(library: Library) -> Any:
    layer = library.layers.BatchNorm1d(3).half()
    layer(library.asarray(np.linspace(-6e4, 6e4, 12).reshape(4, 3).astype(np.float16)))
    var = library.to_numpy(layer.running_var)
    return var.dtype.name, bool(np.isfinite(var).all())


def parameters_after_switching_affine_off_and_converting(library: Library) -> Any:
    layer = library.layers.BatchNorm1d(3)
    layer.affine = False
    return [name for name, _ in library.layers.SyncBatchNorm.convert_sync_batchnorm(layer).named_parameters()]


def running_mean_in_eval_after_switching_tracking_off(library: Library) -> Any:
    layer = library.layers.InstanceNorm1d(3, track_running_stats=True).eval()
    layer.track_running_stats = False
    return moved(library, layer, library.ones(2, 3, 4))


def hooks_after_converting(library: Library) -> Any:
    layer, calls = library.layers.BatchNorm1d(3), []
    layer.register_forward_hook(lambda *arguments: calls.append(1))
    library.layers.SyncBatchNorm.convert_sync_batchnorm(layer).eval()(library.ones(4, 3))
    return len(calls)


def counter_of_instance_norm(library: Library) -> Any:
    return counted(library.layers.InstanceNorm1d(3, track_running_stats=True), library.ones(2, 3, 4))


def cumulative_mean_of_instance_norm(library: Library) -> Any:
    layer = library.layers.InstanceNorm1d(3, momentum=None, track_running_stats=True)
    return moved(library, layer, library.ones(2, 3, 4), 0 * library.ones(2, 3, 4))


def momentum_after_quantizing(library: Library) -> Any:
    layer = library.layers.BatchNorm2d(3, momentum=0.7)
    if library is OURS:
        return an.QuantizedBatchNorm2d.from_float(layer, 0.1, 3).momentum
    from torch.ao.nn import quantized
    from torch.ao.quantization import MinMaxObserver

    layer.activation_post_process = MinMaxObserver()
    layer.activation_post_process(library.ones(3))
    return quantized.BatchNorm2d.from_float(layer).momentum


def instance_norms_dbias_of_one_sample_and_a_channels_last_gradient(library: Library) -> Any:
    return dbias_is_the_sum_of_dy(
        library.layers.InstanceNorm2d(3, affine=True),
        library.ones(1, 3, 2, 2),
        np.arange(12.0, dtype=np.float32).reshape(1, 2, 2, 3).transpose(0, 3, 1, 2),
    )


def batch_norms_dbias_of_an_x_whose_layout_is_ambiguous(library: Library) -> Any:
    x, dy = library.ones(1, 4, 2, 1).swapaxes(1, 2), np.arange(8.0, dtype=np.float32).reshape(1, 2, 4, 1)
    return dbias_is_the_sum_of_dy(library.layers.BatchNorm2d(2), x, dy)


def dbias_is_the_sum_of_dy(layer: Any, x: Any, dy: Any) -> bool:
    """dy, a NumPy array, keeps its strides in torch, too."""
    if isinstance(layer, an.Module):
        layer(x)
        layer.backward(dy)
        dbias = layer.grads["bias"]
    else:
        layer(x).backward(torch.from_numpy(dy))
        dbias = layer.bias.grad.numpy()
    return np.array_equal(dbias, dy.sum((0, 2, 3)))


def sync_batch_norm_after_switching_tracking_on(library: Library) -> Any:
    layer = library.layers.SyncBatchNorm(3, track_running_stats=False)
    layer.track_running_stats = True
    return outcome(lambda: tuple(layer(library.ones(4, 3)).shape))


def instance_norm_in_eval_after_switching_tracking_on(library: Library) -> Any:
    layer = library.layers.InstanceNorm1d(3).eval()
    layer.track_running_stats = True
    return outcome(lambda: tuple(layer(library.ones(2, 3, 4)).shape))


# -- the table -------------------------------------------------------------------------------------------------

DEPARTURES = [
    Departure(5, reset_after_switching_tracking_on, torch="AttributeError", ours="RuntimeError"),
    Departure(6, batch_norm_of_a_constant_with_eps_0, torch="ValueError", ours=[[0.0] * 3] * 2),
    Departure(6, layer_norm_of_a_constant_with_eps_0, torch="[[nan nan nan]]", ours="[[0. 0. 0.]]"),
    Departure(12, one_value_per_group_and_one_sample, torch="ValueError", ours=[[0.0] * 6]),
    Departure(14, five_channels_without_parameters_for_three, torch=(4, 5), ours="ValueError"),
    Departure(14, five_channels_in_instance_norm_for_three, torch="UserWarning", ours="ValueError"),
    Departure(19, counter_after_a_refused_call, torch=1, ours=0),
    Departure(22, cumulative_mean_without_a_counter, torch=0.0, ours="RuntimeError"),
    Departure(23, counter_after_an_empty_batch, torch=1, ours=0),
    Departure(23, cumulative_mean_of_1_and_0_with_an_empty_batch_between, torch=round(2 / 3, 6), ours=0.5),
    Departure(24, running_variance_of_a_half_layer, torch=("float16", False), ours=("float32", True)),
    Departure(26, parameters_after_switching_affine_off_and_converting, torch=[], ours=["weight", "bias"]),
    Departure(27, running_mean_in_eval_after_switching_tracking_off, torch=0.1, ours=0.0),
    Departure(34, hooks_after_converting, torch=0, ours=1),
    Departure(41, counter_of_instance_norm, torch=0, ours=1),
    Departure(41, cumulative_mean_of_instance_norm, torch=0.0, ours=0.5),
    Departure(45, momentum_after_quantizing, torch=0.1, ours=0.7),
    Departure(None, instance_norms_dbias_of_one_sample_and_a_channels_last_gradient, torch=False, ours=True),
    Departure(None, batch_norms_dbias_of_an_x_whose_layout_is_ambiguous, torch=False, ours=True),
    Departure(None, sync_batch_norm_after_switching_tracking_on, torch="AssertionError", ours=(4, 3)),
    Departure(None, instance_norm_in_eval_after_switching_tracking_on, torch="RuntimeError", ours=(2, 3, 4)),
]


@pytest.mark.parametrize(
    "departure",
    [
        pytest.param(
            departure,
            marks=[pytest.mark.behaviour(departure.number)] if departure.number else [],
            id=f"{departure.number or 'other'}-{departure.show.__name__}",
        )
        for departure in DEPARTURES
    ],
)
def test_torch_does_one_thing_and_we_another(departure):
    assert departure.show(TORCH) == departure.torch
    assert departure.show(OURS) == departure.ours
    assert departure.torch != departure.ours
