"""The CUDA kernels against torch on the same device, in one process, by turns.

    python benchmarks/bench_cuda.py [--json FILE] [--only TEXT] [--turns N]

A time is the median over the turns, of calls back to back on one stream that both libraries use. GB/s counts the bytes
of the model beside each case, over the bandwidth of the device's own copy measured in the same run; the model is what
the op cannot do without: forward 1 read and 1 write of x's size where a unit fits on the chip, else 2 reads and 1
write; backward 2 reads and 1 write, or 4 reads and 1 write. torch's batch norm is timed with cuDNN and without: the
faster one counts. Without torch, its columns are missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from math import prod
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

import arraynorm as an
from arraynorm import _array
from arraynorm.kernels import only
from arraynorm.kernels.cuda import _loader, _plan, _steps
from cuda_device import copy_bandwidth, cupy_with_a_device, description, interleaved


class Case(NamedTuple):
    """A norm of an array, as some network has it."""

    op: str
    shape: tuple[int, ...]
    options: dict[str, Any] = {}  # noqa: RUF012 (a NamedTuple's default; nobody writes to it)


_RESNET_50 = [(64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7)]
CASES = [
    *(Case("batch_norm", (n, c, s, s)) for n in (32, 256) for c, s in _RESNET_50),
    *(Case("batch_norm", (n, s, s, c), {"axis": -1}) for n in (32, 256) for c, s in _RESNET_50),
    Case("batch_norm", (256, 1024)),
    *(
        Case("layer_norm", (max(1, (1 << 26) // k), k), {"normalized_shape": k})
        for k in (256, 768, 1024, 4096, 8192, 16384, 65536)
    ),
    *(Case("rms_norm", (max(1, (1 << 26) // k), k), {"normalized_shape": k}) for k in (256, 1024, 4096, 16384, 65536)),
    *(Case(op, (1, 768), {"normalized_shape": 768}) for op in ("layer_norm", "rms_norm")),
    # the U-Net of a latent diffusion model, a batch of 8
    *(Case("group_norm", (8, c, s, s), {"num_groups": 32}) for c, s in ((320, 64), (640, 32), (1280, 16), (1280, 8))),
    # style transfer on images of 512 x 512
    *(Case("instance_norm", (4, c, s, s)) for c, s in ((32, 512), (64, 256), (128, 128))),
]
DTYPES = ("float32", "float16", "bfloat16")


class Arrays(NamedTuple):
    """CuPy's arrays, made once."""

    x: Any
    dy: Any
    weight: Any
    bias: Any


def draw(cupy: Any, case: Case, dtype: str) -> Arrays:
    """Of the host's random numbers, repeated: cupy.random needs a library more, and the host would need minutes."""
    size = case.options.get("normalized_shape", case.shape[case.options.get("axis", 1)])
    some = cupy.asarray(np.random.default_rng(0).standard_normal((1 << 20) + 7, dtype=np.float32))

    def normal(*shape: int) -> Any:
        values = cupy.resize(some, shape)
        if dtype == "bfloat16":  # by its bits: CuPy has no conversions of its own
            return (values.view(cupy.uint32) >> 16).astype(cupy.uint16).view(ml_dtypes.bfloat16)
        return values.astype(dtype, copy=False)

    dy = normal(prod(case.shape) + 1)[1:].copy().reshape(case.shape)  # not x again
    return Arrays(normal(*case.shape), dy, some[:size].copy(), some[size : 2 * size].copy())


def ours(case: Case, arrays: Arrays) -> dict[str, Callable[[], object]]:
    given = (arrays.weight,) if case.op == "rms_norm" else (arrays.weight, arrays.bias)
    forward, backward = (getattr(an, f"{case.op}_{way}") for way in ("forward", "backward"))
    options = {name: value for name, value in case.options.items() if name not in ("normalized_shape", "num_groups")}
    leading = tuple(case.options[name] for name in ("normalized_shape", "num_groups") if name in case.options)
    _, cache = forward(arrays.x, *leading, *given, **options)
    return {
        "forward": lambda: forward(arrays.x, *leading, *given, **options),
        "backward": lambda: backward(arrays.dy, cache),
    }


def torchs(torch: Any, case: Case, arrays: Arrays, cudnn: bool) -> dict[str, Callable[[], object]]:
    """torch's own op on the same memory (DLPack); its backward alone, over a graph that is kept."""
    torch.backends.cudnn.enabled = cudnn  # asked for at each forward; the graph remembers for the backward
    x, dy, weight, bias = (_as_tensor(torch, array) for array in arrays)
    functional = torch.nn.functional
    if case.options.get("axis") == -1:  # torch's NHWC: the memory order, under an NCHW shape
        x, dy = (a.permute(0, 3, 1, 2) for a in (x, dy))
    if case.op != "batch_norm":  # torch takes parameters of x's dtype alone
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    calls = {
        "batch_norm": lambda a: functional.batch_norm(a, None, None, weight, bias, training=True),
        "layer_norm": lambda a: functional.layer_norm(a, (case.shape[-1],), weight, bias),
        "rms_norm": lambda a: functional.rms_norm(a, (case.shape[-1],), weight),
        "group_norm": lambda a: functional.group_norm(a, 32, weight, bias),
        "instance_norm": lambda a: functional.instance_norm(a, None, None, weight, bias),
    }
    call = calls[case.op]
    leaf = x.detach().requires_grad_()
    for parameter in (weight, bias):
        parameter.requires_grad_()
    y = call(leaf)
    wanted = [leaf, weight] if case.op == "rms_norm" else [leaf, weight, bias]

    def forward() -> object:
        torch.backends.cudnn.enabled = cudnn
        with torch.no_grad():
            return call(x)

    return {"forward": forward, "backward": lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)}


