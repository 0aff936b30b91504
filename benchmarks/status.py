"""README's table of what each CUDA kernel has been through, from the records alone.

    python benchmarks/status.py [--results DIR]

A record speaks for the sources that it names by hash; one of other sources is shown as such. What no record says was
run is not claimed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from arraynorm.kernels.cuda import _loader, instances

TITLES = {
    "row_norm.cu": "rows: layer, RMS; group, instance and batch norm on the chip",
    "batch_norm.cu": "batch norm; group and instance norm in parts",
    "batch_norm_add_relu.cu": "batch norm + add + ReLU",
    "quantized_batch_norm.cu": "quantized batch norm",
}


def table(records: list[dict[str, Any]], source_hash: str) -> str:
    """Markdown: a row for each source, a cell for each thing that was done to all of its instances."""
    lines = ["| kernels | instances | compiled | run in the emulator | run on a GPU |", "|---|---|---|---|---|"]
    for source, title in TITLES.items():
        names = {f"{one.source}: {one.name}" for one in instances() if one.source == source}
        cells = [title, str(len(names))]
        cells.append(_joined(_compiled(r, names, source_hash) for r in records if r["what"] == "compiled"))
        cells.append(_joined(_emulated(r, names, source_hash) for r in records if r["what"] == "run in the emulator"))
        cells.append(_joined(_on_device(r, source_hash) for r in records if r["what"] == "run on a device"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _joined(cells: Any) -> str:
    return "; ".join(cell for cell in cells if cell) or "no"


def _compiled(record: dict[str, Any], names: set[str], source_hash: str) -> str:
    count = len(names & set(record["instances"]))
    if not count:
        return ""
    most = max(record["instances"][name] for name in names & set(record["instances"]))
    architectures = ", ".join(record["architectures"])
    text = f"{count} for {architectures} ({record['compiler']}), no spills, {most} registers at most"
    return text + _age(record, source_hash)


def _emulated(record: dict[str, Any], names: set[str], source_hash: str) -> str:
    count = len(names & set(record["instances"]))
    return f"{count}, {record['schedules']} schedules{_age(record, source_hash)}" if count else ""


def _on_device(record: dict[str, Any], source_hash: str) -> str:
    suite = record["suite"]
    outcome = "all tests passed" if suite["returncode"] == 0 else f"{suite.get('failed', 'some')} tests failed"
    return f"{record['device']} at {record['commit']}: {outcome}{_age(record, source_hash)}"


def _age(record: dict[str, Any], source_hash: str) -> str:
    return "" if record["source_hash"] == source_hash else " (of earlier sources)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    records = [json.loads(file.read_text()) for file in sorted(options.results.glob("cuda_*.json"))]
    print(table(records, _loader.source_hash()))


if __name__ == "__main__":
    main()
