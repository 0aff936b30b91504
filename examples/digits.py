"""What normalization buys: one network on 1,797 scans of digits, over norms, learning rates and initial scales.

    python examples/digits.py                         a table, demo-results/curves.png, demo-results/results.json
    python examples/digits.py --cupy                  the same on a GPU: pip install arraynorm[cuda13]
    mpiexec -n 2 python examples/digits.py --sync     batch norm over two processes: SyncBatchNorm against plain

Every setting gets the same network, data, batches and number of steps; only norm, learning rate and initial scale
differ. The layers that are no norms are NumPy, in digits_net.py; digits_report.py prints and draws. Needs
`pip install arraynorm[demo]`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import arraynorm as an
from arraynorm.distributed import SELF, allreduce_gradients, world
from arraynorm.typing import Communicator
from digits_net import Array, AvgPool2x2, Conv3x3, Dense, Flatten, ReLU, cross_entropy
from digits_report import (
    TRAINED,
    Comparison,
    Grid,
    Run,
    draw_curves,
    format_comparison,
    format_findings,
    format_table,
    write_json,
)

NORMS = ("batch", "layer", "group", "none")
FULL = Grid(NORMS, rates=(0.1, 0.3, 1.0), scales=(0.25, 0.5, 1.0, 2.0), epochs=4)
QUICK = Grid(NORMS, rates=(0.1, 1.0), scales=(0.25, 1.0), epochs=1)
BATCH_SIZE = 32
HELD_OUT = 500

SYNC_STEPS = 20
SYNC_RATE = 0.1
SYNC_RANKS = range(2, 5)  # of more, the last would have one scan, which plain batch norm refuses
SYNC_LIMIT = 1e-10  # rounding alone gives some 1e-15, the statistics of other batches 0.1 and more

# -- the network -----------------------------------------------------------------------------------------------


def norm_layer(norm: str, shape: tuple[int, ...]) -> an.Module | None:
    """The norm of samples of the given shape: (channels, height, width) or (features,)."""
    if norm == "batch":
        return an.BatchNorm2d(shape[0]) if len(shape) == 3 else an.BatchNorm1d(shape[0])
    if norm == "layer":
        return an.LayerNorm(shape)
    if norm == "group":
        return an.GroupNorm(4, shape[0])
    return None


def build_network(norm: str, scale: float, seed: int) -> an.Sequential:
    """Two convolutions and three dense layers, each with a norm and a ReLU, then a dense layer for the ten logits."""
    rng = np.random.default_rng(seed)
    init = {"scale": scale, "rng": rng, "bias": norm == "none"}  # a norm has a bias of its own

    def block(layer: an.Module, shape: tuple[int, ...]) -> an.Sequential:
        parts = {"linear": layer, "norm": norm_layer(norm, shape), "relu": ReLU()}
        return an.Sequential({name: part for name, part in parts.items() if part is not None})

    return an.Sequential(
        {
            "conv1": block(Conv3x3(1, 8, **init), (8, 8, 8)),
            "pool": AvgPool2x2(),
            "conv2": block(Conv3x3(8, 8, **init), (8, 4, 4)),
            "flatten": Flatten(),
            "dense1": block(Dense(128, 64, **init), (64,)),
            "dense2": block(Dense(64, 64, **init), (64,)),
            "dense3": block(Dense(64, 64, **init), (64,)),
            "logits": Dense(64, 10, scale=scale, rng=rng),
        }
    )


# -- data and training -----------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Standardized scans (N, 1, 8, 8) and the digits that they show (N,)."""

    x: Array
    y: Array
    x_held_out: Array
    y_held_out: Array


def load_data(seed: int) -> Data:
    """The scans that come with scikit-learn, split at random with every digit in proportion."""
    digits = load_digits()
    images = digits.images[:, None].astype(np.float32)
    x, x_held_out, y, y_held_out = train_test_split(
        images, digits.target, test_size=HELD_OUT, stratify=digits.target, random_state=seed
    )
    mean, std = x.mean(), x.std()
    return Data((x - mean) / std, y, (x_held_out - mean) / std, y_held_out)


def batches(samples: int, rng: np.random.Generator) -> Iterator[Array]:
    """The indices of the batches of one epoch."""
    order = rng.permutation(samples)
    return (order[start : start + BATCH_SIZE] for start in range(0, samples, BATCH_SIZE))


def train_step(
    network: an.Module, x: Array, y: Array, rate: float, batch_size: int, comm: Communicator = SELF
) -> float:
    """One step of SGD on the mean loss of a batch, of which (x, y) is this rank's part; the summed loss of the part."""
    network.zero_grad()
    loss, dlogits = cross_entropy(network(x), y)
    network.backward(dlogits / batch_size)
    if comm.size > 1:
        allreduce_gradients(network, comm)
    for _, parameter, gradient in network.named_gradients():
        parameter -= rate * gradient
    return loss


def accuracy(network: an.Module, x: Array, y: Array) -> float:
    """Per cent of right answers in eval mode, where batch norm uses its running statistics."""
    network.eval()
    with an.no_grad():
        answers = network(x).argmax(axis=1)
    network.train()
    return float(100 * np.sum(answers == y) / len(y))


