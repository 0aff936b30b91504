"""Whole jobs in which a rank goes wrong end within their deadline, with the same words on all survivors."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from launching import launch, pytestmark  # noqa: F401

JOB = Path(__file__).with_name("faulty_job.py")
RANKS = 3
SURVIVORS = {0, 1}

AGREED, TIMEOUT = "SyncMismatchError", "SyncTimeoutError"
# fault -> the error on the other ranks without and with `comm.step()`
FAULTS = {
    "channels": (AGREED, AGREED),
    "skipped_last_call": (TIMEOUT, AGREED),
    "exception_between": (TIMEOUT, AGREED),
    "eval_on_one_rank": (TIMEOUT, AGREED),
    "late": (TIMEOUT, TIMEOUT),
}
ROWS = [
    (fault, ending, step, errors[bool(step)])
    for number, (fault, errors) in enumerate(FAULTS.items())
    for step in ("", "step")
    # each fault with one of the endings, in turn: all of them are some minutes
    for ending in [("uncaught", "caught", "exit")[number % 3]]
]


def run(folder, *arguments):
    status = launch(RANKS, folder, sys.executable, str(JOB), *filter(None, arguments))
    return status, (folder / "mpiexec").read_text()


@pytest.mark.parametrize(("fault", "ending", "step", "error"), ROWS)
def test_a_fault_ends_in_one_error_on_all_other_ranks(fault, ending, step, error, tmp_path):
    status, log = run(tmp_path, fault, ending, step)
    said = dict(re.findall(r"^rank (\d): (\w+: .*)$", log, re.MULTILINE))
    heard = {text for rank, text in said.items() if int(rank) in SURVIVORS}
    assert status is not None, f"the job hangs\n{log}"
    assert heard, log
    assert all(text.startswith(error) for text in heard), log
    if error == AGREED:
        assert {int(rank) for rank in said} == {0, 1, 2}, log
        assert len(set(said.values())) == 1, log
        assert (status == 0) == (ending == "caught"), log
    else:  # the first rank to give up ends the job, perhaps before another has said what it waits for
        assert status != 0, log


def test_the_rank_that_made_one_call_too_many_gives_up_and_ends_the_job(tmp_path):
    status, log = run(tmp_path, "extra_call", "caught")
    assert status not in (0, None), log
    assert "rank 2: SyncTimeoutError: rank 2 of 3 waited 4 s in SyncBatchNorm 0, batch_norm" in log


@pytest.mark.parametrize("step", ["", "step"])
def test_a_killed_rank_ends_the_job(step, tmp_path):
    status, log = run(tmp_path, "killed", "uncaught", step)
    assert status not in (0, None), log
    assert "came to its end" not in log
