"""The emulator finds what it is there to find: every fault is planted in a kernel that is right without it."""

from __future__ import annotations

import textwrap

import numpy as np
import pytest

from cuda import emulator
from cuda.sanitized import FLAGS, run

# Each block reverses its piece of x through shared memory, and adds the lane opposite of what it has written.
SOURCE = """
__global__ void reversed(const float* x, float* y, int n) {
  DYNAMIC_SHARED(float, staged);
  const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  staged[t] = x[i];
  __syncthreads();
  y[i] = staged[blockDim.x - 1 - t];
  y[i] += __shfl_xor_sync(0xffffffffu, y[i], 31);
}
"""
THREADS = 64


def planted(old: str, new: str) -> str:
    assert SOURCE.count(old) == 1, old
    return SOURCE.replace(old, new)


def launch(source: str, *, seed: int = 0, resident: int = 1, shared: int = 4 * THREADS, blocks: int = 3):
    """(what came out, what should have)"""
    x = np.arange(blocks * THREADS, dtype=np.float32)
    y = np.full_like(x, np.nan)
    kernel = emulator.Module(source, ["reversed"]).kernel("reversed")
    kernel.seed, kernel.resident = seed, resident
    kernel((blocks,), (THREADS,), (x, y, np.int32(x.size)), shared_mem=shared)
    expected = x.reshape(blocks, THREADS)[:, ::-1]
    return y, (expected + expected.reshape(blocks, -1, 32)[..., ::-1].reshape(blocks, THREADS)).reshape(-1)


SCHEDULES = [(0, 1), (1, 2), (7, 3), (8, 1)]


@pytest.mark.parametrize(("seed", "resident"), SCHEDULES)
def test_a_right_kernel_is_right_under_every_schedule(seed, resident):
    actual, expected = launch(SOURCE, seed=seed, resident=resident)
    np.testing.assert_array_equal(actual, expected)


def test_a_missing_barrier_shows_in_the_result():
    """Shared memory starts as NaN, so that what was read too early is seen."""
    source = planted("  __syncthreads();\n", "")
    wrong = [not np.array_equal(*launch(source, seed=seed, resident=resident)) for seed, resident in SCHEDULES]
    assert all(wrong)


def test_a_barrier_that_some_threads_pass_elsewhere_is_named():
    source = planted("  __syncthreads();\n", "  if (t < 32) {\n__syncthreads();\n} else {\n__syncthreads();\n}\n")
    with pytest.raises(emulator.EmulatedError, match=r"reversed: divergent __syncthreads\(\): lines 7 and 9"):
        launch(source)


def test_a_warp_that_meets_at_two_places_is_named():
    source = planted(
        "  __syncthreads();\n", "  if (t % 2) {\n__syncwarp();\n} else {\n__syncwarp();\n}\n__syncthreads();\n"
    )
    with pytest.raises(emulator.EmulatedError, match=r"a warp meets at lines 9 and 7"):
        launch(source)


def test_lanes_that_have_left_are_missed_by_a_shuffle():
    source = planted("  y[i] +=", "  if (t == 5) return;\n  y[i] +=")
    with pytest.raises(emulator.EmulatedError, match="lanes that have left or do not exist"):
        launch(source, seed=8)


def test_a_deadlock_is_described():
    source = planted("  __syncthreads();\n", "  if (t > 0) __syncwarp();\n  __syncthreads();\n")
    with pytest.raises(emulator.EmulatedError, match=r"deadlock: block 0 thread 0 waits at __syncthreads, line 7"):
        launch(source)


@pytest.mark.parametrize(
    "arguments",
    [(np.float32(0), np.zeros(1), np.int32(1)), (np.zeros(1), np.zeros(1), np.int64(1)), (np.zeros(1), np.zeros(1))],
    ids=["a number for a pointer", "8 bytes for 4", "one too few"],
)
def test_arguments_of_another_kind_or_size_are_refused(arguments):
    kernel = emulator.Module(SOURCE, ["reversed"]).kernel("reversed")
    with pytest.raises(TypeError, match="reversed: "):
        kernel((1,), (32,), arguments)


@pytest.mark.parametrize(("grid", "block"), [(0, 32), (1, 0), (1, 1025)])
def test_a_launch_that_cuda_refuses_is_refused(grid, block):
    kernel = emulator.Module(SOURCE, ["reversed"]).kernel("reversed")
    with pytest.raises(emulator.EmulatedError, match="invalid"):
        kernel((grid,), (block,), (np.zeros(1), np.zeros(1), np.int32(1)))


# -- under sanitizers ------------------------------------------------------------------------------------------

SCRIPT = textwrap.dedent(
    """
    import sys
    import numpy as np
    from cuda import emulator
    source, flags = sys.argv[1], sys.argv[2:]
    kernel = emulator.Module(source, ["reversed"], flags).kernel("reversed")
    kernel.resident = 2
    x, y = np.zeros(128, np.float32), np.zeros(128, np.float32)
    kernel((2,), (64,), (x, y, np.int32(128)), shared_mem=256)
    print("done")
    """
)


@pytest.mark.parametrize("sanitizer", FLAGS)
def test_a_right_kernel_passes_under_the_sanitizer(sanitizer):
    done = run(sanitizer, SCRIPT, SOURCE, *FLAGS[sanitizer])
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_store_one_past_the_end_is_found():
    done = run("address", SCRIPT, planted("  staged[t] = x[i];", "  staged[t + 1] = x[i];"), *FLAGS["address"])
    assert done.returncode != 0
    assert "AddressSanitizer: use-after-poison" in done.stderr


def test_a_race_within_a_block_is_found():
    """Also where the schedule happens to give the right result: a missing barrier after the last reading."""
    done = run("thread", SCRIPT, planted("  y[i] +=", "  staged[t] = 0;\n  y[i] +="), *FLAGS["thread"])
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr


@pytest.mark.cuda_check
def test_a_race_between_blocks_is_found():
    done = run("thread", SCRIPT, planted("  y[i] +=", "  y[0] = 1;\n  y[i] +="), *FLAGS["thread"])
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr


@pytest.mark.cuda_check
def test_a_shuffle_orders_no_memory():
    """As on the GPU: only barriers and fences do."""
    source = planted("  __syncthreads();\n", "  if (__shfl_xor_sync(0xffffffffu, 1, 1)) {}\n")
    done = run("thread", SCRIPT, source, *FLAGS["thread"])
    assert "ThreadSanitizer: data race" in done.stderr
