"""What a parity case's results should be, from the oracle, with what it takes to judge the errors of others.

For a layer this is the contract written a second time: when running statistics normalize and when they move.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

import oracle
from parity import cases
from parity.cases import Array, LayerCase, OpCase


class Exact(NamedTuple):
    """One array."""

    value: oracle.Table
    scale: float
    """What an error is relative to: max |value|, and for dx max |dy * weight * rstd|."""
    terms: float
    """The largest sum of magnitudes of an element's terms: what its rounding errors are relative to.

    Where they cancel (one channel's dbias, a running mean near 0) `scale` is smaller, and with it the digits left.
    """
    mean_over_std: float
    """The largest |mean| / sqrt(var + eps) of all sets and steps; 0 where no mean is subtracted to get here."""


class Step(NamedTuple):
    norm: oracle.Norm
    dy: Array


class Truth:
    """The exact results of a case."""

    def __init__(self, case: OpCase | LayerCase) -> None:
        self.case = case
        self.running: dict[str, Exact] = {}
        self.num_batches_tracked: int | None = None
        self.moved_then_used = False
        """Whether running statistics normalize after they moved, and were rounded to their dtype."""
        self._steps = self._op_steps(case) if isinstance(case, OpCase) else self._layer_steps(case)
        self.mean_over_std = max(_mean_over_std(step.norm) for step in self._steps)

    # -- the norm of each step -------------------------------------------------------------------------------

    def _op_steps(self, case: OpCase) -> list[Step]:
        given, options = cases.inputs(case), dict(case.options)
        arrays = {key: getattr(given, key) for key in cases.parameters(case)}
        if given.addend is not None:
            arrays["addend"] = given.addend[0]
        if case.target.endswith("frozen"):
            arrays["given"] = (given.running_mean, given.running_var)
        # without ReLU: `arrays` takes it from the side that is judged
        norm = getattr(oracle, _FORMULAS.get(case.target, case.target))(given.x[0], **arrays, **options)
        if case.target in ("batch_norm", "batch_norm_add_relu", "instance_norm"):
            self._move(norm, given.running_mean, given.running_var, case.momentum)
        return [Step(norm, given.dy[0])]

    def _layer_steps(self, case: LayerCase) -> list[Step]:
        given, live = cases.inputs(case), {**dict(case.options), **dict(case.changed)}
        tracked = cases.tracks(case)
        moves = tracked and live.get("track_running_stats", True)
        mean, var, count = given.running_mean, given.running_var, cases.TRACKED
        steps = []
        for step, mode in enumerate(case.modes):
            x, dy = given.x[step], given.dy[step]
            arrays = {key: getattr(given, key) for key in cases.parameters(case)}
            if given.addend is not None:
                arrays["addend"] = given.addend[step]
            if tracked and mode == "e":
                arrays["given"] = (mean, var)
                self.moved_then_used |= count > cases.TRACKED
            norm = _layer_norm(case, x, arrays, live)
            if moves and mode == "t":
                count += 1
                momentum = live.get("momentum", 0.1)
                mean, var = self._move(norm, mean, var, 1 / count if momentum is None else momentum)
            steps.append(Step(norm, dy))
        if tracked:
            self.num_batches_tracked = count
            if not self.running:
                self.running = {
                    key: _plain(oracle.wide(a)) for key, a in (("running_mean", mean), ("running_var", var))
                }
        return steps

    def _move(self, norm: oracle.Norm, mean: Array, var: Array, momentum: float) -> tuple[Array, Array]:
        """The running statistics after a step; float64 between the steps, which costs half an eps each."""
        new_mean, new_var = oracle.running_stats(norm, mean, var, momentum)
        terms = (1 - momentum) * np.abs(mean) + momentum * np.max(np.mean(np.abs(oracle.narrow(norm.x)), axis=1))
        self.running = {
            "running_mean": Exact(new_mean, _largest(new_mean), float(np.max(terms)), 0.0),
            "running_var": _plain(new_var)._replace(mean_over_std=_mean_over_std(norm)),
        }
        return oracle.narrow(new_mean), oracle.narrow(new_var)

    # -- results ---------------------------------------------------------------------------------------------

    @property
    def has_relu(self) -> bool:
        return "relu" in self.case.target or self.case.target.startswith("Fused")

    def before_relu(self, step: int) -> tuple[Array, float]:
        """What ReLU is taken of, in float64, and the largest sum of magnitudes of its terms."""
        norm = self._steps[step].norm
        weight, bias, addend = (np.abs(oracle.narrow(term)) for term in (norm.weight, norm.bias, norm.addend))
        terms = _magnitude(norm) * weight + bias + addend
        return oracle.narrow(norm.y).reshape(self.case.shape), float(np.max(terms))

    def arrays(self, is_open: Array | None = None) -> dict[str, Exact]:
        """The arrays of `ours.results` but the counter; with ReLU, the gradients for the mask `is_open` of each step.

        Within rounding of the kink a mask may be either way, and the gradients are right for their own mask.
        """
        _, y_terms = self.before_relu(-1)
        y = self._steps[-1].norm.y.reshape(self.case.shape)
        y = np.where(y > 0, y, 0 * y) if self.has_relu else y
        k = self.mean_over_std
        found = {"y": Exact(y, _largest(y), y_terms, k)}
        sums: dict[str, oracle.Table] = {}
        magnitudes: dict[str, Array] = {}
        for number, (norm, dy) in enumerate(self._steps):
            dv = dy.reshape(norm.shape)
            dv = dv if is_open is None else np.where(is_open[number].reshape(norm.shape), dv, np.zeros_like(dv))
            gradients = norm.backward(dv)
            rows = oracle.narrow(norm.rows(dv))
            per_parameter = {"dweight": np.abs(rows) * _magnitude(norm), "dbias": np.abs(rows)}
            for key, terms in per_parameter.items():
                value = getattr(gradients, key)
                if value is not None:
                    sums[key] = sums[key] + value if key in sums else value
                    magnitudes[key] = magnitudes.get(key, 0) + oracle.narrow(norm.per_parameter(oracle.wide(terms)))
        shape = cases.parameter_shape(self.case)
        for key, v in sums.items():
            found[key] = Exact(v.reshape(shape), _largest(v), _largest(magnitudes[key]), k if key == "dweight" else 0.0)
        dx = gradients.dx.reshape(self.case.shape)
        dx_scale = float(np.max(np.abs(rows * oracle.narrow(norm.weight * norm.rstd))))
        found["dx"] = Exact(dx, dx_scale, max(dx_scale, _largest(dx)), k)
        if gradients.daddend is not None:
            found["daddend"] = _plain(gradients.daddend)
        return found | self.running


# The formula before ReLU, under the oracle's name.
_FORMULAS = {
    "batch_norm_frozen": "batch_norm",
    "batch_norm_add_relu": "batch_norm",
    "batch_norm_add_relu_frozen": "batch_norm",
}


def _layer_norm(case: LayerCase, x: Array, arrays: dict[str, Any], live: dict[str, Any]) -> oracle.Norm:
    """The norm of one step of a layer."""
    if case.target == "RMSNorm":
        return oracle.rms_norm(x, live["normalized_shape"], **arrays, eps=live.get("eps"))
    eps = live.get("eps", 1e-5)
    if case.target == "LayerNorm":
        return oracle.layer_norm(x, live["normalized_shape"], **arrays, eps=eps)
    axis = live.get("axis", 1)
    if case.target == "GroupNorm":
        return oracle.group_norm(x, live["num_groups"], **arrays, axis=axis, eps=eps)
    if case.target.startswith("InstanceNorm"):
        is_unbatched = x.ndim == int(case.target[-2]) + 1
        x = x[None] if is_unbatched else x
        if "given" not in arrays:
            return oracle.instance_norm(x, **arrays, axis=axis, eps=eps)
    return oracle.batch_norm(x, **arrays, axis=axis, eps=eps)


def _magnitude(norm: oracle.Norm) -> Array:
    """|x_hat|, and at least 1: that of a set of one value is 0, the difference of two that are not."""
    return np.maximum(np.abs(oracle.narrow(norm.x_hat)), 1)


def _mean_over_std(norm: oracle.Norm) -> float:
    return _largest(norm.mean * norm.rstd)


def _plain(value: oracle.Table) -> Exact:
    return Exact(value, _largest(value), _largest(value), 0.0)


def _largest(value: oracle.Table) -> float:
    return float(np.max(np.abs(oracle.narrow(value))))
