"""What the environment chooses when the package is imported, and what `show_config` says of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

import arraynorm as an
from arraynorm.kernels import cpu
from compiled import LEVELS, needs_native, run_python, succeed
from norms import kernels

# The settings, and what an op runs on.
REPORT = """
import json
import numpy as np
import arraynorm as an
from arraynorm.kernels import only

x = np.arange(24.0).reshape(2, 3, 4)

def runs(paths):
    try:
        with only(paths):
            an.batch_norm_backward(x, an.batch_norm_forward(x)[1])
    except NotImplementedError as error:
        return str(error)
    return "yes"

an.set_num_threads(2)
an.set_memory_limit(2**24)
an.release_memory()
print(json.dumps({
    "config": an.show_config(mode="dicts"),
    "threads": an.get_num_threads(),
    "compiled": runs("specialised"),
    "reference": runs("reference"),
}))
"""

# Makes the compiled module one that was never built.
MISSING = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == "arraynorm.kernels.cpu._native":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""


def _report(program: str, **environment: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(succeed(program, **environment))
    return found


def _runs_on_the_reference(report: dict[str, Any], reason: str) -> None:
    assert report["config"]["C++"]["used"] is False
    assert reason in report["config"]["C++"]["reason"]
    said = report["config"]["kernels"]["numpy"]
    assert set(said) == set(kernels())
    assert all(case.startswith("reference: ") and reason in case for case in said.values())
    assert "no specialisation for numpy" in report["compiled"]
    assert (report["reference"], report["threads"]) == ("yes", 1)


# -- without the compiled module -------------------------------------------------------------------------------


def test_arraynorm_pure_runs_on_the_reference_and_says_so():
    _runs_on_the_reference(_report(REPORT, ARRAYNORM_PURE="1"), "ARRAYNORM_PURE is set")


def test_a_missing_module_runs_on_the_reference_and_says_so():
    _runs_on_the_reference(_report(MISSING + REPORT), "the compiled module is missing")


def test_the_settings_refuse_without_the_module_what_they_refuse_with_it():
    program = """
import arraynorm as an

for setting, value, error in (
    (an.set_num_threads, 0, ValueError),
    (an.set_num_threads, "2", TypeError),
    (an.set_memory_limit, -1, ValueError),
    (an.set_memory_limit, 0.5, TypeError),
    (an.show_config, "json", ValueError),
):
    try:
        setting(value)
    except error:
        continue
    raise SystemExit(f"{setting.__name__}({value!r}) raised no {error.__name__}")
