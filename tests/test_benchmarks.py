"""The benchmarks time nothing that is wrong, compare fairly, and report what was measured and no more."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
HIDDEN = ("torch", "numba")
RECORD = {
    *("case", "norm", "op", "shape", "dtype", "layout", "groups", "tags", "read", "written", "threads", "bytes"),
    *("seconds", "ratios", "best peer", "best torch", "GB/s", "copy GB/s", "fraction of copy", "roof", "errors"),
    "left out",
}
RELU = "batch_norm_add_relu"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def run(folder: Path, *options: str, hidden: tuple[str, ...] = HIDDEN) -> subprocess.CompletedProcess[str]:
    """The program, on tiny shapes, where some libraries cannot be imported."""
    for name in hidden:
        (folder / f"{name}.py").write_text("raise ImportError('hidden by the test')\n")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [
        sys.executable,
        str(BENCHMARKS / "run.py"),
        "--shrink",
        "--budget",
        "0.002",
        "--out",
        str(folder / "out"),
    ]
    environment = os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run([*command, *options], env=environment, capture_output=True, text=True, timeout=240)


class Quick(NamedTuple):
    stdout: str
    out: Path
    results: dict[str, Any]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Quick:
    folder = tmp_path_factory.mktemp("quick")
    done = run(folder, "--quick", "--threads", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    out = folder / "out"
    return Quick(done.stdout, out, json.loads((out / "cpu.json").read_text()))


def records(results: dict[str, Any]) -> list[dict[str, Any]]:
    return [record for setting in results["settings"].values() for record in setting["cases"]]


# -- a whole run -----------------------------------------------------------------------------------------------


def test_peers_that_are_missing_take_no_part_and_the_reason_is_printed(quick: Quick) -> None:
    for name in HIDDEN:
        assert quick.stdout.count(f"{name} takes no part: not importable: hidden by the test\n") == 2  # one per setting
        assert quick.results["missing peers"][name] == "not importable: hidden by the test"
    assert quick.results["peers"] == ["numpy"]
    assert not any(name.startswith(HIDDEN) for record in records(quick.results) for name in record["seconds"])


def test_a_run_covers_every_norm_and_operation_under_both_settings_of_malloc(quick: Quick, bench: Any) -> None:
    wanted = [case.name for case in bench("measure").cases("", ("float32", "float16", "uint8"), shrink=True)]
    assert len(wanted) >= 45
    assert {case.split()[0] for case in wanted} == set(bench("measure").NORMS)
    assert list(quick.results["settings"]) == ["default", "no page faults"]
    for setting in quick.results["settings"].values():
        assert [record["case"] for record in setting["cases"]] == wanted
    assert quick.results["settings"]["no page faults"]["environment"]["MALLOC_MMAP_THRESHOLD_"] == str(4 * 2**30)


def test_every_record_says_all_that_the_report_needs(quick: Quick) -> None:
    for key in ("machine", "versions", "commit", "date", "load average", "load average at the end", "arraynorm"):
        assert quick.results[key]
    for record in records(quick.results):
        assert set(record) == RECORD
        assert set(record["seconds"]) == {"arraynorm", "arraynorm out=", "numpy", "copy"}
        assert set(record["ratios"]) == {"arraynorm out=", "numpy"}
        for seconds in record["seconds"].values():
            assert 0 < seconds["q1"] <= seconds["median"] <= seconds["q3"]
            assert seconds["turns"] >= 3
        assert record["roof"] > 0
        assert record["best peer"] == "numpy"
        assert record["best torch"] is None


def test_all_competitors_of_every_case_agree_with_float64(quick: Quick, bench: Any) -> None:
    tolerance = bench("cases").TOLERANCE | {"uint8": 1}
    for record in records(quick.results):
        assert set(record["errors"]) == {"arraynorm", "arraynorm out=", "numpy"}
        assert record["left out"] == {}
        assert max(record["errors"].values()) <= tolerance[record["dtype"]]


def test_bytes_are_counted_as_the_model_says(quick: Quick) -> None:
    counts = {"forward": (1, 1), "backward": (2, 1), "frozen forward": (1, 1), "frozen backward": (2, 1)}
    counts |= {"relu forward": (1, 1)}
    fused = {"forward": (2, 1), "backward": (2, 2)}  # x and addend; dx and daddend
    for record in records(quick.results):
        known = fused if record["norm"] == "batch_norm_add_relu" else counts
        assert (record["read"], record["written"]) == known[record["op"]]
        itemsize = {"float32": 4, "float16": 2, "uint8": 1}[record["dtype"]]
        assert record["bytes"] == sum(known[record["op"]]) * int(np.prod(record["shape"])) * itemsize
        assert record["GB/s"] == pytest.approx(record["bytes"] / record["seconds"]["arraynorm"]["median"] / 1e9)


def test_the_report_has_every_bar_and_claims_none_that_was_not_measured(quick: Quick, bench: Any) -> None:
    report = (quick.out / "cpu.md").read_text()
    bars = bench("bars").BARS
    assert len({bar.name for bar in bars}) == len(bars) == 34
    for bar in bars:  # all against torch, which took no part
        assert f"| {bar.name} | {bar.least:g}x torch | not measured | not measured |" in report
    assert (quick.out / "cpu.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert report in quick.stdout


def test_a_sweep_reports_its_points_and_the_copy(tmp_path: Path) -> None:
    done = run(tmp_path, "--sweep", "--quick", "--only", "layer_norm forward", "--threads", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "cpu-sweep.json").read_text())
    assert {(point["norm"], point["op"], point["threads"]) for point in results["points"]} == {
        ("layer_norm", "forward", 1)
    }
    assert len(results["points"]) == 10  # rows of 4 to 1024 of 1024 elements, and their odd twins
    assert all(point["GB/s"] > 0 for point in results["points"])
    assert results["copy GB/s"]["1"] > 0
    assert "## Shape sweep" in (tmp_path / "out" / "cpu.md").read_text()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux alone")
def test_peak_memory_sees_the_temporaries_of_the_numpy_formula(tmp_path: Path, bench: Any) -> None:
    names = [case.name.rsplit(" ", 2)[0] for case in bench("peak_memory").cases(shrink=False)]
    command = [sys.executable, str(BENCHMARKS / "peak_memory.py"), str(names.index("layer_norm forward")), "numpy", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    record = json.loads(done.stdout)
    assert record["outputs"] == 4096 * 4096 * 4
    assert 1.5 <= record["peak over outputs"] <= 6  # x - mean beside x_hat at least


# -- nothing wrong is timed ------------------------------------------------------------------------------------


@pytest.fixture
def runner(bench: Any) -> Any:
    copy = bench("bandwidth").Copy(1 << 16)
    return bench("measure").Runner(["numpy"], budget=0.001, least=3, copy=copy, say=lambda text: None)


@pytest.fixture
def layer_case(bench: Any) -> Any:
    return bench("bench_layer_norm").CASES[0].shrunk()


def test_a_peer_with_wrong_results_is_left_out_and_said_to_be_wrong(
    bench: Any, runner: Any, layer_case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = bench("cases").Competitor(lambda: None, lambda _: [np.ones(layer_case.shape, np.float32)])
    monkeypatch.setattr(bench("bench_layer_norm"), "with_numpy", lambda data: {"numpy": wrong})
    (record,) = runner.measure(layer_case, [1])
    assert record["left out"]["numpy"].startswith("wrong: result 0 is off by")
    assert set(record["seconds"]) == {"arraynorm", "arraynorm out=", "copy"}
    assert record["best peer"] is None


def test_a_peer_known_to_be_inaccurate_is_timed_and_marked(
    bench: Any, runner: Any, layer_case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inaccurate = bench("cases").Competitor(lambda: None, lambda _: [np.ones(layer_case.shape, np.float32)], tolerance=2)
    monkeypatch.setattr(bench("bench_layer_norm"), "with_numpy", lambda data: {"numpy": inaccurate})
    (record,) = runner.measure(layer_case, [1])
    assert record["errors"]["numpy"] > bench("cases").TOLERANCE["float32"]
    assert record["best peer"] == "numpy"
    starred = [cell for cell in bench("report")._row(record) if "*" in cell]
    assert len(starred) == 2  # as the best peer, and in NumPy's column


def test_wrong_results_of_our_own_end_the_run(
    bench: Any, runner: Any, layer_case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = bench("bench_layer_norm")
    monkeypatch.setattr(module, "reference", lambda data: [np.ones(layer_case.shape)], raising=False)
    with pytest.raises(ArithmeticError, match="layer_norm forward 4x64 float32: arraynorm: result 0 is off by"):
        list(runner.measure(layer_case, [1]))


@pytest.mark.parametrize(
    ("dtype", "result", "agrees"),
    [
        ("float32", [1.0, 2.00001], True),
        ("float32", [1.0, 2.001], False),
        ("float16", [1.0, 2.005], True),
        ("float32", [1.0, np.nan], False),
        ("float32", [1.0], False),
        ("uint8", [1, 2], True),
        ("uint8", [1, 4], False),
        ("uint8", [2, 2], False),  # one level, but in half of all elements
    ],
)
def test_results_agree_within_the_tolerance_of_their_dtype(
    bench: Any, layer_case: Any, dtype: str, result: list[float], agrees: bool
) -> None:
    case = replace(layer_case, dtype=dtype)
    complaint = bench("cases").disagreement(case, [np.array(result)], [np.array([1.0, 2.0])])[1]
    assert (complaint == "") == agrees


# -- the yardsticks --------------------------------------------------------------------------------------------


class Clock:
    """Time passes when calls are made, as long as each takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def call(self, seconds: float) -> Callable[[], None]:
        def made() -> None:
            self.now += seconds

        return made

    def perf_counter(self) -> float:
        return self.now


