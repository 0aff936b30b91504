"""Running statistics from the cache of a forward."""

from __future__ import annotations

from typing import get_args

from arraynorm import _array, _check
from arraynorm.functional.batch_norm import BatchNormCache
from arraynorm.functional.batch_norm_add_relu import BatchNormAddReluCache
from arraynorm.functional.instance_norm import InstanceNormCache
from arraynorm.kernels.reference.moments import mean_over
from arraynorm.kernels.reference.running_stats import exponential_average, unbiased
from arraynorm.typing import Array

Cache = BatchNormCache | BatchNormAddReluCache | InstanceNormCache


def update_running_stats(
    running_mean: Array,
    running_var: Array,
    cache: Cache,
    *,
    momentum: float = 0.1,
) -> tuple[Array, Array]:
    """Running statistics after one more batch: new = (1 - momentum) * old + momentum * batch.

    The batch's variance enters **unbiased**, n / (n - 1) times the one that normalized, and `momentum` weighs the
    **new** value, as in torch; Keras, Flax, Chainer and ONNX mean otherwise by the word.

    Parameters
    ----------
    running_mean, running_var : array (C,), float16, bfloat16, float32 or float64
    cache : what `batch_norm_forward`, `batch_norm_add_relu_forward` or `instance_norm_forward` returned
        Of an instance norm's statistics the mean over the samples is taken.
    momentum : float in [0, 1]

    Returns
    -------
    running_mean, running_var : new arrays in the dtypes of the old ones
        Equal to them where the batch was empty. The computation is in float64.

    Raises
    ------
    ValueError, TypeError
        A wrong shape, dtype, library or momentum; something that is no such cache.
    """
    function = "update_running_stats"
    _check.cache_of(function, cache, *get_args(Cache))
    for name, value in (("running_mean", running_mean), ("running_var", running_var)):
        _check.companion(function, cache.mean, name, value, (cache.mean.shape[-1],))
    momentum = _check.momentum(function, momentum)
    mean, var, count = cache.mean, cache.var, cache.n
    if is_empty(cache):  # nothing to add; any count that Bessel's correction accepts will do
        momentum, count = 0.0, 2
    with _array.silent():
        if isinstance(cache, InstanceNormCache):
            xp = _array.array_namespace(mean)
            mean, var = (xp.reshape(mean_over(s, (0,)), (-1,)) for s in (mean, var))
        var = unbiased(var, count)
    return exponential_average(running_mean, mean, momentum), exponential_average(running_var, var, momentum)


def is_empty(cache: Cache) -> bool:
    """Whether the forward saw no values (over all ranks), so that there is nothing to average."""
    return cache.n == 0 or (isinstance(cache, InstanceNormCache) and cache.mean.shape[0] == 0)