an.set_memory_limit(0)
assert an.get_num_threads() == 1
"""
    succeed(program, ARRAYNORM_PURE="1")


@pytest.mark.parametrize("value", ["1", "yes"])
def test_a_module_that_is_required_and_missing_is_an_import_error(value):
    process = run_python(MISSING + "import arraynorm", ARRAYNORM_REQUIRE_NATIVE=value)
    assert process.returncode == 1
    assert "ModuleNotFoundError: No module named 'arraynorm.kernels.cpu._native'" in process.stderr


@pytest.mark.parametrize("value", ["0", ""])
def test_a_variable_that_is_zero_or_empty_asks_for_nothing(value):
    _report(MISSING + REPORT, ARRAYNORM_REQUIRE_NATIVE=value)
    report = _report(REPORT, ARRAYNORM_PURE=value, ARRAYNORM_ISA="", ARRAYNORM_NUM_THREADS="")
    assert report["config"]["C++"]["used"] == (cpu.native is not None)


# -- with it ---------------------------------------------------------------------------------------------------


@needs_native
def test_a_module_that_is_required_and_there_is_used():
    report = _report(REPORT, ARRAYNORM_REQUIRE_NATIVE="1")
    compiled = report["config"]["C++"]
    assert compiled["used"] is True
    assert compiled["available"] == LEVELS
    assert compiled["instructions"] == LEVELS[-1]
    assert (compiled["threads"], report["threads"]) == (2, 2)
    assert (compiled["memory limit"], compiled["memory kept"]) == (2**24, 0)
    assert (report["compiled"], report["reference"]) == ("yes", "yes")
    assert set(report["config"]["kernels"]["numpy"]) == set(kernels())


@needs_native
@pytest.mark.parametrize("level", LEVELS)
def test_arraynorm_isa_chooses_the_instructions(level):
    report = _report(REPORT, ARRAYNORM_ISA=level)
    assert report["config"]["C++"]["instructions"] == level
    assert report["compiled"] == "yes"


@needs_native
def test_instructions_that_there_are_not_are_refused():
    process = run_python("import arraynorm", ARRAYNORM_ISA="v99")
    assert process.returncode == 1
    assert "ValueError" in process.stderr
    assert "must be a level of this processor, got 'v99'" in process.stderr


@needs_native
def test_arraynorm_num_threads_must_be_a_number():
    process = run_python("import arraynorm", ARRAYNORM_NUM_THREADS="some")
    assert process.returncode == 1
    assert "ValueError: ARRAYNORM_NUM_THREADS must be an integer >= 1, got 'some'" in process.stderr


@needs_native
def test_there_is_more_than_one_level_on_an_x86_64_of_the_last_ten_years():
    """Or the tests of every level would quietly be those of one."""
    import platform

    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"this is no x86-64 but {platform.machine()}: one level, the portable one")
    assert LEVELS[0] == "baseline"
    with open("/proc/cpuinfo") as file:
        flags = next(line for line in file if line.startswith("flags")).split()
    assert ("v3" in LEVELS) == ({"avx2", "fma", "f16c"} <= set(flags))


# -- what is said ----------------------------------------------------------------------------------------------


def test_every_kernel_is_printed_under_what_it_runs_on(capsys):
    assert an.show_config() is None
    printed = capsys.readouterr().out.splitlines()
    config = an.show_config(mode="dicts")
    assert printed[0] == f"arraynorm {config['arraynorm']}, NumPy {config['numpy']}"
    assert printed[-1] == "other libraries, reference"
    headings = [i for i, line in enumerate(printed) if not line.startswith(" ")]
    for name, case in config["kernels"]["numpy"].items():
        line = printed.index(f"    {name}")
        heading = max(i for i in headings if i < line)
        assert printed[heading] == f"numpy arrays, {case}"


def test_nothing_is_printed_where_dicts_are_asked_for(capsys):
    assert isinstance(an.show_config(mode="dicts"), dict)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("mode", ["json", "", None])
def test_another_mode_is_refused(mode):
    with pytest.raises(ValueError, match=r'^show_config: mode must be "text" or "dicts", got '):
        an.show_config(mode=mode)


def test_a_backend_that_cannot_be_imported_is_named_with_its_reason(monkeypatch):
    from arraynorm.kernels._kernel import BACKENDS

    monkeypatch.setitem(BACKENDS, "made_up", "arraynorm.kernels.made_up")
    assert an.show_config(mode="dicts")["kernels"]["made_up"] == {
        "all": "reference: No module named 'arraynorm.kernels.made_up'"
    }


# -- threadpoolctl ---------------------------------------------------------------------------------------------


@needs_native
def test_limits_of_threadpoolctl_are_those_of_the_compiled_kernels_once_it_knows_them():
    pytest.importorskip("threadpoolctl")
    program = """
import threadpoolctl
import arraynorm as an

def ours():
    return [pool for pool in threadpoolctl.threadpool_info() if pool["internal_api"] == "arraynorm"]

an.set_num_threads(3)
assert not ours()
for _ in range(2):
    an.register_with_threadpoolctl()
    (pool,) = ours()
    assert (pool["num_threads"], pool["version"]) == (3, an.__version__), pool
with threadpoolctl.threadpool_limits(1):
    assert an.get_num_threads() == 1
with threadpoolctl.threadpool_limits(2, user_api="arraynorm"):
    assert an.get_num_threads() == 2
with threadpoolctl.threadpool_limits(1, user_api="blas"):
    assert an.get_num_threads() == 3
assert an.get_num_threads() == 3
"""
    succeed(program)


def test_threadpoolctl_is_told_nothing_without_the_module():
    pytest.importorskip("threadpoolctl")
    program = """
import threadpoolctl
import arraynorm as an

an.register_with_threadpoolctl()
assert not [pool for pool in threadpoolctl.threadpool_info() if pool["internal_api"] == "arraynorm"]
"""
    succeed(program, ARRAYNORM_PURE="1")
