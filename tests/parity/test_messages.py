"""The error texts that users search for: both libraries are made to raise them, and say the same.

What is equal is the words. Sizes are written as each library writes them, `torch.Size([1, 3])` and `(1, 3)`, torch
leaves a space out of layer norm's text, and group norm's numbers stand elsewhere: `in_our_hand` rewrites torch's so.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed here: parity is replayed from the record alone")

import arraynorm as an
from parity import torch_side
from parity.libraries import OURS, TORCH, Library

pytestmark = pytest.mark.parity


def call(name: str, *arguments: Any, shape: tuple[int, ...], train: bool = True, **options: Any) -> Any:
    """What calls a layer on ones of `shape`."""
    return lambda library: getattr(library.layers, name)(*arguments, **options).train(train)(library.ones(*shape))


def without(buffer: str) -> Any:
    """What calls a batch norm in training that has lost one of its buffers."""

    def provoke(library: Library) -> None:
        layer = library.layers.BatchNorm1d(3)
        setattr(layer, buffer, None)
        layer(library.ones(4, 3))

    return provoke


def load(name: str, *arguments: Any, version: int | None, strict: bool = True, **arrays: Any) -> Any:
    """What loads a state of torch's version 1 or 2 (or older, None)."""
    return lambda library: getattr(library.layers, name)(*arguments).load_state_dict(
        library.state(version, **arrays), strict=strict
    )


THREE, FOUR = np.ones(3, dtype=np.float32), np.ones(4, dtype=np.float32)
SHAPE = (2, 3, 4, 5, 6, 7)

PROVOCATIONS = [
    *((8, call("BatchNorm1d", 3, shape=SHAPE[:ndim])) for ndim in (1, 4, 5)),
    *((8, call("BatchNorm2d", 3, shape=SHAPE[:ndim])) for ndim in (2, 3, 5)),
    *((8, call("BatchNorm3d", 3, shape=SHAPE[:ndim])) for ndim in (4, 6)),
    (8, call("SyncBatchNorm", 3, shape=(3,))),
    *((9, call("InstanceNorm1d", 3, shape=SHAPE[:ndim])) for ndim in (1, 4)),
    *((9, call("InstanceNorm2d", 3, shape=SHAPE[:ndim])) for ndim in (2, 5)),
    *((9, call("InstanceNorm3d", 3, shape=SHAPE[:ndim])) for ndim in (3, 6)),
    (10, call("BatchNorm1d", 3, shape=(1, 3))),
    (10, call("BatchNorm2d", 3, shape=(1, 3, 1, 1))),
    (10, call("BatchNorm1d", 3, shape=(1, 3), train=False, track_running_stats=False)),
    (11, call("InstanceNorm1d", 3, shape=(2, 3, 1))),
    (11, call("InstanceNorm2d", 3, shape=(2, 3, 1, 1), track_running_stats=True)),
    (11, call("InstanceNorm3d", 3, shape=(2, 3, 1, 1, 1), train=False)),
    (12, lambda library: library.layers.GroupNorm(4, 6)),
    *((13, call("LayerNorm", (4, 5), shape=shape)) for shape in ((2, 5, 4), (5,), (4, 5, 1))),
    (13, call("LayerNorm", 5, shape=(2, 4))),
    (15, call("SyncBatchNorm", 0, shape=(2, 0, 4))),
    (21, without("running_mean")),
    (21, without("running_var")),
    (29, load("BatchNorm1d", 3, version=2, weight=THREE, bias=THREE, running_mean=THREE, running_var=THREE)),
    (30, load("InstanceNorm1d", 3, version=None, running_mean=THREE, running_var=THREE)),
    (30, load("InstanceNorm2d", 3, version=None, strict=False, running_mean=THREE, running_var=THREE)),
    (31, load("BatchNorm2d", 3, version=2, weight=FOUR, bias=FOUR, running_mean=FOUR, extra=THREE, other=THREE)),
    (31, load("GroupNorm", 1, 3, version=None, weight=FOUR)),
]


def in_our_hand(text: str) -> str:
    """Torch's text with sizes written as we write them."""
    text = re.sub(r"torch\.Size\(\[([\d, ]*)\]\)", _size, text)
    text = re.sub(r"(?<=input of size)\[([\d, ]*)\]", lambda match: f" {_size(match)}", text)
    return re.sub(
        r"num_channels \((\d+)\) must be divisible by num_groups \((\d+)\)",
        r"num_channels must be divisible by num_groups, got num_channels=\1, num_groups=\2",
        text,
    )


def _size(match: re.Match[str]) -> str:
    return str(tuple(map(int, match[1].split(","))))


@pytest.mark.parametrize(
    ("number", "provoke"),
    [
        pytest.param(number, provoke, marks=pytest.mark.behaviour(number), id=f"{number}-{index}")
        for index, (number, provoke) in enumerate(PROVOCATIONS)
    ],
)
def test_both_raise_the_same_text(number, provoke):
    with pytest.raises((ValueError, RuntimeError)) as torchs:
        provoke(TORCH)
    with pytest.raises((ValueError, RuntimeError)) as ours:
        provoke(OURS)
    assert str(ours.value) == in_our_hand(str(torchs.value))


@pytest.mark.behaviour(45)
@pytest.mark.parametrize("name", ["QuantizedBNReLU2d", "QuantizedBNReLU3d"])
def test_quantized_layers_raise_the_same_text(name):
    xq = np.zeros((1, 3, 2), dtype=np.uint8)
    with pytest.raises(ValueError, match="Input shape must be") as torchs:
        torch_side.quantized_layer(name, 3)(torch_side.quantize(xq, 0.1, 3))
    with pytest.raises(ValueError, match="Input shape must be") as ours:
        getattr(an, name)(3)(xq, 0.1, 3)
    assert str(ours.value) == str(torchs.value)


@pytest.mark.behaviour(13)
def test_both_refuse_to_normalize_over_no_dimension():
    for library in (OURS, TORCH):
        with pytest.raises((ValueError, RuntimeError), match="normalized_shape"):
            library.layers.LayerNorm(())(library.ones(2, 3))
