"""The fault table: what goes wrong on one rank of a job, how the program ends, and what is expected of the others.

test_faulty_jobs.py runs it, fault_report.py makes a table of it for the docs.
"""

from __future__ import annotations

from typing import NamedTuple

RANKS = 3
# How the program ends, and the rank at fault, which is another one each time.
ENDINGS = {"uncaught": 2, "caught": 0, "exit": 1}
STEPS = ("alone", "step")

# How the job ends for the ranks that are not at fault.
AGREED = "all raise the same SyncMismatchError"
DEADLINE = "the others raise SyncTimeoutError"
LONE = "the rank at fault raises SyncTimeoutError, the others end"
ABORT = "the rank at fault aborts the job"
KILLED = "the launcher ends the job"
FINE = "all go on alike"

# Seconds that a rank waits for its peers. Where none is to come to the deadline it is long, so that a busy machine is
# not taken for a fault.
TIMEOUTS = {DEADLINE: 2.0, LONE: 2.0, AGREED: 60.0, ABORT: 60.0, KILLED: 60.0, FINE: 60.0}


class Outcome(NamedTuple):
    """How a job ends."""

    end: str
    said: str = ""
    """Stands in what the ranks say of the error; `{odd}` is the rank at fault."""


class Fault(NamedTuple):
    """One row: a function of faulty_job.py, and what is expected without and with `comm.step()`."""

    what: str
    alone: Outcome
    step: Outcome
    own: str = ""
    """What the rank at fault says, where it is not what the others say."""
    why: str = ""


def both(end: str, said: str = "") -> tuple[Outcome, Outcome]:
    return Outcome(end, said), Outcome(end, said)


def closed(deadline: Outcome, said: str) -> tuple[Outcome, Outcome]:
    """A fault that has no later round to be seen in, unless the step brings one."""
    return deadline, Outcome(AGREED, said)


