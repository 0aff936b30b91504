"""The functional API: pure functions on arrays.

`NAME_forward` returns (y, cache), `NAME_backward(dy, cache)` a NamedTuple of gradients, bare `NAME` y alone.
"""

from arraynorm.functional.batch_norm import (
    BatchNormCache,
    FrozenBatchNormCache,
    batch_norm,
    batch_norm_backward,
    batch_norm_forward,
    batch_norm_frozen,
    batch_norm_frozen_backward,
    batch_norm_frozen_forward,
)
from arraynorm.functional.batch_norm_add_relu import (
    BatchNormAddReluCache,
    FrozenBatchNormAddReluCache,
    batch_norm_add_relu,
    batch_norm_add_relu_backward,
    batch_norm_add_relu_forward,
    batch_norm_add_relu_frozen,
    batch_norm_add_relu_frozen_backward,
    batch_norm_add_relu_frozen_forward,
)
from arraynorm.functional.group_norm import GroupNormCache, group_norm, group_norm_backward, group_norm_forward
from arraynorm.functional.instance_norm import (
    InstanceNormCache,
    instance_norm,
    instance_norm_backward,
    instance_norm_forward,
)
from arraynorm.functional.layer_norm import LayerNormCache, layer_norm, layer_norm_backward, layer_norm_forward
from arraynorm.functional.quantized_batch_norm import quantized_batch_norm, quantized_batch_norm_relu
from arraynorm.functional.rms_norm import RMSNormCache, rms_norm, rms_norm_backward, rms_norm_forward
from arraynorm.functional.running_stats import update_running_stats

__all__ = [
    "BatchNormAddReluCache",
    "BatchNormCache",
    "FrozenBatchNormAddReluCache",
    "FrozenBatchNormCache",
    "GroupNormCache",
    "InstanceNormCache",
    "LayerNormCache",
    "RMSNormCache",
    "batch_norm",
    "batch_norm_add_relu",
    "batch_norm_add_relu_backward",
    "batch_norm_add_relu_forward",
    "batch_norm_add_relu_frozen",
    "batch_norm_add_relu_frozen_backward",
    "batch_norm_add_relu_frozen_forward",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_norm_frozen",
    "batch_norm_frozen_backward",
    "batch_norm_frozen_forward",
    "group_norm",
    "group_norm_backward",
    "group_norm_forward",
    "instance_norm",
    "instance_norm_backward",
    "instance_norm_forward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "quantized_batch_norm",
    "quantized_batch_norm_relu",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
    "update_running_stats",
]
