"""gradcheck at rtol 1e-7 for every functional op, axis and option, and for every layer, in float64.

On NumPy arrays the ops are checked element by element; layers, ranks and the other libraries along random directions,
which takes a tenth of the time. KinkWarning is an error here, as every warning is: a case of add + ReLU that comes
near the kink fails.
"""

from __future__ import annotations

import inspect
import itertools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed import SELF
from arraynorm.testing import gradcheck, run_ranks
from namespaces import Namespace

Case = dict[str, Any]

RTOL = 1e-7
EPS = (1e-5, 1e-2, 0.0)
DATA = ((0.3, 1.0), (1e3, 1.0), (-2.0, 2e-3))
"""(mean, std) of x: |mean / std| up to 1e3."""
AFFINE = ((), ("weight",), ("bias",), ("weight", "bias"))
ADDED = ((), ("weight",), ("bias",), ("addend",), ("addend", "weight", "bias"))
SHAPES = ((6, 3), (2, 3, 4), (2, 3, 1, 3), (2, 3, 2, 1, 2))
# channels that can be grouped on most axes; never two values to a group, whose x_hat is +-1 whatever x is
GROUPED = ((3, 6), (2, 4, 5), (2, 6, 1, 3), (1, 4, 1, 2, 3))


class Op(NamedTuple):
    """A norm's options, of which the cases are made, and what the op is called with."""

    options: dict[str, tuple[Any, ...]]
    arguments: Callable[[Case, np.random.Generator], dict[str, Any]]
    """What is no input to differentiate: settings, and given statistics."""
    sizes: Callable[[Case], tuple[int, ...]]
    """The shape of weight and bias."""
    allowed: Callable[[Case], bool]


def channels(case: Case) -> tuple[int, ...]:
    return (case["shape"][case["axis"]],)


def normalized(case: Case) -> tuple[int, ...]:
    return tuple(case["shape"][-case["normalized_ndim"] :])


def on_axis(case: Case, rng: np.random.Generator) -> dict[str, Any]:
    return {name: case[name] for name in ("axis", "eps", "num_groups") if name in case}


def on_axis_with_statistics(case: Case, rng: np.random.Generator) -> dict[str, Any]:
    (mean, std), sizes = case["data"], channels(case)
    statistics = {"mean": mean + std * rng.normal(size=sizes), "var": std**2 * rng.uniform(0.5, 2, sizes)}
    return statistics | on_axis(case, rng)


def on_last_dimensions(case: Case, rng: np.random.Generator) -> dict[str, Any]:
    shape = normalized(case)
    return {"normalized_shape": shape[0] if case["as_int"] else shape, "eps": case["eps"]}


def has_axis(case: Case) -> bool:
    return case["axis"] < len(case["shape"])


def is_grouped(case: Case) -> bool:
    if not has_axis(case) or channels(case)[0] % case["num_groups"]:
        return False
    values = np.prod(case["shape"][1:]) // case["num_groups"]
    return bool(values > 2 or (values == 1 and case["eps"]))


def has_rows(case: Case) -> bool:
    return len(case["shape"]) >= case["normalized_ndim"] and (case["normalized_ndim"] == 1 or not case["as_int"])


COMMON = {"shape": SHAPES, "given": AFFINE, "eps": EPS, "data": DATA}
ANY_AXIS = {"axis": (0, 1, 2, -1)}
LATER_AXIS = {"axis": (1, 2, -1)}
ROWS = {"normalized_ndim": (1, 2, 3), "as_int": (False, True)}
OPS = {
    "batch_norm": Op(COMMON | ANY_AXIS, on_axis, channels, has_axis),
    "batch_norm_frozen": Op(COMMON | ANY_AXIS, on_axis_with_statistics, channels, has_axis),
    "batch_norm_add_relu": Op(COMMON | ANY_AXIS | {"given": ADDED}, on_axis, channels, has_axis),
    "batch_norm_add_relu_frozen": Op(COMMON | ANY_AXIS | {"given": ADDED}, on_axis_with_statistics, channels, has_axis),
    "instance_norm": Op(COMMON | LATER_AXIS | {"shape": SHAPES[1:]}, on_axis, channels, has_axis),
    "group_norm": Op(
        COMMON | LATER_AXIS | {"shape": GROUPED, "num_groups": (1, 2, 3, 4, 6)}, on_axis, channels, is_grouped
    ),
    "layer_norm": Op(COMMON | ROWS, on_last_dimensions, normalized, has_rows),
    "rms_norm": Op(
        COMMON | ROWS | {"given": ((), ("weight",)), "eps": (None, *EPS)}, on_last_dimensions, normalized, has_rows
    ),
}