FAULTS = {
    "channels": Fault("each rank has another C", *both(AGREED, "channels: 2 on rank 0, 3 on rank 1, 4 on rank 2")),
    "dtype": Fault("float32 on one rank, float64 on the others", *both(AGREED, "float32 on rank {odd}")),
    "mode": Fault(
        "one of two layers in eval on one rank",
        *both(AGREED, "index: "),
        why="eval makes no round: the second layer of one rank meets the first of the others",
    ),
    "eps": Fault("another eps on one rank", *both(AGREED, "0.001 on rank {odd}")),
    "momentum": Fault("another momentum on one rank", *both(AGREED, "0.5 on rank {odd}")),
    "affine": Fault("no weight on one rank", *both(AGREED, "0 on rank {odd}")),
    "call_order": Fault(
        "backward before forward on one rank, after a good step", *both(AGREED, "batch_norm_backward on rank {odd}")
    ),
    "swapped_layers": Fault(
        "two layers of equal C swapped on one rank, at the very first step",
        *both(AGREED, "1 on rank {odd}"),
        why="layers are numbered in the order of construction",
    ),
    "skipped_last_call": Fault(
        "one rank skips the last call",
        *closed(
            Outcome(DEADLINE, "SyncBatchNorm 0, batch_norm_backward"),
            "the end of the step on rank {odd}",
        ),
        own="came to its end",
        why="without a step the others wait in a round that has no other end than the deadline",
    ),
    "extra_call": Fault(
        "one rank makes one call too many",
        *closed(Outcome(LONE, "SyncBatchNorm 0, batch_norm"), "batch_norm on rank {odd}"),
        why="the others are done, and wait in MPI_Finalize until the one that waits for them aborts the job",
    ),
    "eval_on_one_rank": Fault(
        "the only layer in eval on one rank",
        *closed(Outcome(DEADLINE, "SyncBatchNorm 0, batch_norm"), "the end of the step on rank {odd}"),
        own="came to its end",
    ),
    "refused_x": Fault(
        "one rank's x is refused",
        *both(AGREED, "rank {odd}: ValueError: SyncBatchNorm: x must have num_features = 3 channels"),
    ),
    "refused_dy": Fault(
        "one rank's dy is refused", *both(AGREED, "rank {odd}: ValueError: batch_norm_backward: dy must have shape")
    ),
    "exception_before": Fault(
        "an exception in user code before the call",
        *closed(Outcome(DEADLINE, "SyncBatchNorm 0, batch_norm"), "rank {odd}: KeyError: 'planted'"),
        own="KeyError: 'planted'",
    ),
    "exception_between": Fault(
        "an exception in user code between forward and backward",
        *closed(Outcome(DEADLINE, "SyncBatchNorm 0, batch_norm_backward"), "rank {odd}: KeyError: 'planted'"),
        own="KeyError: 'planted'",
    ),
    "exception_inside": Fault(
        "an exception within a call, before its message (out of memory)",
        *closed(Outcome(DEADLINE, "SyncBatchNorm 0, batch_norm"), "rank {odd}: MemoryError: planted"),
        own="MemoryError: planted",
    ),
    "exception_after_round": Fault(
        "the same where statistics are summed, after a round",
        *both(DEADLINE, "SyncBatchNorm 0, batch_norm"),
        own="MemoryError: planted",
        why="the others wait in the sum, where a round of this rank would be garbage: it makes no other",
    ),
    "interrupted": Fault(
        "a signal handler raises while the rank waits",
        *both(ABORT),
        own="InterruptedError: planted",
        why="MPI_Finalize would wait for the unfinished collective: the process aborts the job when it exits",
    ),
    "two_threads": Fault(
        "a second thread calls on the same communicator",
        *closed(
            Outcome(DEADLINE, "SyncBatchNorm 1, batch_norm"),
            "rank {odd}: RuntimeError: MPICommunicator: entered from two threads at once",
        ),
        own="RuntimeError: MPICommunicator: entered from two threads at once",
        why="the second thread is refused at once, the first goes on; then the refused call is missing",
    ),
    "nan": Fault(
        "a NaN in one channel of one rank's x",
        *both(FINE, "channels with a NaN and with nothing else: [[1], [1]]"),
        why="no fault: that channel is NaN on all ranks, and no other",
    ),
    "late": Fault(
        "one rank comes after twice the timeout",
        *both(DEADLINE, "SyncBatchNorm 0, batch_norm"),
        why="the job has ended by then",
    ),
    "killed_before": Fault("SIGKILL before a collective", *both(KILLED)),
    "killed_in_a_payload": Fault("SIGKILL within a payload", *both(KILLED), own="killed inside merge_moments"),
    "killed_in_a_round": Fault(
        "SIGKILL within an agreement round (statistics are summed)", *both(KILLED), own="killed inside agree"
    ),
    "killed_in_a_sum": Fault("SIGKILL within a sum", *both(KILLED), own="killed inside merge_moments"),
}


class Job(NamedTuple):
    """One run of one row."""

    fault: str
    step: str
    ending: str

    @property
    def odd(self) -> int:
        """The rank at fault."""
        return ENDINGS.get(self.ending, 0)

    @property
    def expected(self) -> Outcome:
        row = FAULTS[self.fault]
        if self.ending == "mpi4py":
            return Outcome(ABORT)
        outcome: Outcome = getattr(row, self.step)
        return outcome._replace(said=outcome.said.format(odd=self.odd))

    @property
    def own(self) -> str:
        return "" if self.expected.end == AGREED else FAULTS[self.fault].own

    @property
    def timeout(self) -> float:
        return TIMEOUTS[self.expected.end]


def jobs_of(fault: str) -> list[Job]:
    """All runs of a row; also under `python -m mpi4py`, where the others would else wait for a rank that has raised."""
    row = FAULTS[fault]
    # A step changes nothing for a fault that is agreed on without one, or where no rank has an error to end with.
    in_step = {AGREED: ["caught"], KILLED: ["caught"], FINE: ["caught"]}.get(row.alone.end, ENDINGS)
    jobs = [Job(fault, step, ending) for step in STEPS for ending in (in_step if step == "step" else ENDINGS)]
    raised = "Error" in row.own and row.alone.end == DEADLINE
    return jobs + [Job(fault, "alone", "mpi4py")] * raised


JOBS = [job for fault in FAULTS for job in jobs_of(fault)]

# For `make test`: each fault with one ending, in turn, and with both steps where they differ. All of them take minutes.
FEW = [
    Job(fault, step, list(ENDINGS)[number % 3])
    for number, (fault, row) in enumerate(FAULTS.items())
    for step in (STEPS if row.alone != row.step else STEPS[:1])
]