def _as_tensor(torch: Any, array: Any) -> Any:
    if _array.dtype_name(array.dtype) == "bfloat16":  # DLPack of CuPy has none
        return torch.from_dlpack(array.view("int16")).view(torch.bfloat16)
    return torch.from_dlpack(array)


def model(case: Case, arrays: Arrays) -> dict[str, int]:
    """Bytes that each way cannot do without."""
    device = _loader.device_of(arrays.x)
    if case.op in ("layer_norm", "rms_norm"):
        row = case.shape[-1] * arrays.x.itemsize
        once = {"forward": row <= device.shared_bytes, "backward": 2 * row <= device.shared_bytes}
    else:
        axis = case.options.get("axis", 1) % len(case.shape)
        view = _steps.channels if case.op == "batch_norm" else _steps.samples
        split = _array.channel_view if case.op == "batch_norm" else _array.sample_view
        x = arrays.x.reshape(split(case.shape, axis))
        group = case.shape[axis] // case.options.get("num_groups", case.shape[axis])
        layouts = [_steps.layout(view, x, second) for second in (None, x)]
        once = {"forward": _plan.is_one_part(layouts[0], group, 1, device)}
        once["backward"] = group == 1 and _plan.is_one_part(layouts[1], 1, 2, device)
    size = prod(case.shape) * arrays.x.itemsize
    return {
        "forward": size * (2 if once["forward"] else 3),
        "backward": size * (3 if once["backward"] else 5),
    }


def measure(cupy: Any, torch: Any, case: Case, dtype: str, bandwidth: float, turns: int) -> list[dict[str, Any]]:
    arrays = draw(cupy, case, dtype)
    stream = cupy.cuda.get_current_stream()
    rows = []
    mine, bytes_ = ours(case, arrays), model(case, arrays)
    kinds = {"cuDNN": True, "native": False} if case.op == "batch_norm" else {"torch": True}
    peers = {kind: torchs(torch, case, arrays, cudnn) for kind, cudnn in kinds.items()} if torch else {}
    for way in ("forward", "backward"):
        calls = {"ours": mine[way]} | {kind: peer[way] for kind, peer in peers.items()}
        seconds = interleaved(calls, stream, cupy.cuda.Event, turns)
        row = {"op": case.op, "shape": case.shape, "options": case.options, "dtype": dtype, "way": way}
        row |= {"ours us": 1e6 * seconds["ours"], "model bytes": bytes_[way]}
        row["fraction of copy"] = bytes_[way] / seconds["ours"] / bandwidth
        if peers:
            best = min(peers, key=seconds.__getitem__)
            row |= {"torch us": 1e6 * seconds[best], "torch is": best, "torch / ours": seconds[best] / seconds["ours"]}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the record there")
    parser.add_argument("--only", default="", help="cases whose description contains this")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    cupy = cupy_with_a_device()
    torch = _torch()
    stream = cupy.cuda.Stream(non_blocking=True)
    rows = []
    with stream, only("specialised"), _on_torch_too(torch, stream):
        bandwidth = copy_bandwidth(cupy, stream, options.turns)
        record = {"what": "measured"} | description(cupy) | {"copy GB/s": bandwidth / 1e9}
        print(f"{record['device']}: copies {bandwidth / 1e9:.0f} GB/s, read and written")
        for case in CASES:
            for dtype in DTYPES:
                text = f"{case.op} {case.shape} {case.options} {dtype}"
                if options.only in text:
                    try:
                        new = measure(cupy, torch, case, dtype, bandwidth, options.turns)
                    except _out_of_memory(cupy, torch):
                        print(f"{text}: not run, not enough memory", flush=True)
                        continue
                    finally:
                        _give_back_memory(cupy, torch)
                    rows += new
                    for row in new:
                        ratio = f", torch x {row['torch / ours']:.2f}" if torch else ""
                        share = f"{100 * row['fraction of copy']:.0f} % of copy"
                        print(f"{text} {row['way']}: {row['ours us']:.1f} us, {share}{ratio}", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(record | {"rows": rows}, file, indent=1)


def _torch() -> Any:
    """torch with a device, or None."""
    try:
        import torch
    except ImportError:
        print("torch is not installed: ours alone")
        return None
    if not torch.cuda.is_available():
        print("this torch has no CUDA device: ours alone")
        return None
    return torch


def _out_of_memory(cupy: Any, torch: Any) -> tuple[type[Exception], ...]:
    return (cupy.cuda.memory.OutOfMemoryError, *((torch.OutOfMemoryError,) if torch else ()))


def _give_back_memory(cupy: Any, torch: Any) -> None:
    """What one library's pool keeps, the other cannot have."""
    cupy.get_default_memory_pool().free_all_blocks()
    if torch:
        torch.cuda.empty_cache()


def _on_torch_too(torch: Any, stream: Any) -> Any:
    """torch works on our stream, so that events between calls time both."""
    return torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)) if torch else nullcontext()


if __name__ == "__main__":
    main()