def pairwise(op: Op) -> list[Case]:
    """Cases in which every two values of different options meet, chosen greedily from the product of all options."""
    product = [dict(zip(op.options, values, strict=True)) for values in itertools.product(*op.options.values())]
    pairs = [(case, set(itertools.combinations(case.items(), 2))) for case in product if op.allowed(case)]
    open_pairs = set().union(*(met for _, met in pairs))
    chosen = []
    while open_pairs:
        case, met = max(pairs, key=lambda pair: len(pair[1] & open_pairs))
        open_pairs -= met
        chosen.append(case)
    return chosen


def named(name: str, case: Case) -> Any:
    words = ["x".join(map(str, case["shape"])), "+".join(case["given"]) or "plain"]
    words += [f"{key}={value}" for key, value in case.items() if key not in ("shape", "given")]
    return pytest.param(name, case, id=f"{name}: {', '.join(words).replace(' ', '')}")


CASES = [named(name, case) for name, op in OPS.items() for case in pairwise(op)]


def seeded(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def away_from_kink(draw: Callable[[], Any], before_relu: Callable[[Any], np.ndarray[Any, Any]]) -> Any:
    """The first draw in which no value before the ReLU is near 0 on their own scale."""
    for _ in range(10_000):
        drawn = draw()
        values = before_relu(drawn)
        if abs(values).min() > 0.05 * values.std():
            return drawn
    raise AssertionError("no draw stays away from the kink")


def inputs_of(case: Case, op: Op, rng: np.random.Generator) -> dict[str, np.ndarray[Any, Any]]:
    mean, std = case["data"]
    sizes = {"x": case["shape"], "addend": case["shape"], "weight": op.sizes(case), "bias": op.sizes(case)}
    drawn = {key: rng.normal(size=sizes[key]) for key in ("x", *case["given"])}
    return drawn | {"x": mean + std * drawn["x"]}


@pytest.mark.parametrize(("name", "case"), CASES)
def test_the_backward_of_every_op_has_the_gradients_of_its_forward(name: str, case: Case, xp: Namespace) -> None:
    op, rng = OPS[name], seeded(name, case)
    settings = op.arguments(case, rng)

    def before_relu(inputs: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        normed = {key: value for key, value in inputs.items() if key != "addend"}
        y = getattr(an, name.replace("_add_relu", ""))(**normed, **settings)
        return np.asarray(y + inputs.get("addend", 0.0))

    if "relu" in name:
        inputs = away_from_kink(lambda: inputs_of(case, op, rng), before_relu)
    else:
        inputs = inputs_of(case, op, rng)
    arrays = {key: xp.asarray(value) for key, value in inputs.items()}
    settings = {key: xp.asarray(v) if isinstance(v, np.ndarray) else v for key, v in settings.items()}
    op_forward, op_backward = getattr(an, f"{name}_forward"), getattr(an, f"{name}_backward")
    order = [key for key in inspect.signature(op_forward).parameters if key in ("x", "addend", "weight", "bias")]

    def forward(*values: Any) -> Any:
        return op_forward(**settings, **dict(zip(order, values, strict=True)))

    mode = "full" if xp.name == "numpy" else "directional"
    gradcheck(forward, op_backward, [arrays.get(key) for key in order], rtol=RTOL, mode=mode)


# -- over ranks ------------------------------------------------------------------------------------------------

SHARDED = [
    pytest.param(name, counts, axis, given, id=f"{name} over {counts}, axis {axis}, {'+'.join(given) or 'plain'}")
    for name in ("batch_norm", "batch_norm_add_relu")
    for counts, axis, given in (
        ((2, 4), 1, ("weight", "bias")),
        ((3, 1, 2), -1, ("weight",)),
        ((1, 0, 4), 2, ("bias",)),
    )
]


@pytest.mark.parametrize(("name", "counts", "axis", "given"), SHARDED)
def test_over_ranks_the_gradients_are_those_of_the_sum_of_all_losses(
    name: str, counts: tuple[int, ...], axis: int, given: tuple[str, ...], xp: Namespace
) -> None:
    rng = seeded(name, counts, axis)

    def draw() -> dict[str, np.ndarray[Any, Any]]:
        return {"x": rng.normal(30, 1, (sum(counts), 3, 2)), **{k: rng.normal(size=(6, 3, 2)[axis]) for k in given}}

    inputs = away_from_kink(draw, lambda drawn: an.batch_norm(**drawn, axis=axis))
    shards = [xp.asarray(s) for s in np.split(inputs["x"], np.cumsum(counts)[:-1])]
    parameters = [xp.asarray(inputs[key]) if key in inputs else None for key in ("weight", "bias")]

    def forward(*values: Any) -> Any:
        *xs, weight, bias = values

        def rank(comm: Any) -> Any:
            return getattr(an, f"{name}_forward")(xs[comm.rank], weight=weight, bias=bias, axis=axis, comm=comm)

        ys, caches = zip(*run_ranks(len(counts), rank), strict=True)
        return xp.module.concat(ys), caches

    def backward(dy: Any, caches: Any) -> Any:
        starts = np.cumsum((0, *counts))
        dys = [dy[int(a) : int(b), ...] for a, b in itertools.pairwise(starts)]

        def rank(comm: Any) -> Any:
            return getattr(an, f"{name}_backward")(dys[comm.rank], caches[comm.rank]._replace(comm=comm))

        found = run_ranks(len(counts), rank)
        # a parameter's gradients are the ranks' own sums, which data-parallel training adds
        totals = [None if g[0] is None else sum(g[1:], g[0]) for g in zip(*(f[-2:] for f in found), strict=True)]
        return (*(gradients.dx for gradients in found), *totals)

    gradcheck(forward, backward, (*shards, *parameters), rtol=RTOL, mode="directional")


# -- layers ----------------------------------------------------------------------------------------------------


class LayerCase(NamedTuple):
    """A layer and the shapes of its inputs (x, or x and addend)."""

    cls: str
    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]


LAYERS = [
    LayerCase("BatchNorm", (3,), {}, ((2, 3, 1, 2, 1, 2),)),
    LayerCase("BatchNorm", (4,), {"axis": 0, "eps": 0.0, "bias": False}, ((4, 5),)),
    LayerCase("BatchNorm1d", (3,), {}, ((7, 3),)),
    LayerCase("BatchNorm1d", (3, 1e-2, None), {}, ((4, 3, 5),)),
    LayerCase("BatchNorm2d", (3,), {"affine": False}, ((2, 3, 2, 3),)),
    LayerCase("BatchNorm2d", (3,), {"axis": -1, "track_running_stats": False}, ((2, 2, 2, 3),)),
    LayerCase("BatchNorm3d", (3,), {}, ((2, 3, 2, 1, 3),)),
    LayerCase("SyncBatchNorm", (3,), {"comm": SELF}, ((5, 3, 2),)),
    LayerCase("FusedBatchNorm", (3,), {"axis": -1}, ((5, 2, 3), (5, 2, 3))),
    LayerCase("FusedBatchNorm1d", (3,), {}, ((7, 3),)),
    LayerCase("FusedBatchNorm2d", (3,), {"affine": False}, ((2, 3, 2, 3), (2, 3, 2, 3))),
    LayerCase("FusedBatchNorm2d", (3,), {"bias": False, "track_running_stats": False}, ((2, 3, 2, 3),)),
    LayerCase("FusedBatchNorm3d", (3,), {}, ((2, 3, 2, 1, 3), (2, 3, 2, 1, 3))),
    LayerCase("InstanceNorm1d", (3,), {}, ((2, 3, 5),)),
    LayerCase("InstanceNorm1d", (3,), {"affine": True, "track_running_stats": True}, ((3, 5),)),
    LayerCase("InstanceNorm2d", (3,), {"affine": True, "axis": -1}, ((2, 3, 2, 3),)),
    LayerCase("InstanceNorm3d", (3,), {"affine": True, "bias": False, "track_running_stats": True}, ((2, 3, 2, 2, 1),)),
    LayerCase("GroupNorm", (2, 6), {}, ((2, 6, 3),)),
    LayerCase("GroupNorm", (3, 6, 1e-2), {"axis": -1, "bias": False}, ((2, 2, 6),)),
    LayerCase("GroupNorm", (1, 4), {"affine": False}, ((3, 4),)),
    LayerCase("LayerNorm", (5,), {}, ((3, 5),)),
    LayerCase("LayerNorm", ((3, 4),), {"bias": False}, ((2, 3, 4),)),
    LayerCase("LayerNorm", ((2, 3, 2), 1e-2, False), {}, ((2, 2, 3, 2),)),
    LayerCase("RMSNorm", (5,), {}, ((3, 5),)),
    LayerCase("RMSNorm", ((3, 4), 1e-2), {"elementwise_affine": False}, ((2, 3, 4),)),
]


def words(case: LayerCase) -> str:
    settings = [*map(str, case.positional), *(f"{key}={value}" for key, value in case.keywords.items())]
    return f"{case.cls}({', '.join(settings)}) of {' and '.join('x'.join(map(str, s)) for s in case.shapes)}"


def built(case: LayerCase, xp: Namespace, rng: np.random.Generator) -> Any:
    """The layer in float64, with parameters and running statistics that are not those of a new one."""
    layer = getattr(an, case.cls)(*case.positional, **case.keywords, xp=xp.module, dtype=xp.dtype("float64"))
    for name, array in layer.state_dict().items():
        if name != "num_batches_tracked":
            setattr(layer, name, xp.asarray(rng.uniform(0.5, 2.0, array.shape)))
    return layer


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", LAYERS, ids=words)
def test_every_layer_has_the_gradients_of_its_forward(case: LayerCase, training: bool, xp: Namespace) -> None:
    rng = seeded(case[:2], case.shapes)
    layer = built(case, xp, rng).train(training)

    def before_relu(inputs: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        keywords = {key: value for key, value in case.keywords.items() if key != "comm"}
        plain = an.BatchNorm(*case.positional, **keywords, dtype=np.float64).train(training)
        plain.load_state_dict(layer.state_dict())
        return np.asarray(sum(inputs[1:], plain(inputs[0])))

    def draw() -> list[np.ndarray[Any, Any]]:
        return [rng.normal(0.7, 1.5, shape) for shape in case.shapes]

    inputs = away_from_kink(draw, before_relu) if case.cls.startswith("Fused") else draw()
    gradcheck(layer, inputs=[xp.asarray(value) for value in inputs], rtol=RTOL, mode="directional")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_sequence_of_layers_has_the_gradients_of_its_forward(training: bool, xp: Namespace) -> None:
    rng = seeded("sequence")
    cases = [LAYERS[i] for i in (3, 13, 17)]
    layers = [built(LayerCase(c.cls, (3,) if c.cls != "GroupNorm" else (1, 3), {}, ()), xp, rng) for c in cases]
    layer = an.Sequential(*layers).train(training)
    gradcheck(layer, inputs=[xp.asarray(rng.normal(size=(3, 3, 4)))], rtol=RTOL, mode="directional")


def test_every_differentiable_layer_is_among_the_cases() -> None:
    layers = {
        name
        for name in an.layers.__all__
        if isinstance(cls := getattr(an, name), type) and cls.backward is not an.Module.backward
    }
    without = {name for name in layers if name.startswith("Quantized")}  # rounding to 8 bits has no gradient
    assert layers - without - {"Sequential"} == {case.cls for case in LAYERS}


def test_every_differentiable_op_is_among_the_cases() -> None:
    suffix = "_backward"
    assert {name.removesuffix(suffix) for name in an.functional.__all__ if name.endswith(suffix)} == set(OPS)
