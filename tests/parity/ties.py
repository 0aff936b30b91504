"""The judgement of a quantized case: where two results differ, the exact value must be a rounding tie."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

import oracle
from parity import cases
from parity.cases import Array, QuantizedCase

# Torch computes alpha * (x - x_zero_point) + beta in float32, alpha and beta in units of y's scale; an eps of the
# terms for the roundings of alpha and beta, and one for those of product and sum. 1.4 eps is the most measured.
TORCH = 2 * 2.0**-23
OURS = 1e-11  # in levels: float64 at 1e3 levels, the most that these cases have before they saturate
NEAR = 1e-5


class Ties(NamedTuple):
    """Of the values of a case, or of many."""

    values: int = 0
    different: int = 0
    farthest: float = 0.0
    """From the tie, in levels."""
    not_near: int = 0
    """Farther than NEAR."""
    faults: tuple[str, ...] = ()

    def plus(self, other: Ties) -> Ties:
        values, different = self.values + other.values, self.different + other.different
        farthest, not_near = max(self.farthest, other.farthest), self.not_near + other.not_near
        return Ties(values, different, farthest, not_near, self.faults + other.faults)

    def summary(self) -> str:
        near = f"{self.not_near} of them farther than {NEAR:g}"
        return f"{self.different} of {self.values} differ, at most {self.farthest:.1e} levels from a tie, {near}"


def ties(case: QuantizedCase, ours: Array, torch: Array) -> Ties:
    """Ours is the exact value, rounded; torch's is, or is the level on the other side of a tie."""
    exact, terms = _exact(case)
    limits = np.iinfo(case.dtype)
    from_tie = np.abs(exact - np.floor(exact) - 0.5)
    faults = []
    if not (ours.dtype == torch.dtype == case.dtype and ours.shape == torch.shape == exact.shape):
        return Ties(faults=(f"{cases.name(case)}: {ours.dtype}{ours.shape} and {torch.dtype}{torch.shape}",))
    rounded = np.clip(np.rint(exact), limits.min, limits.max)
    different = ours != torch
    one_level = np.abs(ours.astype(int) - torch) <= 1
    for text, wrong in (
        ("ours is not the exact value, rounded", (ours != rounded) & (from_tie > OURS)),
        ("ours and torch's differ by more than a level", ~one_level),
        ("ours and torch's differ away from a tie", different & (from_tie > TORCH * terms)),
    ):
        if np.any(wrong):
            where = tuple(int(index) for index in np.argwhere(wrong)[0])
            found = f"{ours[where]} and {torch[where]}, exactly {exact[where]:.9g}"
            faults.append(f"{cases.name(case)}: {text}: {np.sum(wrong)} times, first at {where}: {found}")
    farthest = float(np.max(from_tie[different], initial=0.0))
    not_near = int(np.sum(from_tie[different] > NEAR))
    return Ties(exact.size, int(np.sum(different)), farthest, not_near, tuple(faults))


def _exact(case: QuantizedCase) -> tuple[Array, Array]:
    """The levels before rounding, in float64, and the magnitude of the terms that torch adds."""
    given, (x_scale, y_scale) = cases.quantized_inputs(case), case.scales
    if case.target.startswith("Quantized"):
        y_scale = float(np.float32(y_scale))  # the layer's buffer
    statistics = given.mean, given.var, given.weight, given.bias
    options = {"x_scale": x_scale, "x_zero_point": given.x_zero_point, "y_scale": y_scale, "axis": case.axis}
    has_relu = "relu" in case.target.lower()
    levels = oracle.quantized_levels(given.xq, *statistics, **options, y_zero_point=given.y_zero_point, relu=has_relu)
    one_per_channel = np.full_like(given.xq.swapaxes(1, case.axis)[:, :, :1, :1], given.x_zero_point)
    zero = oracle.quantized_levels(one_per_channel.swapaxes(1, case.axis), *statistics, **options, y_zero_point=0)
    levels, beta = oracle.narrow(levels), oracle.narrow(zero)
    return levels, np.abs(levels - given.y_zero_point - beta) + np.abs(beta)
