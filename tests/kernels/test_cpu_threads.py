"""The C++ kernels' threads: how many, several callers, forks, and the interpreter's lock."""

from __future__ import annotations

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arraynorm as an
from arraynorm.kernels import cpu
from arraynorm.kernels.cpu._threads import default_threads
from arraynorm.kernels.reference.batch_norm import batch_norm_stats
from compiled import needs_native, succeed, threads
from data import Host
from launching import FOREIGN

# Before every program: an op above the size from which threads are used, forward and backward, as bytes.
CALL = """
import os, sys, threading
import numpy as np
import arraynorm as an

x = np.random.default_rng(0).standard_normal((3, 2, 100003)).astype("float32")
weight = np.ones(2, "float32")

def call():
    y, cache = an.batch_norm_add_relu_forward(x, x, weight)
    gradients = an.batch_norm_add_relu_backward(x, cache)
    return b"".join(a.tobytes() for a in (y, cache.mask, gradients.dx, gradients.daddend, gradients.dweight))
"""


# -- how many --------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc, to count the threads of a process")
def test_a_large_call_uses_as_many_threads_as_it_may_and_a_small_one_its_own():
    program = """
def started():
    before = len(os.listdir("/proc/self/task"))
    call()
    return len(os.listdir("/proc/self/task")) - before

an.set_num_threads(1)
assert started() == 0
x, all_of_x = x[:, :, :100], x
an.set_num_threads(4)
assert started() == 0
x = all_of_x
an.set_num_threads(3)
assert started() == 2
assert started() == 0
an.set_num_threads(2)
assert started() == 0
an.set_num_threads(5)
assert started() == 2
"""
    succeed(CALL + program)


@needs_native
def test_the_number_of_threads_is_what_was_set():
    with threads(3):
        assert an.get_num_threads() == 3
        an.set_num_threads(np.int64(2))
        assert an.get_num_threads() == 2
        an.set_num_threads(2**70)
        assert an.get_num_threads() >= 2**16


@pytest.mark.parametrize(
    ("number", "error"),
    [(0, ValueError), (-1, ValueError), (1.5, TypeError), (2.0, TypeError), ("2", TypeError), (None, TypeError)],
)
def test_a_number_of_threads_that_cannot_be_is_refused(number: Any, error: type[Exception]):
    before = an.get_num_threads()
    with pytest.raises(error, match=r"^set_num_threads: threads must be "):
        an.set_num_threads(number)
    assert an.get_num_threads() == before


def _machine(monkeypatch, processors: int, allowed: int) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(allowed)), raising=False)


LAUNCHERS = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "PMI_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")


@pytest.mark.parametrize(("processors", "allowed"), [(8, 8), (8, 3), (1, 1)])
def test_by_default_there_are_as_many_threads_as_processors_that_may_be_used(monkeypatch, processors, allowed):
    _machine(monkeypatch, processors, allowed)
    assert default_threads({}) == allowed


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize(("ranks", "number"), [("1", 8), ("2", 4), ("3", 2), ("8", 1), ("100", 1)])
def test_ranks_that_are_not_bound_share_the_machine(monkeypatch, name, ranks, number):
    _machine(monkeypatch, 8, 8)
    assert default_threads({name: ranks}) == number


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_bound_rank_has_its_processors_for_itself(monkeypatch, name):
    _machine(monkeypatch, 8, 2)
    assert default_threads({name: "4"}) == 2


@pytest.mark.parametrize("ranks", ["", "many", "-2", "0"])
def test_a_number_of_ranks_that_is_none_is_not_believed(monkeypatch, ranks):
    _machine(monkeypatch, 8, 8)
    assert default_threads({"PMI_LOCAL_SIZE": ranks}) == 8


def test_without_affinity_masks_all_processors_may_be_used(monkeypatch):
    """As on macOS and Windows."""
    _machine(monkeypatch, 8, 8)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert default_threads({}) == 8
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert default_threads({}) == 1


def test_the_environment_has_the_last_word(monkeypatch):
    _machine(monkeypatch, 8, 2)
    assert default_threads({"ARRAYNORM_NUM_THREADS": "5", "PMI_LOCAL_SIZE": "4"}) == 5
    assert default_threads({"ARRAYNORM_NUM_THREADS": "", "PMI_LOCAL_SIZE": "4"}) == 2


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "two", " "])
def test_a_variable_that_is_no_number_of_threads_is_refused(number):
    with pytest.raises(ValueError, match=r"^ARRAYNORM_NUM_THREADS must be an integer >= 1, got '"):
        default_threads({"ARRAYNORM_NUM_THREADS": number})


@needs_native
def test_a_process_starts_with_the_number_of_its_environment_or_of_its_mask():
    program = "import arraynorm; print(arraynorm.get_num_threads())"
    assert succeed(program, ARRAYNORM_NUM_THREADS="3") == "3\n"
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("the rest needs os.sched_setaffinity")
    bound = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    assert succeed(bound + program) == "1\n"
    assert succeed(program) == f"{default_threads(_without_launcher())}\n"


