"""Violations of sections E to K of the contract: state, conversion, ranks, the other layers, the module."""

from __future__ import annotations

from violations._violation import Violation

E_TO_K = [
    # E. State
    Violation(
        28,
        "loading replaces the layer's arrays",
        "layers/_state.py",
        "setattr(module, name, _array.assign(getattr(module, name), value))",
        "setattr(module, name, value)",
    ),
    Violation(
        28,
        "migrations are written to the caller's dict",
        "layers/_state.py",
        "state = dict(state_dict)",
        "state = state_dict",
    ),
    Violation(
        29, "a state of version 2 may lack its counters", "layers/_running_stats.py", "version < 2", "version < 3"
    ),
    Violation(29, "the state says version 1", "layers/_running_stats.py", "_version = 2", "_version = 1"),
    Violation(
        30,
        "an old state's untracked statistics are only unexpected keys",
        "layers/instance_norm.py",
        "if version is None and",
        "if version == 0 and",
    ),
    Violation(
        31,
        "missing keys are not told where there are other faults",
        "layers/_state.py",
        "if strict and missing:",
        "if strict and missing and not errors:",
    ),
    Violation(
        32,
        "the cache is pickled",
        "layers/module.py",
        'return {**self.__dict__, "_cache": None}',
        "return dict(self.__dict__)",
    ),
    Violation(
        32,
        "an unpickled layer trains with the world, whatever it had",
        "layers/_synchronized.py",
        "keeps = self._comm is None or self._comm is distributed.SELF",
        "keeps = True",
    ),
    # F. convert_sync_batchnorm and revert_sync_batchnorm
    Violation(
        33,
        "revert forgets the class",
        "layers/sync_batch_norm.py",
        "            source = layer._source\n            layer = ",
        "            source = BatchNorm\n            layer = ",
    ),
    Violation(
        33,
        "fused layers keep their communicator",
        "layers/sync_batch_norm.py",
        "FusedBatchNorm):\n                layer.comm = comm",
        "FusedBatchNorm):\n                pass",
    ),
    Violation(
        34,
        "a converted layer is in training",
        "layers/module.py",
        'new.__dict__["_cache"] = None',
        "new.__dict__.update(_cache=None, training=True)",
    ),
    Violation(
        34,
        "a converted layer loses its hooks, as torch does",
        "layers/module.py",
        'new.__dict__["_cache"] = None',
        "new.__dict__.update(_cache=None, _forward_hooks={})",
    ),
    # G. SyncBatchNorm
    Violation(
        35,
        "eval without buffers communicates, as torch 1.8 does",
        "layers/_synchronized.py",
        "        if not self.training:",
        "        if not self.training and self.track_running_stats:",
    ),
    Violation(
        35,
        "several ranks without mpi4py train each for itself",
        "distributed/_resolve.py",
        "    if size > 1:",
        "    if size > 2:",
    ),
    Violation(
        36,
        "the unbiased factor takes the rank's own n",
        "functional/running_stats.py",
        "mean, var, count = cache.mean, cache.var, cache.n",
        "mean, var, count = cache.mean, cache.var, cache.n\n"
        '    if getattr(cache, "comm", None) is not None:\n'
        "        count = max(cache.x.size // cache.mean.size, 2)",
    ),
    Violation(
        37,
        "a rank with one value refuses it before it asks the others",
        "functional/_statistics.py",
        "    count, mean, m2 = comm.merge",
        "    local_count(x3, ())\n    count, mean, m2 = comm.merge",
    ),
    Violation(
        38,
        "a rank without requires_grad skips the backward's collective",
        "layers/_synchronized.py",
        "        self._comm = comm\n",
        "        self._comm = comm\n"
        "        if not layer._requires_grad:\n"
        "            self.allreduce_sum = lambda a: a\n",
    ),
    Violation(
        38,
        "there is a dweight without a weight",
        "functional/_backward.py",
        "None if parameter is None else _array.store(",
        "_array.store(",
    ),
    Violation(
        39,
        "a forward sends its mean once more",
        "functional/_statistics.py",
        "    _check.more_than_one_value(count, (), comm.size)",
        "    comm.allreduce_sum(mean)\n    _check.more_than_one_value(count, (), comm.size)",
    ),
    # H. InstanceNorm
    Violation(
        40,
        "instance norm's running variance is the biased one",
        "functional/running_stats.py",
        "if isinstance(cache, InstanceNormCache):",
        "if isinstance(cache, InstanceNormCache) and (count := 1 << 60):",
    ),
    Violation(
        41,
        "instance norm never counts, as torch does",
        "layers/_running_stats.py",
        "        if counter is not None:\n            buffers",
        "        if counter is not None and not isinstance(cache, InstanceNormCache):\n            buffers",
    ),
    # I. Fused BatchNorm
    Violation(
        42,
        "the gradient at the kink is dy",
        "kernels/reference/batch_norm_add_relu.py",
        "pack_bits(y > 0)",
        "pack_bits(y >= 0)",
    ),
    # J. Quantized BatchNorm and BNReLU
    Violation(
        43,
        "the scale is not in the state",
        "layers/quantized_batch_norm.py",
        "namespace.full((), 1.0, dtype=namespace.float32, device=device))",
        "namespace.full((), 1.0, dtype=namespace.float32, device=device), False)",
    ),
    Violation(
        44,
        "ties are rounded up",
        "kernels/reference/quantized_batch_norm.py",
        "xp.round(v / scale)",
        "xp.floor(v / scale + 0.5)",
    ),
    Violation(
        45,
        "from_float drops the momentum, as torch does",
        "layers/quantized_batch_norm.py",
        "layer.eps, layer.momentum, axis",
        "layer.eps, axis",
    ),
    # K. Module
    Violation(
        46,
        "what a forward hook returns is dropped",
        "layers/module.py",
        "y = y if changed is None else changed",
        "y = y if changed is None else y",
    ),
    Violation(46, "backward does not use up the cache", "layers/_affine.py", "        self._cache = None\n", ""),
    Violation(46, "no_grad keeps caches", "layers/no_grad.py", "_grad_enabled.set(False)", "_grad_enabled.set(True)"),
]
