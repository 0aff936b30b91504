"""README's table of what each CUDA kernel has been through, from the records alone.

    python benchmarks/status.py [--results DIR] [--write README.md]

A record speaks for the sources that it names by hash; one of other sources is shown as such. What no record says was
run is not claimed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from arraynorm.kernels.cuda import _loader, instances

BEGIN, END = "<!-- made by benchmarks/status.py --write README.md -->", "<!-- end of what it made -->"
TITLES = {
    "row_norm.cu": "rows: layer, RMS; group, instance and batch norm on the chip",
    "batch_norm.cu": "batch norm; group and instance norm in parts",
    "batch_norm_add_relu.cu": "batch norm + add + ReLU",
    "quantized_batch_norm.cu": "quantized batch norm",
}


def table(records: list[dict[str, Any]], hashes: dict[str, str]) -> str:
    """Markdown: a row for each source, a cell for each thing that was done to all of its instances."""
    lines = ["| kernels | instances | compiled | run in the emulator | run on a GPU |", "|---|---|---|---|---|"]
    for source, title in TITLES.items():
        names = {f"{one.source}: {one.name}" for one in instances() if one.source == source}
        cells = [title, str(len(names))]
        for what, cell, nothing in (
            ("compiled", _compiled, "not compiled"),
            ("run in the emulator", _emulated, "not run in the emulator"),
            ("run on a device", _on_device, "not run on a GPU"),
        ):
            found = [cell(r, names, source) + _age(r, source, hashes) for r in records if _is_about(r, what, names)]
            cells.append("; ".join(found) or nothing)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _is_about(record: dict[str, Any], what: str, names: set[str]) -> bool:
    return record["what"] == what and not names.isdisjoint(record.get("instances", names))


def _compiled(record: dict[str, Any], names: set[str], source: str) -> str:
    known = names & set(record["instances"])
    most = max(record["instances"][name] for name in known)
    where = f"{', '.join(record['architectures'])} ({record['compilers'][source]})"
    return f"{len(known)} for {where}, no spills, {most} registers at most"


def _emulated(record: dict[str, Any], names: set[str], source: str) -> str:
    return f"{len(names & set(record['instances']))}, {record['schedules']} schedules"


def _on_device(record: dict[str, Any], names: set[str], source: str) -> str:
    suite = record.get("suite", {})
    outcome = {0: "all tests passed"}.get(suite.get("returncode"), f"{suite.get('failed', 'some')} tests failed")
    return f"{record['device']} at {record['commit']}: {outcome if suite else 'the tests were not run'}"


def _age(record: dict[str, Any], source: str, hashes: dict[str, str]) -> str:
    return "" if record["sources"].get(source) == hashes[source] else " (of earlier sources)"


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(results.glob("cuda_*.json"))]


def placed(text: str, made: str) -> str:
    """A text in which the table stands between BEGIN and END."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"there is no place for the table: {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--write", type=Path, help="put the table in its place in this file")
    options = parser.parse_args()
    made = table(read(options.results), _loader.source_hashes())
    if options.write:
        options.write.write_text(placed(options.write.read_text(), made))
    else:
        print(made)


if __name__ == "__main__":
    main()
