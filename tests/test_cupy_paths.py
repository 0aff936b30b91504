"""The paths of CuPy arrays, all of them but the device: dispatch, kernels, moves and training, on an imitation.

On a device tests/gpu and the suite over the cupy namespace show the same (make gpu).
"""

from __future__ import annotations

import copy
import importlib.util
import json
import platform
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import arraynorm as an
from arraynorm.kernels import only
from arraynorm.kernels.cuda import _loader
from cuda.examples import RUNS
from imitated_cupy import imitated_cupy, launched
from imitated_cupy import ndarray as cupy_array
from norms import backward, forward

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not shutil.which("g++"),
    reason="the CUDA emulator needs g++ on x86-64",
)

EXAMPLES = Path(__file__).parents[1] / "examples"
PACKED = [run for run in RUNS["float32"]("float32") if run.device == "large" and run.layout == "contiguous"]


@pytest.fixture
def cupy():
    with imitated_cupy() as found:
        yield found


def held(layer: an.Module) -> list:
    return [*layer.parameters(), *layer.buffers(), *(g for g in layer.grads.values() if g is not None)]


@pytest.mark.parametrize("run", PACKED, ids=str)
def test_a_public_op_takes_cupy_arrays_through_the_cuda_kernels(cupy, run):
    """With `only("specialised")`: what the reference would do raises."""
    host, host_dy = run.arrays("float32")
    wanted, host_cache = forward(run.example, host)
    gradients = backward(run.example, host_dy, host_cache)
    given, dy = {name: cupy.asarray(array) for name, array in host.items()}, cupy.asarray(host_dy)
    with only("specialised"):
        y, cache = forward(run.example, given)
        found = backward(run.example, dy, cache)
    assert launched
    for ours, expected in zip((y, *found), (wanted, *gradients), strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            assert isinstance(ours, cupy_array)
            scale = 1 + np.abs(expected).max()
            np.testing.assert_allclose(ours.get(), expected, rtol=0, atol=4e-7 * scale)  # float32, rounded once each


@pytest.mark.parametrize("run", PACKED, ids=str)
def test_an_op_never_waits_for_the_device(cupy, run, monkeypatch):
    """Nothing is read back, or else it could not be captured in a graph."""
    host, host_dy = run.arrays("float32")
    given, dy = {name: cupy.asarray(array) for name, array in host.items()}, cupy.asarray(host_dy)

    def refuse(*_):
        raise AssertionError("an element was read")

    for name in ("get", "__float__", "__int__", "__bool__", "__index__"):
        monkeypatch.setattr(cupy_array, name, refuse)
    _, cache = forward(run.example, given)
    backward(run.example, dy, cache)
    assert launched


def test_work_goes_to_the_device_of_x(cupy):
    with cupy.cuda.Device(1):
        x = cupy.asarray(np.random.default_rng(0).standard_normal((4, 3)))
    y, cache = an.batch_norm_forward(x)
    dx = an.batch_norm_backward(x, cache).dx
    assert {number for _, number in launched} == {1}
    assert {a.device.id for a in (y, dx, cache.mean, cache.rstd)} == {1}


def test_arrays_of_host_and_device_are_not_mixed(cupy):
    x = cupy.asarray(np.ones((4, 3)))
    with pytest.raises(TypeError, match="weight"):
        an.batch_norm(x, np.ones(3))
    with pytest.raises(TypeError, match="x"):
        an.BatchNorm1d(3)(x)
    y, cache = an.batch_norm_forward(x)
    with pytest.raises(TypeError, match="dy"):
        an.batch_norm_backward(y.get(), cache)


LAYERS = [
    (an.BatchNorm2d(4), (3, 4, 5, 2)),
    (an.FusedBatchNorm2d(4), (3, 4, 5, 2)),
    (an.InstanceNorm2d(4, affine=True, track_running_stats=True), (3, 4, 5, 2)),
    (an.GroupNorm(2, 4), (3, 4, 5, 2)),
    (an.LayerNorm(6), (5, 6)),
    (an.RMSNorm(6), (5, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: type(value).__name__)
def test_a_layer_trains_on_the_device_and_comes_back(cupy, layer, shape):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, *shape), dtype=np.float32)
    host, moved = copy.deepcopy(layer), copy.deepcopy(layer)
    assert moved.cuda() is moved
    assert all(isinstance(array, cupy_array) for array in held(moved))
    wanted, y = host(x), moved(cupy.asarray(x))
    expected, found = host.backward(dy), moved.backward(cupy.asarray(dy))
    assert all(isinstance(array, cupy_array) for array in held(moved))
    assert launched
    pairs = [(y, wanted)]
    pairs += zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    assert moved.cpu() is moved
    assert all(isinstance(array, np.ndarray) for array in held(moved))
    pairs += zip(held(moved), held(host), strict=True)
    for ours, theirs in pairs:
        ours = ours if ours is None or isinstance(ours, np.ndarray) else ours.get()
        if theirs is not None:
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)  # a few ulp of float32


