"""The table of parity cases: shapes times options for every functional op and every layer."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from parity.cases import Case, LayerCase, OpCase, QuantizedCase

C = TypeVar("C", bound=Case)

DTYPES = ("float64", "float32")
HALF_DTYPES = ("float16", "bfloat16")

# The sizes break vector widths, and every rank a layer takes is there.
_SHAPES = ((5, 3), (33, 2), (4, 3, 7), (2, 5, 3, 3), (3, 1, 31, 2), (2, 2, 2, 3, 2))
_AFFINE = ((), ("weight",), ("bias",), ("weight", "bias"))


def _options(**choices: Sequence[Any]) -> Iterator[tuple[tuple[str, Any], ...]]:
    """Every combination of the options' values."""
    for values in itertools.product(*choices.values()):
        yield tuple(zip(choices, values, strict=True))


# -- functional ops --------------------------------------------------------------------------------------------


def _ops(dtypes: Sequence[str]) -> Iterator[OpCase]:
    batch_norms = ("batch_norm", "batch_norm_frozen")
    fused = ("batch_norm_add_relu", "batch_norm_add_relu_frozen")
    for dtype, shape, given in itertools.product(dtypes, _SHAPES, _AFFINE):
        for options in _options(axis=(0, 1, -1), eps=(1e-5, 1e-2)):
            yield from (OpCase(op, shape, options, given, dtype) for op in batch_norms)
            yield OpCase(fused[0], shape, options, given, dtype)
            yield from (OpCase(op, shape, options, (*given, "addend"), dtype) for op in fused)
    for dtype, shape, given in itertools.product(dtypes, _SHAPES[2:], _AFFINE):
        for options in _options(axis=(1, -1), eps=(1e-5, 1e-2)):
            yield OpCase("instance_norm", shape, options, given, dtype)
    for dtype, shape, given in itertools.product(dtypes, ((3, 6), (2, 6, 5), (1, 4, 3, 5), (2, 2, 6)), _AFFINE):
        for axis in (1, -1):
            channels = shape[axis]
            for groups in (g for g in (1, 2, 3, 6) if channels % g == 0 and _group_size(shape, g) > 1):
                yield OpCase("group_norm", shape, (("num_groups", groups), ("axis", axis)), given, dtype)
    for dtype, shape, split in itertools.product(dtypes, _SHAPES, (1, 2, 3)):
        if split < len(shape) or split == 2:  # the whole of a 2-D input, too
            normalized = ("normalized_shape", shape[-split:])
            for given in _AFFINE:
                yield OpCase("layer_norm", shape, (normalized,), given, dtype)
            for eps, given in itertools.product((None, 1e-5), ((), ("weight",))):
                yield OpCase("rms_norm", shape, (normalized, ("eps", eps)), given, dtype)


def _group_size(shape: tuple[int, ...], groups: int) -> int:
    return math.prod(shape[1:]) // groups


# -- layers ----------------------------------------------------------------------------------------------------

_BATCH_NORMS = {
    "BatchNorm": ((5, 3), (2, 3, 2, 1, 2, 2)),
    "BatchNorm1d": ((5, 3), (4, 3, 7)),
    "BatchNorm2d": ((2, 3, 3, 5),),
    "BatchNorm3d": ((2, 3, 2, 3, 2),),
    "SyncBatchNorm": ((5, 3), (4, 3, 7), (2, 3, 3, 5)),
}
_FUSED = {
    "FusedBatchNorm": ((5, 3),),
    "FusedBatchNorm1d": ((6, 3), (4, 3, 7)),
    "FusedBatchNorm2d": ((2, 3, 3, 5),),
    "FusedBatchNorm3d": ((2, 3, 2, 3, 2),),
}
_INSTANCE_NORMS = {
    "InstanceNorm1d": ((4, 3, 7), (3, 7)),  # the second of each without a batch axis
    "InstanceNorm2d": ((2, 3, 3, 5), (3, 3, 5)),
    "InstanceNorm3d": ((2, 3, 2, 3, 2), (3, 2, 3, 2)),
}
_AFFINE_OPTIONS = ({"affine": True}, {"affine": True, "bias": False}, {"affine": False})
_MODES = ("ttt", "tte", "eee")


