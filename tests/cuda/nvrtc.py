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
from cuda.emulated import arguments

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
        ceiling = min(255, REGISTERS // most_threads(instance))
        if self.stack or self.spill_stores or self.spill_loads:
            return f"{self.stack} bytes of stack, {self.spill_stores} and {self.spill_loads} bytes of spills"
        return f"{self.registers} registers, above {ceiling}" if self.registers > ceiling else None


def most_threads(instance: Instance) -> int:
    """Of a block: the launch bound of the kernel, or of the form that it is given."""
    source, (template, _, given) = _loader.source(instance.source), instance.name.partition("<")
    bound = re.search(rf"__launch_bounds__\((.*), 1\)\s+{template}\(", source)[1]  # type: ignore[index]
    if bound == "Form<V>::THREADS":
        form = given.partition(",")[0]
        bound = re.search(rf"struct {form} : Part {{\s+static constexpr int THREADS = (\d+);", source)[1]  # type: ignore[index]
    return int(bound)


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


def changed(record: dict[str, Any], architectures: Sequence[str]) -> list[str]:
    """The sources of which a record does not say that all instances were compiled for these architectures."""
    if record.get("architectures") != list(architectures):
        return list(_loader.source_hashes())
    known = set(record["instances"])
    return [
        file
        for file, digest in _loader.source_hashes().items()
        if record["sources"].get(file) != digest
        or not known.issuperset(f"{file}: {one.name}" for one in instances() if one.source == file)
    ]


def check(
    architectures: Sequence[str], jobs: int, earlier: dict[str, Any] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The record of all instances, and their faults; an earlier record speaks for the sources that it has."""
    KEPT.mkdir(parents=True, exist_ok=True)
    earlier = earlier or {}
    sources = changed(earlier, architectures)
    work = [Job(arch, file, tuple(names)) for arch in architectures for file, names in _groups() if file in sources]
    new = [job for job in work if not job.kept.exists()]
    counts = [sum(len(job.names) for job in some) for some in (work, new)]
    print(f"NVRTC {version()}: {counts[0] - counts[1]} kernels as compiled before, {counts[1]} to compile", flush=True)
    with ProcessPoolExecutor(jobs) as pool:
        for job, compiled in zip(new, pool.map(compile_group, new), strict=True):
            job.kept.write_text(json.dumps(compiled))
            print(f"{job.arch} {job.source}: {', '.join(job.names)}", flush=True)
    registers, faults = {}, []
    for job in work:
        for name, values in json.loads(job.kept.read_text()).items():
            found, key = Figures(*values), f"{job.source}: {name}"
            registers[key] = max(found.registers, registers.get(key, 0))
            if fault := found.fault(Instance(job.source, name)):
                faults.append(f"{job.arch} {name}: {fault}")
    reused = {file: compiler for file, compiler in earlier.get("compilers", {}).items() if file not in sources}
    names = {f"{one.source}: {one.name}": one.source for one in instances()}
    record = {
        "what": "compiled",
        "sources": _loader.source_hashes(),
        "compilers": {file: reused.get(file, f"NVRTC {version()}") for file in _loader.source_hashes()},
        "architectures": list(architectures),
        "instances": {
            name: registers[name] if file in sources else earlier["instances"][name] for name, file in names.items()
        },
    }
    return record, faults


def _groups() -> list[tuple[str, list[str]]]:
    """Source and names of instances that are compiled together: of one dtype and width."""

    def key(one: Instance) -> tuple[str, tuple[str, ...]]:
        return one.source, arguments(one)

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