def test_a_layer_moves_from_device_to_device(cupy):
    layer = an.BatchNorm1d(3).cuda(1)
    assert {array.device.id for array in held(layer)} == {1}
    assert {array.device.id for array in held(layer.cuda())} == {1}, "on a device already"
    assert {array.device.id for array in held(layer.cuda(0))} == {0}
    assert {array.device.id for array in held(layer.to(cupy.cuda.Device(1)))} == {1}
    assert {type(array) for array in held(layer.to(np))} == {np.ndarray}
    assert {type(array) for array in held(layer.to(cupy))} == {cupy_array}
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        layer.cuda(7)


def test_a_state_of_the_device_loads_on_the_host_and_the_other_way_round(cupy):
    layer, other = an.BatchNorm1d(3).cuda(), an.BatchNorm1d(3)
    layer(cupy.asarray(np.random.default_rng(0).standard_normal((7, 3), dtype=np.float32)))
    other.load_state_dict({name: value.get() for name, value in layer.state_dict().items()})
    assert other.running_mean.tobytes() == layer.running_mean.get().tobytes()
    fresh = an.BatchNorm1d(3).cuda()
    fresh.load_state_dict({name: cupy.asarray(value) for name, value in other.state_dict().items()})
    assert isinstance(fresh.running_mean, cupy_array)
    assert fresh.running_mean.get().tobytes() == other.running_mean.tobytes()


def test_a_cache_moves_to_the_host_for_its_backward(cupy):
    x, dy = np.random.default_rng(0).standard_normal((2, 5, 6), dtype=np.float32)
    _, cache = an.layer_norm_forward(cupy.asarray(x), 6)
    found = an.layer_norm_backward(dy, cache.to(np))
    wanted = an.layer_norm_backward(cupy.asarray(dy), cache)
    for ours, theirs in zip(found, wanted, strict=True):
        if ours is not None:
            np.testing.assert_allclose(ours, theirs.get(), rtol=1e-6, atol=1e-6)  # a few ulp of float32


def test_the_demo_trains_on_the_device(cupy, monkeypatch):
    """Its own layers are NumPy calls that CuPy takes over; a setting learns there what it learns on the host."""
    monkeypatch.syspath_prepend(EXAMPLES)
    digits = importlib.import_module("digits")
    data = digits.load_data(0)
    few = digits.Data(*(part[:96] for part in data))
    for norm in ("batch", "layer", "group"):
        host, device = (digits.train(norm, 0.1, 1.0, few, 1, 0, library) for library in (np, cupy))
        assert launched
        assert device.curve == pytest.approx(host.curve, abs=3)  # 3 of 96 scans: rounding differs from step to step
        launched.clear()


