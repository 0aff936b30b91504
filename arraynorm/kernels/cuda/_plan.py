"""Plans: from a layout and a device to launches. Pure functions, cached; nothing here needs a GPU or CuPy.

How a reduction is cut depends on the layout and the device's size, never on timing: the same bits from run to run.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from arraynorm.kernels.cuda._instances import ITEM_BYTES, PARAMETER_SUMS, instance, widths
from arraynorm.kernels.cuda._loader import Device, Plan

Four = tuple[int, int, int, int]

_STRIDES = [(axis, np.int64) for axis in "nacb"]
GEOMETRY = np.dtype(
    [(name, np.int64) for name in ("N", "A", "C", "B", "K", "U", "parts", "size")]
    + [(name, np.int64) for name in ("team", "merge", "stash", "lanes", "blocks", "summed")]
    + [(array, np.dtype(_STRIDES)) for array in ("x", "dy", "y", "z")]
)
"""struct Geometry of geometry.cuh."""

SCRATCH_BYTES = 64 * 8  # of shared memory, for the sums of a block
# __launch_bounds__ of slab and row kernels: 128 registers a thread. Its second number, 1, keeps ptxas from spilling
# for the sake of more blocks at once.
MOST_THREADS = 512
TILE_THREADS = 256  # of kernels by tiles, which hold the constants of V channels in registers
PACKS_EACH = 4  # packs that a thread takes before a block grows
WAVES = 4  # blocks for each processor, of kernels that cut units into parts


class Layout(NamedTuple):
    """What plans are made for: arrays that are all seen as (N, A, C, B), see geometry.cuh."""

    dtype: str
    shape: Four
    strides: tuple[Four, Four | None, Four | None, Four | None]
    """In elements, of x, dy or addend, the output, and the second output; 0 along axes of one element."""
    alignment: int
    """The largest power of two, up to 16, that divides all the addresses in bytes."""


class Reduction(NamedTuple):
    """A launch that reduces, and the memory it needs."""

    plan: Plan
    parts: int
    partials: int
    """Doubles."""
    jobs: int
    """Zeros that count the blocks which have arrived; 0 where every job is one block."""


def by_tiles(layout: Layout) -> bool:
    """Whether channels are what lies side by side in x, as in NHWC."""
    _, _, channels, after = layout.shape
    step = layout.strides[0]
    return channels > 1 and step[2] == 1 and (after == 1 or step[3] != 1)


# -- row norms -------------------------------------------------------------------------------------------------


@lru_cache(4096)
def row_forward(layout: Layout, group: int, centered: bool, whole_block: bool, device: Device) -> Plan:
    """A team to each unit of `group` channels; `whole_block` for the bits of `moments`, which has no small teams."""
    width = slab_width(layout, group)
    packs = _unit(layout, group) // width
    units = layout.shape[0] * layout.shape[2] // group
    team, threads = _team(packs, whole_block)
    stash, shared = _stash(-(-packs // team), threads, width * ITEM_BYTES[layout.dtype], device)
    blocks = min(-(-units // (threads // team)), device.processors * 32)
    return Plan(
        instance("row_forward", layout.dtype, width, centered),
        *(blocks, threads, shared, _geometry(layout, group, group, team=team, stash=stash)),
    )


class RowBackward(NamedTuple):
    """The launches of a row norm's backward: dx with partial sums, then their sum; or means, then dx by columns."""

    first: Plan
    second: Plan
    partials: int
    """Doubles between the two."""


