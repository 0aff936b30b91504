"""Hypothesis strategies for parity cases: shapes, axes and options that the grid does not have."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from parity.cases import STEPS, LayerCase, OpCase
from parity.grid import DTYPES, HALF_DTYPES

_RANKS = {"1d": (2, 3), "2d": (4,), "3d": (5,)}


@st.composite
def ops(draw: st.DrawFn, target: str) -> OpCase:
    """A call of the functional op `target`."""
    dtype = draw(st.sampled_from((*DTYPES, *HALF_DTYPES)))
    options: dict[str, Any] = {}
    if target in ("layer_norm", "rms_norm"):
        shape = draw(_shapes(1, 5))
        split = draw(st.integers(0, len(shape) - 1))
        options |= {"normalized_shape": shape[split:], "eps": draw(_EPS)}
    else:
        shape = draw(_shapes(3 if target == "instance_norm" else 2, 5))
        first = 1 if target in ("group_norm", "instance_norm") else 0
        axis = draw(st.integers(first, len(shape) - 1))
        if target == "group_norm":
            groups = [groups for groups in range(1, shape[axis] + 1) if shape[axis] % groups == 0]
            options["num_groups"] = draw(st.sampled_from(groups))
            set_size = math.prod(shape[1:]) // options["num_groups"]
        else:
            set_size = math.prod(shape[first:]) // shape[axis]
        if set_size == 1 and not target.endswith("frozen"):  # refused by torch
            shape = (*shape, 2)
        options |= {"axis": axis - draw(st.sampled_from((0, len(shape)))), "eps": draw(_EPS)}
    names = ["weight"] + ["bias"] * (target != "rms_norm") + ["addend"] * ("relu" in target)
    given = tuple(name for name in names if draw(st.booleans()))
    return OpCase(target, shape, tuple(options.items()), given, dtype, draw(_MOMENTA), draw(_means_over_std(dtype)))


@st.composite
def layers(draw: st.DrawFn, target: str) -> LayerCase:
    """Three steps of the layer `target`."""
    shape, options = draw(_rows() if target in ("LayerNorm", "RMSNorm") else _channels(target))
    if target != "RMSNorm":
        options["bias"] = draw(st.booleans())
    changed: dict[str, Any] = {}
    if "num_features" in options:
        # torch's instance norm does not count, and so has no momentum=None
        is_instance_norm = target.startswith("InstanceNorm")
        momenta = _MOMENTA if is_instance_norm else st.none() | _MOMENTA
        options |= {"momentum": draw(momenta), "track_running_stats": draw(st.booleans())}
        optional: dict[str, Any] = {"momentum": momenta, "eps": _EPS, "affine": st.booleans()}
        if options["track_running_stats"] and not is_instance_norm:
            optional["track_running_stats"] = st.booleans()
        changed = draw(st.fixed_dictionaries({}, optional=optional))
    return LayerCase(
        target,
        shape,
        tuple(options.items()),
        dtype := draw(st.sampled_from(DTYPES)),
        "".join(draw(st.tuples(*[st.sampled_from("te")] * STEPS))),
        tuple(changed.items()),
        target.startswith("Fused") and draw(st.booleans()),
        draw(_means_over_std(dtype)),
    )


@st.composite
def _rows(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The shape and options of a layer over the last dimensions."""
    shape = draw(_shapes(1, 5))
    normalized = shape[draw(st.integers(0, len(shape) - 1)) :]
    return shape, {"normalized_shape": normalized, "eps": draw(_EPS), "elementwise_affine": draw(st.booleans())}


@st.composite
def _channels(draw: st.DrawFn, target: str) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The shape and options of a layer with channels; every set has two values at least."""
    first = 1 if target.startswith(("InstanceNorm", "GroupNorm")) else 0
    ranks = [rank for rank in _RANKS.get(target[-2:], (2, 3, 4, 5)) if rank > 2 or target[:8] != "Instance"]
    shape = draw(st.sampled_from(ranks).flatmap(lambda rank: _shapes(rank, rank, least=2)))
    axis = draw(st.integers(first, len(shape) - 1))
    options: dict[str, Any] = {"axis": axis, "eps": draw(_EPS), "affine": draw(st.booleans())}
    if target != "GroupNorm":
        return shape, options | {"num_features": shape[axis]}
    groups = draw(st.sampled_from([groups for groups in range(1, shape[axis]) if shape[axis] % groups == 0]))
    return shape, options | {"num_groups": groups, "num_channels": shape[axis]}


_EPS = st.sampled_from((1e-5, 1e-3, 0.1, 1.0))
_MOMENTA = st.integers(0, 20).map(lambda number: number / 20)


def _shapes(least_rank: int, most_rank: int, *, least: int = 1) -> st.SearchStrategy[tuple[int, ...]]:
    sizes = st.lists(st.integers(least, 7), min_size=least_rank, max_size=most_rank)
    return sizes.filter(lambda shape: math.prod(shape) <= 1500).map(tuple)


def _means_over_std(dtype: str) -> st.SearchStrategy[float]:
    return st.sampled_from((0.0, 0.5, 10.0) if dtype in HALF_DTYPES else (0.0, 0.5, 10.0, 1e4))