def _layers(dtypes: Sequence[str]) -> Iterator[LayerCase]:
    # torch does not count an instance norm's batches, and so has no momentum=None to compare with
    for targets, momenta in ((_BATCH_NORMS | _FUSED, (0.1, None)), (_INSTANCE_NORMS, (0.3,))):
        for target, shapes in targets.items():
            for dtype, shape, affine in itertools.product(dtypes, shapes, _AFFINE_OPTIONS):
                for options in _options(momentum=momenta, track_running_stats=(True, False)):
                    arguments = (("num_features", 3), *affine.items(), *options)
                    for modes in _MODES:
                        yield LayerCase(target, shape, arguments, dtype, modes, addend=target in _FUSED)
    for target, shapes in _FUSED.items():
        for dtype, shape, modes in itertools.product(dtypes, shapes, _MODES):
            yield LayerCase(target, shape, (("num_features", 3),), dtype, modes)  # without an addend
    for dtype, shape, affine in itertools.product(dtypes, ((3, 6), (2, 6, 5), (2, 6, 3, 2)), _AFFINE_OPTIONS):
        for groups in (1, 2, 3):
            arguments = (("num_groups", groups), ("num_channels", 6), *affine.items(), ("eps", 1e-3))
            yield LayerCase("GroupNorm", shape, arguments, dtype)
    for dtype, normalized in itertools.product(dtypes, ((5,), (3, 5))):
        shape = (4, 3, 5)
        for affine in ({}, {"bias": False}, {"elementwise_affine": False}):
            yield LayerCase("LayerNorm", shape, (("normalized_shape", normalized), *affine.items()), dtype)
        for options in _options(eps=(None, 1e-5), elementwise_affine=(True, False)):
            yield LayerCase("RMSNorm", shape, (("normalized_shape", normalized), *options), dtype)


def _changed_layers(dtypes: Sequence[str]) -> Iterator[LayerCase]:
    """Attributes changed after construction: table D of the contract, and live eps and momentum."""
    three = ("num_features", 3)
    for dtype, target, modes in itertools.product(dtypes, ("BatchNorm1d", "SyncBatchNorm", "FusedBatchNorm1d"), _MODES):
        shape = (5, 3, 4)
        for built, then in itertools.product((True, False), repeat=2):
            if target == "SyncBatchNorm" and then and not built:
                continue  # torch dies of a missing counter; `test_departures` shows it
            tracking = ("track_running_stats", built)
            yield LayerCase(target, shape, (three, tracking), dtype, modes, (("track_running_stats", then),))
        yield LayerCase(target, shape, (three,), dtype, modes, (("eps", 0.1), ("momentum", 0.7)))
        yield LayerCase(target, shape, (three,), dtype, modes, (("momentum", None),))
        yield LayerCase(target, shape, (three,), dtype, modes, (("affine", False),))
    for dtype, modes in itertools.product(dtypes, _MODES):
        shape, affine = (4, 3, 7), ("affine", True)
        yield LayerCase("InstanceNorm1d", shape, (three, affine), dtype, modes, (("eps", 0.1),))
        yield LayerCase("InstanceNorm1d", shape, (three, affine), dtype, modes, (("affine", False),))


# -- ill-conditioned ones --------------------------------------------------------------------------------------

_MEANS_OVER_STD = {"float64": (1e2, 1e4, 1e6), "float32": (1e2, 1e4, 1e6), "float16": (1e2,), "bfloat16": (1e1,)}


def _hard_ops(dtypes: Sequence[str]) -> Iterator[OpCase]:
    """Means far from 0, as far as each dtype can resolve a deviation of 1 beside them."""
    both = ("weight", "bias")
    for dtype in dtypes:
        for mean, shape in itertools.product(_MEANS_OVER_STD[dtype], ((9, 4, 6), (3, 6, 5, 4))):
            for axis in (1, -1):
                per_channel = (("axis", axis),)
                for target in ("batch_norm", "batch_norm_frozen", "instance_norm"):
                    yield OpCase(target, shape, per_channel, both, dtype, mean_over_std=mean)
                for target in ("batch_norm_add_relu", "batch_norm_add_relu_frozen"):
                    yield OpCase(target, shape, per_channel, (*both, "addend"), dtype, mean_over_std=mean)
                yield OpCase("group_norm", shape, (("num_groups", 2), *per_channel), both, dtype, mean_over_std=mean)
            for split in (1, 2):
                normalized = (("normalized_shape", shape[-split:]),)
                yield OpCase("layer_norm", shape, normalized, both, dtype, mean_over_std=mean)
                yield OpCase("rms_norm", shape, normalized, ("weight",), dtype, mean_over_std=mean)


