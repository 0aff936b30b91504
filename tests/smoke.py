"""A short walk through the installed package that needs nothing but its runtime dependencies; `.ci/run` takes it
in an environment that holds the wheel alone."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import numpy as np

import arraynorm as an
from arraynorm.testing import gradcheck, run_ranks

package = Path(an.__file__).parent
assert package.is_relative_to(sys.prefix), f"{package} is not the installed package"
assert (package / "py.typed").exists()
assert an.__version__ == importlib.metadata.version("arraynorm")
assert not any(importlib.util.find_spec(name) for name in ("torch", "mpi4py", "ml_dtypes", "pytest"))

rng = np.random.default_rng(0)
x, weight, bias = rng.standard_normal((4, 6, 5)), rng.standard_normal(6), rng.standard_normal(6)
for forward, backward in (
    (an.batch_norm_forward, an.batch_norm_backward),
    (an.instance_norm_forward, an.instance_norm_backward),
    (lambda *arrays: an.group_norm_forward(arrays[0], 2, *arrays[1:]), an.group_norm_backward),
):
    gradcheck(forward, backward, (x, weight, bias))
gradcheck(lambda x: an.layer_norm_forward(x, (6, 5)), an.layer_norm_backward, (x,))
gradcheck(lambda x: an.rms_norm_forward(x, 5), an.rms_norm_backward, (x,))

net = an.Sequential(an.BatchNorm1d(6), an.FusedBatchNorm1d(6), an.InstanceNorm1d(6), an.GroupNorm(3, 6))
assert net.backward(net(x)).shape == x.shape
net.load_state_dict(net.half().state_dict())

shards = x[:1], x[1:1], x[1:]
parts = run_ranks(3, lambda comm: an.batch_norm(shards[comm.rank], weight, bias, comm=comm))
assert np.allclose(np.concatenate(parts), an.batch_norm(x, weight, bias), rtol=0, atol=1e-12)

assert np.array_equal(an.SyncBatchNorm(6)(x), an.BatchNorm(6)(x))  # alone without mpi4py and without a launcher
print(f"arraynorm {an.__version__} with NumPy {np.__version__}: the smoke test passed")
