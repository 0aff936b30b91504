"""examples/digits.py runs as a user runs it, says what its results say, and its own layers have right gradients."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

import arraynorm as an
from arraynorm.distributed import SELF
from arraynorm.testing import gradcheck, run_ranks

EXAMPLES = Path(__file__).parents[1] / "examples"
MPIEXEC = shutil.which("mpiexec", path=Path(sys.executable).parent) or shutil.which("mpiexec")
needs_mpiexec = pytest.mark.skipif(MPIEXEC is None, reason="mpiexec is neither beside python nor on the PATH")


def run(folder: Path, *options: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The example as a program, in `folder`, on a machine without a display."""
    environment = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY")}
    # Several tests may share two cores: threads that wait for each other would make them ten times slower.
    environment |= {"MPLBACKEND": "TkAgg", "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [*launcher, sys.executable, str(EXAMPLES / "digits.py"), *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("digits")


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("digits_net")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("digits_report")


# -- the grid --------------------------------------------------------------------------------------------------


class Quick(NamedTuple):
    """What one quick run left behind."""

    stdout: str
    stderr: str
    out: Path
    results: dict[str, Any]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Quick:
    folder = tmp_path_factory.mktemp("quick")
    done = run(folder, "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    out = folder / "demo-results"
    return Quick(done.stdout, done.stderr, out, json.loads((out / "results.json").read_text()))


def shown(run: dict[str, Any]) -> str:
    return "div." if run["diverged"] else f"{run['curve'][-1]:.1f}"


def test_the_results_have_every_cell_once_with_a_value_for_every_epoch(quick: Quick) -> None:
    results = quick.results
    cells = [(run["norm"], run["rate"], run["scale"]) for run in results["runs"]]
    wanted = {
        (n, r, s) for n in ("batch", "layer", "group", "none") for r in results["rates"] for s in results["scales"]
    }
    assert len(cells) == len(wanted) >= 16
    assert set(cells) == wanted
    for run in results["runs"]:
        assert len(run["curve"]) == results["epochs"]
        assert all(0 <= value <= 100 for value in run["curve"])


def test_the_table_shows_the_results_in_aligned_columns(quick: Quick) -> None:
    results = quick.results
    lines = quick.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("learning rate"))
    table = lines[start : start + 7]
    assert {len(line) for line in table} == {len(table[2])}
    assert set(table[2]) == {"-"}
    bars = [[i for i, character in enumerate(line) if character == "|"] for line in (*table[:2], *table[3:])]
    assert all(places == bars[0] for places in bars)

    def cells(line: str) -> list[list[str]]:
        return [group.split() for group in line.split("|")[1:]]

    assert cells(table[0]) == [[f"{rate:g}"] for rate in results["rates"]]
    assert cells(table[1]) == [[f"{scale:g}" for scale in results["scales"]]] * len(results["rates"])
    by_cell = {(run["norm"], run["rate"], run["scale"]): shown(run) for run in results["runs"]}
    for line in table[3:]:
        norm = line.split()[0]
        expected = [[by_cell[norm, rate, scale] for scale in results["scales"]] for rate in results["rates"]]
        assert cells(line) == expected


def test_what_the_run_claims_follows_from_its_results(quick: Quick) -> None:
    trained = {}
    for norm in ("batch", "layer", "group", "none"):
        own = [run for run in quick.results["runs"] if run["norm"] == norm]
        trained[norm] = sum(not run["diverged"] and run["curve"][-1] >= 90 for run in own)
        best = max(run["curve"][-1] for run in own)
        name = "no norm" if norm == "none" else f"{norm} norm"
        claim = rf"^{name} +trains \(>= 90 %\) in +{trained[norm]} of {len(own)} settings; its best: {best:.1f} %$"
        assert re.search(claim, quick.stdout, re.MULTILINE), quick.stdout
    whole_grid = trained["batch"] == 4 > trained["none"]
    assert ("trains over the whole grid" in quick.stdout) == whole_grid
    assert ("not over the whole grid" in quick.stdout) == (trained["none"] < trained["batch"] < 4)
    assert ("in no more settings than no norm" in quick.stdout) == (trained["batch"] <= trained["none"])


def test_the_learning_curves_are_a_png(quick: Quick) -> None:
    data = (quick.out / "curves.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[12:16] == b"IHDR"
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 400
    assert height >= 400
    assert data[-8:-4] == b"IEND"


def test_a_bar_shows_the_progress(quick: Quick) -> None:
    assert "100%" in quick.stderr
    assert "16/16" in quick.stderr


@pytest.mark.parametrize(
    ("batch", "none", "verdict"),
    [
        ([95, 90], [89.9, 10], "Batch norm trains over the whole grid; without a norm 0 of 2 do."),
        ([95, 91], [95, 10], "Batch norm trains over the whole grid; without a norm 1 of 2 do."),
        ([95, 89.9], [89.9, 10], "Batch norm trains in more settings than no norm, but not over the whole grid."),
        ([95, 95], [90, 99], "Here batch norm trains in no more settings than no norm."),
        ([95, 10], [10, 95], "Here batch norm trains in no more settings than no norm."),
        ([10, 10], [10, 95], "Here batch norm trains in no more settings than no norm."),
    ],
)
def test_the_verdict_is_the_one_that_the_numbers_allow(
    report: ModuleType, batch: list[float], none: list[float], verdict: str
) -> None:
    grid = report.Grid(("batch", "none"), rates=(0.1,), scales=(1.0, 2.0), epochs=1)
    runs = [
        report.Run(norm, 0.1, scale, [accuracy], diverged=False)
        for norm, accuracies in (("batch", batch), ("none", none))
        for scale, accuracy in zip(grid.scales, accuracies, strict=True)
    ]
    assert report.format_findings(grid, runs).splitlines()[-1] == verdict


def test_a_run_that_diverged_is_shown_as_such_and_does_not_count(report: ModuleType) -> None:
    grid = report.Grid(("batch", "none"), rates=(0.1,), scales=(1.0,), epochs=1)
    runs = [
        report.Run("batch", 0.1, 1.0, [95.0], diverged=False),
        report.Run("none", 0.1, 1.0, [95.0], diverged=True),
    ]
    assert [line.split()[-1] for line in report.format_table(grid, runs).splitlines()[3:]] == ["95.0", "div."]
    assert re.search(r"no norm +trains .* 0 of 1", report.format_findings(grid, runs))


def test_every_norm_starts_from_the_same_weights_times_the_scale(digits: ModuleType) -> None:
    def weights(norm: str, scale: float) -> list[np.ndarray[Any, Any]]:
        parameters = digits.build_network(norm, scale, 3).named_parameters()
        return [array for name, array in parameters if name.endswith(("linear.weight", "logits.weight"))]

    reference = weights("none", 1.0)
    assert len(reference) == 6
    for norm in digits.NORMS:
        for scale in (1.0, 0.25):  # a power of two: exact
            for ours, theirs in zip(weights(norm, scale), reference, strict=True):
                np.testing.assert_array_equal(ours, theirs * np.float32(scale))


def test_each_norm_stands_where_it_should(digits: ModuleType) -> None:
    kinds = {
        norm: [type(m).__name__ for m in digits.build_network(norm, 1.0, 0).modules() if "Norm" in type(m).__name__]
        for norm in digits.NORMS
    }
    assert kinds == {
        "batch": ["BatchNorm2d"] * 2 + ["BatchNorm1d"] * 3,
        "layer": ["LayerNorm"] * 5,
        "group": ["GroupNorm"] * 5,
        "none": [],
    }


def test_the_same_seed_gives_the_same_run(digits: ModuleType) -> None:
    first, second = (digits.train("group", 0.3, 1.0, digits.load_data(5), 1, 5) for _ in range(2))
    assert first == second


def test_another_seed_gives_another_split_and_other_weights(digits: ModuleType) -> None:
    assert not np.array_equal(digits.load_data(5).y, digits.load_data(6).y)
    first, other = (digits.build_network("batch", 1.0, seed).logits.weight for seed in (5, 6))
    assert not np.array_equal(first, other)


def test_held_out_scans_are_not_trained_on(digits: ModuleType) -> None:
    data = digits.load_data(0)
    assert len(data.y) + len(data.y_held_out) == 1797
    assert len(data.y_held_out) == digits.HELD_OUT
    scans = {scan.tobytes() for scan in data.x}
    assert not any(scan.tobytes() in scans for scan in data.x_held_out)
    seen = np.concatenate(list(digits.batches(len(data.y), np.random.default_rng(0))))
    np.testing.assert_array_equal(np.sort(seen), np.arange(len(data.y)))


# -- over ranks ------------------------------------------------------------------------------------------------


@needs_mpiexec
def test_over_two_mpi_processes_sync_batch_norm_gives_the_single_run_and_plain_does_not(tmp_path: Path) -> None:
    done = run(tmp_path, "--sync", "--out", "results", launcher=(str(MPIEXEC), "-n", "2"))
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results" / "sync.json").read_text())
    assert results["sync"] <= 1e-10
    assert results["plain"] >= 1e-3
    assert results["parts"] == [24, 8]
    # once each, since rank 0 alone prints
    assert re.findall(r"^SyncBatchNorm +(\S+e\S+)$", done.stdout, re.MULTILINE) == [f"{results['sync']:.1e}"]
    assert re.findall(r"^BatchNorm per rank +(\S+)$", done.stdout, re.MULTILINE) == [f"{results['plain']:.1e}"]
    assert done.stdout.count("SyncBatchNorm gives the single-process run to 1e-10; batch norm on each") == 1
    assert done.stdout.rstrip().endswith("does not.")


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_over_simulated_ranks_too(
    digits: ModuleType, tmp_path: Path, ranks: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(ranks, lambda comm: digits.run_sync(comm, tmp_path, 1)) == [True] * ranks
    results = json.loads((tmp_path / "sync.json").read_text())
    assert results["sync"] <= 1e-10
    assert results["plain"] >= 1e-3
    assert capsys.readouterr().out.count("ranks have") == 1


def test_if_sync_batch_norm_were_wrong_the_run_would_say_so(
    digits: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(an.SyncBatchNorm, "convert_sync_batchnorm", lambda network, comm: network)
    assert run_ranks(2, lambda comm: digits.run_sync(comm, tmp_path, 0)) == [False, False]
    assert "SyncBatchNorm DOES NOT give the single-process run" in capsys.readouterr().out


def test_the_comparison_finds_any_difference_and_keeps_a_nan(digits: ModuleType, report: ModuleType) -> None:
    reference = {"a": np.array([1.0, -4.0]), "b": np.array([2.0])}
    assert digits.difference(reference, reference, SELF) == 0
    assert digits.difference(reference | {"a": np.array([1.0, -3.0])}, reference, SELF) == 0.25
    assert digits.difference(reference | {"b": np.array([1.0])}, reference, SELF) == 0.5
    error = digits.difference(reference | {"a": np.array([np.nan, -4.0])}, reference, SELF)
    assert np.isnan(error)
    assert not report.Comparison(0, [3, 1], 20, 1e-10, sync=error, plain=1.0).sync_is_equal


def test_shards_are_uneven_and_none_is_too_small_for_plain_batch_norm(digits: ModuleType) -> None:
    for ranks in digits.SYNC_RANKS:
        cuts = digits.cuts(digits.BATCH_SIZE, ranks)
        sizes = np.diff(cuts)
        assert (cuts[0], cuts[-1]) == (0, digits.BATCH_SIZE)
        assert len(set(sizes)) == ranks
        assert min(sizes) >= 2


# -- the command line ------------------------------------------------------------------------------------------


def test_sync_with_one_process_says_what_to_run(tmp_path: Path) -> None:
    done = run(tmp_path, "--sync")
    assert done.returncode == 2
    assert re.search(r"got 1; run: mpiexec -n 2 python \S*digits\.py --sync$", done.stderr.rstrip())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fast"], "unrecognized arguments: --fast"),
        (["--quick", "--sync"], "argument --sync: not allowed with argument --quick"),
        (["--seed", "-1"], "--seed must be >= 0 and < 2**32"),
        (["--seed", "x"], "argument --seed: invalid int value"),
        (["--quick", "--out", "a_file"], "--out: "),
        (["--out"], "argument --out: expected one argument"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_trained(
    digits: ModuleType,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a_file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["digits.py", *options])
    with pytest.raises(SystemExit) as exit_info:
        digits.main()
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


# -- the example's own layers ----------------------------------------------------------------------------------

LAYERS = {
    "dense": (lambda net, rng: net.Dense(5, 3, rng=rng), (4, 5)),
    "dense without bias": (lambda net, rng: net.Dense(5, 3, rng=rng, bias=False), (4, 5)),
    "convolution": (lambda net, rng: net.Conv3x3(2, 3, rng=rng), (2, 2, 4, 5)),
    "convolution without bias": (lambda net, rng: net.Conv3x3(3, 1, rng=rng, bias=False), (2, 3, 1, 3)),
    "relu": (lambda net, rng: net.ReLU(), (3, 7)),
    "pool": (lambda net, rng: net.AvgPool2x2(), (2, 3, 4, 6)),
    "flatten": (lambda net, rng: net.Flatten(), (3, 2, 2, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_the_example_has_right_gradients(net: ModuleType, name: str) -> None:
    build, shape = LAYERS[name]
    rng = np.random.default_rng(7)
    gradcheck(build(net, rng).double(), inputs=(rng.normal(size=shape),))


def test_the_loss_has_the_right_gradient(net: ModuleType) -> None:
    labels = np.array([0, 2, 1])

    def forward(logits: Any) -> tuple[Any, Any]:
        loss, dlogits = net.cross_entropy(logits, labels)
        return np.asarray([loss]), dlogits

    gradcheck(forward, lambda dy, dlogits: [dy * dlogits], (np.random.default_rng(8).normal(size=(3, 4)),))


def test_the_loss_of_huge_logits_is_finite(net: ModuleType) -> None:
    loss, dlogits = net.cross_entropy(np.array([[1e4, 0.0]]), np.array([1]))
    assert loss == 1e4
    np.testing.assert_array_equal(dlogits, [[1.0, -1.0]])


def test_the_convolution_is_the_sum_over_a_padded_window(net: ModuleType) -> None:
    rng = np.random.default_rng(9)
    layer = net.Conv3x3(2, 3, rng=rng).double()
    layer.bias[...] = [1, 2, 3]
    x = rng.normal(size=(2, 2, 4, 5))
    padded = np.zeros((2, 2, 6, 7))
    padded[:, :, 1:5, 1:6] = x
    y = np.empty((2, 3, 4, 5))
    for n, o, i, j in np.ndindex(y.shape):
        y[n, o, i, j] = np.sum(padded[n, :, i : i + 3, j : j + 3] * layer.weight[o]) + layer.bias[o]
    # 19 terms of size 1, each rounded once
    np.testing.assert_allclose(layer(x), y, rtol=0, atol=19 * 4 * np.finfo(float).eps)


@pytest.mark.parametrize("norm", ["batch", "layer", "group", "none"])
def test_a_gradient_comes_right_through_the_whole_network(digits: ModuleType, norm: str) -> None:
    network = digits.build_network(norm, 1.0, 0).double()
    x = np.random.default_rng(10).normal(size=(6, 1, 8, 8))
    gradcheck(lambda x: (network(x), None), lambda dy, _: [network.backward(dy)], (x,), mode="directional")
