"""The benchmark of what synchronizing costs runs, and the cost model can be fitted to what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launching import launch, pytestmark  # noqa: F401

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.timeout(400)
def test_the_benchmark_of_two_ranks_gives_the_model_its_constants(tmp_path):
    results, model = tmp_path / "results.json", tmp_path / "model.json"
    program = (sys.executable, str(BENCHMARKS / "bench_sync_batch_norm.py"), "--json", str(results))
    status = launch(2, tmp_path, *program, "--turns", "2", "--repeats", "1", "--steps", "1")
    assert status == 0, (tmp_path / "mpiexec").read_text()
    measured = json.loads(results.read_text())
    assert [row["channels"] for row in measured["collectives"]] == [64, 256, 1024, 4096]
    assert all(us > 0 for row in measured["collectives"] for us in row["us"].values())
    assert set(measured["training"]["per cent over plain"]) == {"synchronized", "without agreement"}
    if measured["oversubscribed"]:
        pytest.skip("one core for two ranks: what a rank costs alone, which the model needs, is not measured then")
    fit = (sys.executable, str(BENCHMARKS / "fit_cost_model.py"), str(results), "--json", str(model))
    done = subprocess.run(fit, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(model.read_text())["fits"][0]["ranks"] == 2
