"""The page about faults shows what the jobs of the fault table have done, all of them, under both MPIs."""

from __future__ import annotations

import json

import pytest

from mpi.fault_report import BEGIN, MPIS, PAGE, RESULTS, collected, job_of, rendered, with_table
from mpi.fault_table import DEADLINE, ENDINGS, FAULTS, FEW, JOBS, RANKS


def test_the_table_of_the_page_is_that_of_the_results():
    page = PAGE.read_text()
    assert BEGIN in page
    assert with_table(page, rendered(json.loads(RESULTS.read_text()))) == page


def test_every_job_has_ended_as_expected_under_both_mpis():
    records = json.loads(RESULTS.read_text())["jobs"]
    for mpi in MPIS:
        there = [record for record in records if record["mpi"].startswith(mpi)]
        assert {job_of(record) for record in there} == set(JOBS)
        assert [(record["end"], record["rank_at_fault"]) for record in there] == [
            (job_of(record).expected.end, job_of(record).odd) for record in there
        ]
    assert len(records) == len(MPIS) * len(JOBS)


def test_every_fault_happens_three_ways_on_each_rank_in_turn_and_within_a_step():
    for fault, row in FAULTS.items():
        runs = {(job.step, job.ending, job.odd) for job in JOBS if job.fault == fault}
        steps = ("alone", "step") if row.alone != row.step or row.alone.end == DEADLINE else ("alone",)
        assert {(step, *ending) for step in steps for ending in ENDINGS.items()} <= runs
        assert any(step == "step" for step, *_ in runs)
    assert sorted(ENDINGS.values()) == list(range(RANKS))


def test_the_short_run_has_every_fault_and_every_ending():
    assert {job.fault for job in FEW} == set(FAULTS)
    assert {job.ending for job in FEW} == set(ENDINGS)


def test_results_that_lack_a_job_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=f"{len(MPIS) * len(JOBS)} jobs have left no record"):
        collected(tmp_path)