def _without_launcher() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("ARRAYNORM_", *FOREIGN))}


# -- several callers -------------------------------------------------------------------------------------------


def _train(x: Host) -> bytes:
    weight = np.ones(x.shape[1], x.dtype)
    y, cache = an.batch_norm_add_relu_forward(x, None, weight)
    gradients = an.batch_norm_add_relu_backward(x, cache)
    return b"".join(a.tobytes() for a in (y, cache.mask, gradients.dx, gradients.dweight))


@needs_native
def test_callers_in_several_python_threads_get_their_own_results():
    """One has the pool, and the others, at the same time, work alone."""
    shapes = [(3, 2, 100003), (9, 117, 257), (3001, 131), (2, 3, 50001), (7, 5)]
    xs = [np.random.default_rng(i).standard_normal(shape).astype("float32") for i, shape in enumerate(shapes)]
    wanted = [_train(x) for x in xs]
    together = threading.Barrier(len(xs))

    def repeat(i: int) -> list[bytes]:
        together.wait()
        return [_train(xs[i]) for _ in range(10)]

    with threads(3), ThreadPoolExecutor(len(xs)) as executor:
        for i, results in enumerate(executor.map(repeat, range(len(xs)))):
            assert all(result == wanted[i] for result in results)


@needs_native
def test_the_number_of_threads_may_change_while_others_compute():
    x = np.random.default_rng(0).standard_normal((3, 2, 100003)).astype("float32")
    wanted, stop = _train(x), threading.Event()

    def keep_changing() -> None:
        while not stop.is_set():
            for number in (1, 4, 2, 7):
                an.set_num_threads(number)

    with threads(2):
        changing = threading.Thread(target=keep_changing)
        changing.start()
        try:
            assert all(_train(x) == wanted for _ in range(20))
        finally:
            stop.set()
            changing.join()


@needs_native
def test_python_threads_run_during_a_call():
    """With an interval of hours, the interpreter's lock changes hands only where it is given away: by the other thread
    at each tick, and by this one nowhere between its two stamps but within the kernel."""
    x = np.random.default_rng(0).standard_normal((64, 64, 1024)).astype("float32")
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0)

    interval = sys.getswitchinterval()
    other = threading.Thread(target=tick)
    sys.setswitchinterval(10_000)
    try:
        other.start()
        for _ in range(1000):  # until the machine has run both at a time
            ticks.clear()
            start = time.perf_counter()
            batch_norm_stats(x)
            end = time.perf_counter()
            if any(start < t < end for t in ticks):
                return
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        other.join()
    raise AssertionError("no tick of another thread in a thousand calls")


# -- forks -----------------------------------------------------------------------------------------------------

# A child that hangs is ended by its alarm, and says so by its status; Python 3.12 warns of any fork with threads.
FORK = """
import signal, warnings

warnings.simplefilter("ignore", DeprecationWarning)

def child_succeeds(body):
    process = os.fork()
    if process == 0:
        signal.alarm(100)
        status = 1
        try:
            status = 0 if body() else 1
        finally:
            os._exit(status)
    return os.waitpid(process, 0)[1] == 0
"""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@needs_native
@needs_fork
def test_a_forked_child_computes_with_threads_of_its_own():
    program = """
an.set_num_threads(3)
wanted = call()

def right():
    counts = []
    for _ in range(3):
        if call() != wanted:
            return False
        counts.append(threads())
    return counts == [counts[0]] * 3 and an.get_num_threads() == 3

def threads():
    return len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 3

def right_with_threads():
    return threads() in (1, 3) and right() and threads() == 3

for _ in range(5):
    assert child_succeeds(right_with_threads)
assert child_succeeds(lambda: right() and child_succeeds(right))
assert right() and call() == wanted
"""
    succeed(CALL + FORK + program)


@needs_native
@needs_fork
def test_a_fork_while_other_threads_are_inside_kernels_hangs_nobody():
    program = """
an.set_num_threads(3)
an.set_memory_limit(2**24)
wanted, stop, wrong = call(), threading.Event(), []

def keep_calling():
    while not stop.is_set():
        if call() != wanted:
            wrong.append(1)

others = [threading.Thread(target=keep_calling) for _ in range(2)]
for other in others:
    other.start()
try:
    for _ in range(15):
        assert child_succeeds(lambda: call() == wanted)
        assert call() == wanted
finally:
    stop.set()
    for other in others:
        other.join()
assert not wrong
"""
    succeed(CALL + FORK + program)


@needs_native
def test_a_process_ends_while_its_threads_wait_or_work():
    """The pool's are not joined; those of Python that are daemons may be inside a kernel."""
    program = """
an.set_num_threads(3)
call()
started = threading.Event()

def work():
    while True:
        call()
        started.set()

threading.Thread(target=work, daemon=True).start()
started.wait()
print("done")
"""
    assert succeed(CALL + program) == "done\n"


def test_the_module_says_the_number_of_threads():
    said = an.show_config(mode="dicts")["C++"]
    assert said.get("threads", 1) == an.get_num_threads()
    assert said["used"] == (cpu.native is not None)
