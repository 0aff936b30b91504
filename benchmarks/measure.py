"""Measuring cases: who takes part, whether all agree, how long each takes."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from types import ModuleType
from typing import Any

import numpy as np

import arraynorm as an
from bandwidth import Copy
from cases import Case, Competitor, Data, disagreement
from roof import Roof
from timing import Times, interleave

NORMS = (
    "batch_norm",
    "batch_norm_add_relu",
    "layer_norm",
    "rms_norm",
    "group_norm",
    "instance_norm",
    "quantized_batch_norm",
)
PEERS = ("torch", "numpy", "numba")
SUBJECT = "arraynorm"


def bench_of(norm: str) -> ModuleType:
    return importlib.import_module(f"bench_{norm}")


def available(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The peers that can be imported, and why the others can't."""
    found, missing = [], {}
    for name in PEERS:
        if name not in names:
            missing[name] = "not asked for"
            continue
        try:
            importlib.import_module(name)
            found.append(name)
        except ImportError as error:
            missing[name] = f"not importable: {error}"
    return found, missing


def set_threads(peers: Sequence[str], threads: int) -> None:
    """For everyone; NumPy has one thread whatever is said."""
    an.set_num_threads(threads)
    if "torch" in peers:
        import torch

        torch.set_grad_enabled(False)
        torch.set_num_threads(threads)
    if "numba" in peers:
        import numba

        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))


def cases(pattern: str, dtypes: Sequence[str], *, shrink: bool) -> list[Case]:
    """All cases of all norms whose names contain the pattern."""
    found = (case for norm in NORMS for case in bench_of(norm).CASES)
    chosen = (case for case in found if pattern in case.name and case.dtype in dtypes)
    return list({case.name: case for case in (case.shrunk() if shrink else case for case in chosen)}.values())


class Runner:
    """Measures cases with the same peers, budget and yardstick."""

    def __init__(self, peers: Sequence[str], budget: float, least: int, copy: Copy, say: Callable[[str], None]) -> None:
        self.peers, self.budget, self.least, self.copy, self.say = peers, budget, least, copy, say
        self.roof = Roof()

    def measure(self, case: Case, threads: Sequence[int]) -> Iterator[dict[str, Any]]:
        """One record for each number of threads."""
        set_threads(self.peers, max(threads))
        competitors, errors, left_out = self._competitors(case)
        for number in threads:
            set_threads(self.peers, number)
            calls = {name: competitor.run for name, competitor in competitors.items()}
            calls["copy"] = lambda number=number: self.copy(number)
            roof = self.roof.seconds(case, number)
            times = interleave(calls, SUBJECT, budget=self.budget, least=self.least)
            if roof:  # the lower one: this one was not timed in the same turns
                roof = min(roof, self.roof.seconds(case, number))
            yield self._record(case, number, times) | {"roof": roof, "errors": errors, "left out": left_out}

    def _competitors(self, case: Case) -> tuple[dict[str, Competitor], dict[str, float], dict[str, str]]:
        """Those whose results agree with float64; their errors; the others, with the reasons."""
        module = bench_of(case.norm)
        data = Data(case, np.random.default_rng(0))
        expected = _expected(module, data)
        taking_part, errors, left_out = {}, {}, {}
        for library in (SUBJECT, *self.peers):
            found = _built(module, library, data)
            if not found:
                left_out[library] = "no kernel for this dtype or operation"
            for name, competitor in found.items():
                results = competitor.results(competitor.run())
                error, complaint = disagreement(case, results, expected, competitor.tolerance)
                if complaint and library == SUBJECT:
                    raise ArithmeticError(f"{case.name}: {name}: {complaint}")
                if complaint:
                    left_out[name] = f"wrong: {complaint}"
                    self.say(f"{case.name}: {name} is left out, {complaint}")
                else:
                    taking_part[name], errors[name] = competitor, error
        return taking_part, errors, left_out

    def _record(self, case: Case, threads: int, times: Times) -> dict[str, Any]:
        summary = times.summary()
        copied = times.ratio("copy").median  # of the copy's time to ours
        record = asdict(case) | {"case": case.name, "tags": sorted(case.tags), "shape": list(case.shape)}
        ratios = {name: times.ratio(name)._asdict() for name in summary if name not in (SUBJECT, "copy")}
        return record | {
            "threads": threads,
            "bytes": case.moved,
            "seconds": summary,
            "ratios": ratios,
            "best peer": _best(ratios, PEERS),
            "best torch": _best(ratios, ("torch",)),
            "GB/s": case.moved / summary[SUBJECT]["median"] / 1e9,
            "copy GB/s": self.copy.moved / summary["copy"]["median"] / 1e9,
            "fraction of copy": case.moved / self.copy.moved * copied,
        }


def _built(module: ModuleType, library: str, data: Data) -> Mapping[str, Competitor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor")  # to be removed, says torch: it is there in 2.13
        return getattr(module, f"with_{library}")(data)


def _expected(module: ModuleType, data: Data) -> list[Any]:
    """What arraynorm gives in float64, on the same values; or the module's own formula."""
    if hasattr(module, "reference"):
        return list(module.reference(data))
    competitor = module.with_arraynorm(data.wide())[SUBJECT]
    return list(competitor.results(competitor.run()))


def _best(ratios: dict[str, dict[str, float]], libraries: Sequence[str]) -> str | None:
    """The fastest of some libraries' competitors."""
    names = [name for name in ratios if name.split()[0] in libraries]
    return min(names, key=lambda name: ratios[name]["median"], default=None)


def line(record: dict[str, Any]) -> str:
    """What is printed for a case."""
    best, torch = record["best peer"], record["best torch"]
    shown = dict.fromkeys(name for name in (best, torch) if name)
    against = ", ".join(f"{record['ratios'][name]['median']:.2f}x {name}" for name in shown) or "no peer"
    seconds = record["seconds"][SUBJECT]
    return (
        f"{record['case']:66s} {record['threads']} thr  {1e3 * seconds['median']:9.4f} ms "
        f"[{1e3 * seconds['q1']:.4f}, {1e3 * seconds['q3']:.4f}]  {record['GB/s']:6.1f} GB/s "
        f"{100 * record['fraction of copy']:4.0f} % of copy  {against}"
    )
