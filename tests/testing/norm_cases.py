"""Every norm, with the formulas of its gradients as sums of terms, so that a test can leave one of them out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

import arraynorm as an

Array = np.ndarray[Any, Any]

SHAPE = (2, 4, 3)
ROWS = (2, 12)
EPS = 1e-3
MEAN, VAR = (0.3, -0.2, 0.1, 0.0), (0.5, 1.0, 2.0, 4.0)
AFFINE, ADD_RELU = ("dx", "dweight", "dbias"), ("dx", "daddend", "dweight", "dbias")


class NormCase(NamedTuple):
    """One norm as `gradcheck` takes it, and where its statistics and its parameters stand."""

    name: str
    forward: Callable[..., tuple[Any, Any]]
    gradients: tuple[str, ...]
    """Fields of what backward returns, one for each input."""
    view: tuple[int, ...]
    """SHAPE split so that statistics and parameters have axes of their own; samples first."""
    statistics: tuple[int, ...]
    """Axes of the view over which mean and variance are taken; none where they are given."""
    summed: tuple[int, ...]
    """Axes of the view over which the parameters' gradients are sums."""

    def backward(self, dy: Any, cache: Any) -> Any:
        return getattr(an, f"{self.name}_backward")(dy, cache)


def _given(like: Any) -> list[Any]:
    """The statistics of the frozen norms, in the library of `like`."""
    return [array_namespace(like).asarray(values, dtype=like.dtype) for values in (MEAN, VAR)]


def _batch_norm(x: Any, weight: Any, bias: Any, eps: float = EPS) -> Any:
    return an.batch_norm_forward(x, weight, bias, eps=eps)


def _batch_norm_frozen(x: Any, weight: Any, bias: Any, eps: float = EPS) -> Any:
    return an.batch_norm_frozen_forward(x, *_given(x), weight, bias, eps=eps)


def _batch_norm_add_relu(x: Any, addend: Any, weight: Any, bias: Any, eps: float = EPS) -> Any:
    return an.batch_norm_add_relu_forward(x, addend, weight, bias, eps=eps)


def _batch_norm_add_relu_frozen(x: Any, addend: Any, weight: Any, bias: Any, eps: float = EPS) -> Any:
    return an.batch_norm_add_relu_frozen_forward(x, addend, *_given(x), weight, bias, eps=eps)


def _instance_norm(x: Any, weight: Any, bias: Any, eps: float = EPS) -> Any:
    return an.instance_norm_forward(x, weight, bias, eps=eps)


def _group_norm(x: Any, weight: Any, bias: Any, eps: float = EPS) -> Any:
    return an.group_norm_forward(x, 2, weight, bias, eps=eps)


def _layer_norm(x: Any, weight: Any, bias: Any, eps: float = EPS) -> Any:
    return an.layer_norm_forward(x, SHAPE[1:], weight, bias, eps=eps)


def _rms_norm(x: Any, weight: Any, eps: float = EPS) -> Any:
    return an.rms_norm_forward(x, SHAPE[1:], weight, eps=eps)


NORMS = [
    NormCase("batch_norm", _batch_norm, AFFINE, SHAPE, (0, 2), (0, 2)),
    NormCase("batch_norm_frozen", _batch_norm_frozen, AFFINE, SHAPE, (), (0, 2)),
    NormCase("batch_norm_add_relu", _batch_norm_add_relu, ADD_RELU, SHAPE, (0, 2), (0, 2)),
    NormCase("batch_norm_add_relu_frozen", _batch_norm_add_relu_frozen, ADD_RELU, SHAPE, (), (0, 2)),
    NormCase("instance_norm", _instance_norm, AFFINE, SHAPE, (2,), (0, 2)),
    NormCase("group_norm", _group_norm, AFFINE, (2, 2, 2, 3), (2, 3), (0, 3)),
    NormCase("layer_norm", _layer_norm, AFFINE, ROWS, (1,), (0,)),
    NormCase("rms_norm", _rms_norm, ("dx", "dweight"), ROWS, (1,), (0,)),
]


def draw(norm: NormCase, seed: int = 0, *, mean: float = 0.0, std: float = 1.0) -> tuple[Array, ...]:
    """Inputs of a norm, where x has this mean and standard deviation, and no ReLU is near its kink."""
    rng = np.random.default_rng(seed)
    per_parameter = SHAPE[1:] if norm.view == ROWS else SHAPE[1:2]
    drawn = {
        "dx": mean + std * rng.standard_normal(SHAPE),
        # |weight * x_hat + bias| stays below 12, since x_hat of 12 values is below sqrt(12)
        "daddend": rng.choice([-20.0, 20.0], SHAPE) + rng.standard_normal(SHAPE),
        "dweight": rng.uniform(0.5, 3.0, per_parameter) * rng.choice([-1.0, 1.0], per_parameter),
        "dbias": rng.uniform(-1.0, 1.0, per_parameter),
    }
    return tuple(drawn[name] for name in norm.gradients)


def terms(norm: NormCase, dy: Array, cache: Any) -> dict[str, dict[str, Array]]:
    """For each gradient its terms, of which it is the sum.

    With g = dy where y > 0, elsewhere 0, and x_hat = (x - mean) * rstd:
    dx = rstd * (g * weight - mean(g * weight) - x_hat * mean(g * weight * x_hat)), of which given statistics leave
    the first; dweight = sum(g * x_hat), dbias = sum(g), daddend = g.
    """
    view, axes = norm.view, norm.statistics
    of_parameter = [1 if axis in norm.summed else n for axis, n in enumerate(view)]
    of_statistic = [1 if axis in axes else n for axis, n in enumerate(view)] if axes else of_parameter
    x, dy, weight = cache.x.reshape(view), dy.reshape(view), cache.weight.reshape(of_parameter)
    rstd = cache.rstd.reshape(of_statistic)
    x_hat = (x - cache.mean.reshape(of_statistic)) * rstd if hasattr(cache, "mean") else x * rstd

    first = np.zeros(view)
    first[0] = 1.0
    g_terms = {"the first sample": dy * first, "the other samples": dy * (1 - first)}
    if "daddend" in norm.gradients:
        passes = np.unpackbits(cache.mask, count=x.size, bitorder="little").reshape(view)
        g_terms["what the ReLU stops"] = dy * (passes - 1.0)
    g = sum(g_terms.values())
    dx_terms = {"dy itself": rstd * weight * g}
    if axes:
        dx_terms["the variance"] = -rstd * x_hat * np.mean(g * weight * x_hat, axis=axes, keepdims=True)
    if axes and hasattr(cache, "mean"):
        dx_terms["the mean"] = np.broadcast_to(-rstd * np.mean(g * weight, axis=axes, keepdims=True), view)

    def summed(term: Array) -> Array:
        return np.sum(term, axis=norm.summed).reshape(cache.weight.shape)

    every = {
        "dx": {name: term.reshape(SHAPE) for name, term in dx_terms.items()},
        "daddend": {name: term.reshape(SHAPE) for name, term in g_terms.items()},
        "dweight": {name: summed(term * x_hat) for name, term in g_terms.items()},
        "dbias": {name: summed(term) for name, term in g_terms.items()},
    }
    return {gradient: every[gradient] for gradient in norm.gradients}
