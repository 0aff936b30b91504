"""Whole jobs in which a rank goes wrong end within their deadline, with the same words on all survivors."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from launching import launch, pytestmark  # noqa: F401
from mpi.fault_table import AGREED, DEADLINE, FEW, FINE, JOBS, KILLED, LONE, RANKS

PROGRAM = Path(__file__).with_name("faulty_job.py")
# Seconds to the end of a job past its deadline: 1 for the others to say so too, a few for the launcher, the rest for
# a machine that is busy.
SLACK = 40.0
# Of a killed rank. What is printed of an MPI_Abort is lost now and then.
LAUNCHERS_WORDS = {"MPICH": "EXIT STRING: Killed (signal 9)", "Open MPI": "exited on signal 9 (Killed)"}


class Ended(NamedTuple):
    """What is left of a job."""

    status: int | None
    seconds: float
    """From the barrier, after which the fault happens, to the end of mpiexec."""
    mpi: str
    said: dict[int, list[str]]
    log: str


def run(job, folder):
    module = ["-m", "mpi4py"] if job.ending == "mpi4py" else []
    words = map(str, (job.fault, job.ending, job.step, job.odd, job.timeout, folder))
    status = launch(RANKS, folder, sys.executable, *module, str(PROGRAM), *words)
    end, log = time.time(), (folder / "mpiexec").read_text()
    files = {rank: folder / f"rank-{rank}" for rank in range(RANKS)}
    assert all(file.exists() for file in files.values()), f"not all ranks have begun\n{log}"
    said = {rank: file.read_text().splitlines() for rank, file in files.items()}
    began = [re.fullmatch(r"began at (\S+) with (.*)", lines.pop(0)) for lines in said.values()]
    return Ended(status, end - max(float(match[1]) for match in began), began[0][2], said, log)


def check(job, ended):
    """The job has ended as the table says."""
    status, seconds, mpi, said, _ = ended
    expected, odd = job.expected, job.odd
    others = {rank: lines for rank, lines in said.items() if rank != odd}
    assert status is not None, "the job hangs"
    within = job.timeout + SLACK if expected.end in (DEADLINE, LONE) else job.timeout
    assert seconds < within, f"the job has ended after {seconds:.1f} s"
    if expected.end in (AGREED, FINE):
        lines, *same = said.values()
        assert same == [lines] * (RANKS - 1), "the ranks differ"
        assert expected.said in lines[0]
        if expected.end == FINE:
            assert (status, lines[1:]) == (0, ["came to its end"])
        else:
            assert lines[0].startswith("SyncMismatchError: ")
            going_on = [re.match("[a-z ]*", line)[0] for line in lines[1:]]
            assert going_on == (["used again", "came to its end"] if job.ending == "caught" else [])
            assert (status == 0) == (job.ending == "caught")
        return
    assert status != 0
    for lines in others.values() if expected.end == DEADLINE else [said[odd]] if expected.end == LONE else []:
        check_timeout(job, lines)
    if expected.end == DEADLINE:
        # The first to give up ends the job, perhaps before another has come to its deadline or to its last line.
        assert any(others.values()), "no rank has said why"
    elif expected.end == LONE:
        assert list(others.values()) == [["came to its end"]] * (RANKS - 1)
    else:
        assert not any(others.values())
    check_own(job, said[odd])
    if expected.end == KILLED:
        (words,) = (words for name, words in LAUNCHERS_WORDS.items() if mpi.startswith(name))
        assert words in " ".join(ended.log.split())
    elif job.ending != "mpi4py":  # which aborts at once: the launcher may lose what was said last
        assert re.search(r"^rank \d: (?!began)", ended.log, re.MULTILINE), "the launcher has shown nothing"


def check_timeout(job, lines):
    """What a rank says that has waited in vain, if there was time to say it."""
    waited = rf"rank \d of {RANKS} waited {job.timeout:g} s in {job.expected.said}(, step 1)?, and not all ranks came"
    wanted = [f"SyncTimeoutError: {waited}; one has failed, hangs or makes other calls.*"]
    if job.ending == "caught":
        wanted += [f"used again: SyncTimeoutError: the communicator is broken since an earlier call: {waited}"]
        wanted += ["came to its end"]
    assert len(lines) <= len(wanted), lines
    for line, pattern in zip(lines, wanted, strict=False):
        assert re.fullmatch(pattern, line), f"{line}\nis not\n{pattern}"


def check_own(job, lines):
    """What the rank at fault says, in the rows where it is not what the others say."""
    if job.expected.end == LONE:
        return
    wanted = [job.own] * bool(job.own)
    if job.ending == "caught" and "Error" in job.own:
        wanted.append("came to its end")
    assert len(lines) == len(wanted), lines
    assert all(line.startswith(start) for line, start in zip(lines, wanted, strict=True)), lines


def record(job, ended):
    """For fault_report.py: what there is to tell of the job."""
    folder = os.environ.get("ARRAYNORM_FAULT_RECORDS")
    if folder is not None:
        facts = {"mpi": ended.mpi, **job._asdict(), "rank_at_fault": job.odd, "timeout_s": job.timeout}
        facts |= {"end": job.expected.end, "exit_status": ended.status, "seconds": round(ended.seconds, 1)}
        facts |= {"said": {f"rank {rank}": lines for rank, lines in ended.said.items()}}
        name = "-".join([ended.mpi.split(" ")[0], *job])
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, f"{name}.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    "job",
    [pytest.param(job, id=" ".join(job), marks=[] if job in FEW else pytest.mark.thorough) for job in JOBS],
)
def test_a_job_ends_as_the_fault_table_says(job, tmp_path):
    ended = run(job, tmp_path)
    try:
        check(job, ended)
    except AssertionError as error:
        said = "\n".join(f"rank {rank}: {line}" for rank, lines in ended.said.items() for line in lines)
        error.add_note(f"{' '.join(job)}: exit status {ended.status} after {ended.seconds:.1f} s\n{said}\n{ended.log}")
        raise
    record(job, ended)
