"""The layers of `digits.py` that are no norms, in plain NumPy, and its loss; CuPy's arrays take NumPy's calls over.

Each is an `an.Module`: `forward` keeps what `backward` needs, `backward` returns dx and accumulates the gradients of
the parameters. Nothing more is needed to mix your own layers with those of arraynorm.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

import arraynorm as an

Array: TypeAlias = np.ndarray[Any, Any]


class Dense(an.Module):
    """y = x @ weight + bias, for x (N, inputs)."""

    def __init__(
        self, inputs: int, outputs: int, *, rng: np.random.Generator, scale: float = 1.0, bias: bool = True
    ) -> None:
        super().__init__()
        self.register_parameter("weight", he_normal((inputs, outputs), inputs, scale, rng))
        self.register_parameter("bias", np.zeros(outputs, np.float32) if bias else None)

    def forward(self, x: Array) -> Array:
        self.keep(x)
        y = x @ self.weight
        return y if self.bias is None else y + self.bias

    def backward(self, dy: Array) -> Array:
        x = self.kept()
        self.accumulate_gradient("weight", x.T @ dy)
        if self.bias is not None:
            self.accumulate_gradient("bias", dy.sum(axis=0))
        return dy @ self.weight.T


class Conv3x3(an.Module):
    """3 x 3 convolution of x (N, inputs, H, W), padded by zeros to keep H and W: one matrix product with patches."""

    def __init__(
        self, inputs: int, outputs: int, *, rng: np.random.Generator, scale: float = 1.0, bias: bool = True
    ) -> None:
        super().__init__()
        self.register_parameter("weight", he_normal((outputs, inputs, 3, 3), 9 * inputs, scale, rng))
        self.register_parameter("bias", np.zeros(outputs, np.float32) if bias else None)

    def forward(self, x: Array) -> Array:
        columns = patches(x)
        self.keep(columns)
        y = correlate(columns, self.weight, x.shape)
        return y if self.bias is None else y + self.bias[:, None, None]

    def backward(self, dy: Array) -> Array:
        columns = self.kept()
        dweight = dy.reshape(*dy.shape[:2], -1) @ columns.swapaxes(1, 2)
        self.accumulate_gradient("weight", dweight.sum(axis=0).reshape(self.weight.shape))
        if self.bias is not None:
            self.accumulate_gradient("bias", dy.sum(axis=(0, 2, 3)))
        # A pixel that reached an output by weight[o, i, r, c] hears from it by the same weight: turned by 180 degrees,
        # inputs and outputs swapped.
        return correlate(patches(dy), self.weight[:, :, ::-1, ::-1].swapaxes(0, 1), dy.shape)


def patches(x: Array) -> Array:
    """x (N, C, H, W) -> (N, C * 9, H * W): the 3 x 3 surroundings of every pixel, zero beyond the border."""
    n, c, h, w = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = sliding_window_view(padded, (3, 3), axis=(2, 3))
    return windows.transpose(0, 1, 4, 5, 2, 3).reshape(n, c * 9, h * w)


def correlate(columns: Array, weight: Array, shape: tuple[int, ...]) -> Array:
    """columns (N, I * 9, H * W) of an image of the given shape, weight (O, I, 3, 3) -> (N, O, H, W)."""
    n, _, h, w = shape
    return (weight.reshape(len(weight), -1) @ columns).reshape(n, len(weight), h, w)


class ReLU(an.Module):
    """max(x, 0)."""

    def forward(self, x: Array) -> Array:
        self.keep(x > 0)
        return np.maximum(x, 0)

    def backward(self, dy: Array) -> Array:
        return dy * self.kept()


class AvgPool2x2(an.Module):
    """The mean of every 2 x 2 block of x (N, C, H, W), for even H and W."""

    def forward(self, x: Array) -> Array:
        n, c, h, w = x.shape
        return x.reshape(n, c, h // 2, 2, w // 2, 2).mean(axis=(3, 5))

    def backward(self, dy: Array) -> Array:
        return dy.repeat(2, axis=2).repeat(2, axis=3) / 4


class Flatten(an.Module):
    """x (N, ...) -> (N, K)."""

    def forward(self, x: Array) -> Array:
        self.keep(x.shape)
        return x.reshape(len(x), -1)

    def backward(self, dy: Array) -> Array:
        return dy.reshape(self.kept())


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """The loss of logits (N, classes), summed over the samples, and its gradient by the logits."""
    samples = np.arange(len(labels), like=labels)  # in their library
    shifted = logits - logits.max(axis=1, keepdims=True)  # exp can't overflow then
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    dlogits = np.exp(log_p)
    dlogits[samples, labels] -= 1
    return -float(log_p[samples, labels].sum()), dlogits


def he_normal(shape: tuple[int, ...], fan_in: int, scale: float, rng: np.random.Generator) -> Array:
    """Normal weights with deviation scale * sqrt(2 / fan_in); scale 1 is He et al., 2015, arXiv:1502.01852."""
    return (scale * np.sqrt(2 / fan_in) * rng.standard_normal(shape)).astype(np.float32)