@lru_cache(4096)
def row_backward(layout: Layout, centered: bool, device: Device) -> RowBackward:
    """For x (rows, K), seen as (rows, 1, K, 1)."""
    rows, _, columns, _ = layout.shape
    width = slab_width(layout, columns)
    packs = columns // width
    team = _power_of_two(packs) if packs <= 32 else 32 * min(16, _power_of_two(-(-packs // 64)))
    threads = max(team, 128)
    depth = -(-packs // team)
    sums = depth * width * 2 * threads * 8
    if sums + SCRATCH_BYTES > device.shared_bytes:
        return _long_row_backward(layout, width, centered, device)
    stash, shared = _stash(depth, threads, 2 * width * ITEM_BYTES[layout.dtype], device, sums)
    # each block writes 16 bytes for a column: as many blocks as fill the device, and 8 rows at least to each
    resident = max(1, min(2048 // threads, device.shared_bytes // shared))
    blocks = max(1, min(device.processors * resident, rows // (8 * (threads // team))))
    geometry = _geometry(layout, columns, columns, team=team, stash=stash)
    first = Plan(instance("row_backward", layout.dtype, width, centered), blocks, threads, shared, geometry)
    return RowBackward(first, parameter_sums(columns), blocks * 2 * columns)


def _long_row_backward(layout: Layout, width: int, centered: bool, device: Device) -> RowBackward:
    rows, _, columns, _ = layout.shape
    geometry = _geometry(layout, columns, columns, team=MOST_THREADS)
    blocks = min(rows, device.processors * WAVES)
    means = instance("long_row_means", layout.dtype, width, centered)
    threads = 128
    if columns // (width * threads) < device.processors:  # rather more threads than wider loads
        width = 1
    dx = instance("long_row_dx", layout.dtype, width, centered)
    return RowBackward(
        Plan(means, blocks, MOST_THREADS, SCRATCH_BYTES, geometry),
        Plan(dx, -(-columns // (width * threads)), threads, 0, geometry),
        2 * rows,
    )


@lru_cache(4096)
def parameter_sums(columns: int) -> Plan:
    """The sums of two matrices' columns."""
    return Plan(PARAMETER_SUMS, -(-columns // 32), 256, 0, None)


# -- reductions ------------------------------------------------------------------------------------------------


def is_one_part(layout: Layout, group: int, arrays: int, device: Device) -> bool:
    """Whether a unit of `group` channels, of x or of x and dy, is for one block, which then can do all there is."""
    if by_tiles(layout):
        return False
    packs = _unit(layout, group) // slab_width(layout, group)
    return _cut(layout, group, packs, arrays, device)[0] == 1


@lru_cache(4096)
def moments(layout: Layout, group: int, device: Device) -> Reduction:
    """Mean and m2 of groups of `group` channels."""
    if by_tiles(layout):
        return _tile_reduction("moments", None, layout, group, 1, device)
    return _slab_reduction("moments", None, layout, group, group, 1, device)


@lru_cache(4096)
def products(layout: Layout, group: int, relu: bool, device: Device) -> Reduction:
    """Sums of dy and dy * x_hat, of each channel and of groups."""
    if by_tiles(layout):
        return _tile_reduction("products", relu, layout, group, 2, device)
    return _slab_reduction("products", relu, layout, group, 1, 2, device)


@lru_cache(4096)
def slab_backward(layout: Layout, whole_block: bool, device: Device) -> Plan:
    """dx and the sums, a team to each channel of a sample; `whole_block` for the bits of `products`."""
    width = slab_width(layout, 1)
    packs = _unit(layout, 1) // width
    units = layout.shape[0] * layout.shape[2]
    team, threads = _team(packs, whole_block)
    stash, shared = _stash(-(-packs // team), threads, 2 * width * ITEM_BYTES[layout.dtype], device)
    blocks = min(-(-units // (threads // team)), device.processors * 32)
    geometry = _geometry(layout, 1, 1, team=team, stash=stash)
    return Plan(instance("slab_backward", layout.dtype, width), blocks, threads, shared, geometry)


def _slab_reduction(
    template: str, relu: bool | None, layout: Layout, group: int, unit: int, arrays: int, device: Device
) -> Reduction:
    width = slab_width(layout, unit)
    packs = _unit(layout, unit) // width
    parts, size, threads = _cut(layout, unit, packs, arrays, device)
    units = layout.shape[0] * layout.shape[2] // unit
    merge = min(32, _power_of_two(group // unit * parts))
    geometry = _geometry(layout, group, unit, parts=parts, size=size, merge=merge)
    slab = instance(template, layout.dtype, width, relu, form="Slab")
    plan = Plan(slab, units * parts, threads, SCRATCH_BYTES, geometry)
    jobs = 0 if group // unit * parts == 1 else units * unit // group
    return Reduction(plan, parts, 2 * units * parts, jobs)


def _tile_reduction(
    template: str, relu: bool | None, layout: Layout, group: int, sums: int, device: Device
) -> Reduction:
    samples, before, channels, after = layout.shape
    width = _tile_width(layout)
    lanes, tiles = _tiles(channels, width)
    rows = before * after
    parts, size = _row_parts(rows, samples * tiles, TILE_THREADS // lanes, WAVES, device)
    merge = min(32, _power_of_two(group * parts))
    geometry = _geometry(layout, group, 1, parts=parts, size=size, merge=merge, lanes=lanes)
    tiled = instance(template, layout.dtype, width, relu, form="Tile")
    shared = sums * width * TILE_THREADS * 8
    plan = Plan(tiled, samples * tiles * parts, TILE_THREADS, shared, geometry)
    jobs, blocks = (samples * tiles, parts) if group == 1 else (samples, parts * tiles)
    return Reduction(plan, parts, 2 * samples * parts * channels, 0 if blocks == 1 else jobs)


# -- maps ------------------------------------------------------------------------------------------------------


@lru_cache(4096)
def apply(layout: Layout, group: int, relu: bool, device: Device) -> Plan:
    """y of given or computed statistics. A mask is written in bytes, which the elements of a thread group must fill."""
    if relu and not _fills_mask_bytes(layout):
        blocks = min(-(-prod(layout.shape) // TILE_THREADS), device.processors * 32)
        flat = instance("flat_apply_add_relu", layout.dtype)
        return Plan(flat, blocks, TILE_THREADS, 0, _geometry(layout, group, 1))
    return _map("apply", relu, layout, group, device)


@lru_cache(4096)
def dx(layout: Layout, group: int, relu: bool, gradients: int, device: Device) -> Plan:
    """dx; where `gradients` is the number of parts of the products, these are summed over parts and samples as well."""
    return _map("dx", relu, layout, group, device, gradients)


@lru_cache(4096)
def requantize(layout: Layout, device: Device) -> Plan:
    """8 bits to 8 bits."""
    return _map("requantize", None, layout, 1, device)


def _map(step: str, relu: bool | None, layout: Layout, group: int, device: Device, gradients: int = 0) -> Plan:
    samples, before, channels, after = layout.shape
    if by_tiles(layout):
        form, width = "Tile", _tile_width(layout)
        lanes, tiles = _tiles(channels, width)
        threads, units, rows = TILE_THREADS, samples * tiles, before * after
        parts, size = _row_parts(rows, units, threads // lanes, 2 * WAVES, device)
    else:
        form, width, lanes = "Slab", slab_width(layout, 1), 0
        packs, units = before * after // width, samples * channels
        threads = min(TILE_THREADS, _threads(packs))
        wanted = max(1, min(-(-2 * WAVES * device.processors // units), packs // (2 * threads)))
        parts, size = _parts(packs, wanted)
    blocks = units * parts
    geometry = _geometry(layout, group, 1, parts=parts, size=size, lanes=lanes, blocks=blocks, summed=gradients)
    more = -(-channels // 32) if gradients else 0
    return Plan(instance(step, layout.dtype, width, relu, form=form), blocks + more, threads, 0, geometry)


def _fills_mask_bytes(layout: Layout) -> bool:
    _, _, channels, after = layout.shape
    return channels % 8 == 0 and after == 1 if by_tiles(layout) else after % 8 == 0


# -- widths, teams, parts --------------------------------------------------------------------------------------


def _unit(layout: Layout, channels: int) -> int:
    """Elements of a unit (A, channels, B)."""
    _, before, _, after = layout.shape
    return before * channels * after


def slab_width(layout: Layout, unit: int) -> int:
    """The widest pack of a unit's runs: within one channel, or, where that is one element, over adjacent channels."""
    after = layout.shape[3]
    steps = [step for step in layout.strides if step is not None]
    if after > 1:
        run = after if all(b == 1 for *_, b in steps) else 1
        return _widest(layout, run, [(n, a, c) for n, a, c, _ in steps])
    run = unit if all(c == 1 for _, _, c, _ in steps) else 1
    return _widest(layout, run, [(n, a, c * unit) for n, a, c, _ in steps])


def _tile_width(layout: Layout) -> int:
    """The widest pack that divides the channels, where these are contiguous, and that every address allows."""
    steps = [step for step in layout.strides if step is not None]
    contiguous = all(c == 1 for _, _, c, _ in steps)
    return _widest(layout, layout.shape[2] if contiguous else 1, [(n, a, b) for n, a, _, b in steps])


def _widest(layout: Layout, run: int, apart: list[tuple[int, int, int]]) -> int:
    item = ITEM_BYTES[layout.dtype]
    for width in widths(layout.dtype):
        whole = run % width == 0 and all(step % width == 0 for steps in apart for step in steps)
        if whole and layout.alignment % (width * item) == 0:
            return width
    raise AssertionError  # a width of 1 always fits


def _power_of_two(n: int) -> int:
    """The smallest one that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def _threads(packs: int) -> int:
    """For packs that a block shares."""
    return 32 * min(MOST_THREADS // 32, _power_of_two(-(-packs // (32 * PACKS_EACH))))


def _team(packs: int, whole_block: bool) -> tuple[int, int]:
    """Threads that share a unit, and threads of a block."""
    if whole_block or packs > 32 * PACKS_EACH:
        return _threads(packs), _threads(packs)
    return min(32, _power_of_two(-(-packs // PACKS_EACH))), 128


def _stash(depth: int, threads: int, pack_bytes: int, device: Device, sums: int = 0) -> tuple[int, int]:
    """Packs that each thread keeps in shared memory, all or none, and the bytes for them, the sums and the scratch."""
    taken = SCRATCH_BYTES + sums
    wanted = taken + depth * threads * pack_bytes
    return (depth, wanted) if wanted <= device.shared_bytes else (0, taken)


def _cut(layout: Layout, unit: int, packs: int, arrays: int, device: Device) -> tuple[int, int, int]:
    """Parts of a unit, packs of a part, threads: one part where the unit fits on the chip or there are many units."""
    units = layout.shape[0] * layout.shape[2] // unit
    threads = _threads(packs)
    fits = arrays * _unit(layout, unit) * ITEM_BYTES[layout.dtype] + SCRATCH_BYTES <= device.shared_bytes
    enough = 2 * units >= device.processors or packs <= 8 * threads
    if (fits and enough) or units >= WAVES * device.processors:
        return 1, packs, threads
    wanted = min(-(-WAVES * device.processors // units), -(-packs // (PACKS_EACH * threads)))
    parts, size = _parts(packs, wanted)
    return parts, size, _threads(size)


def _parts(packs: int, wanted: int) -> tuple[int, int]:
    """About as many parts as wanted, each of a multiple of 32 packs: of whole bytes of a mask."""
    size = -(-packs // (32 * wanted)) * 32
    return -(-packs // size), size


def _tiles(channels: int, width: int) -> tuple[int, int]:
    """Threads side by side, and how many times they cover the channels."""
    lanes = min(32, _power_of_two(-(-channels // width)))
    return lanes, -(-channels // (lanes * width))


def _row_parts(rows: int, tiles: int, rows_at_once: int, waves: int, device: Device) -> tuple[int, int]:
    wanted = max(1, min(-(-waves * device.processors // tiles), rows // (PACKS_EACH * rows_at_once)))
    size = -(-rows // wanted)
    return -(-rows // size), size


def _geometry(
    layout: Layout,
    group: int,
    unit: int,
    *,
    parts: int = 1,
    size: int = 0,
    team: int = 0,
    merge: int = 1,
    stash: int = 0,
    lanes: int = 0,
    blocks: int = 0,
    summed: int = 0,
) -> np.ndarray[Any, Any]:
    """One struct Geometry: CuPy takes an array of one element as a struct by value."""
    strides = (step or (0, 0, 0, 0) for step in layout.strides)
    record = (*layout.shape, group, unit, parts, size, team, merge, stash, lanes, blocks, summed, *strides)
    return np.array([record], dtype=GEOMETRY)
