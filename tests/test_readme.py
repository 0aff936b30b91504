"""Every snippet of the README runs as it stands, and says what the README says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import arraynorm as an

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE))
PYTHON = {title: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for title, text in SECTIONS.items()}
# Lines of code, as the README is meant to stay.
LONGEST = {"Functions": 20, "Layers": 15, "Check a gradient of your own": 10, "Many processes": 10}
MPIEXEC = shutil.which("mpiexec", path=Path(sys.executable).parent) or shutil.which("mpiexec")


def run(snippet: str, folder: Path, *launcher: str) -> None:
    """A snippet as a program of its own, with warnings as errors."""
    program = folder / "snippet.py"
    program.write_text(snippet)
    command = [*launcher, sys.executable, "-W", "error", str(program)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("title", [title for title in LONGEST if title != "Many processes"])
def test_a_snippet_runs(title: str, tmp_path: Path) -> None:
    (snippet,) = PYTHON[title]
    run(snippet, tmp_path)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])  # with 5 the last rank has no samples
def test_the_mpi_snippet_runs(ranks: int, tmp_path: Path) -> None:
    if MPIEXEC is None:
        pytest.skip("mpiexec is missing")
    (snippet,) = PYTHON["Many processes"]
    run(snippet, tmp_path, MPIEXEC, "-n", str(ranks))


def test_every_snippet_is_run_here_and_is_short() -> None:
    assert {title for title, snippets in PYTHON.items() if snippets} == set(LONGEST)
    for title, longest in LONGEST.items():
        (snippet,) = PYTHON[title]
        assert len([line for line in snippet.splitlines() if line]) <= longest, title


def test_the_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    promised = re.findall(r"^make (\S+)", README, re.MULTILINE)
    assert promised == ["demo", "test"]
    for target in promised:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_table_names_what_exists_and_nothing_else() -> None:
    rows = [line.split("|")[2:4] for line in SECTIONS["What there is"].splitlines() if line.startswith("| ")][1:]
    functions = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    layers = {name for row in rows for name in _classes(row[1])}
    assert functions == {name for name in an.functional.__all__ if name + "_forward" in an.functional.__all__} | {
        name for name in an.functional.__all__ if name.startswith("quantized")
    }
    classes = {name for name in an.layers.__all__ if isinstance(getattr(an, name), type)}
    assert layers == classes - {"Module", "Sequential"}


def _classes(cell: str) -> list[str]:
    """ "`BatchNorm`, `BatchNorm1d` / `2d`" names BatchNorm, BatchNorm1d and BatchNorm2d."""
    names: list[str] = []
    for name in re.findall(r"`(\w+)`", cell):
        names.append(names[-1][:-2] + name if name[0].isdigit() else name)
    return names
