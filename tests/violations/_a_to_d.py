"""Violations of sections A to D of the contract: construction, input checks, batch norm, live attributes."""

from __future__ import annotations

from violations._violation import Violation

A_TO_D = [
    # A. Construction
    Violation(
        1,
        "instance norm is affine by default",
        "layers/instance_norm.py",
        "affine: bool = False",
        "affine: bool = True",
    ),
    Violation(
        1,
        "LayerNorm ignores dtype",
        "layers/layer_norm.py",
        "device=device, dtype=dtype)",
        "device=device, dtype=None)",
    ),
    Violation(
        2,
        "eps can be set once",
        "layers/module.py",
        "        else:\n            object.__setattr__(self, name, value)",
        '        elif name != "eps" or name not in self.__dict__:\n            object.__setattr__(self, name, value)',
    ),
    Violation(
        3,
        "SyncBatchNorm starts at the mean of U(0, 1)",
        "layers/sync_batch_norm.py",
        "        self.comm = comm\n        self._source",
        '        if affine:\n            self._fill("weight", 0.5)\n        self.comm = comm\n        self._source',
    ),
    Violation(3, "a LayerNorm without affine has a bias", "layers/layer_norm.py", "bias=affine and bias", "bias=bias"),
    Violation(4, "running variances start at zero", "layers/_running_stats.py", "xp.ones(shape", "xp.zeros(shape"),
    Violation(
        4,
        "the counter is an int32",
        "layers/_running_stats.py",
        "xp.zeros((), dtype=xp.int64",
        "xp.zeros((), dtype=xp.int32",
    ),
    Violation(
        5,
        "a reset leaves the counter",
        "layers/_running_stats.py",
        '("running_var", 1), ("num_batches_tracked", 0)',
        '("running_var", 1)',
    ),
    Violation(
        5,
        "a reset dies on a weight that is None",
        "layers/_affine.py",
        "if affine and self.weight is None:",
        "if affine and self.weight is None and self._buffers:",
    ),
    Violation(
        6, "eps may be negative", "_check.py", "math.isfinite(eps) and eps >= 0", "math.isfinite(eps) and eps > -1"
    ),
    Violation(
        6,
        "a zero variance with eps = 0 is divided by",
        "kernels/reference/moments.py",
        "zero = v == 0",
        "zero = v < 0",
    ),
    Violation(
        6,
        "num_features may be a bool",
        "_check.py",
        "    try:\n        number = integer(function, name, value)",
        "    try:\n        number = int(value) if value is True else integer(function, name, value)",
    ),
    Violation(
        7,
        "repr of LayerNorm leaves out eps",
        "layers/layer_norm.py",
        'f"{self.normalized_shape}, eps={self.eps}, elementwise',
        'f"{self.normalized_shape}, elementwise',
    ),
    # B. Input checks
    Violation(8, "BatchNorm1d takes 4 dimensions", "layers/batch_norm.py", "_ndims = (2, 3)", "_ndims = (2, 3, 4)"),
    Violation(
        9, "InstanceNorm2d takes 5 dimensions", "layers/instance_norm.py", "_ndims = (3, 4)", "_ndims = (3, 4, 5)"
    ),
    Violation(
        9,
        "an unbatched result keeps the axis of its batch",
        "layers/instance_norm.py",
        "return y[0, ...] if unbatched else y",
        "return y",
    ),
    Violation(
        10,
        "one value per channel is normalized by one process",
        "_check.py",
        "    if count == 1:",
        "    if count == 1 and ranks > 1:",
    ),
    Violation(
        11,
        "one spatial element is normalized in a batch of several",
        "_check.py",
        "if spatial == 1:",
        "if spatial == 1 and shape[0] == 1:",
    ),
    Violation(
        12,
        "channels need not be divisible by groups",
        "_check.py",
        "if num_channels % number:",
        "if num_channels < number:",
    ),
    Violation(
        12,
        "one value per group is refused for one sample, as torch does",
        "functional/group_norm.py",
        "    num_groups = _check.groups(function, num_groups, x.shape[axis])",
        "    num_groups = _check.groups(function, num_groups, x.shape[axis])\n"
        "    _check.more_than_one_value(x.size // num_groups, tuple(x.shape))",
    ),
    Violation(13, "an empty normalized_shape is taken", "_check.py", "    if not sizes:", "    if sizes is None:"),
    Violation(
        14,
        "channels are not counted without affine",
        "layers/_running_stats.py",
        "        _check.channels(type(self)",
        "        if self.affine:\n            _check.channels(type(self)",
    ),
    Violation(
        15,
        "a synchronized layer without channels is taken in eval",
        "layers/sync_batch_norm.py",
        "if self.num_features == 0:",
        "if self.num_features == 0 and self.training:",
    ),
    Violation(
        16,
        "memmaps are refused",
        "_check.py",
        "if type(value) is not np.ndarray and type(value) is not np.memmap:",
        "if type(value) is not np.ndarray:",
    ),
    Violation(
        16,
        "masks are ignored",
        "_check.py",
        "if type(value) is not np.ndarray and type(value) is not np.memmap:",
        "if isinstance(value, np.matrix):",
    ),
    # C. BatchNorm forward and buffers
    Violation(
        17,
        "buffers move in training without tracking",
        "layers/batch_norm.py",
        "self.training and self.track_running_stats and",
        "self.training and",
    ),
    Violation(
        17,
        "batch norm's running variance is the biased one",
        "functional/running_stats.py",
        "unbiased(var, count)",
        "(unbiased(var, count) if isinstance(cache, InstanceNormCache) else var)",
    ),
    Violation(
        18,
        "momentum=None moves no buffer",
        "layers/batch_norm.py",
        "if self._moves_running_stats():",
        "if self._moves_running_stats() and self.momentum is not None:",
    ),
    Violation(
        19,
        "the counter moves although the call fails",
        "layers/batch_norm.py",
        "        with refusal(comm):\n            frozen = self._check_call(x)",
        "        try:\n"
        "            frozen = self._check_call(x)\n"
        "        except Exception:\n"
        "            if self.num_batches_tracked is not None:\n"
        "                self.num_batches_tracked[...] += 1\n"
        "            raise",
    ),
    Violation(
        19,
        "the counter moves by two",
        "layers/_running_stats.py",
        "_array.assign(counter, counter + 1)",
        "_array.assign(counter, counter + (2 if self.momentum and not isinstance(cache, InstanceNormCache) else 1))",
    ),
    Violation(
        20,
        "eval of a layer whose tracking was switched off uses the batch",
        "layers/batch_norm.py",
        "frozen = has_running_stats and not self.training",
        "frozen = has_running_stats and not self.training and self.track_running_stats",
    ),
    Violation(
        21,
        "a running_mean alone is taken",
        "layers/_running_stats.py",
        "if any(missing) and not all(missing):",
        "if missing == [True, False]:",
    ),
    Violation(
        22,
        "a cumulative mean without a counter dies on None",
        "layers/_running_stats.py",
        "        elif self.momentum is None:",
        "        elif self.momentum == 2:",
    ),
    Violation(
        22,
        "the user's own running_mean is left behind",
        "layers/_running_stats.py",
        'buffers["running_mean"] = _array.assign(',
        'buffers["running_mean"] = (lambda old, new, *rest: new)(',
    ),
    Violation(
        23,
        "an empty batch is counted, as torch does",
        "layers/_running_stats.py",
        "        if is_empty(cache):\n",
        "        if is_empty(cache):\n            self.num_batches_tracked[...] += 1\n",
    ),
    Violation(
        24,
        "half() makes buffers half, as torch does",
        "layers/module.py",
        "dtype if is_parameter else _array.running_dtype(xp, dtype)",
        "dtype if is_parameter or any(array is b for b in self.buffers()) else _array.running_dtype(xp, dtype)",
    ),
    Violation(
        24,
        "a layer of dtype float16 has half buffers",
        "layers/_running_stats.py",
        "dtype = _array.running_dtype(xp, xp.float32 if dtype is None else dtype)",
        "dtype = xp.float32 if dtype is None else dtype",
    ),
    Violation(
        25,
        "backward in eval divides by the variance",
        "kernels/reference/batch_norm.py",
        "dx = _array.widen(dy) * rstd",
        "dx = _array.widen(dy) * rstd**2",
    ),
    Violation(
        25,
        "backward in training forgets the mean of dy",
        "kernels/reference/batch_norm.py",
        "dx = (_array.widen(dy) - mean_dy - x_hat",
        "dx = (_array.widen(dy) - x_hat",
    ),
    # D. Attributes changed after construction
    Violation(
        26,
        "affine switched off leaves weight and bias unused",
        "layers/batch_norm.py",
        "parameters = self.weight, self.bias",
        "parameters = (self.weight, self.bias) if self.affine else (None, None)",
    ),
    Violation(
        26,
        "conversion drops weight and bias by the flag, as torch does",
        "layers/sync_batch_norm.py",
        "layer = layer._recreated_as(cls)\n",
        "layer = layer._recreated_as(cls)\n"
        "                if not layer.affine:\n"
        "                    layer.weight = layer.bias = None\n",
    ),
    Violation(
        27,
        "instance norm moves buffers although tracking was switched off, as torch does",
        "layers/instance_norm.py",
        "self._has_running_stats() and self.track_running_stats",
        "self._has_running_stats()",
    ),
]