def train(norm: str, rate: float, scale: float, data: Data, epochs: int, seed: int, library: Any = np) -> Run:
    """Train a network on arrays of `library`, from scratch; the learning rate falls linearly from `rate` to 0."""
    network = build_network(norm, scale, seed).to(library)
    data = Data(*map(library.asarray, data))
    rng = np.random.default_rng(seed)
    steps = -(-len(data.y) // BATCH_SIZE)
    curve, loss = [], 0.0
    with np.errstate(all="ignore"):  # a network that diverges overflows on its way
        for epoch in range(epochs):
            loss = 0.0
            for step, indices in enumerate(batches(len(data.y), rng), start=epoch * steps):
                batch = library.asarray(indices)
                now = rate * (1 - step / (epochs * steps))
                loss += train_step(network, data.x[batch], data.y[batch], now, len(batch))
            curve.append(accuracy(network, data.x_held_out, data.y_held_out))
    return Run(norm, rate, scale, curve, diverged=not np.isfinite(loss))


def run_grid(grid: Grid, out: Path, seed: int, library: Any) -> None:
    """Train every setting with every norm; print what came out, and write it to `out`."""
    data = load_data(seed)
    start = time.perf_counter()
    settings = list(itertools.product(grid.norms, grid.rates, grid.scales))
    bar = tqdm(settings, desc="training", unit="network")
    runs = [train(norm, rate, scale, data, grid.epochs, seed, library) for norm, rate, scale in bar]
    seconds = time.perf_counter() - start

    print(f"{len(runs)} networks trained on {len(data.y)} scans each (epochs: {grid.epochs}), in {seconds:.0f} s.")
    print(f"Per cent right of the {HELD_OUT} scans held out (div.: the loss is not finite any more):\n")
    print(format_table(grid, runs))
    print()
    print(format_findings(grid, runs))
    draw_curves(grid, runs, out / "curves.png")
    results = grid._asdict() | {"seed": seed, "trained": TRAINED, "runs": [run._asdict() for run in runs]}
    write_json(results, out / "results.json")
    print(f"\nLearning curves: {out / 'curves.png'}\nAll numbers: {out / 'results.json'}")


# -- the same training over MPI ranks --------------------------------------------------------------------------


def cuts(samples: int, ranks: int) -> Array:
    """Where a batch is cut, unevenly on purpose: 3/4 and 1/4 for two ranks; 5/9, 3/9 and 1/9 for three."""
    left = np.arange(ranks, -1, -1) / ranks
    return np.rint(samples * (1 - left**2)).astype(int)


def train_shards(network: an.Module, data: Data, comm: Communicator, seed: int) -> dict[str, Array]:
    """SYNC_STEPS steps in float64, each rank on its part of every batch: the parameters and buffers afterwards."""
    network.double()
    rng = np.random.default_rng(seed)
    for batch in itertools.islice(batches(len(data.y), rng), SYNC_STEPS):
        start, stop = cuts(len(batch), comm.size)[comm.rank :][:2]
        part = batch[start:stop]
        train_step(network, data.x[part].astype(np.float64), data.y[part], SYNC_RATE, len(batch), comm)
    return network.state_dict()


def difference(state: dict[str, Array], reference: dict[str, Array], comm: Communicator) -> float:
    """max |state - reference| / max |reference| of the worst parameter or buffer on the worst rank."""
    worst = np.zeros(comm.size)
    worst[comm.rank] = np.max([np.max(abs(state[name] - b)) / np.max(abs(b)) for name, b in reference.items()])
    return float(np.max(comm.allreduce_sum(worst)))  # a slot for each rank; unlike max(), np.max keeps a nan


def run_sync(comm: Communicator, out: Path, seed: int) -> bool:
    """Compare batch norm over the ranks with one process that has whole batches; whether SyncBatchNorm equals it."""
    data = load_data(seed)
    single, plain, sync = (build_network("batch", 1.0, seed) for _ in range(3))
    an.SyncBatchNorm.convert_sync_batchnorm(sync, comm)
    reference = train_shards(single, data, SELF, seed)
    sync_error = difference(train_shards(sync, data, comm, seed), reference, comm)
    plain_error = difference(train_shards(plain, data, comm, seed), reference, comm)
    parts = np.diff(cuts(BATCH_SIZE, comm.size)).tolist()
    comparison = Comparison(seed, parts, SYNC_STEPS, SYNC_LIMIT, sync_error, plain_error)
    if comm.rank == 0:
        print(format_comparison(comparison))
        write_json(comparison._asdict(), out / "sync.json")
    return comparison.sync_is_equal


def on_gpu() -> Any:
    """The module cupy, or a RuntimeError that says what is missing."""
    try:
        import cupy
    except ImportError:
        raise RuntimeError("CuPy is not installed; pip install arraynorm[cuda13] or arraynorm[cuda12]") from None
    if not cupy.cuda.is_available():
        raise RuntimeError("CuPy finds no CUDA device")
    return cupy


# -- the command line ------------------------------------------------------------------------------------------


def main() -> int:
    """0, or 1 if SyncBatchNorm is not what it should be; 2 for wrong options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="a small grid and one epoch, to see that everything works")
    mode.add_argument("--sync", action="store_true", help="compare batch norms over the ranks that mpiexec started")
    parser.add_argument("--cupy", action="store_true", help="train on the GPU")
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="folder for results (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the batches (%(default)s)")
    options = parser.parse_args()
    if not 0 <= options.seed < 2**32:
        parser.error("--seed must be >= 0 and < 2**32")
    if options.cupy and options.sync:
        parser.error("--cupy and --sync do not go together")
    try:
        library = on_gpu() if options.cupy else np
    except RuntimeError as error:
        parser.error(f"--cupy: {error}")
    comm = world() if options.sync else SELF
    if options.sync and comm.size not in SYNC_RANKS:
        parser.error(
            f"--sync takes {SYNC_RANKS[0]} to {SYNC_RANKS[-1]} MPI ranks, got {comm.size}; run: "
            f"mpiexec -n 2 python {sys.argv[0]} --sync"
        )
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    if options.sync:
        return 0 if run_sync(comm, options.out, options.seed) else 1
    run_grid(QUICK if options.quick else FULL, options.out, options.seed, library)
    return 0


if __name__ == "__main__":
    sys.exit(main())