def test_ratios_are_those_within_a_turn_whatever_the_machine_does_meanwhile(bench: Any) -> None:
    times = bench("timing").Times("ours", {"ours": [1.0, 9.0, 2.0], "theirs": [3.0, 27.0, 6.0]}, {})
    assert times.ratio("theirs") == (3.0, 3.0, 3.0)


def test_turns_that_a_slow_competitor_sat_out_do_not_count(bench: Any) -> None:
    nan = float("nan")
    times = bench("timing").Times("ours", {"ours": [1.0, 5.0, 2.0], "slow": [4.0, nan, 8.0]}, {"ours": 1, "slow": 1})
    assert times.ratio("slow").median == 4.0
    assert times.summary()["slow"]["turns"] == 2


def test_calls_share_the_budget_and_a_slow_one_sits_out_most_turns(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, timing = Clock(), bench("timing")
    monkeypatch.setattr(timing, "time", clock)
    calls = {"ours": clock.call(0.010), "slow": clock.call(0.200), "tiny": clock.call(3e-6)}
    found = timing.interleave(calls, "ours", budget=6.0).summary()
    # A share is 2 s: 28 samples of 10 ms, each after six untimed calls; 10 of 200 ms, without.
    assert [found[name]["turns"] for name in calls] == [28, 10, 28]
    assert clock.now <= 6.0
    assert found["tiny"]["repeats"] == 67  # of 3 us, for 200 us
    for name, seconds in (("ours", 0.010), ("slow", 0.200), ("tiny", 3e-6)):
        assert found[name]["median"] == pytest.approx(seconds)


def test_the_order_of_a_turn_changes(bench: Any) -> None:
    made: list[str] = []
    calls = {name: lambda name=name: made.append(name) for name in "abc"}
    bench("timing").interleave(calls, "a", budget=1e-3, least=20)
    runs = [name for name, before in zip(made[1:], made, strict=False) if name != before]
    assert len({tuple(runs[i : i + 3]) for i in range(len(runs) - 2)}) > 3


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_copy_copies_everything_on_any_number_of_threads(bench: Any, threads: int) -> None:
    copy = bench("bandwidth").Copy(1 << 16)
    start = (-copy._block.ctypes.data) % 4096
    source, target = copy._block[start : start + copy.size], copy._block[start + copy.size : start + 2 * copy.size]
    source[:] = np.random.default_rng(0).integers(0, 256, copy.size, np.uint8)
    target[:] = 0
    copy(threads)
    np.testing.assert_array_equal(target, source)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("norm", "op"), [("layer_norm", "forward"), ("rms_norm", "backward"), (RELU, "backward")])
