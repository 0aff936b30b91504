"""Layer objects: parameters, running statistics and caches around the functional API."""

from arraynorm.layers.batch_norm import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from arraynorm.layers.fused_batch_norm import FusedBatchNorm, FusedBatchNorm1d, FusedBatchNorm2d, FusedBatchNorm3d
from arraynorm.layers.group_norm import GroupNorm
from arraynorm.layers.instance_norm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from arraynorm.layers.layer_norm import LayerNorm
from arraynorm.layers.module import Module
from arraynorm.layers.no_grad import no_grad
from arraynorm.layers.quantized_batch_norm import (
    QuantizedBatchNorm2d,
    QuantizedBatchNorm3d,
    QuantizedBNReLU2d,
    QuantizedBNReLU3d,
)
from arraynorm.layers.rms_norm import RMSNorm
from arraynorm.layers.sequential import Sequential
from arraynorm.layers.sync_batch_norm import SyncBatchNorm, revert_sync_batchnorm

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "FusedBatchNorm",
    "FusedBatchNorm1d",
    "FusedBatchNorm2d",
    "FusedBatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "Module",
    "QuantizedBNReLU2d",
    "QuantizedBNReLU3d",
    "QuantizedBatchNorm2d",
    "QuantizedBatchNorm3d",
    "RMSNorm",
    "Sequential",
    "SyncBatchNorm",
    "no_grad",
    "revert_sync_batchnorm",
]
