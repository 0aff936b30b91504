"""Faults planted in the kernels themselves are caught by the checks that the kernels pass: `make cuda-check`."""

from __future__ import annotations

import textwrap
from unittest import mock

import pytest

from arraynorm.kernels.cuda import _loader
from cuda import emulated as place
from cuda import emulator
from cuda.emulated import SMALL, emulated
from cuda.examples import Run
from cuda.sanitized import FLAGS, run
from norms import Example
from tolerances import check

pytestmark = pytest.mark.cuda_check

LARGE_SETS = Run(Example("batch_norm", (2, 2, 8192)), "contiguous", "small")
ROWS = Run(Example("layer_norm", (7, 1024), {"normalized_shape": (1024,)}), "contiguous", "small")
COLUMNS = Run(Example("batch_norm", (67, 8)), "contiguous", "small")
MASKED = Run(Example("batch_norm_add_relu", (3, 4, 16)), "contiguous", "small")

BARRIER = "    __syncthreads();\n"
BEFORE_READING = "#pragma unroll\n    for (int m = 0; m < M; ++m) values[m] = lane <"
AFTER_READING = "    butterfly(values, 32);\n"
LAST_PACK = "last = first + g.size < total ? first + g.size : total"
IN_SLABS = ";\n    row = threadIdx.x;"

SEEN_IN_RESULTS = {
    "no barrier before a block's sums are read": (ROWS, BARRIER + BEFORE_READING, BEFORE_READING),
    "no barrier before the sums are overwritten": (ROWS, AFTER_READING + BARRIER, AFTER_READING),
    "no barrier between rows of a tile": (COLUMNS, BARRIER + "      if (thread < reach)", "      if (thread < reach)"),
    "a store one pack along": (ROWS, "store(out, ys + at.at(g, g.y));", "store(out, ys + at.at(g, g.y) + V);"),
    "one pack too few": (LARGE_SETS, LAST_PACK + IN_SLABS, f"{LAST_PACK} - 1{IN_SLABS}"),
    "the first block merging, not the last": (LARGE_SETS, "== unsigned(blocks - 1)", "== 0u"),
    "a bit in its neighbour's place": (MASKED, "bits <<= V * lane;", "bits <<= V * (lane ^ 1);"),
    "a mean of one element too many": (LARGE_SETS, "sum[m] / count)", "sum[m] / (count + 1))"),
}
"""An op, and what becomes of its source."""


@pytest.mark.parametrize("name", SEEN_IN_RESULTS)
def test_a_fault_in_a_kernel_is_seen_in_its_results(name):
    run_, old, new = SEEN_IN_RESULTS[name]
    whole = _loader.source.__wrapped__
    places = []

    def source(file: str) -> str:
        code = whole(file)
        places.append(code.count(old))
        return code.replace(old, new)

    def alone(instance, flags=()):
        return emulator.Module(source(instance.source), [instance.name], flags)

    arrays, dy = run_.arrays("float32")
    with mock.patch.object(place, "module_of", alone):
        caught = 0
        for seed, resident in ((0, 1), (1, 3), (11, 5)):
            try:
                with emulated(SMALL, seed=seed, resident=resident):
                    check(run_.example, arrays, dy)
            except (AssertionError, emulator.EmulatedError):
                caught += 1
    assert max(places) == 1, "the fault is to be planted in one place"
    assert caught


SCRIPT = textwrap.dedent(
    """
    import sys
    from cuda import emulated as place, emulator
    from cuda.emulated import SMALL, emulated
    from cuda.examples import Run
    from norms import Example, backward, forward
    from arraynorm.kernels.cuda import _loader
    op, shape, options, dtype, old, new, *flags = sys.argv[1:]
    whole = _loader.source
    _loader.source = lambda file: whole(file).replace(old, new) if old else whole(file)
    place.module_of = lambda one, flags: emulator.Module(_loader.source(one.source), [one.name], flags)
    run = Run(Example(op, eval(shape), eval(options)), "contiguous", "small")
    arrays, dy = run.arrays(dtype)
    with emulated(SMALL, seed=1, resident=3, flags=flags):
        y, cache = forward(run.example, arrays)
        backward(run.example, dy, cache)
    print("done")
    """
)


def sanitized(sanitizer: str, run_: Run, dtype: str, old: str = "", new: str = ""):
    op, shape, options = run_.example
    return run(sanitizer, SCRIPT, op, repr(shape), repr(options), dtype, old, new, *FLAGS[sanitizer])


CLEAN = [
    (LARGE_SETS, "float32"),
    (ROWS, "float16"),
    (COLUMNS, "float32"),
    (MASKED, "bfloat16"),
    (Run(Example("batch_norm_add_relu", (3, 3, 31)), "contiguous", "small"), "float32"),
    (Run(Example("group_norm", (2, 4, 16), {"num_groups": 2}), "contiguous", "small"), "float32"),
    (Run(Example("group_norm", (2, 9, 8), {"num_groups": 4, "axis": -1}), "contiguous", "small"), "float64"),
    (Run(Example("rms_norm", (3, 2048), {"normalized_shape": (2048,)}), "contiguous", "small"), "float32"),
]


@pytest.mark.parametrize("sanitizer", FLAGS)
@pytest.mark.parametrize(("run_", "dtype"), CLEAN, ids=str)
def test_kernels_pass_under_the_sanitizer(sanitizer, run_, dtype):
    done = sanitized(sanitizer, run_, dtype)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


SEEN_BY_SANITIZERS = {
    "a race: no fences around the count of blocks": ("thread", LARGE_SETS, "  __threadfence();\n", ""),
    "a race: no barrier between rows of a tile": (
        "thread",
        COLUMNS,
        BARRIER + "      if (thread < reach)",
        "      if (thread < reach)",
    ),
    "a store beyond the stash": (
        "address",
        ROWS,
        "packs[j * blockDim.x + threadIdx.x] = pack;",
        "packs[(j + 1) * blockDim.x + threadIdx.x] = pack;",
    ),
}


@pytest.mark.parametrize("name", SEEN_BY_SANITIZERS)
def test_a_fault_in_a_kernel_is_seen_by_the_sanitizer(name):
    sanitizer, run_, old, new = SEEN_BY_SANITIZERS[name]
    done = sanitized(sanitizer, run_, "float32", old, new)
    assert done.returncode != 0
    assert "ERROR: AddressSanitizer" in done.stderr or "WARNING: ThreadSanitizer: data race" in done.stderr
