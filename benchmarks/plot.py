"""Torch's time over arraynorm's, a bar for each case of the table in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

COLOURS = {1: "#9ecae1", 2: "#3182bd"}


def ratios(results: dict[str, Any], path: Path) -> None:
    """One panel for each setting of malloc, a pair of bars (1 and 2 threads) for each case."""
    settings = results["settings"]
    names = list(dict.fromkeys(r["case"] for s in settings.values() for r in _shown(s)))
    figure, axes = plt.subplots(
        1, len(settings), figsize=(7 * len(settings), 1.5 + 0.32 * max(len(names), 4)), sharey=True, squeeze=False
    )
    for axis, (setting, result) in zip(axes[0], settings.items(), strict=True):
        threads = sorted({record["threads"] for record in result["cases"]})
        height = 0.8 / max(len(threads), 1)
        for position, number in enumerate(threads):
            records = [record for record in _shown(result) if record["threads"] == number]
            places = [names.index(record["case"]) + (position - (len(threads) - 1) / 2) * height for record in records]
            found = [record["ratios"][record["best torch"]] for record in records]
            medians = [ratio["median"] for ratio in found]
            spread = [[r["median"] - r["q1"] for r in found], [r["q3"] - r["median"] for r in found]]
            colour = COLOURS.get(number, "#08519c")
            axis.barh(places, medians, height, xerr=spread, color=colour, ecolor="grey", label=f"{number} threads")
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale("log")
        axis.set_title(f"malloc: {setting}")
        axis.set_xlabel("torch's time over arraynorm's: median and quartiles")
        if any(_shown(result)):
            axis.legend(loc="lower right")
    axes[0, 0].set_yticks(
        range(len(names)), [name.removesuffix(" float32").replace(" float32 ", " ") for name in names]
    )
    axes[0, 0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _shown(setting: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for r in setting["cases"] if r["dtype"] == "float32" and "table" in r["tags"] and r["best torch"]]