def test_the_demo_says_what_is_missing_for_the_device(monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    digits = importlib.import_module("digits")
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr("sys.argv", ["digits.py", "--cupy"])
    with pytest.raises(SystemExit) as ended:
        digits.main()
    assert ended.value.code == 2
    assert "--cupy: CuPy is not installed; pip install arraynorm[cuda13]" in capsys.readouterr().err


# -- the programs for a GPU ------------------------------------------------------------------------------------

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    """benchmarks/bench_cuda.py, with a small case of each op."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found, device = importlib.import_module("bench_cuda"), importlib.import_module("cuda_device")
    small = {"batch_norm": (2, 4, 4, 4), "group_norm": (2, 32, 8), "instance_norm": (2, 4, 4, 4)}
    cases = [
        *(found.Case(op, (5, 64), {"normalized_shape": 64}) for op in ("layer_norm", "rms_norm")),
        *(found.Case(op, shape, {"num_groups": 32} if op == "group_norm" else {}) for op, shape in small.items()),
        found.Case("batch_norm", (2, 4, 4, 8), {"axis": -1}),
    ]
    assert {case.op for case in cases} == {case.op for case in found.CASES}
    monkeypatch.setattr(found, "CASES", cases)
    monkeypatch.setattr(found, "DTYPES", ("float32", "float16"))
    monkeypatch.setattr(device, "CALLS", 1)
    yield found
    for name in ("bench_cuda", "cuda_device"):
        del sys.modules[name]


def test_the_benchmark_leaves_a_record_of_every_case(cupy, bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "copy_bandwidth", lambda *_: 1e9)
    monkeypatch.setattr(bench, "_torch", lambda: None)
    monkeypatch.setattr(sys, "argv", ["bench_cuda.py", "--json", str(tmp_path / "record.json"), "--turns", "1"])
    bench.main()
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["device"], record["copy GB/s"]) == ("An imitation", 1)
    assert record["sources"] == _loader.source_hashes()
    assert len(record["rows"]) == 2 * len(bench.CASES) * len(bench.DTYPES)
    assert all(row["ours us"] > 0 and row["fraction of copy"] > 0 for row in record["rows"])
    row = record["rows"][0]
    assert (row["op"], row["way"], row["dtype"]) == ("layer_norm", "forward", "float32")
    assert row["model bytes"] == 2 * 5 * 64 * 4, "read once, written once"


@pytest.mark.parity
def test_the_benchmark_has_torch_compute_the_same(cupy, bench):
    """On the CPU: the forward and the gradients that are timed against ours are those of the same op."""
    torch = pytest.importorskip("torch", reason="needs torch")
    for case in bench.CASES:
        arrays = bench.draw(cupy, case, "float32")
        host = bench.Arrays(*(array.get() for array in arrays))
        mine, theirs = bench.ours(case, arrays), bench.torchs(torch, case, host, True)
        y, wanted = mine["forward"]()[0].get(), theirs["forward"]().numpy()
        found, expected = [a.get() for a in mine["backward"]() if a is not None], theirs["backward"]()
        expected = [tensor.numpy() for tensor in expected]
        if case.options.get("axis") == -1:
            wanted, expected[0] = (np.moveaxis(a, 1, -1) for a in (wanted, expected[0]))
        assert len(found) == len(expected)
        for ours, others in zip((y, *found), (wanted, *expected), strict=True):
            np.testing.assert_allclose(ours, others, rtol=1e-4, atol=1e-4)  # torch's sums are float32


@pytest.fixture
def gpu(cupy, monkeypatch, tmp_path):
    """benchmarks/gpu.py, with what the programs that it starts would print."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("gpu_program", BENCHMARKS / "gpu.py")  # tests/gpu has the name gpu
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    programs = {
        "pytest": (1, "FAILED a.py::test[cupy] - no\n2 failed in a sentence\n1 failed, 7 passed, 2 skipped in 3.00s\n"),
        "memcheck": (0, "8 runs\n========= ERROR SUMMARY: 0 errors\n"),
        "racecheck": (1, "========= RACECHECK SUMMARY: 1 hazard displayed\n"),
        "initcheck": (0, "========= ERROR SUMMARY: 0 errors\n"),
        "synccheck": (0, "========= ERROR SUMMARY: 0 errors\n"),
    }

    def run(command, folder, seconds=None):
        if "--json" in command:
            Path(command[-1]).write_text(json.dumps({"copy GB/s": 4000, "rows": [1, 2]}))
            return 0, ""
        return next(said for word, said in programs.items() if word in command)

    monkeypatch.setattr(found, "_run", run)
    monkeypatch.setattr(found.shutil, "which", lambda *_, **__: "compute-sanitizer")

    def main(*words):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--results", str(tmp_path), *words])
        try:
            found.main()
        except SystemExit as ended:
            said = ended.code
        else:
            said = None
        return said, json.loads((tmp_path / "cuda_an_imitation.json").read_text())

    yield main
    del sys.modules["cuda_device"]


def test_all_that_needs_a_gpu_leaves_one_record(gpu):
    said, record = gpu()
    assert said == "failed: suite, racecheck"
    assert record["what"] == "run on a device"
    assert {"device", "driver", "versions", "commit", "sources"} <= set(record)
    assert record["suite"] == {
        "returncode": 1,
        "failed": 1,
        "passed": 7,
        "skipped": 2,
        "failures": ["a.py::test[cupy] - no"],
    }
    assert record["sanitizers"]["racecheck"] == {
        "returncode": 1,
        "summary": ["========= RACECHECK SUMMARY: 1 hazard displayed"],
    }
    assert record["benchmark"] == {"returncode": 0, "copy GB/s": 4000, "rows": [1, 2]}


def test_a_part_is_added_to_the_record_of_the_others_if_it_is_about_the_same(gpu, monkeypatch):
    assert gpu("--only", "benchmark")[0] is None
    said, record = gpu("--only", "suite")
    assert said == "failed: suite"
    assert {"suite", "benchmark"} <= set(record)
    monkeypatch.setattr(_loader, "source_hashes", lambda: {"row_norm.cu": "of other sources"})
    _, record = gpu("--only", "suite")
    assert "benchmark" not in record


def test_the_snippets_of_the_doc_run(cupy):
    """docs/cuda.md, one after the other, as a reader would have them in one file."""
    text = (EXAMPLES.parent / "docs" / "cuda.md").read_text()
    code = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(code) == 2
    names = {}
    exec("\n".join(code), names)
    assert launched
    assert isinstance(names["dx"], cupy_array)
    assert isinstance(names["gradients"].dx, np.ndarray)
    assert names["count"] == 24
