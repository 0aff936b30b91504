"""Plant violations of the contract in copies of the package, and see whether exactly the tests of each fail.

python tests/plant.py                      ten behaviours, drawn at random
python tests/plant.py --seed 7 --count 20
python tests/plant.py --all                every violation of tests/violations/
python tests/plant.py --number 17 42       those of these behaviours
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import arraynorm
from violations import VIOLATIONS, Violation

TESTS = Path(__file__).resolve().parent
PACKAGE = Path(arraynorm.__file__).resolve().parent
MARK = re.compile(r"\bmark\.behaviour\(([\d, ]+)\)")
TIMEOUT = 300  # seconds for one run of the tests


class Outcomes(NamedTuple):
    """What a run of the tests found."""

    behaviours: dict[str, list[int]]
    failed: list[str]


class Verdict(NamedTuple):
    """Whether exactly the tests of a violated behaviour failed, and what to say of it."""

    exact: bool
    text: str


def marked_files() -> dict[Path, set[int]]:
    """The test files that name behaviours, with the numbers; those that need torch are left out."""
    numbers = {
        path: {int(number) for match in MARK.findall(path.read_text()) for number in match.split(",")}
        for path in sorted(TESTS.rglob("test_*.py"))
        if "parity" not in path.relative_to(TESTS).parts
    }
    return {path: named for path, named in numbers.items() if named}


def plant(violation: Violation, package: Path) -> None:
    """Edit one file of `package`."""
    path = package / violation.file
    source = path.read_text()
    if source.count(violation.old) != 1:
        raise ValueError(f"{violation.file} holds {source.count(violation.old)} times, not once: {violation.old!r}")
    path.write_text(source.replace(violation.old, violation.new))


def run_tests(violation: Violation | None) -> Outcomes:
    """Run the tests that name behaviours on a copy of the package, with a violation planted in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / PACKAGE.name
        shutil.copytree(PACKAGE, copy)
        if violation is not None:
            plant(violation, copy)
        report = Path(folder) / "outcomes.json"
        path = os.pathsep.join((folder, str(TESTS), os.environ.get("PYTHONPATH", "")))
        # the violations are of the Python sources, which the compiled kernels would take the place of
        environment = {**os.environ, "PYTHONPATH": path, "ARRAYNORM_OUTCOMES": str(report), "ARRAYNORM_PURE": "1"}
        # -P, for the working directory may hold the package itself
        options = ["-P", "-m", "pytest", "-q", "--tb=no", "--capture=no", "-m", "behaviour and not parity"]
        plugins = ["-p", "outcomes", *(f"-pno:{name}" for name in ("cacheprovider", "hypothesispytest", "xdist"))]
        run = subprocess.run(
            [sys.executable, *options, *plugins, *map(str, marked_files())],
            cwd=TESTS.parent,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        if not report.exists():
            raise RuntimeError(f"pytest stopped early:\n{run.stdout}{run.stderr}")
        found = json.loads(report.read_text())
        if Path(found["package"]).parent != copy:
            raise RuntimeError(f"the tests ran on {found['package']}, not on the copy {copy}")
    return Outcomes(found["behaviours"], found["failed"])


def judge(violation: Violation) -> Verdict:
    """Plant a violation and compare the tests that fail with those that should."""
    try:
        outcomes = run_tests(violation)
    except (ValueError, RuntimeError, subprocess.TimeoutExpired) as error:
        return Verdict(False, f"{violation.number:2}  INEXACT  {violation.what}: {error}")
    failed = sorted(set(outcomes.failed))
    others = [test for test in failed if outcomes.behaviours.get(test) != [violation.number]]
    exact = bool(failed) and not others
    head = f"{violation.number:2}  {'exact  ' if exact else 'INEXACT'}  {violation.what}"
    lines = [f"{head}: {len(failed) - len(others)} of its tests fail, {len(others)} others"]
    lines += [f"        {outcomes.behaviours.get(test)} {test}" for test in others[:5]]
    return Verdict(exact, "\n".join(lines))


def chosen(arguments: argparse.Namespace) -> list[Violation]:
    if arguments.all:
        return VIOLATIONS
    if arguments.number:
        return [violation for violation in VIOLATIONS if violation.number in arguments.number]
    rng = random.Random(arguments.seed)
    numbers = rng.sample(sorted({violation.number for violation in VIOLATIONS}), arguments.count)
    return [rng.choice([v for v in VIOLATIONS if v.number == number]) for number in sorted(numbers)]


def main(argv: Sequence[str] | None = None) -> int:
    """The number of violations that were not found exactly, as an exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--number", type=int, nargs="+", default=[])
    arguments = parser.parse_args(argv)

    intact = run_tests(None)
    if intact.failed:
        print("without a violation these tests fail already:", *sorted(set(intact.failed)), sep="\n    ")
        return 2
    violations = chosen(arguments)
    print(f"{PACKAGE}: {len(intact.behaviours)} tests pass; {len(violations)} violations, seed {arguments.seed}")
    inexact = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for verdict in pool.map(judge, violations):
            print(verdict.text, flush=True)
            inexact += not verdict.exact
    print(f"{len(violations) - inexact} of {len(violations)} violations made exactly their tests fail")
    return min(inexact, 1)


if __name__ == "__main__":
    sys.exit(main())
