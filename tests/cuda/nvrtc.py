"""Compile every instance with NVRTC for every architecture, and hold it to its registers: no GPU is needed.

    python -m cuda.nvrtc [--arch sm_90 ...] [--json FILE] [--jobs N]

Needs cupy-cuda13x with nvidia-cuda-nvrtc and nvidia-cuda-runtime from pip. What has been compiled before, from the
same source with the same compiler, is not compiled again: build/nvrtc keeps the figures by hash.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from arraynorm.kernels.cuda import _loader
from arraynorm.kernels.cuda._instances import Instance, instances

ARCHITECTURES = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")
KEPT = Path(__file__).parents[2] / "build" / "nvrtc"
REGISTERS = 65536
"""Of a multiprocessor: what the threads of one block share."""


class Figures(NamedTuple):
    """What ptxas says of a kernel."""

    stack: int
    spill_stores: int
    spill_loads: int
    registers: int

    def fault(self, instance: Instance) -> str | None:
        """Spills, local memory, or more registers than its largest block leaves to a thread."""
        source = _loader.source(instance.source)
        template = instance.name.partition("<")[0]
        threads = int(re.search(rf"__launch_bounds__\((\d+), 1\)\s+{template}\(", source)[1])  # type: ignore[index]
        ceiling = min(255, REGISTERS // threads)
        if self.stack or self.spill_stores or self.spill_loads:
            return f"{self.stack} bytes of stack, {self.spill_stores} and {self.spill_loads} bytes of spills"
        return f"{self.registers} registers, above {ceiling}" if self.registers > ceiling else None


class Job(NamedTuple):
    """Some instances of one source, for one architecture."""

    arch: str
    source: str
    names: tuple[str, ...]

    @property
    def kept(self) -> Path:
        """Where their figures are, by the hash of all that they come from."""
        inputs = repr((_loader.code(self.source), _loader.OPTIONS, version(), *self))
        return KEPT / f"{hashlib.sha256(inputs.encode()).hexdigest()[:24]}.json"


def compile_group(job: Job) -> dict[str, list[int]]:
    """The figures of every instance, by name."""
    arch, source, names = job
    import cupy
    from cupy.cuda import nvrtc

    include = Path(cupy.__file__).parents[1] / "nvidia" / "cu13" / "include"
    program = nvrtc.createProgram(_loader.source(source), source, [], [])
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        # as CuPy compiles: it appends -ftz=true and takes device code by default
        options = [*_loader.OPTIONS, f"-arch={arch}", f"-I{include}", "-ftz=true", "--ptxas-options=-v"]
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            raise SystemExit(f"{source} for {arch}:\n{nvrtc.getProgramLog(program)}") from error
        log = nvrtc.getProgramLog(program)
        return {name: _figures(log, nvrtc.getLoweredName(program, name)) for name in names}
    finally:
        nvrtc.destroyProgram(program)


def _figures(log: str, lowered: str | bytes) -> list[int]:
    symbol = lowered.decode() if isinstance(lowered, bytes) else lowered
    found = re.search(
        rf"Function properties for '?{re.escape(symbol)}'?\s*\n\D*(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\s*\n.*?Used (\d+) registers",
        log,
    )
    if found is None:
        raise SystemExit(f"ptxas says nothing of {symbol}:\n{log}")
    return [int(figure) for figure in found.groups()]


def version() -> str:
    from cupy.cuda import nvrtc

    return ".".join(map(str, nvrtc.getVersion()))


def check(architectures: Sequence[str], jobs: int) -> tuple[dict[str, Any], list[str]]:
    """The record of all instances, and their faults."""
    KEPT.mkdir(parents=True, exist_ok=True)
    jobs_to_do = [Job(arch, source, tuple(names)) for arch in architectures for source, names in _groups()]
    new = [job for job in jobs_to_do if not job.kept.exists()]
    counts = [sum(len(job.names) for job in some) for some in (jobs_to_do, new)]
    print(f"NVRTC {version()}: {counts[0] - counts[1]} instances reused, {counts[1]} to compile", flush=True)
    with ProcessPoolExecutor(jobs) as pool:
        for job, compiled in zip(new, pool.map(compile_group, new), strict=True):
            job.kept.write_text(json.dumps(compiled))
            print(f"{job.arch} {job.source}: {', '.join(job.names)}", flush=True)
    figures: dict[str, dict[str, Figures]] = {arch: {} for arch in architectures}
    faults = []
    for job in jobs_to_do:
        for name, values in json.loads(job.kept.read_text()).items():
            found = figures[job.arch][f"{job.source}: {name}"] = Figures(*values)
            if fault := found.fault(Instance(job.source, name)):
                faults.append(f"{job.arch} {name}: {fault}")
    record = {
        "what": "compiled",
        "source_hash": _loader.source_hash(),
        "compiler": f"NVRTC {version()}",
        "architectures": list(architectures),
        "instances": {
            name: max(figures[arch][name].registers for arch in figures) for name in figures[architectures[0]]
        },
    }
    return record, faults


def _groups() -> list[tuple[str, list[str]]]:
    """Source and names of instances that are compiled together: of one dtype and width."""

    def key(one: Instance) -> tuple[str, str]:
        return one.source, re.sub(r"^\w+<?|, (true|false)|>$", "", one.name)

    groups = itertools.groupby(sorted(instances(), key=key), key)
    return [(source, [one.name for one in group]) for (source, _), group in groups]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES)
    parser.add_argument("--json", help="write the record there")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    record, faults = check(options.arch, options.jobs)
    if faults:
        sys.exit("\n".join(faults))
    most = max(record["instances"].values())
    print(f"{len(record['instances'])} instances for {', '.join(options.arch)}: no spills, {most} registers at most")
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
