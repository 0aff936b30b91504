"""Derivatives by central differences at halved steps, extrapolated to step zero (Ridders 1982)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from arraynorm import _array

Host: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

_EPS = float(np.finfo(np.float64).eps)
_NUDGES = 4  # of x by its last bits, to see what rounding does to y: one may move a whole set alike, which a norm hides
_HALVINGS = 40  # of the step, at most: rounding usually ends it after five
_SETTLED = 1e-4  # relative error above which differences have found nothing: across a kink it is about 1
_JUMP = 1e-4  # of the largest y: what the last bits of x change by more is no rounding, but a jump of f


class Derivative(NamedTuple):
    """The derivative of <dy, f(x + t v)> by t at t = 0."""

    value: float
    error: float
    """What the differences leave open."""
    terms: float
    """Sum of |dy * df/dt|: what the value consists of, before its terms cancel."""
    jump: float
    """From the derivative on the left to the one on the right."""
    exists: bool
    """Whether the differences settle, and on the same value from both sides."""


class Differences:
    """Differences of <dy, f> around x."""

    def __init__(self, f: Callable[[Host], Host], x: Host, dy: Host) -> None:
        self.f, self.x, self.dy = f, x, dy
        self.y = f(x)
        self.blur = self._blur()

    def _blur(self) -> Host:
        """What rounding may do to each term of <dy, y>.

        That is a few roundings of y itself, and what the last bits of x do to y: of 1e6 +- 1, ten digits reach a norm.
        """
        rng = np.random.default_rng(0)
        seen: Host = np.zeros_like(self.y)
        with _array.silent():
            for _ in range(_NUDGES):
                nudged = self.x + rng.integers(-1, 2, self.x.shape) * np.spacing(self.x)
                seen = np.fmax(seen, abs(self.f(nudged) - self.y))
        seen = np.minimum(seen, _JUMP * np.max(abs(self.y), initial=0.0))
        return np.asarray(abs(self.dy) * (4 * _EPS * abs(self.y) + seen))

    def along(self, v: Host, rtol: float) -> Derivative:
        """The derivative in direction v.

        The step t is halved until the error is well below `rtol` of the terms, or rounding outweighs the gain.
        """
        slope, jump = _Extrapolation(2), _Extrapolation(1)
        t = _first_step(self.x)
        moved = np.zeros(self.y.shape, dtype=bool)
        for _ in range(_HALVINGS):
            with _array.silent():  # a step may leave the domain (of a log): its nan is passed over
                after, before = self.f(self.x + t * v), self.f(self.x - t * v)
                # subtracted before they are summed: a large offset of y costs fewer digits
                change = float(np.vdot(self.dy, after - before))
                bend = float(np.vdot(self.dy, after - 2 * self.y + before))
                terms = float(np.vdot(abs(self.dy), abs(after - before))) / (2 * t)
            moved |= after != before  # what v does not reach has no rounding: it cancels
            noise = float(np.vdot(self.blur, moved) if moved.any() else np.sum(self.blur)) / t
            slope.add(change / (2 * t), terms, noise)
            jump.add(bend / t, terms, 4 * noise)
            if (
                math.isfinite(slope.error)
                and slope.error <= max(0.01 * rtol * terms, noise)
                and jump.error <= max(rtol * terms, 4 * noise)
            ):
                break
            t /= 2
        settles = slope.error <= _SETTLED * slope.terms + 8 * slope.noise
        agrees = abs(jump.value) <= rtol * slope.terms + 8 * jump.error
        return Derivative(slope.value, slope.error, slope.terms, jump.value, settles and agrees)


class _Extrapolation:
    """Ridders' table: estimates at steps t, t/2, t/4, ... whose errors are series in t^p, t^(p+2), t^(p+4), ..."""

    def __init__(self, power: int) -> None:
        self.power = power
        self.row: list[float] = []
        self._forget()

    def _forget(self) -> None:
        self.value, self.error, self.terms, self.noise = math.nan, math.inf, 0.0, 0.0

    def add(self, estimate: float, terms: float, noise: float) -> None:
        """Cancel one more power of t with every earlier estimate; keep what is closest to the two it came from."""
        if terms > 2 * self.terms + 8 * noise:  # f was saturated, its differences constant: small, not good
            self._forget()
        row = [estimate]
        for column, previous in enumerate(self.row):
            factor = 2.0 ** (self.power + 2 * column)
            row.append((factor * row[column] - previous) / (factor - 1))
            error = max(abs(row[-1] - row[-2]), abs(row[-1] - previous)) + noise
            if error < self.error:  # never true of a nan
                self.value, self.error, self.terms, self.noise = row[-1], error, terms, noise
        self.row = row[:6]  # further powers are below rounding


def _first_step(x: Host) -> float:
    """About 1/16 of x's spread (for 1e4 +- 1 the 1 counts, as it does for a norm).

    Of 12 bits, so that x + t v is exact, or nearly so, for directions v of few bits; but no power of two, for a
    function of that period would look constant at every step.
    """
    spread = float(np.ptp(x)) if x.size else 0.0
    size = spread or float(np.max(abs(x), initial=0.0)) or 1.0
    return math.ldexp(2531, math.frexp(size)[1] - 17)