def _hard_layers(dtypes: Sequence[str]) -> Iterator[LayerCase]:
    channels, tracking = ("num_features", 6), ("track_running_stats", True)
    for dtype in dtypes:
        for mean, modes in itertools.product(_MEANS_OVER_STD[dtype], _MODES):
            shape, given = (3, 6, 5, 4), (channels,)
            for target in ("BatchNorm2d", "SyncBatchNorm", "FusedBatchNorm2d"):
                yield LayerCase(target, shape, given, dtype, modes, mean_over_std=mean)
            yield LayerCase("InstanceNorm2d", shape, (*given, tracking), dtype, modes, mean_over_std=mean)


# -- the table -------------------------------------------------------------------------------------------------

# (x, y): y coarser than x, finer (most outputs saturate), and about equal.
SCALES = ((0.05, 0.11), (0.1, 0.03), (0.02, 0.021))
_QUANTIZED_OPS = ("quantized_batch_norm", "quantized_batch_norm_relu")
_QUANTIZED_LAYERS = ("QuantizedBatchNorm2d", "QuantizedBatchNorm3d", "QuantizedBNReLU2d", "QuantizedBNReLU3d")


def quantized(channels: int) -> tuple[QuantizedCase, ...]:
    """Every op and layer, dtype and pair of scales; the ops in both layouts."""
    targets = [(op, axis) for op in _QUANTIZED_OPS for axis in (1, -1)] + [(layer, 1) for layer in _QUANTIZED_LAYERS]
    return tuple(
        QuantizedCase(target, channels, dtype, scales, axis)
        for (target, axis), dtype, scales in itertools.product(targets, ("uint8", "int8"), SCALES)
    )


def _sample(cases: Iterable[C], every: int) -> Iterator[C]:
    """Each `every`-th case of each target and dtype, the first included."""
    seen: Counter[tuple[str, str]] = Counter()
    for case in cases:
        if seen[case.target, case.dtype] % every == 0:
            yield case
        seen[case.target, case.dtype] += 1


OPS = (*_ops(DTYPES), *_hard_ops(DTYPES), *_sample(_ops(HALF_DTYPES), 3), *_hard_ops(HALF_DTYPES))
LAYERS = (*_layers(DTYPES), *_changed_layers(DTYPES), *_hard_layers(DTYPES))


def traits(case: Case) -> set[tuple[str, Any]]:
    """What of a case the grid varies."""
    if isinstance(case, QuantizedCase):
        return {("dtype", case.dtype), ("scales", case.scales), ("axis", case.axis)}
    words = {("dtype", case.dtype), ("ndim", len(case.shape)), ("mean over std", case.mean_over_std), *case.options}
    if isinstance(case, OpCase):
        return words | {("given", case.given)}
    return words | {("modes", case.modes), ("addend", case.addend), *(("then", change) for change in case.changed)}


def _covering(cases: Iterable[C], every: int) -> Iterator[C]:
    """Each `every`-th case of each target and dtype, and what else it takes that no trait of a target is left out."""
    cases, seen = tuple(cases), set[tuple[str, Any]]()
    chosen = set(_sample(cases, every))
    for case in sorted(cases, key=lambda case: case not in chosen):  # stable: the chosen ones first
        new = {(case.target, trait) for trait in traits(case)} - seen
        if case in chosen or new:
            yield case
        seen |= new


# What fits in 1 MB, with strides that share no factor with the numbers of options.
RECORDED: tuple[Case, ...] = (*_covering(OPS, 7), *_covering(LAYERS, 5), *quantized(channels=4))


def by_target(cases: Iterable[C]) -> dict[str, list[C]]:
    groups: dict[str, list[C]] = {}
    for case in cases:
        groups.setdefault(case.target, []).append(case)
    return groups
