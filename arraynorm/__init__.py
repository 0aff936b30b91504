"""arraynorm: normalization layers, forward and backward, on plain arrays.

`arraynorm.layers` are objects with parameters and running statistics, `arraynorm.functional` pure functions (both are
also here); `arraynorm.distributed` shares batch statistics over ranks; `arraynorm.testing` checks gradients.
"""

from importlib.metadata import version

from arraynorm import config, distributed, functional, layers, testing, typing
from arraynorm.config import *  # noqa: F403
from arraynorm.functional import *  # noqa: F403
from arraynorm.layers import *  # noqa: F403

__version__ = version("arraynorm")
__all__ = [
    "config",
    "distributed",
    "functional",
    "layers",
    "testing",
    "typing",
    *config.__all__,
    *functional.__all__,
    *layers.__all__,
]
