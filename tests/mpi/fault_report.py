"""What the jobs of the fault table have left: benchmarks/results/fault_table.json, and the table of docs/faults.md.

`cd tests && python -m mpi.fault_report FOLDER`, which `make fault-table` does after `make mpi`.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mpi.fault_table import ABORT, AGREED, DEADLINE, FAULTS, FINE, JOBS, KILLED, LONE, RANKS, STEPS, Job

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "fault_table.json"
PAGE = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- made by make fault-table -->\n", "<!-- until here -->\n"
MPIS = ("MPICH", "Open MPI")

# What the user sees, and to what the seconds of a cell are added.
CELLS = {
    AGREED: ("`SyncMismatchError` on all", ""),
    DEADLINE: ("`SyncTimeoutError` on the others", "timeout + "),
    LONE: ("`SyncTimeoutError` on the rank at fault", "timeout + "),
    ABORT: ("the rank at fault aborts the job", ""),
    KILLED: ("the launcher ends the job", ""),
    FINE: ("all go on", ""),
}


def collected(folder: Path) -> dict[str, Any]:
    """The records of all jobs under all MPIs."""
    records = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    order = {job: number for number, job in enumerate(JOBS)}
    records.sort(key=lambda record: (record["mpi"], order[job_of(record)]))
    missing = [(mpi, *job) for mpi in MPIS for job in JOBS if not any(same(record, mpi, job) for record in records)]
    if missing:
        raise SystemExit(f"{len(missing)} jobs have left no record of having ended as expected: {missing[:5]}")
    made = {"command": "make mpi fault-table", "ranks": RANKS, "machine": platform.machine(), "cores": os.cpu_count()}
    return {**made, "seconds": "from the barrier before the fault to the end of mpiexec", "jobs": records}


def job_of(record: dict[str, Any]) -> Job:
    return Job(record["fault"], record["step"], record["ending"])


def same(record: dict[str, Any], mpi: str, job: Job) -> bool:
    return record["mpi"].startswith(mpi) and job_of(record) == job


def rendered(results: dict[str, Any]) -> str:
    """The table in Markdown: a row for each fault."""
    mpis = " and ".join(sorted({record["mpi"] for record in results["jobs"]}))
    lines = [f"{len(results['jobs'])} jobs, with {mpis}.", ""]
    lines += ["| on one rank of three | without `step()` | within `comm.step()` | why |", "|---|---|---|---|"]
    for name, row in FAULTS.items():
        records = [record for record in results["jobs"] if record["fault"] == name and record["ending"] != "mpi4py"]
        cells = [cell([record for record in records if record["step"] == step]) for step in STEPS]
        lines.append(f"| {row.what} | {' | '.join(cells)} | {row.why} |")
    return "\n".join([*lines, ""])


def cell(records: Sequence[dict[str, Any]]) -> str:
    """What happens, and in how many seconds: the least and the most of all endings and MPIs."""
    (end,) = {record["end"] for record in records}
    words, start = CELLS[end]
    return f"{words}; {start}{span(past_the_deadline(record) if start else record['seconds'] for record in records)} s"


def past_the_deadline(record: dict[str, Any]) -> float:
    return float(record["seconds"] - record["timeout_s"])


def span(seconds: Iterable[float]) -> str:
    ordered = sorted(seconds)
    least, most = (f"{second:.1f}" for second in (ordered[0], ordered[-1]))
    return least if least == most else f"{least} to {most}"


def with_table(page: str, table: str) -> str:
    """The page with its table replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main(folder: str) -> None:
    results = collected(Path(folder))
    jobs = ",\n".join(json.dumps(record) for record in results.pop("jobs"))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1).removesuffix("\n}") + f',\n "jobs": [\n{jobs}\n]}}\n')
    PAGE.write_text(with_table(PAGE.read_text(), rendered(json.loads(RESULTS.read_text()))))


if __name__ == "__main__":
    main(sys.argv[1])