def test_the_roof_moves_all_that_the_case_does(bench: Any, norm: str, op: str, threads: int) -> None:
    roof, case = bench("roof").Roof(), bench("cases").Case(norm, op, (70, 333), read=2, written=1 + (norm == RELU))
    size = case.nbytes
    for streams in (False, True):
        arrays = [(ctypes.c_uint8 * size).from_address(address) for address in roof._arrays(4, -(-size // 64) * 64)]
        *read, first, second = (np.frombuffer(array, np.uint8) for array in arrays)
        for array in read:
            array[:] = np.random.default_rng(threads).integers(0, 256, size, np.uint8)
        read[1] += 1
        first[:] = second[:] = 0
        assert min(roof._run(case, threads, streams, 3)) > 0
        np.testing.assert_array_equal(first, read[0] ^ read[1])
        np.testing.assert_array_equal(second, first if case.written == 2 else 0)


def test_what_the_caches_do_not_hold_of_a_set_is_read_again(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    roof, case = bench("roof"), bench("cases").Case
    monkeypatch.setattr(roof, "_level_2_bytes", lambda: 1 << 20)
    large = (64, 64, 112, 112)  # channels of 3 MB
    everything = int(np.prod(large)) * 4
    looked, again = roof.read_again(case("batch_norm", "forward", large), 1)
    assert (looked, again / everything) == (1, pytest.approx(1 - 2**20 / (64 * 112 * 112 * 4), rel=1e-5))
    looked, again = roof.read_again(case("batch_norm", "backward", large, read=2), 2)
    assert (looked, again / everything) == (2, pytest.approx(1 - 2 * 2**20 / (2 * 64 * 112 * 112 * 4), rel=1e-5))
    for held in (
        case("batch_norm", "forward", (32, 64, 56, 56)),
        case("batch_norm", "forward", (256, 1024)),
        case("instance_norm", "backward", large, read=2),
        case("layer_norm", "backward", (8, 4096), read=2),
    ):
        assert roof.read_again(held, 1)[1] == 0
    assert roof.read_again(case("batch_norm", "frozen forward", large), 1) == (0, 0)  # its statistics are given
    # sixteen channels come with a line: 6 MB together
    looked, again = roof.read_again(case("batch_norm", "forward", (32, 64, 56, 56), layout="channels last"), 1)
    assert again > 0.8 * 32 * 64 * 56 * 56 * 4


def test_without_a_compiler_there_is_no_roof(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench("roof"), "compiled", lambda: (None, "no C compiler"))
    assert bench("roof").Roof().seconds(bench("cases").Case("layer_norm", "forward", (8, 64)), 1) is None


# -- the report ------------------------------------------------------------------------------------------------


def measured(bench: Any, ratio: float, fraction: float = 1.0) -> dict[str, Any]:
    """Results in which torch takes `ratio` times as long in every case, and we a fraction of a copy's bandwidth."""
    cases = [
        asdict(case)
        | {"case": case.name, "tags": sorted(case.tags), "shape": list(case.shape), "bytes": case.moved}
        | {"threads": threads, "ratios": {"torch": {"median": ratio}}, "best torch": "torch", "best peer": "torch"}
        | {"fraction of copy": fraction}
        for case in bench("measure").cases("", ("float32", "float16", "bfloat16"), shrink=False)
        for threads in (1, 2)
    ]
    return {"settings": {name: {"cases": cases} for name in ("default", "no page faults")}}


def test_every_bar_has_cases_that_decide_it(bench: Any) -> None:
    for ratio, met in ((100.0, True), (0.9, False)):
        cliffs = [{"reason": "short sets"}, {"reason": ""}][: 2 - met]
        found = list(bench("bars").verdicts(measured(bench, ratio, ratio / 2), {"cliffs": cliffs, "points": [1]}))
        assert len(found) == len(bench("bars").BARS) + 7
        assert [verdict.bar for verdict in found if verdict.met is not met] == []


def test_one_case_below_a_bar_is_enough_to_miss_it_and_is_named(bench: Any) -> None:
    results = measured(bench, 100.0)
    record = next(
        r for r in results["settings"]["no page faults"]["cases"] if r["case"].startswith("rms_norm backward")
    )
    record["ratios"] = {"torch": {"median": 5.9}}
    missed = [verdict for verdict in bench("bars").verdicts(results, None) if verdict.met is False]
    assert [verdict.bar for verdict in missed] == ["RMS backward"]
    assert missed[0].found.startswith("worst 5.90x (rms_norm backward 4096x768 float32, 1 thr)")
    assert missed[0].found.endswith("1 of 4 below")
    for roof, reach in ((1.0, ""), (1.5, ", 1 of these out of memory's reach")):  # 8.9x and 5.9x there
        record |= {"seconds": {"arraynorm": {"median": 1.5}}, "roof": roof}
        missed = [verdict for verdict in bench("bars").verdicts(results, None) if verdict.met is False]
        assert missed[0].found.endswith("1 of 4 below" + reach)


def test_a_cliff_is_found_and_timed_again_beside_its_neighbour(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = bench("shape_sweep")
    points = [p for p in sweep._points((1 << 10,)) if (p.norm, p.op) == ("layer_norm", "forward")]
    rates = dict.fromkeys(points, 10.0)
    low, noisy = (next(p for p in points if p.shape[1] == row) for row in (16, 1024))
    rates[low], rates[noisy] = 4.0, 4.0
    monkeypatch.setattr(
        sweep, "_rates", lambda pair, *_: {name: 4.0 if point is low else 10.0 for name, point in pair.items()}
    )
    (cliff,) = sweep._confirmed(rates, None, 0.1)  # the other one was noise
    assert cliff["shape"] == [64, 16, 1]
    assert cliff["times"] == 2.5
    assert cliff["reason"] == "sets of 16: 32 ns for each, most of it for its statistics"


def test_what_is_short_or_has_few_rows_is_a_reason_for_a_cliff_and_nothing_else(bench: Any) -> None:
    sweep = bench("shape_sweep")
    reasons = {
        ("batch_norm", (1023, 2, 127)): "runs of 127: 10 ns for each",
        ("batch_norm", (4, 64, 64)): "sets of 256: 320 ns for each, most of it for its statistics",
        ("instance_norm", (4, 64, 4096)): "",
        ("group_norm", (4, 64, 4096)): "",
        ("layer_norm", (64, 4096, 1)): "",
        ("rms_norm", (64, 255, 1)): "sets of 255: 320 ns for each, most of it for its statistics",
        ("layer_norm", (3, 4096, 1)): "parameters a third of x are read and checked; backward, their gradients are "
        "summed in double",
    }
    for (norm, shape), reason in reasons.items():
        point = sweep.Point(norm, "forward", 0, (0, 0, False), shape)
        assert sweep._reason(point, 20480.0) == reason
