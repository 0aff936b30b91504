"""The records that checks and measurements leave, what they spare, and README's table, which is made of them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from arraynorm.kernels.cuda import _loader, instances
from cuda import check, nvrtc

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
HASHES = dict.fromkeys(_loader.source_hashes(), "now")


def names(source: str) -> list[str]:
    return [f"{one.source}: {one.name}" for one in instances() if one.source == source]


@pytest.fixture
def status(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = importlib.import_module("status")
    yield found
    del sys.modules["status"]


# -- the table -------------------------------------------------------------------------------------------------


def test_readme_has_the_table_that_the_records_make(status):
    """If not: python benchmarks/status.py --write README.md, after `make cuda-check` if it is to say more."""
    readme = (ROOT / "README.md").read_text()
    made = status.table(status.read(BENCHMARKS / "results"), _loader.source_hashes())
    assert status.placed(readme, made) == readme
    assert readme.count(status.BEGIN) == readme.count(status.END) == 1


def test_a_file_without_a_place_for_the_table_is_refused(status):
    with pytest.raises(SystemExit, match="no place for the table"):
        status.placed("some text", "a table")


def test_the_table_claims_nothing_without_records(status):
    rows = status.table([], HASHES).splitlines()[2:]
    assert set(HASHES) == set(status.TITLES)
    assert len(rows) == len(HASHES)
    assert all(row.endswith("| not compiled | not run in the emulator | not run on a GPU |") for row in rows)


def test_the_table_says_what_the_records_say_and_no_more(status):
    rows = names("row_norm.cu")
    records = [
        {
            "what": "compiled",
            "sources": HASHES,
            "compilers": {"row_norm.cu": "NVRTC 13.0"},
            "architectures": ["sm_90"],
            "instances": {name: 90 + i for i, name in enumerate(rows[:2])},
        },
        {
            "what": "run in the emulator",
            "sources": HASHES | {"row_norm.cu": "before"},
            "schedules": 3,
            "instances": rows,
        },
        {
            "what": "run on a device",
            "sources": HASHES | {"batch_norm.cu": "before"},
            "device": "NVIDIA X",
            "commit": "abc",
            "suite": {"returncode": 1, "failed": 2},
        },
    ]
    row, other = status.table(records, HASHES).splitlines()[2:4]
    assert row.split(" | ")[2:] == [
        "2 for sm_90 (NVRTC 13.0), no spills, 91 registers at most",
        f"{len(rows)}, 3 schedules (of earlier sources)",
        "NVIDIA X at abc: 2 tests failed |",
    ]
    assert other.split(" | ")[2:] == [
        "not compiled",
        "not run in the emulator",
        "NVIDIA X at abc: 2 tests failed (of earlier sources) |",
    ]
    records[2]["suite"] = {"returncode": 0}
    assert "NVIDIA X at abc: all tests passed |" in status.table(records, HASHES)
    del records[2]["suite"]
    assert "NVIDIA X at abc: the tests were not run |" in status.table(records, HASHES)


# -- what the records spare ------------------------------------------------------------------------------------


def compiled(architectures=nvrtc.ARCHITECTURES) -> dict:
    """A record of all instances."""
    return {
        "what": "compiled",
        "sources": _loader.source_hashes(),
        "compilers": dict.fromkeys(_loader.source_hashes(), "NVRTC 13.0"),
        "architectures": list(architectures),
        "instances": {name: 40 for file in _loader.source_hashes() for name in names(file)},
    }


def test_what_is_recorded_is_compiled_no_more():
    assert nvrtc.changed(compiled(), nvrtc.ARCHITECTURES) == []


def test_what_changed_is_compiled_again_and_nothing_else():
    everything = list(_loader.source_hashes())
    assert nvrtc.changed({}, nvrtc.ARCHITECTURES) == everything
    assert nvrtc.changed(compiled(["sm_90"]), nvrtc.ARCHITECTURES) == everything
    record = compiled()
    record["sources"]["row_norm.cu"] = "before"
    assert nvrtc.changed(record, nvrtc.ARCHITECTURES) == ["row_norm.cu"]
    record = compiled()
    del record["instances"][names("quantized_batch_norm.cu")[0]]
    assert nvrtc.changed(record, nvrtc.ARCHITECTURES) == ["quantized_batch_norm.cu"]


def test_a_new_record_keeps_what_an_earlier_one_says_of_the_same_sources(tmp_path):
    """With a compiler that says 50 registers, and spills in one instance."""
    earlier = compiled()
    earlier["sources"]["quantized_batch_norm.cu"] = "before"
    spilled = "requantize<Tile, signed char, 16>"

    class Pool:
        def __init__(self, jobs):
            pass

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

        def map(self, function, jobs):
            return [{name: [0, 8 * (name == spilled), 0, 50] for name in job.names} for job in jobs]

    with mock.patch.multiple(nvrtc, KEPT=tmp_path / "kept", version=lambda: "13.9", ProcessPoolExecutor=Pool):
        record, faults = nvrtc.check(nvrtc.ARCHITECTURES, 1, earlier)
        again, _ = nvrtc.check(nvrtc.ARCHITECTURES, 1, record)
    assert record["sources"] == _loader.source_hashes()
    assert record["compilers"] == earlier["compilers"] | {"quantized_batch_norm.cu": "NVRTC 13.9"}
    registers = record["instances"]
    assert registers == {name: 50 if name.startswith("quantized") else 40 for name in earlier["instances"]}
    assert faults == [f"{arch} {spilled}: 0 bytes of stack, 8 and 0 bytes of spills" for arch in nvrtc.ARCHITECTURES]
    assert again == record


def test_registers_are_held_to_what_the_largest_block_leaves():
    for name, most in (("dx<Slab, float, 4, true>", 128), ("dx<Tile, float, 4, true>", 255)):
        one = next(one for one in instances() if one.name == name)
        assert nvrtc.Figures(0, 0, 0, most).fault(one) is None
        assert nvrtc.Figures(0, 0, 0, most + 1).fault(one) == f"{most + 1} registers, above {most}"
    assert {nvrtc.most_threads(one) for one in instances()} == {128, 256, 512}


def run_check(results: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cuda.check", "--recorded", "--results", str(results)]
    return subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, check=False)


def test_the_check_says_what_it_reuses_and_what_is_left(tmp_path):
    done = run_check(tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.count("not compiled yet") == len(_loader.source_hashes())
    assert "emulator: " + check.inputs() + ": not run yet" in done.stdout
    (tmp_path / check.COMPILED).write_text(json.dumps(compiled()))
    (tmp_path / check.EMULATED).write_text(json.dumps({"what": "run in the emulator", "inputs": check.inputs()}))
    done = run_check(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("reused") == len(_loader.source_hashes()) + 1


def test_the_check_of_emulated_kernels_depends_on_every_file_that_they_come_from(tmp_path, monkeypatch):
    """In a copy of tests/cuda one file has a line more; then a kernel has another hash."""
    before = check.inputs()
    shutil.copytree(ROOT / "tests" / "cuda", tmp_path / "cuda")
    monkeypatch.setattr(check, "TESTS", tmp_path)
    assert check.inputs() == before
    for name in ("emulator.cpp", "emulator.h", "test_bits.py", "examples.py", "nvrtc.py"):
        file = tmp_path / "cuda" / name
        text = file.read_text()
        file.write_text(text + "\n")
        assert (check.inputs() == before) == (name in check.RUN_NO_KERNEL), name
        file.write_text(text)
    hashes = _loader.source_hashes() | {"row_norm.cu": "of another text"}
    monkeypatch.setattr(_loader, "source_hashes", lambda: hashes)
    assert check.inputs() != before


# -- programs for a GPU ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", ["gpu.py", "bench_cuda.py"])
def test_a_program_for_a_gpu_says_what_is_missing(program):
    if importlib.util.find_spec("cupy") is not None and importlib.import_module("cupy").cuda.is_available():
        pytest.skip("there is a device here: `make gpu` is the test")
    done = subprocess.run([sys.executable, BENCHMARKS / program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(("no CuPy here: pip install arraynorm[cuda13]", "no CUDA device here: "))
    assert "Traceback" not in done.stderr
