"""What `digits.py` says of its runs: tables, what follows from them, and the learning curves."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

TRAINED = 90.0
"""Per cent of the held-out scans from which on a network counts as trained; guessing gives 10."""


class Grid(NamedTuple):
    """What is tried, and for how long."""

    norms: Sequence[str]
    rates: Sequence[float]
    scales: Sequence[float]
    epochs: int


class Run(NamedTuple):
    """One training."""

    norm: str
    rate: float
    scale: float
    curve: Sequence[float]
    """Per cent right of the held-out scans after every epoch."""
    diverged: bool
    """Whether the loss of the last epoch is infinite or nan."""

    @property
    def accuracy(self) -> float:
        return self.curve[-1]

    @property
    def trained(self) -> bool:
        return not self.diverged and self.accuracy >= TRAINED


def format_table(grid: Grid, runs: Sequence[Run]) -> str:
    """A line for each norm, a column for each learning rate and initial scale."""
    cells = {run[:3]: "div." if run.diverged else f"{run.accuracy:.1f}" for run in runs}

    def line(head: str, groups: Sequence[Sequence[str]]) -> str:
        return " |".join([f"{head:<13}", *("".join(f"{cell:>7}" for cell in group) for group in groups)])

    last = len(grid.scales) - 1
    lines = [
        line("learning rate", [[""] * last + [f"{rate:g}"] for rate in grid.rates]),
        line("initial scale", [[f"{scale:g}" for scale in grid.scales]] * len(grid.rates)),
    ]
    lines.append("-" * len(lines[0]))
    for norm in grid.norms:
        lines.append(line(norm, [[cells[norm, rate, scale] for scale in grid.scales] for rate in grid.rates]))
    return "\n".join(lines)


def format_findings(grid: Grid, runs: Sequence[Run]) -> str:
    """What these runs show, and no more."""
    settings = len(grid.rates) * len(grid.scales)
    lines, trained = [], {}
    for norm in grid.norms:
        own = [run for run in runs if run.norm == norm]
        trained[norm] = sum(run.trained for run in own)
        best = max(run.accuracy for run in own)
        name = "no norm" if norm == "none" else f"{norm} norm"
        lines.append(
            f"{name:<10} trains (>= {TRAINED:g} %) in {trained[norm]:>2} of {settings} settings; its best: {best:.1f} %"
        )
    if trained["batch"] == settings > trained["none"]:
        lines.append(f"Batch norm trains over the whole grid; without a norm {trained['none']} of {settings} do.")
    elif trained["batch"] > trained["none"]:
        lines.append("Batch norm trains in more settings than no norm, but not over the whole grid.")
    else:
        lines.append("Here batch norm trains in no more settings than no norm.")
    return "\n".join(lines)


def draw_curves(grid: Grid, runs: Sequence[Run], path: Path) -> None:
    """A PNG: a panel for each setting, a curve for each norm."""
    # A Figure without pyplot draws by Agg, whatever the settings, and looks for no display.
    figure = Figure(figsize=(2.4 * len(grid.scales) + 1, 2.1 * len(grid.rates) + 1.2), layout="constrained")
    panels = figure.subplots(len(grid.rates), len(grid.scales), sharex=True, sharey=True, squeeze=False)
    colors = dict(zip(grid.norms, ("tab:blue", "tab:orange", "tab:green", "black"), strict=True))
    for (row, rate), (column, scale) in itertools.product(enumerate(grid.rates), enumerate(grid.scales)):
        panel = panels[row, column]
        panel.set_title(f"learning rate {rate:g}, scale {scale:g}", fontsize="medium")
        panel.axhline(TRAINED, color="gray", linestyle=":", linewidth=1)
        panel.set(ylim=(0, 102), xlim=(0.5, grid.epochs + 0.5), xticks=range(1, grid.epochs + 1))
        for run in runs:
            if (run.rate, run.scale) == (rate, scale):
                marker = "x" if run.diverged else "."
                panel.plot(range(1, grid.epochs + 1), run.curve, color=colors[run.norm], marker=marker)
    figure.supxlabel("epoch")
    figure.supylabel("per cent right of the held-out scans")
    keys = [panels[0, 0].plot([], [], color=color, marker=".", label=norm)[0] for norm, color in colors.items()]
    figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), title="norm (x: diverged)")
    figure.savefig(path, dpi=120)


class Comparison(NamedTuple):
    """Batch norms over several ranks, against one process that has whole batches."""

    seed: int
    parts: Sequence[int]
    """How many scans of a batch each rank has."""
    steps: int
    limit: float
    sync: float
    """max |difference| / max |value| of the worst parameter or buffer: SyncBatchNorm, and BatchNorm on every rank."""
    plain: float

    @property
    def sync_is_equal(self) -> bool:
        return self.sync <= self.limit  # false of a nan

    @property
    def plain_is_equal(self) -> bool:
        return self.plain <= self.limit


def format_comparison(comparison: Comparison) -> str:
    """Both numbers, and what they mean."""
    parts, limit = comparison.parts, comparison.limit
    gives = "gives" if comparison.sync_is_equal else "DOES NOT give"
    does = "does, too" if comparison.plain_is_equal else "does not"
    return f"""\
{len(parts)} ranks have {" + ".join(map(str, parts))} of the {sum(parts)} scans of every batch.
After {comparison.steps} steps of SGD in float64, against one process that has whole batches,
max |difference| / max |value| of the worst parameter or buffer on the worst rank:

SyncBatchNorm        {comparison.sync:.1e}
BatchNorm per rank   {comparison.plain:.1e}

SyncBatchNorm {gives} the single-process run to {limit:g}; batch norm on each rank's own scans {does}."""


def write_json(results: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n")
