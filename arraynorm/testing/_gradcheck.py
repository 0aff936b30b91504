"""The check of gradients written by hand: what is compared, and the verdict."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from arraynorm import _array, _check
from arraynorm.testing._backward import gradients_of
from arraynorm.testing._differences import Derivative, Differences, Host
from arraynorm.testing._operation import Backward, Forward, GradientError, operation
from arraynorm.typing import Array

_DIRECTIONS = 4  # for each input in "directional" mode: one may happen to be blind to an error
_MAX_SKIPPED = 0.25  # share of an input's samples that may sit on kinks


class KinkWarning(UserWarning):
    """The forward has no derivative at a sampled point, which is left out of the comparison."""


def gradcheck(
    forward: Callable[..., Any],
    backward: Backward | None = None,
    inputs: Sequence[Array | None] = (),
    *,
    rtol: float = 1e-7,
    atol: float = 0.0,
    mode: Literal["full", "directional"] = "full",
    seed: int = 0,
) -> None:
    r"""Check a backward against finite differences of its forward.

    For a random `dy`, every gradient :math:`\partial \langle dy, y \rangle / \partial x_i` that `backward` returns
    is compared with central differences of `forward`, extrapolated to step zero.

    Parameters
    ----------
    forward : callable or Module
        ``forward(*inputs) -> (y, cache)``. Or a layer, without `backward`: the gradients of its inputs and of all its
        parameters are checked, in the mode (train or eval) that it is in, on float64 copies; the layer keeps every bit.
    backward : callable, optional
        ``backward(dy, cache)`` returns one gradient for each input, in order.
    inputs : sequence of float64 arrays or None
        Of any array library. None stands for an absent argument, such as a weight; its gradient must be None.
        `forward` gets these very arrays, so a transposed or read-only one is tested as such.
    rtol : float
        Allowed error, relative to the gradient (see Notes).
    atol : float
        Allowed absolute error, in addition. Zero, because what is small depends on the data.
    mode : {"full", "directional"}
        Move every element on its own, or each input as a whole along random directions v: then ``<dy, J v>`` by
        differences is compared with ``<J^T dy, v>``.
    seed : int
        Of `dy` and the directions.

    Raises
    ------
    GradientError
        If a gradient is wrong (the message names the argument, the worst element, both values and the tolerance) or
        has not its input's shape, dtype and library; if a second run gives other bits; if `inputs` or `dy` were
        written to; if anything is not finite; if more than a quarter of an input's samples sit on kinks.
    TypeError
        If an input is not float64: differences in float32 are good to three digits and could not tell. If `forward`,
        `backward` or `inputs` are not what they must be.
    ValueError
        If an input is not finite, or there is none.

    Warns
    -----
    KinkWarning
        Where the derivatives from the left and from the right differ, as at the zero of a ReLU, or differences do
        not settle. Any value in between is as right as another there, so the point is left out.

    Notes
    -----
    The allowed error is ``atol + rtol * s`` plus what the differences themselves leave open, usually 1e-9 of s. Here
    s is the sum of the absolute terms that a gradient consists of, :math:`\sum_j |dy_j \partial y_j / \partial x_i|`,
    or the largest gradient of that input if that is less. So an element that is zero because its terms cancel may be
    zero up to rounding, and a channel of small gradients is not measured by another's large ones.
    Differences see nothing below the rounding of y, and of what x goes through on its way there: how much that is, is
    measured by moving the last bits of x. A gradient that small goes unchecked; one that is zero for all x (of a bias
    before a norm) is compared with rounding, and may need an `atol` where backward computes it in large terms.

    References
    ----------
    C. J. F. Ridders, "Accurate computation of F'(x) and F'(x) F''(x)", Advances in Engineering Software 4 (1982).

    Examples
    --------
    >>> import numpy as np
    >>> from arraynorm.testing import gradcheck
    >>> def forward(x):
    ...     return np.sin(x), x
    >>> def backward(dy, x):
    ...     return (dy * np.cos(x),)
    >>> gradcheck(forward, backward, (np.arange(6.0),))
    """
    if mode not in ("full", "directional"):
        raise ValueError(f'gradcheck: mode must be "full" or "directional", got {mode!r}')
    _compare(forward, backward, inputs, rtol, atol, mode, seed)


def check_vjp(
    forward: Forward,
    backward: Backward,
    inputs: Sequence[Array | None],
    *,
    rtol: float = 1e-7,
    atol: float = 0.0,
    seed: int = 0,
) -> None:
    """Check a vector-Jacobian product along random directions v: <dy, J v> must equal <J^T dy, v>.

    `gradcheck` in directional mode, which has the parameters, the errors and the warnings: some 50 calls of `forward`
    for each input, whatever its size.

    Examples
    --------
    >>> import numpy as np, arraynorm as an
    >>> from arraynorm.testing import check_vjp
    >>> x = np.random.default_rng(0).normal(size=(16, 8, 5, 5))
    >>> check_vjp(an.batch_norm_forward, an.batch_norm_backward, (x,))
    """
    _compare(forward, backward, inputs, rtol, atol, "directional", seed)


def _compare(
    forward: Callable[..., Any],
    backward: Backward | None,
    inputs: Sequence[Array | None],
    rtol: float,
    atol: float,
    mode: str,
    seed: int,
) -> None:
    rtol, atol = _check.tolerance("gradcheck", "rtol", rtol), _check.tolerance("gradcheck", "atol", atol)
    op = operation(forward, backward, inputs)
    dy_seed, direction_seed = np.random.SeedSequence(seed).spawn(2)
    dy, gradients = gradients_of(op, dy_seed)
    rng = np.random.default_rng(direction_seed)
    for position, gradient in enumerate(gradients):
        if gradient is not None:
            x = _array.to_numpy(op.inputs[position])
            differences = Differences(op.function_of(position, dy.shape), x, dy)
            samples = [
                _Sample(where, float(np.vdot(gradient, v)), differences.along(v, rtol))
                for where, v in _directions(x.shape, mode, rng)
            ]
            _judge(op.names[position], samples, rtol, atol)


def _directions(shape: tuple[int, ...], mode: str, rng: np.random.Generator) -> Iterator[tuple[str, Host]]:
    """The directions in which an input is moved, each with its name for messages."""
    if mode == "full":
        for index in np.ndindex(shape):
            v = np.zeros(shape)
            v[index] = 1.0
            yield f"at {list(index)}", v
    else:
        for number in range(_DIRECTIONS):
            v = np.rint(64 * rng.standard_normal(shape)) / 64  # few bits, for x + t v to be exact
            yield f"along random direction {number}", v


class _Sample(NamedTuple):
    """One number of a gradient, as backward and as the differences have it."""

    where: str
    analytic: float
    numeric: Derivative

    @property
    def error(self) -> float:
        return abs(self.analytic - self.numeric.value)


def _judge(name: str, samples: Sequence[_Sample], rtol: float, atol: float) -> None:
    """Raise if one of the samples of an argument's gradient is wrong."""
    kinked = [s for s in samples if not s.numeric.exists]
    if kinked:
        _report_kinks(name, kinked, len(samples))
    smooth = [s for s in samples if s.numeric.exists]
    largest = max((abs(s.numeric.value) for s in smooth), default=0.0)

    def allowed(sample: _Sample) -> float:
        # 4 times, since the extrapolations that agree best agree a little by luck.
        return atol + rtol * min(sample.numeric.terms, largest) + 4 * sample.numeric.error

    wrong = [s for s in smooth if s.error > allowed(s)]
    if wrong:
        worst = min(wrong, key=lambda s: allowed(s) / s.error)
        raise GradientError(
            f"gradcheck: the gradient of {name} is wrong {worst.where}: backward gives {worst.analytic:.12g}, "
            f"differences give {worst.numeric.value:.12g}: an error of {worst.error:.2g}, where "
            f"{allowed(worst):.2g} is allowed ({len(wrong)} of {len(samples)} samples are wrong)"
        )


def _report_kinks(name: str, kinked: Sequence[_Sample], count: int) -> None:
    """Warn of points without a derivative, or raise if they are too many to leave out."""
    where, _, numeric = kinked[0]
    found = (
        f"gradcheck: y has no derivative by {name} {where}: from the left {numeric.value - numeric.jump / 2:.6g}, "
        f"from the right {numeric.value + numeric.jump / 2:.6g}, each to within {numeric.error:.1g} "
        f"({len(kinked)} of {count} samples)"
    )
    if len(kinked) > _MAX_SKIPPED * count:
        raise GradientError(f"{found}; move the inputs off the kinks, and compute all of forward in float64")
    warnings.warn(f"{found}; not compared", KinkWarning, stacklevel=5)  # the caller of gradcheck or check_vjp
