"""Records what torch gives for `grid.RECORDED`, for `test_recorded`. After a change to the cases, or for a new torch:

cd tests && python -m parity.record
"""

from __future__ import annotations

from parity import grid, recorded, torch_side
from parity.cases import name

if __name__ == "__main__":
    recorded.write(torch_side.version(), ((name(case), torch_side.results(case)) for case in grid.RECORDED))
    print(f"{len(grid.RECORDED)} cases in {recorded.PATH.name}, {recorded.PATH.stat().st_size / 1e3:.0f} kB")
