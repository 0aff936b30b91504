"""Tools for testing norms, and whatever else has a forward and a backward.

gradcheck(forward, backward, (x, weight, bias))     every element of every gradient, against differences in float64
gradcheck(layer, inputs=(x,))                       a layer: its inputs and all its parameters
check_vjp(forward, backward, (x, weight, bias))     a few random directions, for inputs of any size
run_ranks(4, function)                              synchronized code on simulated ranks, without MPI
"""

from arraynorm.distributed.threads import run_ranks
from arraynorm.testing._gradcheck import KinkWarning, check_vjp, gradcheck
from arraynorm.testing._operation import GradientError

__all__ = ["GradientError", "KinkWarning", "check_vjp", "gradcheck", "run_ranks"]
